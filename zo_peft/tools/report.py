"""`zo-peft report`: show runs on one page, with charts and tables."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Template
from transformers.hf_argparser import HfArg

from zo_peft.errors import explained
from zo_peft.runs.texts import mib, number
from zo_peft.tools.charts import draw
from zo_peft.tools.history import Run, load, names

PAGE_NAME = "report.html"

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass
class ReportArguments:
    """Which runs are shown, and where the page goes."""

    runs: list[str] = HfArg(help="Output folders of zo-peft train, finished or not.")
    output_dir: str = HfArg(default="zo_peft_report", help="Folder for the page and the charts.")


def report(given: ReportArguments) -> dict[str, Any]:
    """Write a self-contained HTML page and its charts, as PNG files.

    Returns `page` and `charts`, which are file names, and `runs`, the page's first table. A
    UserError says that a folder holds no run, or a damaged one, or `output_dir` is a file or below
    one; nothing has been written then.
    """
    folders = list(dict.fromkeys(Path(name).resolve() for name in given.runs))
    runs = [load(folder, name) for folder, name in zip(folders, names(folders))]
    figures, folder = draw(runs), Path(given.output_dir)
    what, errors = f"--output_dir {folder} cannot be made", (FileExistsError, NotADirectoryError)
    with explained(what, *errors, advice="give a folder"):
        folder.mkdir(parents=True, exist_ok=True)
    charts = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure.savefig(charts[name], dpi=110)
    (folder / PAGE_NAME).write_text(page(runs, charts), encoding="utf-8")
    return {
        "page": str(folder / PAGE_NAME),
        "charts": [*map(str, charts.values())],
        "runs": [row(run) for run in runs],
    }


def page(runs: Sequence[Run], charts: dict[str, Path]) -> str:
    """Return the page, with its charts inside: PNG files by the names that `draw` gives them."""
    rows = [row(run) for run in runs]
    settings = [run.metrics.get("settings", {}) for run in runs]
    every = {name for own in settings for name in own}
    differ = {name for name in every if len({str(own.get(name, "")) for own in settings}) > 1}
    ordered = sorted(every, key=lambda name: (name not in differ, name))
    images = {name: base64.b64encode(path.read_bytes()).decode() for name, path in charts.items()}
    return Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True).render(
        title=f"zo_peft: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
        header=rows[0].keys(),
        rows=[list(own.values()) for own in rows],
        charts=images,
        settings_header=["", *(run.name for run in runs)],
        settings=[[name, *(own.get(name, "") for own in settings)] for name in ordered],
        differing=len(differ),
    )


def row(run: Run) -> dict[str, str]:
    """Say what a run was, spent and reached, by heading; what is not known is empty."""
    metrics, last = run.metrics, run.steps.ffill().iloc[-1]
    metric = _change(metrics, "metric_before", "metric_after")
    memory = metrics.get("peak_memory_bytes")
    return {
        "run": run.name,
        "strategy": metrics.get("strategy", ""),
        "metric": f"{run.metric_name} {metric}" if metric else "",
        "evaluation loss": _change(metrics, "eval_loss_before", "eval_loss_after"),
        "steps": number(last["step"], ",.0f"),
        "forward passes": number(last["forward_passes"], ",.0f"),
        "seconds": number(metrics.get("wall_seconds", last["seconds"]), ",.0f"),
        "peak MiB": "" if memory is None else mib(memory),
        "skipped updates": number(run.total("skipped"), ",.0f"),
        "dropped losses": number(run.total("non_finite"), ",.0f"),
        "ended": "yes" if metrics else "no",
    }


def _change(metrics: dict[str, Any], before: str, after: str) -> str:
    ends = [number(metrics.get(name), ".4f") for name in (before, after)]
    return " → ".join(ends) if all(ends) else ""
