"""Charts of one or several runs, which share their axes."""

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

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


class Panel(NamedTuple):
    """What a panel shows.

    Attributes:
        series: a series of the steps or, if it is evaluated, of the evaluations.
        kind: measured, and so with noise; set; count, shown as the sum so far; or evaluated.
        x, unit, across: the series that it is drawn over, in units of so much, and its label.
    """

    series: str
    label: str
    kind: str
    x: str = "forward_passes"
    unit: float = 1.0
    across: str = "forward passes"


STEPS = (
    Panel("slope", "slope along the direction", "measured"),
    Panel("spread", "spread of the candidates' losses, over eps", "measured"),
    Panel("eps", "eps", "set"),
    Panel("learning_rate", "learning rate, with its back-off", "set"),
)
FAULTS = (
    Panel("skipped", "skipped updates, so far", "count"),
    Panel("non_finite", "dropped losses, so far", "count"),
)

#: Units of time: the seconds in one, its name, and the shortest run in seconds that it is used for.
UNITS = ((3600.0, "hours", 7200.0), (60.0, "minutes", 180.0), (1.0, "seconds", 0.0))

#: What the legend says of the marks.
EACH_STEP = Line2D([], [], color="0.5", lw=0.8, alpha=0.6, label="each step")
EVALUATION = Line2D([], [], color="0.5", ls="", marker="o", mec="white", label="evaluation")
SKIPPED = Line2D([], [], color="black", ls="", marker="x", mew=1.5, label="skipped update")


@rc_context(fname=STYLE)
def draw(runs: Sequence[Run]) -> dict[str, Figure]:
    """Draw the figures that have something to show: loss, metric, steps, faults, by these names."""
    longest = pd.Series([run.steps["seconds"].max() for run in runs]).max()
    times = [(unit, name) for unit, name, shortest in UNITS if longest >= shortest]
    across = [("forward_passes", 1.0, "forward passes")]
    across += [("seconds", unit, f"time of training, {name}") for unit, name in times[:1]]
    metric = plain(runs[0].metric_name) if len({r.metric_name for r in runs}) == 1 else "metric"
    figures: dict[str, Sequence[Panel]] = {
        "loss": [Panel("loss", "loss", "measured", *x) for x in across],
        "metric": [Panel("metric", metric, "evaluated", *x) for x in across],
        # A guided run tries no candidates: their spread and their eps are zero throughout.
        "steps": [panel for panel in STEPS if any(run.steps[panel.series].any() for run in runs)],
        "faults": FAULTS if any(run.total(p.series) for run in runs for p in FAULTS) else (),
    }
    if not _known(runs, figures["metric"][0]):
        del figures["metric"]
    return {name: _figure(runs, panels) for name, panels in figures.items() if panels}


def _figure(runs: Sequence[Run], panels: Sequence[Panel]) -> Figure:
    """A figure of panels, two in a row, with a legend."""
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 0.7 + 3.5 * rows))
    for number, panel in enumerate(panels, start=1):
        labels = {"xlabel": panel.across, "ylabel": panel.label}
        axes = figure.add_subplot(rows, min(2, len(panels)), number, **labels)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        _draw(axes, panel, runs)
    first, named = panels[0], zip(runs, styles(len(runs)))
    marks = [Line2D([], [], label=plain(run.name), **style) for run, style in named]
    marks += [EACH_STEP] if first.kind == "measured" else []
    if first.series == "loss":
        marks += [EVALUATION] if _known(runs, first._replace(kind="evaluated")) else []
        marks += [SKIPPED] if any(run.total("skipped") for run in runs) else []
    figure.legend(handles=marks, loc="outside lower center", ncols=6)
    return figure


def _draw(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    name, x, unit = panel.series, panel.x, panel.unit
    for run, style in zip(runs, styles(len(runs))):
        steps, evaluations = run.steps, run.evaluations
        if panel.kind == "evaluated":
            axes.plot(evaluations[x] / unit, evaluations[name], marker="o", mec="white", **style)
        elif panel.kind == "count":
            axes.step(steps[x] / unit, steps[name].fillna(0).cumsum(), where="post", **style)
        elif panel.kind == "set":
            axes.step(steps[x] / unit, steps[name], where="post", **style)
        elif name == "loss":
            points = evaluations[x] / unit, evaluations[name]
            axes.plot(*points, "o", mec="white", color=style["color"])
            skipped = steps["skipped"] > 0
            height = smooth(steps[name]).interpolate(limit_direction="both")[skipped]
            axes.plot(steps[x][skipped] / unit, height, "x", color="black", mew=1.5, zorder=4)
    if panel.kind == "measured":
        _measured(axes, runs, x, unit, name)
    elif panel.kind == "count":
        axes.set_ylim(0, None)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    elif panel.kind == "set":
        # Eps moves in equal ratios, so its axis is always logarithmic.
        _scale(axes, [run.steps[name] for run in runs], 1.0 if name == "eps" else WIDE)


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


def _known(runs: Sequence[Run], panel: Panel) -> bool:
    found = (run.evaluations if panel.kind == "evaluated" else run.steps for run in runs)
    return any(columns[panel.series].notna().any() for columns in found)


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
