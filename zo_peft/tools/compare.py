"""`zo-peft compare`: train with several strategies on the same budget of forward passes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import TrainerState
from transformers.hf_argparser import HfArg
from transformers.trainer import TRAINER_STATE_NAME

from zo_peft.core.strategies import STRATEGIES
from zo_peft.errors import UserError
from zo_peft.runs import jobs
from zo_peft.train.checks import GRADIENT, PRESETS
from zo_peft.train.results import write_json

RESULT_NAME, PLOT_NAME = "comparison.json", "comparison.png"

#: The entries of `zo_metrics.json` that are compared.
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

    Beside the result, `output_dir` gets `comparison.png` and a folder for each run. A run that is
    there already is not made again.

    Args:
        options: of `zo-peft train`, for all runs.

    Returns:
        The contents of `comparison.json`: by strategy, the entries of `COMPARED`.

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
        metrics = jobs.train(folder / name, [*options, *own])
        result[name] = {key: metrics[key] for key in COMPARED}
    write_json(folder / RESULT_NAME, result)
    plot(folder, result)
    return result


def plot(folder: Path, result: dict[str, Any]) -> None:
    """Draw training losses over examples forwarded, and below each run's metric, time, memory."""
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
    runs = result.values()
    memory = [run["peak_memory_bytes"] / 2**20 for run in runs]
    bars = {
        f"{metric} after": ([run["metric_after"] or 0.0 for run in runs], "{:.3f}"),
        "seconds": ([run["wall_seconds"] for run in runs], "{:,.0f}"),
        "peak memory, MiB": (memory, "{:,.0f}"),
    }
    colors = [f"C{index}" for index in range(len(result))]
    for column, (title, (values, form)) in enumerate(bars.items()):
        axes = figure.add_subplot(grid[1, column], title=title)
        axes.bar_label(axes.bar([*result], values, color=colors), fmt=form)
        axes.margins(y=0.1)
        axes.tick_params(axis="x", labelrotation=30)
    figure.savefig(folder / PLOT_NAME, dpi=120)


def _training_losses(run: Path) -> list[tuple[int, float]]:
    """Pairs of examples forwarded and the loss that was logged then."""
    logs = TrainerState.load_from_json(str(run / TRAINER_STATE_NAME)).log_history
    return [(log["examples_forwarded"], log["loss"]) for log in logs if "loss" in log]
