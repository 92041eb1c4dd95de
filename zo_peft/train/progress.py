"""What a run sums up while it runs, and what a user sees of it."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback


class Totals(TrainerCallback, ExportableState):
    """What a run has taken and seen so far; checkpoints keep it, so that it covers the whole run.

    It counts the steps with finite losses, the sum of these, seconds of training (evaluations
    included, also in processes before this one, up to their last checkpoints), and what a run with
    gradients has spent.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything: a run begins."""
        self.began: float | None = None
        self.earlier = self.losses = self.steps = 0.0
        self.forward_passes = self.examples_forwarded = 0

    def add(self, loss: float, share: float = 1.0) -> None:
        """Count the loss of a step, or of the micro-batch that is this share of one."""
        if math.isfinite(loss):
            self.losses += share * loss
            self.steps += share

    @property
    def seconds(self) -> float | None:
        """Of training so far; None before it."""
        return None if self.began is None else self.earlier + time.monotonic() - self.began

    @property
    def train_loss(self) -> float:
        """The mean over the steps."""
        return self.losses / self.steps if self.steps else math.nan

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = {name: value for name, value in vars(self).items() if name != "began"}
        return {"args": {}, "attributes": kept | {"earlier": self.seconds or 0.0}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = time.monotonic()


class Progress(ProgressCallback):
    """What is seen of a run, on stderr: bars in a terminal, elsewhere a line for each log.

    The bar and the time left count towards `max_forward_passes` where it is given, else steps. The
    metric is named without `eval_`.
    """

    def __init__(self, forward_passes: Callable[[], int], metric: str, bars: bool) -> None:
        super().__init__()
        self.forward_passes, self.metric, self.bars = forward_passes, metric, bars
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, at what was done before; nothing that was measured before is shown."""
        self.shown, self.unit, self.total = {}, "passes", args.max_forward_passes
        if self.total is None:
            self.unit, self.total = "step", state.max_steps
        self.initial, self.began = self._counts(state)[self.unit], time.monotonic()
        self.says_budget = args.chooses_budget and self.unit == "passes"
        if self.bars and state.is_world_process_zero:
            counted = {"total": self.total, "initial": self.initial, "unit": f" {self.unit}"}
            self.training_bar = tqdm(**counted, dynamic_ncols=True)

    def _counts(self, state: Any) -> dict[str, int]:
        return {"step": state.global_step, "passes": self.forward_passes()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.training_bar is not None:
            self.training_bar.update(self._counts(state)[self.unit] - self.training_bar.n)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar of an evaluation."""
        if self.bars:
            super().on_prediction_step(args, state, control, **kwargs)
            if self.prediction_bar is not None:
                self.prediction_bar.set_description("evaluation", refresh=False)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show how far the run is, and its last loss and metric."""
        logs = logs or {}
        for name, value in logs.items():
            if name.startswith("eval_") and name.endswith(f"_{self.metric}"):
                self.shown[self.metric] = f"{value:.4f}"
        if "loss" not in logs or not state.is_world_process_zero:
            return
        self.shown["loss"] = f"{logs['loss']:.4f}"
        counts = {name: f"{count:,}" for name, count in self._counts(state).items()}
        counts[self.unit] += f"/{self.total:,}"
        done = self._counts(state)[self.unit]
        pace = (time.monotonic() - self.began) / max(done - self.initial, 1)
        left = f"{tqdm.format_interval(pace * max(self.total - done, 0))} left"
        if self.says_budget:
            chosen = f"no budget was given, so this run makes {self.total:,} forward passes: {left}"
            tqdm.write(f"{chosen} (max_forward_passes sets another)", file=sys.stderr)
            self.says_budget = False
        if self.training_bar is not None:
            passes = {} if self.unit == "passes" else {"passes": counts["passes"]}
            self.training_bar.set_postfix(passes | self.shown, refresh=False)
        else:
            shown = [f"{name} {value}" for name, value in (counts | self.shown).items()]
            print("  ".join([*shown, left]), file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)
