"""`zo-peft report`: runs as one page of charts and tables."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from zo_peft.errors import UserError
from zo_peft.tools.charts import draw
from zo_peft.tools.history import Run, load, names, number

PAGE_NAME = "report.html"

#: What each chart shows.
CAPTIONS = {
    "loss": "Loss of each training step (faint), their trailing mean (line), and the loss of the "
    "evaluation examples (dots). A cross marks an update that was skipped.",
    "metric": "The metric on the evaluation examples, before training and at each evaluation.",
    "steps": "What the steps measured: the size of the slope along the direction, and the standard "
    "deviation of the candidates' losses over eps. Below, eps and the learning rate as they moved; "
    "a learning rate that was chosen automatically is in nats, another one as its rule defines it.",
    "faults": "Updates that were skipped, and losses that were not finite and dropped.",
}

#: The page may show its own pictures and styles, and load or run nothing.
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2em auto;
  max-width: 1210px; padding: 0 1em; }}
h1 {{ font-size: 1.5em; }}
h2 {{ font-size: 1.15em; margin-top: 2em; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.3em 0.8em; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; overflow-wrap: break-word; }}
td {{ max-width: 30em; }}
tr.differs th, tr.differs td {{ background: #fff6dd; }}
figure {{ margin: 0; }}
img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #555; max-width: 60em; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="wide">{table}</div>
{charts}
<h2>Settings</h2>
<p>{note}</p>
<div class="wide">{settings}</div>
</body>
</html>
"""


@dataclass
class ReportArguments:
    """What is looked at."""

    runs: list[str] = field(metadata={"help": "Output folders of zo-peft train, finished or not."})
    output_dir: str = field(
        default="zo_peft_report", metadata={"help": "Folder for the page and the charts."}
    )


def report(given: ReportArguments) -> dict[str, Any]:
    """Write a self-contained HTML page and its charts, as PNG files.

    Returns:
        `page` and `charts`, the files, and `runs`, the page's table.

    Raises:
        UserError: a folder holds no run, or a damaged one, or `output_dir` cannot be a folder;
            nothing has been written then.
    """
    folders = list(dict.fromkeys(Path(name).resolve() for name in given.runs))
    runs = [load(folder, name) for folder, name in zip(folders, names(folders))]
    charts = {name: _png(figure) for name, figure in draw(runs).items()}
    folder = Path(given.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--output_dir {folder} is, or is below, a file; give a folder") from None
    for name, content in charts.items():
        (folder / f"{name}.png").write_bytes(content)
    unfinished = folder / f"{PAGE_NAME}.tmp"
    # JSON may hold half a surrogate pair, which UTF-8 cannot.
    unfinished.write_text(page(runs, charts), encoding="utf-8", errors="replace")
    unfinished.replace(folder / PAGE_NAME)
    return {
        "page": str(folder / PAGE_NAME),
        "charts": [str(folder / f"{name}.png") for name in charts],
        "runs": [row(run) for run in runs],
    }


def report_text(result: dict[str, Any]) -> str:
    """The result of `report` in a line."""
    counts = {"run": len(result["runs"]), "chart": len(result["charts"])}
    told = (f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items())
    return f"{', '.join(told)}: {result['page']}"


def page(runs: Sequence[Run], charts: dict[str, bytes]) -> str:
    """The page, with its charts inside.

    Args:
        charts: PNG files by the names of `CAPTIONS`.
    """
    rows = [row(run) for run in runs]
    settings = [_settings(run) for run in runs]
    every = sorted({name for own in settings for name in own})
    differ = {name for name in every if len({own.get(name, "") for own in settings}) > 1}
    title = f"zo_peft: {runs[0].name}" if len(runs) == 1 else f"zo_peft: {len(runs)} runs"
    note = "As given or chosen; a run that has not ended says none."
    if differ:
        note += " Those that differ come first."
    return PAGE.format(
        title=html.escape(title),
        table=_table(list(rows[0]), [list(own.values()) for own in rows]),
        charts="\n".join(_chart(name, content) for name, content in charts.items()),
        note=note,
        settings=_table(
            ["", *(run.name for run in runs)],
            [
                [name, *(own.get(name, "") for own in settings)]
                for name in sorted(every, key=lambda name: (name not in differ, name))
            ],
            marked=len(differ),
        ),
    )


def row(run: Run) -> dict[str, str]:
    """What a run was, spent and reached, as text by heading; empty where it is not known."""
    metrics = run.metrics
    metric = _change(metrics, "metric_before", "metric_after")
    seconds = metrics.get("wall_seconds", _end(run.steps["seconds"]))
    return {
        "run": run.name,
        "strategy": str(metrics.get("strategy", "")),
        "metric": f"{run.metric_name} {metric}" if metric else "",
        "evaluation loss": _change(metrics, "eval_loss_before", "eval_loss_after"),
        "steps": _shown(_end(run.steps["step"]), ",.0f"),
        "forward passes": _shown(_end(run.steps["forward_passes"]), ",.0f"),
        "seconds": _shown(seconds, ",.0f"),
        "peak MiB": _shown(metrics.get("peak_memory_bytes"), ",.0f", 2**20),
        "skipped updates": _shown(run.total("skipped"), ",.0f"),
        "dropped losses": _shown(run.total("non_finite"), ",.0f"),
        "ended": "yes" if metrics else "no",
    }


def _settings(run: Run) -> dict[str, str]:
    settings = run.metrics.get("settings")
    return {str(k): str(v) for k, v in settings.items()} if isinstance(settings, dict) else {}


def _end(values: Any) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _change(metrics: dict[str, Any], before: str, after: str) -> str:
    ends = [_shown(metrics.get(name), ".4f") for name in (before, after)]
    return " → ".join(ends) if all(ends) else ""


def _shown(value: Any, form: str, unit: float = 1.0) -> str:
    known = number(value)
    return "" if known is None else format(known / unit, form)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], marked: int = 0) -> str:
    """A table of text; the first rows may be marked."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in header)}</tr>"]
    for index, (first, *rest) in enumerate(rows):
        kind = ' class="differs"' if index < marked else ""
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in rest)
        lines.append(f"<tr{kind}><th>{html.escape(first)}</th>{cells}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _chart(name: str, content: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    caption = CAPTIONS[name]
    return (
        f'<h2>{name.capitalize()}</h2>\n<figure><img id="{name}" src="{source}" '
        f'alt="{html.escape(caption)}"><figcaption>{html.escape(caption)}</figcaption></figure>'
    )


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
