"""The choice of eps on functions whose slope, curvature and rounding are known."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_peft import Direction
from zo_peft.core.eps import ABOVE_LEAST, LADDER, TOLERANCE, choose, errors, forward_passes, steps


class Curve:
    """Losses `slope x + curvature x^2 / 2`, rounded to multiples of `step`; x: eps of one seed."""

    def __init__(self, slope: float, curvature: float, step: float = 0.0) -> None:
        self.slope, self.curvature, self.step = slope, curvature, step
        self.passes = 0

    def __call__(self, points: Sequence[Sequence[Direction]]) -> list[list[float]]:
        self.passes += len(points[0])
        return [[self.loss(sum(w for _, w in point.terms)) for point in own] for own in points]

    def loss(self, x: float) -> float:
        value = 3.3 + self.slope * x + self.curvature * x * x / 2
        return round(value / self.step) * self.step if self.step else value


@given(slope=st.floats(0.1, 10), curvature=st.floats(0, 1000), parts=st.integers(1, 3))
def test_the_error_of_a_parabola_is_curvature_over_slope(
    slope: float, curvature: float, parts: int
) -> None:
    curve = Curve(slope, curvature)
    found = errors(curve, [[7, 8] for _ in range(parts)], LADDER)
    np.testing.assert_allclose(found, [curvature * e / (2 * slope) for e in LADDER], atol=1e-6)
    assert curve.passes == 1 + 2 * len(LADDER) * 2


@pytest.mark.parametrize("curvature", [0.0, 1.0, 30.0, 1e4])
def test_chooses_the_largest_eps_within_the_tolerance(curvature: float) -> None:
    eps, error = choose(LADDER, errors(Curve(1.0, curvature), [[1]], LADDER))
    assert error == pytest.approx(curvature * eps / 2, abs=1e-6)
    fine = [e for e in LADDER if curvature * e / 2 <= TOLERANCE]
    assert eps == (fine[-1] if fine else LADDER[0])


def test_rounding_pushes_eps_up_and_curvature_bounds_it() -> None:
    exact, _ = choose(LADDER, errors(Curve(1.0, 20.0), [[1]], LADDER))
    coarse = [Curve(1.0 + 0.01 * k, 20.0, 0.02) for k in range(16)]
    found = errors(lambda points: [c(points)[0] for c in coarse], [[1]], LADDER)
    eps, error = choose(LADDER, found)
    assert exact == pytest.approx(1e-2)
    assert 1e-2 <= eps < 1e-1
    assert error <= max(TOLERANCE, ABOVE_LEAST * min(found))


def test_a_loss_that_never_moves_takes_the_largest_eps() -> None:
    found = errors(Curve(0.0, 0.0), [[1]], LADDER)
    assert all(math.isinf(error) for error in found)
    assert choose(LADDER, found)[0] == LADDER[-1]


def test_where_losses_jump_the_smallest_eps_that_moves_one_is_taken() -> None:
    assert choose(LADDER, [math.inf] * 7 + [2.65, 2.24]) == (LADDER[7], 2.65)
    # At the third eps from the end losses jump on one side alone.
    assert choose(LADDER, [math.inf] * 5 + [1.0, 1.0, 2.65, 2.38]) == (LADDER[6], 1.0)


def test_a_short_run_chooses_once_and_a_long_one_again() -> None:
    assert steps(50) == {0}
    assert steps(800) == {0, 100, 200, 400}
    assert forward_passes(16, 50) == 19
    assert forward_passes(16, 800) == 19 + 3 * 7
    assert forward_passes(1, 800) == 145 + 3 * 49
