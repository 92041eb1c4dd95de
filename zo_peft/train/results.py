"""`zo_metrics.json`: what a run says of itself when it ends. The keys are named here alone."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.trainer_utils import has_length

from zo_peft.errors import explained
from zo_peft.models.hub import LOAD_ERRORS, file_of, public_name
from zo_peft.models.memory import peak_memory_bytes
from zo_peft.train.config import run_settings

METRICS_NAME = "zo_metrics.json"


def results(
    trainer: Any,
    before: dict[str, float],
    after: dict[str, float],
    validated: dict[str, float] | None = None,
    evaluated: Any = None,
    wall_seconds: float | None = None,
) -> dict[str, Any]:
    """The contents of `zo_metrics.json` for a run that has ended, or is under way.

    `before` and `after` are what `evaluate` gave on the data `evaluated`, before and after training
    (empty: not measured), and `validated` on the examples by which checkpoints are chosen.
    """
    metric, scheduler, engine = f"eval_{trainer.metric_name}", trainer.lr_scheduler, trainer.engine
    # How often adapters were swapped, and the seconds of training in the engine and in all.
    inside = engine and engine.identity | {
        "swaps": engine.swaps,
        "seconds": round(engine.training_inside, 3),
        "training_seconds": round(engine.training_seconds, 3),
    }
    return {
        "strategy": trainer.args.strategy,
        "steps": trainer.state.global_step,
        "forward_passes": trainer.forward_passes,
        "examples_forwarded": trainer.examples_forwarded,
        "train_examples": _count(trainer.train_dataset),
        "eval_examples": _count(evaluated),
        "form": trainer.form,
        "check_passes": trainer.check_passes,
        "wall_seconds": wall_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "metric_name": trainer.metric_name,
        "metric_before": before.get(metric),
        "metric_after": after.get(metric),
        "metric_dev": (validated or {}).get(metric),
        "train_loss": trainer.totals.train_loss if trainer.totals.steps else None,
        "eval_loss_before": before.get("eval_loss"),
        "eval_loss_after": after.get("eval_loss"),
        "learning_rate": getattr(scheduler, "base_lrs", [None])[0],
        "tuned_parameters": trainer.tuned_numel,
        "non_finite": trainer.faults.non_finite,
        "skipped": trainer.faults.skipped,
        "processes": trainer.args.world_size,
        "guide": trainer.guide,
        "engine": inside,
        "calibrations": [asdict(calibration) for calibration in trainer.calibrations],
        "settings": given(run_settings(trainer.args, trainer.tokenization.generates)),
    }


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that are unset."""
    return {n: value for n, value in values.items() if value is not None and value is not False}


def _count(dataset: Any) -> int | None:
    """How many examples; None where there are no data, several sets, or a stream."""
    return len(dataset) if has_length(dataset) and not isinstance(dataset, dict) else None


def read_results(name: str) -> dict[str, Any]:
    """The contents of `zo_metrics.json` of a folder or a repository of the Hub; empty without one.

    A UserError says that it is there, but is not what a run writes.
    """
    try:
        content = file_of(name, METRICS_NAME).read_bytes()
    except LOAD_ERRORS:
        return {}
    what = f"{METRICS_NAME} of {public_name(name)} is not what a run writes"
    with explained(what, ValueError, TypeError, KeyError, advice="remove it"):
        found = json.loads(content)
        return {**found, "settings": {**found["settings"]}}


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one piece: a reader sees the old file or the new one."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)
