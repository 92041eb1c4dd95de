"""`zo-peft reproduce`: a row of the tables of arXiv:2601.04710, with the published settings."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from transformers.hf_argparser import HfArg

from zo_peft.data.tasks import TASKS
from zo_peft.errors import UserError
from zo_peft.models.hub import public_name
from zo_peft.runs import jobs
from zo_peft.runs.texts import text
from zo_peft.train.checks import Preset
from zo_peft.train.results import write_json

RESULT_NAME, TABLE_NAME = "reproduction.json", "reproduction.md"

Kind = Literal["full", "LoRA", "prefix"]
KINDS: dict[str, Kind] = {"LORA": "LoRA", "PREFIX_TUNING": "prefix"}

#: For each kind: options, zo_eps, and the learning rates that are tried (MeZO, arXiv:2305.17333,
#: appendix on hyperparameters).
MEZO: dict[Kind, tuple[dict[str, Any], float, tuple[float, ...]]] = {
    "full": ({"tune": "weights"}, 1e-3, (1e-6, 1e-7)),
    "LoRA": ({"peft_type": "LORA", "lora_r": 8, "lora_alpha": 16}, 1e-2, (1e-4, 5e-5)),
    "prefix": ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5}, 1e-1, (1e-2, 1e-3)),
}
#: What is different for GV and Greedy. The learning rates, for full weights only, are those of OPT
#: and of Llama.
GUIDED_FULL_RATES = (2e-7, 5e-7)
GUIDED = {"num_candidates": 2, "max_steps": 10_000}

#: Options of every published run. It is evaluated five times, and the best checkpoint is kept.
COMMON: dict[str, Any] = {
    "dtype": "float16",
    "per_device_train_batch_size": 16,
    "max_steps": 20_000,
    "eval_strategy": "steps",
    "eval_steps": 0.2,
    "save_strategy": "steps",
    "save_steps": 0.2,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
}

#: arXiv:2601.04710, Table V, OPT-13B: for each method and kind a value for each of `TASKS`.
TABLE_V: dict[tuple[str, Kind], tuple[float, ...]] = {
    ("MeZO", "full"): (91.4, 66.1, 67.9, 67.6, 63.5, 61.1, 60.1, 88.0, 81.7, 84.7, 30.9),
    ("MeZO", "LoRA"): (89.6, 67.9, 66.1, 73.8, 64.4, 59.7, 61.5, 84.0, 81.2, 83.8, 31.4),
    ("MeZO", "prefix"): (90.7, 70.8, 69.6, 73.1, 60.6, 59.9, 63.7, 87.0, 81.4, 84.2, 28.9),
    ("MeZO-GV", "full"): (93.9, 73.5, 71.6, 72.5, 65.4, 61.4, 62.5, 89.0, 82.9, 84.9, 31.7),
    ("MeZO-GV", "LoRA"): (91.6, 72.6, 72.8, 75.6, 66.3, 60.9, 61.9, 89.0, 82.9, 84.9, 32.7),
    ("MeZO-GV", "prefix"): (92.4, 74.8, 73.2, 76.6, 63.5, 61.8, 64.4, 90.0, 82.7, 84.3, 30.9),
    ("SubZero-GV", "full"): (94.7, 74.8, 73.9, 76.8, 64.4, 62.7, 63.2, 89.0, 83.1, 84.9, 31.3),
    ("SubZero-GV", "LoRA"): (94.0, 75.8, 73.8, 77.6, 65.4, 63.9, 64.1, 90.0, 83.8, 85.3, 32.4),
}
#: Table IX, OPT-13B with Greedy: for each kind the values of some tasks.
TABLE_IX: dict[Kind, dict[str, float]] = {
    "full": {"wic": 61.9, "rte": 72.2, "boolq": 72.6},
    "LoRA": {"wic": 62.7, "rte": 75.8, "boolq": 75.9},
}
METHODS: dict[str, str] = {
    "mezo": "MeZO",
    "paper-gv": "MeZO-GV",
    "paper-greedy": "MeZO-Greedy",
    "subzero": "SubZero",
    "lozo": "LOZO",
}


@dataclass
class ReproduceArguments:
    """The row of the table. All other options are those of `zo-peft train`."""

    model_name_or_path: str = HfArg(help="Base model: Hub id or folder.")
    task: str = HfArg(help=f"One of {', '.join(TASKS)}.")
    preset: Preset = HfArg(default="paper-gv", help="The method: paper-gv, paper-greedy, mezo, ...")
    peft_type: Literal["LORA", "PREFIX_TUNING"] | None = HfArg(
        default=None, help="The adapter. Default: none, full weights."
    )
    low_rank_noise: Literal["subzero", "lozo"] | None = HfArg(
        default=None, help="With paper-gv, subzero gives the rows of SubZero-GV."
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="Seeds.")
    output_dir: str = HfArg(
        default="zo_peft_reproduce", help="Folder of the table and of each run."
    )

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"task={self.task!r} is not known; use one of {', '.join(TASKS)}")

    @property
    def kind(self) -> Kind:
        """What is tuned, in the words of the table."""
        return "full" if self.peft_type is None else KINDS[self.peft_type]

    @property
    def method(self) -> str:
        """The method, in the words of the table."""
        if self.preset == "paper-gv" and self.low_rank_noise is not None:
            return f"{METHODS[self.low_rank_noise]}-GV"
        return METHODS[self.preset]


def settings(given: ReproduceArguments) -> tuple[dict[str, Any], tuple[float, ...]]:
    """The published options of `zo-peft train`, and the learning rates to try."""
    own, eps, rates = MEZO[given.kind]
    if given.preset in ("paper-gv", "paper-greedy"):
        own = own | GUIDED
        rates = GUIDED_FULL_RATES if given.kind == "full" else rates
    chosen = {
        "model_name_or_path": given.model_name_or_path,
        "task": given.task,
        "preset": given.preset,
        "low_rank_noise": given.low_rank_noise,
        "zo_eps": eps,
        "metric_for_best_model": "f1" if TASKS[given.task].rewards else "accuracy",
    }
    return COMMON | own | chosen, rates


def reproduce(given: ReproduceArguments, options: list[str]) -> dict[str, Any]:
    """Try each learning rate with the first seed, and then the best one with all other seeds.

    Which is best is decided on validation examples. Runs that are there are not made again.

    Args:
        options: further options of `zo-peft train`, which replace published ones.

    Returns:
        The contents of `reproduction.json`. Beside it, `reproduction.md` is the table.

    Raises:
        UserError: the runs of all learning rates fail, or a run with another seed.
    """
    folder = Path(given.output_dir)
    published, rates = settings(given)

    def run(rate: float, seed: int) -> dict[str, Any]:
        own = jobs.flags({**published, "learning_rate": rate, "seed": seed})
        return jobs.train(folder / f"lr-{rate:g}-seed-{seed}", [*own, *options])

    first, *others = given.seeds
    grid: dict[float, dict[str, Any]] = {}
    failed: list[UserError] = []
    for rate in rates:
        try:
            grid[rate] = run(rate, first)
        except UserError as error:
            failed.append(error)
    if not grid:
        raise failed[0]
    best = max(grid, key=lambda rate: grid[rate]["metric_dev"])
    runs = [grid[best], *(run(best, seed) for seed in others)]
    result = {
        "task": given.task,
        "method": f"{given.method} ({given.kind})",
        "model": public_name(given.model_name_or_path),
        "learning_rate": best,
        "grid": {f"{rate:g}": found["metric_dev"] for rate, found in grid.items()},
        "metric_name": runs[0]["metric_name"],
        "metrics": [found["metric_after"] for found in runs],
        "seeds": given.seeds,
        "forward_passes": runs[0]["forward_passes"],
        "wall_seconds": mean(found["wall_seconds"] for found in runs),
        "peak_memory_bytes": max(found["peak_memory_bytes"] for found in runs),
        "published": figure(given.method, given.kind, given.task),
    }
    write_json(folder / RESULT_NAME, result)
    (folder / TABLE_NAME).write_text(text("reproduce", result) + "\n")
    return result


def figure(method: str, kind: Kind, task: str) -> str | None:
    """The published figure in percent with its model and table, if there is one."""
    table, row = "V", dict(zip(TASKS, TABLE_V.get((method, kind), ())))
    if method == "MeZO-Greedy":
        table, row = "IX", TABLE_IX.get(kind, {})
    return f"{row[task]} (OPT-13B, Table {table})" if task in row else None
