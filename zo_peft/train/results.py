"""`zo_metrics.json`: what a run says of itself when it ends. The keys are named here alone."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zo_peft.models.memory import peak_memory_bytes
from zo_peft.train.config import ZOConfig, run_settings

METRICS_NAME = "zo_metrics.json"


def results(
    trainer: Any,
    before: dict[str, float],
    after: dict[str, float],
    validated: dict[str, float] | None = None,
    train_loss: float | None = None,
    wall_seconds: float | None = None,
) -> dict[str, Any]:
    """The contents of `zo_metrics.json` for a run that has ended, or is under way.

    Args:
        before, after: what `evaluate` gave before and after training; empty: not measured.
        validated: the same on the examples by which checkpoints are chosen.
        train_loss: the mean over the run's steps.
    """
    metric = f"eval_{trainer.metric_name}"
    return {
        "strategy": trainer.args.strategy,
        "steps": trainer.state.global_step,
        "forward_passes": trainer.forward_passes,
        "examples_forwarded": trainer.examples_forwarded,
        "check_passes": trainer.check_passes,
        "wall_seconds": wall_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "metric_name": trainer.metric_name,
        "metric_before": before.get(metric),
        "metric_after": after.get(metric),
        "metric_dev": (validated or {}).get(metric),
        "train_loss": train_loss,
        "eval_loss_before": before.get("eval_loss"),
        "eval_loss_after": after.get("eval_loss"),
        "tuned_parameters": trainer.tuned_numel,
        "non_finite": trainer.faults.non_finite,
        "skipped": trainer.faults.skipped,
        "processes": trainer.args.world_size,
        "guide": trainer.guide,
        "calibrations": [asdict(calibration) for calibration in trainer.calibrations],
        "settings": given_settings(trainer.args),
    }


def given_settings(*parts: Any) -> dict[str, Any]:
    """What dataclasses of arguments were given or chose, by name, without what is unset.

    Of a `ZOConfig` it is what decides about the result.
    """
    values: dict[str, Any] = {}
    for part in parts:
        values |= run_settings(part) if isinstance(part, ZOConfig) else asdict(part)
    return {n: value for n, value in values.items() if value is not None and value is not False}


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one piece: a reader sees the old file or the new one."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)
