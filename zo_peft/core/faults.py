"""Numerical faults: which estimates are not followed, and how often that happened."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from zo_peft.core.strategies import Estimate

#: So many skipped updates in a row end a run.
IN_A_ROW = 10

#: An update is skipped if its slope is more than so many times the median of the last slopes, which
#: late in training are a thousand times apart (docs/efficiency.md).
MAX_SLOPE = 1e6

#: That median is over the last so many slopes, once there are at least so many.
SLOPES, FEWEST_SLOPES = 101, 20


@dataclass
class Faults:
    """The faults of a run so far.

    Attributes:
        non_finite: how many losses were NaN or infinite, and dropped.
        skipped: how many updates were skipped.
        in_a_row: how many were skipped since the last update that was made.
        slopes: sizes of the last slopes that were followed, except those of zero.
    """

    non_finite: int = 0
    skipped: int = 0
    in_a_row: int = 0
    slopes: list[float] = field(default_factory=list)

    def found(self, estimate: Estimate, losses: Sequence[float]) -> dict[str, Any]:
        """What is wrong with an estimate from these losses, as its record in the journal says it.

        `non_finite` is the number of losses that are not finite; `skipped` is the reason why the
        estimate is not followed.
        """
        bad = sum(not math.isfinite(loss) for loss in losses)
        wrong: dict[str, Any] = {"non_finite": bad} if bad else {}
        if not math.isfinite(estimate.slope):
            return wrong | {"skipped": f"{bad} of {len(losses)} losses are not finite"}
        usual = median(self.slopes) if len(self.slopes) >= FEWEST_SLOPES else math.inf
        if abs(estimate.slope) <= MAX_SLOPE * usual:
            return wrong
        return wrong | {
            "skipped": f"the slope {estimate.slope:.3g} is more than {MAX_SLOPE:g} times "
            f"the median {usual:.3g} of the last {len(self.slopes)}"
        }

    def take(self, estimate: Estimate, chosen: dict[str, Any]) -> None:
        """Count a step, measured or taken from the journal."""
        self.non_finite += chosen.get("non_finite", 0)
        if "skipped" in chosen:
            self.skipped += 1
            self.in_a_row += 1
            return
        self.in_a_row = 0
        # Rewards are often equal for all candidates, which is not a small slope but none.
        if estimate.slope:
            self.slopes = [*self.slopes, abs(estimate.slope)][-SLOPES:]
