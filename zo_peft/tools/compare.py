"""`zo-peft compare`: train with several strategies on the same budget of forward passes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from zo_peft.core.strategies import STRATEGIES
from zo_peft.errors import UserError
from zo_peft.runs import jobs
from zo_peft.tools.charts import draw
from zo_peft.tools.history import load
from zo_peft.train.checks import GRADIENT, PRESETS
from zo_peft.train.results import write_json

RESULT_NAME, PLOT_NAME = "comparison.json", "comparison.png"


@dataclass
class CompareArguments:
    """What is compared; all further options are those of `zo-peft train`."""

    max_forward_passes: int = HfArg(
        help="The budget of each; a backward pass counts as two forward passes."
    )
    strategies: list[str] = HfArg(
        default_factory=lambda: ["mezo", "greedy", "gv", "adam"],
        help="Strategies of zo-peft train, adam and sgd with gradients; or presets.",
    )
    output_dir: str = HfArg(default="zo_peft_compare", help="Folder of the result and of each run.")


def compare(given: CompareArguments, options: list[str]) -> dict[str, Any]:
    """Train with each strategy in a process of its own, on the same data with the same budget.

    Beside the result, `output_dir` gets a folder for each run and `comparison.png`, the chart of
    losses that `zo-peft report` draws. A run that is there already is not made again.

    Args:
        options: of `zo-peft train`, for all runs.

    Returns:
        The contents of `comparison.json`: by strategy, its `zo_metrics.json`.

    Raises:
        UserError: a strategy is not known, or a run fails.
    """
    known = (*STRATEGIES, *GRADIENT)
    for name in given.strategies:
        if name not in known and name not in PRESETS:
            expected = ", ".join([*known, *PRESETS])
            raise UserError(f"strategy {name!r} is not known; use some of {expected}")
    folder = Path(given.output_dir)
    result: dict[str, Any] = {}
    for name in given.strategies:
        kind = "strategy" if name in known else "preset"
        own = jobs.flags({kind: name, "max_forward_passes": given.max_forward_passes})
        result[name] = jobs.train(folder / name, [*options, *own])
    write_json(folder / RESULT_NAME, result)
    runs = [load(folder / name, name) for name in result]
    draw(runs)["loss"].savefig(folder / PLOT_NAME, dpi=110)
    return result
