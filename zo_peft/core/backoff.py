"""Shorter steps where the loss rises."""

import math


class Backoff:
    """Halves the steps when the mean loss of a window of steps rises above the best such mean.

    A rise counts above `ERRORS` standard errors of the difference, and above `RISE` of the loss.
    """

    WINDOW, ERRORS, RISE = 32, 4.0, 0.05

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.best: tuple[float, float] | None = None

    def __call__(self, loss: float) -> float:
        """The factor on the step size that this loss calls for: 1 or 1/2."""
        self.losses.append(loss)
        if len(self.losses) < self.WINDOW:
            return 1.0
        n, losses = len(self.losses), self.losses
        mean = sum(losses) / n
        variance = sum((loss - mean) ** 2 for loss in losses) / (n - 1) / n
        self.losses = []
        if self.best is None or mean <= self.best[0]:
            self.best = mean, variance
            return 1.0
        rise = mean - self.best[0]
        error = math.sqrt(variance + self.best[1])
        return 0.5 if rise > max(self.ERRORS * error, self.RISE * abs(self.best[0])) else 1.0
