"""What the folder of a run tells: every step, every evaluation, and what was spent.

The journal has what each step measured. transformers' log (`trainer_state.json`) has the times and
the evaluations. A run with gradients has no journal, and one that was killed may have no log.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from zo_peft.core.journal import JOURNAL_NAME, read
from zo_peft.errors import UserError, explained
from zo_peft.train.results import METRICS_NAME


@dataclass(frozen=True)
class Run:
    """A run, as its folder tells it.

    Attributes:
        name: the folder's name.
        steps: a row for each step with a float64 column for each name in `SERIES`, NaN where it is
            not known. A run without a journal has a row for each log entry instead.
        evaluations: the same for each evaluation: step, forward_passes, seconds, loss, metric.
        metric_name: which metric `metric` is.
        metrics: the contents of `zo_metrics.json`; empty if the run has not ended.
    """

    name: str
    steps: pd.DataFrame
    evaluations: pd.DataFrame
    metric_name: str
    metrics: dict[str, Any]

    def total(self, name: str) -> float:
        """Sum a series over the steps."""
        return float(self.steps[name].sum())


#: What is known of a step. `step` counts from 1, `slope` has no sign, `learning_rate` includes its
#: back-off, `skipped` is 1 if the update was skipped, `non_finite` counts losses.
SERIES: tuple[str, ...] = ("step", "forward_passes", "seconds", "loss", "slope", "spread", "eps")
SERIES += ("learning_rate", "skipped", "non_finite")


def names(folders: Sequence[Path]) -> list[str]:
    """Name different folders, each with as many parents as it takes to tell them apart."""
    for parts in count(1):
        found = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(found)) == len(folders):
            break
    return found


def load(folder: Path, name: str) -> Run:
    """Read a run's folder; a UserError says that it holds no run, or a damaged one."""
    journal, metrics = folder / JOURNAL_NAME, _json(folder / METRICS_NAME)
    steps = _journalled(journal) if journal.is_file() else None
    if steps is not None and metrics.get("forward_passes") not in [*steps["forward_passes"][-1:]]:
        metrics = {}  # An earlier run in this folder wrote them.
    log = _log(folder, ended=bool(metrics) or steps is None)
    steps = _logged(log, metrics) if steps is None else steps
    if steps.empty:
        what = f"no steps of a run, neither in {JOURNAL_NAME} nor in {TRAINER_STATE_NAME}"
        raise UserError(f"{name} holds {what}; give an --output_dir of zo-peft train")
    times = _columns(log, step="step", seconds="seconds")
    steps["seconds"] = _between(steps["step"], times["step"], times["seconds"])
    return Run(name, steps, *_evaluations(log, metrics, steps), metrics)


def _journalled(path: Path) -> pd.DataFrame:
    records = list(read(path)[1])
    names = {name: name for name in (*SERIES, "backoff")}
    steps = _columns([vars(record) for record in records], **names)
    steps["step"] += 1
    steps["learning_rate"] *= steps.pop("backoff")
    steps["skipped"] = [float("skipped" in record.chosen) for record in records]
    steps["non_finite"] = [float(record.chosen.get("non_finite", 0)) for record in records]
    for name in ("slope", "spread"):
        steps[name] = steps[name].abs().where(steps["skipped"] == 0)
    return steps


def _logged(log: Sequence[dict[str, Any]], metrics: dict[str, Any]) -> pd.DataFrame:
    training = [entry for entry in log if "loss" in entry]
    last = training[-1]["step"] if training else 0
    if metrics.get("steps", 0) > last:
        # Of a run that has ended, all is counted, also what was not logged any more.
        spent = {"step": metrics["steps"], "forward_passes": metrics["forward_passes"]}
        training = [*training, spent]
    steps = _columns(training, **{name: name for name in SERIES} | {"eps": "zo_eps"})
    for name in ("skipped", "non_finite"):
        steps[name] = np.diff(steps[name], prepend=0.0)
    steps["slope"] = steps["slope"].abs()
    return steps


def _log(folder: Path, ended: bool) -> list[dict[str, Any]]:
    """Return transformers' log; if the run has not ended, that of its last checkpoint."""
    path = folder / TRAINER_STATE_NAME
    if not (ended and path.is_file()):
        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        path = Path(checkpoint or folder / "none") / TRAINER_STATE_NAME
    return _json(path).get("log_history", [])


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if there is no file."""
    with explained(f"{path.parent.name}/{path.name} is not readable JSON", ValueError):
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _columns(rows: Sequence[dict[str, Any]], **keys: str) -> pd.DataFrame:
    """Return a column for each key of the rows, NaN where a value is missing or not finite."""
    found = {name: [row.get(key) for row in rows] for name, key in keys.items()}
    frame = pd.DataFrame(found, dtype=float)
    return frame.where(np.isfinite(frame))


def _between(x: pd.Series, known_x: pd.Series, known_y: pd.Series) -> Any:
    """Return y at x on lines from (0, 0) through the known points; NaN beyond the last of them.

    Of several points with one x, the smallest y counts.
    """
    known = known_y.groupby(known_x).min().dropna()
    return np.interp(x, [0.0, *known.index], [0.0, *known], right=np.nan)


def _evaluations(
    log: Sequence[dict[str, Any]], metrics: dict[str, Any], steps: pd.DataFrame
) -> tuple[pd.DataFrame, str]:
    """Return the evaluations on the same examples, and the name of their metric."""
    entries = [entry for entry in log if "eval_loss" in entry]
    name = metrics.get("metric_name")
    if name is None:
        spent = ("_loss", "_time", "_runtime", "_per_second")
        keys = (key for entry in entries for key in entry if not key.endswith(spent))
        named = (key for key in keys if key.startswith("eval_"))
        name = next(named, "eval_metric").removeprefix("eval_")
    before = []
    if metrics.get("metric_dev") is not None:
        # A task is evaluated on validation examples; at its end, on test examples before these.
        del entries[-2:-1]
    elif "metric_before" in metrics:
        values = metrics["metric_before"], metrics.get("eval_loss_before")
        before = [{"step": 0, "seconds": 0, f"eval_{name}": values[0], "eval_loss": values[1]}]
    names = {"step": "step", "seconds": "seconds", "loss": "eval_loss", "metric": f"eval_{name}"}
    found = _columns([*before, *entries], **names)
    found["forward_passes"] = _between(found["step"], steps["step"], steps["forward_passes"])
    return found, name
