"""`zo-peft reproduce`: a row of the tables of arXiv:2601.04710, with the published settings."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import yaml
from transformers.hf_argparser import HfArg

from zo_peft.data.tasks import TASKS
from zo_peft.errors import UserError
from zo_peft.models.hub import public_name
from zo_peft.runs import jobs, run
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.runs.options import parse
from zo_peft.runs.texts import text
from zo_peft.train.checks import Preset
from zo_peft.train.config import ZOConfig
from zo_peft.train.results import write_json

RESULT_NAME, TABLE_NAME = "reproduction.json", "reproduction.md"

#: The model of the published tables, and settings that no result depends on in the mean.
MODEL, FREE = "opt-13b", ("seed", "task_data_dir")

#: Arguments that are of all runs together.
OF_SEVERAL_RUNS = ("seeds", "output_dir")

PUBLISHED: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_bytes())


@dataclass
class ReproduceArguments:
    """The row of the table. All other options are those of `zo-peft train`."""

    model_name_or_path: str = HfArg(help="Base model: Hub id or folder.")
    task: str = HfArg(help="The benchmark.", metadata={"choices": [*TASKS]})
    preset: Preset = HfArg(default="paper-gv", help="paper-gv, paper-greedy, mezo, subzero, lozo.")
    peft_type: Literal["LORA", "PREFIX_TUNING"] | None = HfArg(
        default=None, help="The adapter. Default: none, full weights."
    )
    low_rank_noise: Literal["subzero", "lozo"] | None = HfArg(
        default=None, help="With paper-gv, subzero gives the rows of SubZero-GV."
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="Seeds.")
    output_dir: str = HfArg(default="zo_peft_reproduce", help="Folder of the table and each run.")

    @property
    def row(self) -> str:
        """The row of the table: the method, and what is tuned."""
        methods = PUBLISHED["methods"]
        method = methods[self.preset]["name"]
        if self.preset == "paper-gv" and self.low_rank_noise is not None:
            method = f"{methods[self.low_rank_noise]['name']}-GV"
        return f"{method} ({PUBLISHED['kinds'][self.peft_type]['name']})"


def settings(given: ReproduceArguments) -> tuple[dict[str, Any], list[float]]:
    """The published options of `zo-peft train`, and the learning rates to try."""
    kind, method = PUBLISHED["kinds"][given.peft_type], PUBLISHED["methods"][given.preset]
    own = {name: value for name, value in vars(given).items() if name not in OF_SEVERAL_RUNS}
    own["metric_for_best_model"] = "f1" if TASKS[given.task].rewards else "accuracy"
    rates = kind["learning_rates"]
    if given.peft_type is None:
        rates = method.get("full_learning_rates", rates)
    return PUBLISHED["common"] | kind["options"] | method.get("options", {}) | own, rates


def reproduce(given: ReproduceArguments, options: list[str]) -> dict[str, Any]:
    """Try each learning rate with the first seed, and then the best one with all other seeds.

    Which is best is decided on validation examples. Runs that are there are not made again. Further
    `options` of `zo-peft train` replace published ones.

    Returns the contents of `reproduction.json`. Beside it, `reproduction.md` is the table. A
    UserError says that the runs of all learning rates fail, or a run with another seed.
    """
    if fixed := {"--learning_rate", "--seed"} & {word.partition("=")[0] for word in options}:
        raise UserError(f"{min(fixed)} is of one run; here are the published rates, and --seeds")
    folder = Path(given.output_dir)
    published, rates = settings(given)

    def attempt(rate: float, seed: int) -> dict[str, Any]:
        own = jobs.flags({**published, "learning_rate": rate, "seed": seed})
        return jobs.train(folder / f"lr-{rate:g}-seed-{seed}", [*own, *options])

    first, *others = given.seeds
    grid: dict[float, dict[str, Any]] = {}
    failed: list[UserError] = []
    for rate in rates:
        try:
            grid[rate] = attempt(rate, first)
        except UserError as error:
            failed.append(error)
    if not grid:
        raise failed[0]
    best = max(grid, key=lambda rate: grid[rate]["metric_dev"])
    runs = [grid[best], *(attempt(best, seed) for seed in others)]
    result = {
        "task": given.task,
        "method": given.row,
        "model": public_name(given.model_name_or_path),
        "learning_rate": best,
        "grid": {f"{rate:g}": found["metric_dev"] for rate, found in grid.items()},
        "metric_name": runs[0]["metric_name"],
        "metrics": [found["metric_after"] for found in runs],
        "seeds": given.seeds,
        "forward_passes": runs[0]["forward_passes"],
        "wall_seconds": mean(found["wall_seconds"] for found in runs),
        "peak_memory_bytes": max(found["peak_memory_bytes"] for found in runs),
        "published": figure(given.row, given.task),
        "differences": differences(published | {"learning_rate": best}, runs[0]["settings"]),
    }
    write_json(folder / RESULT_NAME, result)
    (folder / TABLE_NAME).write_text(text("reproduce", result) + "\n")
    return result


def differences(published: dict[str, Any], found: dict[str, Any]) -> dict[str, list[Any]]:
    """The settings of a run that are not the published ones: by name, the run's and theirs.

    Args:
        published: the published options of `zo-peft train`.
        found: the `settings` of the run's `zo_metrics.json`.
    """
    kinds = ModelArguments, DataArguments, ZOConfig
    theirs = run.settings(*parse("train", kinds, jobs.flags(published))[1])
    model = found["model_name_or_path"]
    theirs["model_name_or_path"] = model if model.rpartition("/")[2].lower() == MODEL else MODEL
    return {
        name: [found.get(name), theirs.get(name)]
        for name in sorted(found.keys() | theirs.keys())
        if found.get(name) != theirs.get(name) and name not in FREE
    }


def figure(row: str, task: str) -> str | None:
    """The published figure in percent with its model and table, if there is one."""
    for name, rows in PUBLISHED["tables"].items():
        if task in rows.get(row, {}):
            return f"{rows[row][task]} (OPT-13B, Table {name})"
    return None
