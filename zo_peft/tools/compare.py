"""`zo-peft compare`: train with several strategies on the same budget of forward passes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from transformers import TrainerState
from transformers.hf_argparser import HfArg
from transformers.trainer import TRAINER_STATE_NAME

from zo_peft.core.strategies import STRATEGIES
from zo_peft.errors import UserError
from zo_peft.runs import jobs
from zo_peft.train.checks import GRADIENT, GUIDED, PRESETS
from zo_peft.train.results import write_json

RESULT_NAME, PLOT_NAME = "comparison.json", "comparison.png"


@dataclass
class CompareArguments:
    """What is compared; all further options are those of `zo-peft train`."""

    max_forward_passes: int = HfArg(
        help="The budget of each; a backward pass counts as two forward passes."
    )
    strategies: list[str] = HfArg(
        default_factory=lambda: ["guided", "gv", "greedy", "mezo", "adam"],
        help="Strategies of zo-peft train, adam and sgd with gradients; or presets.",
    )
    output_dir: str = HfArg(default="zo_peft_compare", help="Folder of the result and of each run.")


def compare(given: CompareArguments, options: list[str]) -> dict[str, Any]:
    """Train with each strategy in a process of its own, on the same data with the same budget.

    Beside the result, `output_dir` gets `comparison.png` and a folder for each run. A run that is
    there already is not made again. `options` are of `zo-peft train`, for all runs.

    Returns:
        The contents of `comparison.json`: by strategy, its `zo_metrics.json`.

    Raises:
        UserError: a strategy is not known, or a run fails.
    """
    known = (GUIDED, *STRATEGIES, *GRADIENT)
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
    plot(folder, result)
    return result


def plot(folder: Path, result: dict[str, Any]) -> None:
    """Draw training losses over examples forwarded, and below each run's metric, time, memory."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplot_mosaic([["losses"] * 3, ["metric", "seconds", "memory"]])
    for name in result:
        log = TrainerState.load_from_json(str(folder / name / TRAINER_STATE_NAME)).log_history
        points = [(entry["examples_forwarded"], entry["loss"]) for entry in log if "loss" in entry]
        panels["losses"].plot(*zip(*points), label=name)
    panels["losses"].set(
        xlabel="examples forwarded (a backward pass counts as two forwards)", ylabel="training loss"
    )
    panels["losses"].legend()
    runs = pd.DataFrame([*result.values()])
    bars = {
        "metric": (f"{runs['metric_name'][0]} after", runs["metric_after"].fillna(0.0), "{:.3f}"),
        "seconds": ("seconds", runs["wall_seconds"], "{:,.0f}"),
        "memory": ("peak memory, MiB", runs["peak_memory_bytes"] / 2**20, "{:,.0f}"),
    }
    for panel, (title, values, form) in bars.items():
        axes = panels[panel]
        axes.set_title(title)
        drawn = axes.bar([*result], values, color=[f"C{index}" for index in range(len(result))])
        axes.bar_label(drawn, fmt=form)
        axes.margins(y=0.1)
        axes.tick_params(axis="x", labelrotation=30)
    figure.savefig(folder / PLOT_NAME, dpi=120)
