"""Numerical faults: which estimates are not followed, and how often that happened."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from zo_peft.core.strategies import Estimate

#: So many skipped updates in a row end a run.
IN_A_ROW = 10

#: An update is skipped if its slope is more than so many times the median of the last `SLOPES`,
#: once there are at least so many. Late in training they are a thousand times apart.
MAX_SLOPE, SLOPES, FEWEST_SLOPES = 1e6, 101, 20


@dataclass
class Faults:
    """How many losses were not finite, and how many updates were skipped, in all and in a row.

    `slopes` are the sizes of the last slopes that were followed, except those of zero.
    """

    non_finite: int = 0
    skipped: int = 0
    in_a_row: int = 0
    slopes: list[float] = field(default_factory=list)

    def found(self, estimate: Estimate, losses: Sequence[float]) -> dict[str, Any]:
        """What is wrong with an estimate, as its record says it: how many losses are `non_finite`,
        and why the estimate is `skipped`.
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
