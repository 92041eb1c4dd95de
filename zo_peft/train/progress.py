"""What a user sees of a run while it runs: the progress bar, and the clock of its logs."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


class Clock(TrainerCallback):
    """Counts the seconds of training, evaluations included, also of a run that was resumed.

    `began` is the `time.monotonic` at which training would have begun if nothing had stopped it;
    None before training. Time after the last checkpoint of a killed process is not counted.
    """

    began: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start where the logs of the process before end."""
        spent = max((log.get("seconds", 0.0) for log in state.log_history), default=0.0)
        self.began = time.monotonic() - spent


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
