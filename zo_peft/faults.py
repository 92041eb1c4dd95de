"""Numerical faults: which estimates are not followed, and how often that was."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from zo_peft.strategies import Estimate

#: Updates skipped in a row that end a run; slopes that `max_slope` looks back on, and the fewest.
IN_A_ROW, SLOPES, FEWEST_SLOPES = 10, 101, 20


@dataclass
class Faults:
    """Those of a run so far.

    Attributes:
        non_finite: losses that were NaN or infinite, and dropped.
        skipped: updates that were skipped.
        in_a_row: of them, those since the last that was made.
        slopes: sizes of the last slopes that were followed, but for those of zero.
    """

    non_finite: int = 0
    skipped: int = 0
    in_a_row: int = 0
    slopes: list[float] = field(default_factory=list)

    def found(
        self, estimate: Estimate, losses: Sequence[float], max_slope: float
    ) -> dict[str, Any]:
        """What is wrong with an estimate from these losses, as its record in the journal says it.

        `non_finite`: how many losses are; `skipped`: why it is not to be followed.
        """
        bad = sum(not math.isfinite(loss) for loss in losses)
        wrong: dict[str, Any] = {"non_finite": bad} if bad else {}
        if not math.isfinite(estimate.slope):
            return wrong | {"skipped": f"{bad} of {len(losses)} losses are not finite"}
        usual = median(self.slopes) if len(self.slopes) >= FEWEST_SLOPES else math.inf
        if abs(estimate.slope) <= max_slope * usual:
            return wrong
        return wrong | {
            "skipped": f"the slope {estimate.slope:.3g} is more than max_slope={max_slope:g} times "
            f"the median {usual:.3g} of the last {len(self.slopes)}"
        }

    def take(self, estimate: Estimate, chosen: dict[str, Any]) -> None:
        """Take in a step, measured or from the journal."""
        self.non_finite += chosen.get("non_finite", 0)
        if "skipped" in chosen:
            self.skipped += 1
            self.in_a_row += 1
            return
        self.in_a_row = 0
        # Rewards and accuracies are often alike for all candidates: no slope, not a small one.
        if estimate.slope:
            self.slopes = [*self.slopes, abs(estimate.slope)][-SLOPES:]
