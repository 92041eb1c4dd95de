"""Charts of one or several runs, which share their axes."""

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from zo_peft.tools.history import Run

STYLE = Path(__file__).with_name("charts.mplstyle")

#: A trailing mean is over the share `SMOOTHED` of a run's steps, but at most over `WINDOW` steps. A
#: line that has more points than `DRAWN` is drawn with a part of them.
SMOOTHED, WINDOW, DRAWN = 1 / 40, 1000, 2000

#: An axis is logarithmic if its largest value is more than this many times its smallest.
WIDE = 30.0

#: The panels of the figures `steps` and `faults`: series, label, and what the series is: measured,
#: and so has noise; set; or a count, of which the panel shows the sum so far.
PANELS = {
    "steps": (
        ("slope", "slope along the direction", "measured"),
        ("spread", "spread of the candidates' losses, over eps", "measured"),
        ("eps", "eps", "set"),
        ("learning_rate", "learning rate, with its back-off", "set"),
    ),
    "faults": (
        ("skipped", "skipped updates, so far", "count"),
        ("non_finite", "dropped losses, so far", "count"),
    ),
}

#: Units of time: the seconds in one, its name, and the shortest run in seconds that it is used for.
UNITS = ((3600.0, "hours", 7200.0), (60.0, "minutes", 180.0), (1.0, "seconds", 0.0))

#: What the legend says of the marks.
EACH_STEP = Line2D([], [], color="0.5", lw=0.8, alpha=0.6, label="each step")
EVALUATION = Line2D([], [], color="0.5", ls="", marker="o", mec="white", label="evaluation")
SKIPPED = Line2D([], [], color="black", ls="", marker="x", mew=1.5, label="skipped update")


@rc_context(fname=STYLE)
def draw(runs: Sequence[Run]) -> dict[str, Figure]:
    """Draw the figures that have something to show: loss, metric, steps, faults, by these names."""
    figures = {"loss": losses(runs)}
    if _known(runs, "metric", evaluated=True):
        figures["metric"] = metrics(runs)
    if known := [panel for panel in PANELS["steps"] if _known(runs, panel[0])]:
        figures["steps"] = steps(runs, known)
    if any(run.total(panel[0]) for run in runs for panel in PANELS["faults"]):
        figures["faults"] = steps(runs, PANELS["faults"])
    return figures


def losses(runs: Sequence[Run]) -> Figure:
    """Draw training losses, their trailing mean and evaluations, over forward passes and time."""
    figure, across = _across(runs)
    for axes, x, unit in across:
        for run, style in zip(runs, styles(len(runs))):
            found, skipped = run.evaluations, run.steps["skipped"] > 0
            axes.plot(found[x] / unit, found["loss"], "o", mec="white", color=style["color"])
            height = smooth(run.steps["loss"]).interpolate(limit_direction="both")[skipped]
            axes.plot(run.steps[x][skipped] / unit, height, "x", color="black", mew=1.5, zorder=4)
        _measured(axes, runs, x, unit, "loss")
        axes.set_ylabel("loss")
    marks = [EACH_STEP]
    marks += [EVALUATION] if _known(runs, "loss", evaluated=True) else []
    marks += [SKIPPED] if any(run.total("skipped") for run in runs) else []
    return _legend(figure, runs, marks)


def metrics(runs: Sequence[Run]) -> Figure:
    """Draw the metric of each evaluation, over forward passes and time."""
    figure, across = _across(runs)
    named = {run.metric_name for run in runs}
    for axes, x, unit in across:
        for run, style in zip(runs, styles(len(runs))):
            found = run.evaluations
            axes.plot(found[x] / unit, found["metric"], marker="o", mec="white", **style)
        axes.set_ylabel(plain(runs[0].metric_name) if len(named) == 1 else "metric")
    return _legend(figure, runs)


def steps(runs: Sequence[Run], panels: Sequence[tuple[str, str, str]]) -> Figure:
    """Draw panels of `PANELS`: what each step measured, set or counted, over forward passes."""
    figure, grid = _grid(len(panels))
    for axes, (name, label, kind) in zip(grid, panels):
        axes.set(xlabel="forward passes", ylabel=label)
        if kind == "measured":
            _measured(axes, runs, "forward_passes", 1.0, name)
            continue
        for run, style in zip(runs, styles(len(runs))):
            values = run.steps[name]
            values = values.fillna(0).cumsum() if kind == "count" else values
            axes.step(run.steps["forward_passes"], values, where="post", **style)
        if kind == "count":
            axes.set_ylim(0, None)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            # Eps moves in equal ratios, so its axis is always logarithmic.
            _scale(axes, [run.steps[name] for run in runs], 1.0 if name == "eps" else WIDE)
    return _legend(figure, runs, [EACH_STEP] if any(p[2] == "measured" for p in panels) else [])


def smooth(values: pd.Series) -> pd.Series:
    """Return the trailing mean at each value, over those that are not NaN; NaN if all are."""
    window = min(WINDOW, max(1, round(SMOOTHED * len(values))))
    return values.rolling(window, min_periods=1).mean()


def styles(count: int) -> list[dict[str, Any]]:
    """Return the colour and dashes of each of `count` runs, as matplotlib's arguments."""
    return [*islice(cycle(rcParams["axes.prop_cycle"]), count)]


def plain(text: str) -> str:
    """Make matplotlib show text as it is: `$` starts no formula, `_` does not hide a label."""
    shown = " ".join(text.split()).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _known(runs: Sequence[Run], name: str, evaluated: bool = False) -> bool:
    found = (run.evaluations if evaluated else run.steps for run in runs)
    return any(columns[name].notna().any() for columns in found)


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, two in a row."""
    rows = -(-count // 2)
    figure = Figure(figsize=(11, 0.7 + 3.5 * rows))
    grid = [figure.add_subplot(rows, min(2, count), index + 1) for index in range(count)]
    for axes in grid:
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    return figure, grid


def _across(runs: Sequence[Run]) -> tuple[Figure, list[tuple[Axes, str, float]]]:
    """Panels over forward passes and, if known, time; each with its x series and its unit."""
    panels = [("forward_passes", 1.0, "forward passes")]
    if _known(runs, "seconds"):
        longest = pd.Series([run.steps["seconds"].max() for run in runs]).max()
        unit, name = next(unit for unit in UNITS if longest >= unit[2])[:2]
        panels.append(("seconds", unit, f"time of training, {name}"))
    figure, grid = _grid(len(panels))
    for axes, (_, _, label) in zip(grid, panels):
        axes.set_xlabel(label)
    return figure, [(axes, x, unit) for axes, (x, unit, _) in zip(grid, panels)]


def _measured(axes: Axes, runs: Sequence[Run], x: str, unit: float, name: str) -> None:
    """Draw a series with noise: its trailing mean sets the scale, its raw values are faint."""
    means = [smooth(run.steps[name]) for run in runs]
    for run, mean, style in zip(runs, means, styles(len(runs))):
        every = slice(None, None, 1 + len(mean) // DRAWN)
        axes.plot(run.steps[x][every] / unit, mean[every], zorder=3, **style)
    _scale(axes, means)
    axes.margins(y=0.2)
    low, high = axes.get_ylim()
    positive = all((mean.dropna() >= 0).all() for mean in means)
    axes.set_ylim(max(low, 0.0) if positive else low, high)
    for run, style in zip(runs, styles(len(runs))):
        every = slice(None, None, 1 + len(run.steps[name]) // DRAWN)
        raw = run.steps[x][every] / unit, run.steps[name][every]
        axes.plot(*raw, color=style["color"], lw=0.8, alpha=0.3, zorder=1)


def _scale(axes: Axes, series: Sequence[pd.Series], wide: float = WIDE) -> None:
    """Make the y axis logarithmic if 95th and 5th percentile are more than `wide` times apart."""
    ends = pd.DataFrame([values.quantile([0.05, 0.95]) for values in series])
    if 0 < wide * ends[0.05].min() < ends[0.95].max():
        axes.set_yscale("log")


def _legend(figure: Figure, runs: Sequence[Run], marks: Sequence[Line2D] = ()) -> Figure:
    named = zip(runs, styles(len(runs)))
    lines = [Line2D([], [], label=plain(run.name), **style) for run, style in named]
    figure.legend(handles=[*lines, *marks], loc="outside lower center", ncols=6)
    return figure
