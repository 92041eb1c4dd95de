"""The progress bar of a run under way, and the clock that its logs read."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


class Clock(TrainerCallback):
    """Times training, with its evaluations, over all the processes of a run that was resumed.

    Attributes:
        began: the `time.monotonic` at which training would have begun in one process; None before
            it begins. What a killed process spent after its last checkpoint does not count.
    """

    began: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from the time at which the logs of the resumed run end."""
        spent = max((log.get("seconds", 0.0) for log in state.log_history), default=0.0)
        self.began = time.monotonic() - spent


class Progress(ProgressCallback):
    """transformers' bars on stderr, with loss, metric and forward passes.

    The bar counts forward passes towards `max_forward_passes`, or steps if that is not set.

    Args:
        forward_passes: returns how many have been made so far.
        metric: the metric that the bar shows, by its name in the logs without `eval_`.
    """

    def __init__(self, forward_passes: Callable[[], int], metric: str) -> None:
        super().__init__()
        self.forward_passes, self.metric = forward_passes, metric
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar; that of a resumed run starts at what has been done."""
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
        """Show loss and metric in the bar, and all numbers in a line above it."""
        logs = logs or {}
        if "loss" in logs:
            self.shown["loss"] = f"{logs['loss']:.4f}"
        for name, value in logs.items():
            if name.startswith("eval_") and name.endswith(f"_{self.metric}"):
                self.shown[self.metric] = f"{value:.4f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown, refresh=False)
        # The parent class prints on stdout, which is for results alone.
        with contextlib.redirect_stdout(sys.stderr):
            super().on_log(args, state, control, logs, **kwargs)
