"""Strategies side by side, gradients among them, at equal examples forwarded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from zo_peft.core.strategies import STRATEGIES
from zo_peft.errors import UserError
from zo_peft.runs import jobs
from zo_peft.train.checks import GRADIENT, PRESETS
from zo_peft.train.results import write_json

RESULT_NAME, PLOT_NAME = "comparison.json", "comparison.png"

#: What is compared, of `zo_metrics.json`.
COMPARED = (
    "metric_name",
    "metric_before",
    "metric_after",
    "eval_loss_after",
    "train_loss",
    "steps",
    "forward_passes",
    "examples_forwarded",
    "wall_seconds",
    "peak_memory_bytes",
)


@dataclass
class CompareArguments:
    """What is compared; all other options are those of `zo-peft train`."""

    max_forward_passes: int = field(
        metadata={"help": "The budget of each; a backward pass counts as two forward passes."}
    )
    strategies: list[str] = field(
        default_factory=lambda: ["mezo", "greedy", "gv", "adam"],
        metadata={"help": "Strategies of zo-peft train, adam and sgd with gradients; or presets."},
    )
    output_dir: str = field(
        default="zo_peft_compare", metadata={"help": "Folder of the result and of each run."}
    )


def compare(given: CompareArguments, options: list[str]) -> dict[str, Any]:
    """Train with each strategy in a process of its own, on the same data with the same budget.

    Args:
        options: of `zo-peft train`, for all of them.

    Returns:
        The contents of `comparison.json`: by strategy, the numbers of `COMPARED`. Beside it lie
        `comparison.png` and a folder for each run. Runs that are there are not made again.

    Raises:
        UserError: a strategy is not known, or a run fails.
    """
    known = (*STRATEGIES, *GRADIENT)
    for name in given.strategies:
        if name not in known and name not in PRESETS:
            raise UserError(
                f"strategy {name!r} is not known; use some of {', '.join([*known, *PRESETS])}"
            )
    folder = Path(given.output_dir)
    result: dict[str, Any] = {}
    for name in given.strategies:
        own = {
            "strategy" if name in known else "preset": name,
            "max_forward_passes": given.max_forward_passes,
        }
        metrics = jobs.train(folder / name, [*options, *jobs.flags(own)])
        result[name] = {key: metrics[key] for key in COMPARED}
    write_json(folder / RESULT_NAME, result)
    plot(folder, result)
    return result


def compare_text(result: dict[str, Any]) -> str:
    """The result as a table."""
    name = next(iter(result.values()))["metric_name"]
    header = ["strategy", f"{name} before", "after", "loss", "steps", "forward passes"]
    header += ["examples forwarded", "seconds", "peak MiB"]
    rows = [
        [
            strategy,
            _decimal(run["metric_before"]),
            _decimal(run["metric_after"]),
            _decimal(run["eval_loss_after"]),
            f"{run['steps']:,}",
            f"{run['forward_passes']:,}",
            f"{run['examples_forwarded']:,}",
            f"{run['wall_seconds']:.0f}",
            f"{run['peak_memory_bytes'] / 2**20:,.0f}",
        ]
        for strategy, run in result.items()
    ]
    return jobs.table(header, rows)


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def plot(folder: Path, result: dict[str, Any]) -> None:
    """Draw training losses over examples forwarded; below, each run's metric, time and memory."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    losses = figure.add_subplot(grid[0, :])
    for name in result:
        losses.plot(*zip(*_training_losses(folder / name)), label=name)
    losses.set(
        xlabel="examples forwarded (a backward pass counts as two forwards)", ylabel="training loss"
    )
    losses.legend()
    metric = next(iter(result.values()))["metric_name"]
    bars = {
        f"{metric} after": ([run["metric_after"] or 0.0 for run in result.values()], "{:.3f}"),
        "seconds": ([run["wall_seconds"] for run in result.values()], "{:,.0f}"),
        "peak memory, MiB": (
            [run["peak_memory_bytes"] / 2**20 for run in result.values()],
            "{:,.0f}",
        ),
    }
    colors = [f"C{index}" for index in range(len(result))]
    for column, (title, (values, form)) in enumerate(bars.items()):
        axes = figure.add_subplot(grid[1, column], title=title)
        axes.bar_label(axes.bar([*result], values, color=colors), fmt=form)
        axes.margins(y=0.1)
        axes.tick_params(axis="x", labelrotation=30)
    figure.savefig(folder / PLOT_NAME, dpi=120)


def _training_losses(run: Path) -> list[tuple[int, float]]:
    """Examples forwarded, and the loss that was logged there."""
    state = TrainerState.load_from_json(str(run / TRAINER_STATE_NAME))
    logs = (log for log in state.log_history if "loss" in log)
    return [(log["examples_forwarded"], log["loss"]) for log in logs]
