"""What a run's folder tells of it: every step, every evaluation, what was spent.

What a step measured is in the journal; when, and what evaluations said, is in transformers' log
(`trainer_state.json`). A run with gradients has the log alone, one that was killed may have the
journal alone. The files may be a stranger's: what is no number in them counts as unknown.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from zo_peft.core.journal import JOURNAL_NAME, read
from zo_peft.errors import UserError
from zo_peft.train.results import METRICS_NAME

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """A run, as its folder tells it.

    Attributes:
        name: of the folder.
        steps: of each step, by the names of `SERIES`: an array of float64, NaN where unknown. Of a
            run without a journal, the same of each log entry.
        evaluations: the same at each evaluation: forward_passes, seconds, loss, metric.
        metric_name: what `metric` is.
        metrics: the contents of `zo_metrics.json`; empty if the run has not ended.
    """

    name: str
    steps: dict[str, Numbers]
    evaluations: dict[str, Numbers]
    metric_name: str
    metrics: dict[str, Any]

    def total(self, name: str) -> float:
        """The sum of a series of the steps."""
        return float(np.nansum(self.steps[name]))


#: What is known of a step: `step` counts from 1, `slope` is without its sign, `learning_rate` with
#: its back-off, `skipped` is 1 where the update was, `non_finite` counts losses.
SERIES: tuple[str, ...] = (
    "step",
    "forward_passes",
    "seconds",
    "loss",
    "slope",
    "spread",
    "eps",
    "learning_rate",
    "skipped",
    "non_finite",
)


def names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many parents as tell them apart."""
    parts = 1
    while True:
        found = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(found)) == len(folders):
            return found
        parts += 1


def load(folder: Path, name: str) -> Run:
    """What a run's folder holds.

    Raises:
        UserError: no run, or a damaged one.
    """
    journal, metrics = folder / JOURNAL_NAME, _json(folder / METRICS_NAME)
    steps = _journalled(journal) if journal.is_file() else {}
    if steps and metrics.get("forward_passes") != _last(steps["forward_passes"]):
        metrics = {}  # of an earlier run in this folder
    log = _log(folder, ended=bool(metrics) or not steps)
    if not steps:
        steps = _logged(log)
    if not len(steps["step"]):
        raise UserError(
            f"{name} holds no steps of a run, neither in {JOURNAL_NAME} nor in "
            f"{TRAINER_STATE_NAME}; give an --output_dir of zo-peft train"
        )
    steps["seconds"] = _between(steps["step"], _column(log, "step"), _column(log, "seconds"))
    return Run(name, steps, *_evaluations(log, metrics, steps), metrics)


def _journalled(path: Path) -> dict[str, Numbers]:
    rows = []
    for record in read(path)[1]:
        skipped = "skipped" in record.chosen
        row = {
            "step": record.step + 1,
            "forward_passes": record.forward_passes,
            "loss": record.loss if math.isfinite(record.loss) else math.nan,
            "slope": math.nan if skipped else abs(record.slope),
            "spread": math.nan if skipped else record.spread,
            "eps": record.eps,
            "learning_rate": record.learning_rate * record.backoff,
            "skipped": float(skipped),
            "non_finite": record.chosen.get("non_finite", 0),
        }
        rows.append(row)
    return {key: _column(rows, key) for key in SERIES}


def _logged(log: Sequence[dict[str, Any]]) -> dict[str, Numbers]:
    training = [entry for entry in log if number(entry.get("loss")) is not None]
    columns = {key: _column(training, {"eps": "zo_eps"}.get(key, key)) for key in SERIES}
    sums = {key: np.diff(columns[key], prepend=0.0) for key in ("skipped", "non_finite")}
    return columns | sums | {"slope": np.abs(columns["slope"])}


def _log(folder: Path, ended: bool) -> list[dict[str, Any]]:
    """transformers' log; of a run under way that of its last checkpoint."""
    path = folder / TRAINER_STATE_NAME
    if not (ended and path.is_file()):
        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        path = Path(checkpoint or folder / "none") / TRAINER_STATE_NAME
    history = _json(path).get("log_history", [])
    if not isinstance(history, list):
        raise UserError(f"{path.parent.name}/{path.name} has a `log_history` that is no list")
    return [entry for entry in history if isinstance(entry, dict)]


def _json(path: Path) -> dict[str, Any]:
    """An object of JSON; empty where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.parent.name}/{path.name} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.parent.name}/{path.name} holds no JSON object")
    return content


def _column(rows: Sequence[dict[str, Any]], key: str) -> Numbers:
    """A value of each row, NaN where it is no finite number."""
    values = (number(row.get(key)) for row in rows)
    return np.array([math.nan if value is None else value for value in values])


def number(value: Any) -> float | None:
    """A value as a finite number, if it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _between(x: Numbers, known_x: Numbers, known_y: Numbers) -> Numbers:
    """`y` at `x`, on lines from (0, 0) through what is known first of each `x`; NaN beyond."""
    known = np.isfinite(known_x) & np.isfinite(known_y)
    if not known.any():
        return np.full(len(x), np.nan)
    order = np.lexsort((known_y[known], known_x[known]))
    known_x, first = np.unique(known_x[known][order], return_index=True)
    known_y = known_y[known][order][first]
    return np.interp(x, np.append(0.0, known_x), np.append(0.0, known_y), right=np.nan)


def _evaluations(
    log: Sequence[dict[str, Any]], metrics: dict[str, Any], steps: dict[str, Numbers]
) -> tuple[dict[str, Numbers], str]:
    """The evaluations that compare, on the same examples, and the name of their metric."""
    entries = [entry for entry in log if number(entry.get("eval_loss")) is not None]
    name = metrics.get("metric_name")
    if not isinstance(name, str):
        spent = ("_loss", "_time", "_runtime", "_per_second")
        keys = (key for entry in entries for key in entry if not key.endswith(spent))
        named = (key for key in keys if key.startswith("eval_"))
        name = next(named, "eval_metric").removeprefix("eval_")
    before = []
    if metrics.get("metric_dev") is not None:
        # Of a task: validation examples during the run, at its end test examples and these again.
        del entries[-2:-1]
    elif "metric_before" in metrics:
        values = metrics["metric_before"], metrics.get("eval_loss_before")
        before = [{"step": 0, "seconds": 0, f"eval_{name}": values[0], "eval_loss": values[1]}]
    rows = [*before, *entries]
    found = {"seconds": "seconds", "loss": "eval_loss", "metric": f"eval_{name}"}
    columns = {key: _column(rows, own) for key, own in found.items()}
    passes = _between(_column(rows, "step"), steps["step"], steps["forward_passes"])
    return {"forward_passes": passes, **columns}, name


def _last(values: Numbers) -> float:
    return float(values[-1]) if len(values) else 0.0
