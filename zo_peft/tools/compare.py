"""`zo-peft compare`: train with several strategies on the same budget of forward passes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from transformers.hf_argparser import HfArg

from zo_peft.core.strategies import STRATEGIES
from zo_peft.errors import UserError
from zo_peft.runs import jobs
from zo_peft.tools.charts import smooth
from zo_peft.tools.history import load
from zo_peft.tools.readout import READOUT
from zo_peft.train.checks import GRADIENT, GRADIENT_PASSES, GUIDED, PRESETS
from zo_peft.train.results import write_json

RESULT_NAME, PLOT_NAME = "comparison.json", "comparison.png"

#: The entries of `zo_metrics.json` that are means over seeds.
MEANS = ["metric_before", "metric_after", "eval_loss_before", "eval_loss_after", "wall_seconds"]
MEANS += ["steps", "forward_passes", "examples_forwarded", "peak_memory_bytes"]

#: What a strategy of `zo-peft train` may be; other names are presets.
OF_TRAIN = (GUIDED, *STRATEGIES, *GRADIENT)

#: How many points a line of a run with gradients has, which is drawn from its log.
POINTS = 100


@dataclass
class CompareArguments:
    """What is compared; all further options are those of `zo-peft train`."""

    max_forward_passes: int = HfArg(
        help="The budget of each; a backward pass counts as two forward passes."
    )
    strategies: list[str] = HfArg(
        default_factory=lambda: [READOUT, "guided", "gv", "greedy", "mezo", "adam"],
        help="Strategies of zo-peft train, adam and sgd with gradients; presets, such as "
        "paper-mezo; or readout, the best linear head on the frozen base.",
        metadata={"choices": [*dict.fromkeys((*OF_TRAIN, READOUT, *PRESETS))]},
    )
    seeds: int = HfArg(default=1, help="How many seeds, of which the table has mean and deviation.")
    seed: int = HfArg(default=42, help="The first seed.")
    output_dir: str = HfArg(default="zo_peft_compare", help="Folder of the result and of each run.")


def compare(given: CompareArguments, options: list[str]) -> dict[str, Any]:
    """Train with each strategy in a process of its own, on the same data with the same budget.

    Beside the result, `output_dir` gets `comparison.png` and a folder for each run. A run that is
    there already is not made again. `options` are of `zo-peft train`, for all runs.

    Returns the contents of `comparison.json`: by strategy, its `zo_metrics.json`. With several
    seeds, the numbers of `MEANS` are means of the runs, and `NAME_std` are the standard deviations.
    A UserError says that there is no seed, an option is of one run, or a run fails.
    """
    if given.seeds < 1:
        raise UserError(f"seeds={given.seeds}; it must be 1 or more")
    if twice := {"--strategy", "--preset"} & {word.partition("=")[0] for word in options}:
        raise UserError(f"{min(twice)} is of one run; name what is compared in --strategies")
    folder, budget, first = Path(given.output_dir), given.max_forward_passes, given.seed
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for name in given.strategies:
        runs[name] = {}
        for seed in range(first, first + given.seeds):
            own: dict[str, Any] = {"max_forward_passes": budget, "seed": seed}
            if name != READOUT:
                own["strategy" if name in OF_TRAIN else "preset"] = name
            # The log is all that a run with gradients leaves of its steps.
            every = max(1, budget // GRADIENT_PASSES // POINTS) if name in GRADIENT else None
            argv = [*jobs.flags({"logging_steps": every}), *options, *jobs.flags(own)]
            folder_name = name if seed == first else f"{name}-seed-{seed}"
            command = READOUT if name == READOUT else "train"
            runs[name][folder_name] = jobs.train(folder / folder_name, argv, command)
    result = {name: summary([*found.values()]) for name, found in runs.items()}
    write_json(folder / RESULT_NAME, result)
    plot(folder, result, {name: [*found] for name, found in runs.items()})
    print(f"the table and its chart: {folder / RESULT_NAME}, {folder / PLOT_NAME}", file=sys.stderr)
    return result


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One `zo_metrics.json` for the runs of several seeds; see `compare`."""
    if len(runs) == 1:
        return runs[0]
    known = pd.DataFrame(runs, columns=MEANS, dtype=float).dropna(axis=1)
    # A mean of the runs that did not diverge would flatter a strategy.
    unknown, spread = dict.fromkeys(MEANS), known.std().add_suffix("_std")
    return {**runs[0], "seeds": len(runs), **unknown, **known.mean(), **spread}


def plot(folder: Path, result: dict[str, Any], runs: dict[str, list[str]]) -> None:
    """Draw training losses over forward passes, and below each strategy's metric, time, memory.

    `runs` has the folders of each strategy's runs. Bars have the deviation over seeds.
    """
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplot_mosaic([["losses"] * 3, ["metric", "seconds", "memory"]])
    losses = panels["losses"]
    for index, (name, folders) in enumerate(runs.items()):
        if name == READOUT:
            loss = result[name]["eval_loss_after"]
            losses.axhline(loss, color=f"C{index}", ls="--", label=f"{name} (evaluation)")
            continue
        for run in folders:
            steps = load(folder / run, run).steps.dropna(subset="loss")
            # The legend names each strategy once.
            label, style = name if run == folders[0] else f"_{run}", f"C{index}.-"
            losses.plot(steps["forward_passes"], smooth(steps["loss"]), style, label=label)
    losses.set_xlabel("forward passes (a backward pass counts as two)")
    losses.set_ylabel("training loss, trailing mean")
    losses.legend()
    table = pd.DataFrame([*result.values()], index=[*result])
    metric = f"{table['metric_name'].iloc[0]} after"
    for panel, key, title, unit, form in (
        ("metric", "metric_after", metric, 1, "{:.3f}"),
        ("seconds", "wall_seconds", "seconds", 1, "{:,.0f}"),
        ("memory", "peak_memory_bytes", "peak memory, MiB", 2**20, "{:,.0f}"),
    ):
        axes, deviation = panels[panel], f"{key}_std"
        axes.set_title(title)
        drawn = axes.bar(
            [*result],
            table[key].fillna(0.0) / unit,
            yerr=table[deviation] / unit if deviation in table else None,
            color=[f"C{index}" for index in range(len(result))],
        )
        axes.bar_label(drawn, fmt=form)
        axes.margins(y=0.1)
        axes.tick_params(axis="x", labelrotation=30)
    figure.savefig(folder / PLOT_NAME, dpi=120)
