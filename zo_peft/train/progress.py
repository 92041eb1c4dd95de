"""What a run sums up while it runs, and what a user sees of it: the progress bar."""

import contextlib
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

    Attributes:
        earlier: seconds of training, evaluations included, in processes before this one. Time
            after the last checkpoint of a killed process is not counted.
        losses, steps: the sum of the steps' finite losses, and how many they are.
        forward_passes, examples_forwarded: of a run with gradients; any other has an evaluator.
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
    """transformers' bars, with loss, metric and forward passes; all of it on stderr.

    The bar and its time left count towards `max_forward_passes` where it is given, else steps. It
    shows the metric of that name, which is without `eval_`.
    """

    def __init__(self, forward_passes: Callable[[], int], metric: str) -> None:
        super().__init__()
        self.forward_passes, self.metric = forward_passes, metric
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar; a resumed run starts where it was."""
        budget = args.max_forward_passes
        counted = {"total": state.max_steps, "initial": state.global_step, "unit": " steps"}
        if budget is not None:
            counted = {"total": budget, "initial": self.forward_passes(), "unit": " passes"}
        if state.is_world_process_zero:
            self.training_bar = tqdm(**counted, dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.training_bar is None:
            return
        done, passes = state.global_step, self.forward_passes()
        if args.max_forward_passes is None:
            self.shown["passes"] = f"{passes:,}"
            self.training_bar.set_postfix(self.shown, refresh=False)
        else:
            done = passes
        self.training_bar.update(done - self.training_bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show loss and metric in the bar, and the line of all numbers above it."""
        logs = logs or {}
        if "loss" in logs:
            self.shown["loss"] = f"{logs['loss']:.4f}"
        for name, value in logs.items():
            if name.startswith("eval_") and name.endswith(f"_{self.metric}"):
                self.shown[self.metric] = f"{value:.4f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown, refresh=False)
        # The parent writes on stdout, where only results belong.
        with contextlib.redirect_stdout(sys.stderr):
            super().on_log(args, state, control, logs, **kwargs)
