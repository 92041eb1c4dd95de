"""Strategies against the published formulas, written out here in numpy on a quadratic."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zo_peft import Direction, ZOConfig
from zo_peft.core.strategies import (
    Asking,
    Estimate,
    Evaluate,
    Weighting,
    combine,
    greedy,
    gv,
    loss_weights,
    mezo,
    n_spsa,
    run_step,
    run_steps,
    split_weights,
)

Vector = NDArray[np.float64]
WIDTH, EPS, RATE = 12, 1e-2, 1e-3


class Problem:
    """f(theta) = 1/2 theta^T A theta + b^T theta, at a point, and the noise of ten seeds."""

    def __init__(self, seed: int, curved: bool = True) -> None:
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(WIDTH, WIDTH))
        self.hessian = root @ root.T if curved else np.zeros((WIDTH, WIDTH))
        self.slope, self.theta = rng.normal(size=(2, WIDTH))
        self.z: dict[int, Vector] = {s: rng.normal(size=WIDTH) for s in range(100, 120)}
        self.asked: list[Direction] = []

    def f(self, theta: Vector) -> float:
        return float(theta @ self.hessian @ theta / 2 + self.slope @ theta)

    def gradient(self) -> Vector:
        return self.hessian @ self.theta + self.slope

    def vector(self, direction: Direction) -> Vector:
        return sum((w * self.z[seed] for seed, w in direction.terms), np.zeros(WIDTH))

    def evaluate(self, points: Sequence[Direction]) -> list[float]:
        self.asked += points
        return [self.f(self.theta + self.vector(point)) for point in points]

    def central(self, v: Vector) -> float:
        return (self.f(self.theta + EPS * v) - self.f(self.theta - EPS * v)) / (2 * EPS)

    def seeds(self, count: int) -> list[int]:
        return list(self.z)[:count]

    def candidates(self, count: int) -> tuple[list[Vector], list[float]]:
        z = [self.z[seed] for seed in self.seeds(count)]
        return z, [self.f(self.theta + EPS * z_i) for z_i in z]


def check(problem: Problem, step: Asking, v: Vector, g: float, passes: int) -> Estimate:
    """The step finds direction v and slope g, and so the theta of the published update."""
    found = run_step(step, problem.evaluate)
    assert len(problem.asked) == len(found.losses) == passes
    assert found.losses == tuple(
        problem.f(problem.theta + problem.vector(p)) for p in problem.asked
    )
    assert found.loss == pytest.approx(np.mean(found.losses), rel=1e-12)
    np.testing.assert_allclose(problem.vector(found.direction), v, rtol=1e-12, atol=1e-12)
    assert found.slope == pytest.approx(g, rel=1e-9, abs=1e-9)
    after = problem.theta - RATE * found.slope * problem.vector(found.direction)
    np.testing.assert_allclose(after, problem.theta - RATE * g * v, rtol=1e-12)
    return found


@pytest.mark.parametrize("problem_seed", range(5))
def test_mezo(problem_seed: int) -> None:
    problem = Problem(problem_seed)
    z = problem.z[100]
    found = check(problem, mezo(100, EPS), z, problem.central(z), passes=2)
    assert found.elite is None
    # On a quadratic the central difference is the directional derivative.
    assert found.slope == pytest.approx(z @ problem.gradient(), rel=1e-9)


@pytest.mark.parametrize("problem_seed", range(3))
@pytest.mark.parametrize("q", [1, 2, 3, 7])
def test_n_spsa(q: int, problem_seed: int) -> None:
    problem = Problem(problem_seed)
    z, _ = problem.candidates(q)
    g = [problem.central(z_i) for z_i in z]
    root_mean_square = float(np.sqrt(np.mean(np.square(g))))
    mean = np.mean([g_i * z_i for g_i, z_i in zip(g, z)], axis=0)
    step = n_spsa(problem.seeds(q), EPS)
    found = check(problem, step, mean / root_mean_square, root_mean_square, passes=2 * q)
    assert found.elite is None


@pytest.mark.parametrize("problem_seed", range(3))
@pytest.mark.parametrize("m", [2, 3, 4, 8])
def test_greedy_as_published(m: int, problem_seed: int) -> None:
    problem = Problem(problem_seed)
    z, losses = problem.candidates(m)
    best = int(np.argmin(losses))
    step = greedy(problem.seeds(m), EPS, "central")
    found = check(problem, step, z[best], problem.central(z[best]), passes=m + 2)
    assert found.elite == problem.seeds(m)[best]


@pytest.mark.parametrize("m", [2, 3, 8])
def test_greedy_reuses_the_loss_it_knows(m: int) -> None:
    published, reusing = Problem(1), Problem(1)
    central = run_step(greedy(published.seeds(m), EPS, "central"), published.evaluate)
    reuse = run_step(greedy(reusing.seeds(m), EPS, "reuse"), reusing.evaluate)
    assert (reuse.direction, reuse.slope) == (central.direction, central.slope)
    assert reuse.elite == central.elite
    assert len(published.asked) == m + 2
    assert len(reusing.asked) == len(reuse.losses) == m + 1


def guiding(z: list[Vector], losses: list[float], alpha: float) -> Vector:
    """Equation 5: mean of the floor(alpha M) lowest minus mean of the others."""
    order = np.argsort(losses)
    top = int(np.floor(alpha * len(z)))
    lower = np.mean([z[i] for i in order[:top]], axis=0)
    return lower - np.mean([z[i] for i in order[top:]], axis=0)


SPLITS = [
    (m, alpha) for m in (2, 3, 4, 5, 8, 9) for alpha in (0.25, 0.5, 0.75) if 0 < int(alpha * m) < m
]


@pytest.mark.parametrize("problem_seed", range(3))
@pytest.mark.parametrize(("m", "alpha"), SPLITS)
def test_gv_as_published(m: int, alpha: float, problem_seed: int) -> None:
    problem = Problem(problem_seed)
    z, losses = problem.candidates(m)
    v = guiding(z, losses, alpha)
    step = gv(problem.seeds(m), EPS, alpha, "split", "central")
    found = check(problem, step, v, problem.central(v), passes=m + 2)
    assert found.elite == problem.seeds(m)[int(np.argmin(losses))]


@pytest.mark.parametrize("m", [2, 3, 4, 9])
def test_gv_weighted_by_the_loss(m: int) -> None:
    problem = Problem(0)
    z, losses = problem.candidates(m)
    weights = np.mean(losses) - losses
    v = weights @ np.array(z) / np.linalg.norm(weights)
    step = gv(problem.seeds(m), EPS, 0.5, "loss", "central")
    check(problem, step, v, problem.central(v), passes=m + 2)


@pytest.mark.parametrize("weighting", ["split", "loss"])
@pytest.mark.parametrize("m", [2, 3, 4, 9])
def test_gv_reads_the_slope_off_losses_of_a_linear_function(m: int, weighting: Weighting) -> None:
    linear = Problem(2, curved=False)
    found = run_step(gv(linear.seeds(m), EPS, 0.5, weighting, "reuse"), linear.evaluate)
    assert len(linear.asked) == len(found.losses) == m
    derivative = linear.vector(found.direction) @ linear.gradient()
    assert found.slope == pytest.approx(derivative, rel=1e-10)


@pytest.mark.parametrize("weighting", ["split", "loss"])
def test_gv_reads_the_slope_off_to_first_order(weighting: Weighting) -> None:
    """The error of the read-off slope is in proportion to eps."""
    errors = []
    for eps in (1e-3, 1e-4):
        problem = Problem(3)
        found = run_step(gv(problem.seeds(8), eps, 0.5, weighting, "reuse"), problem.evaluate)
        errors.append(found.slope - problem.vector(found.direction) @ problem.gradient())
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.1)


def test_two_candidates_of_gv_carry_no_information() -> None:
    """With M = 2, slope * v is the same whichever of the two is lower (design.md)."""
    problem = Problem(4)
    z1, z2 = problem.z[100], problem.z[101]
    found = run_step(gv([100, 101], EPS, 0.5, "split", "central"), problem.evaluate)
    step = found.slope * problem.vector(found.direction)
    np.testing.assert_allclose(step, problem.central(z1 - z2) * (z1 - z2), rtol=1e-9)


@pytest.mark.parametrize("probe", ["central", "reuse"])
def test_ties_keep_the_order_of_the_candidates(probe: Any) -> None:
    answers = iter([[3.0, 1.0, 1.0, 3.0], [1.0], [1.0]])
    tied: Evaluate = lambda points: (next(answers) * 2)[: len(points)]  # noqa: E731
    assert run_step(greedy([7, 8, 9, 10], 0.1, probe), tied).elite == 8
    answers = iter([[3.0, 1.0, 3.0, 3.0], [1.0], [1.0]])
    found = run_step(gv([7, 8, 9, 10], 0.1, 0.5, "split", probe), tied)
    assert found.direction.terms == ((7, 0.5), (8, 0.5), (9, -0.5), (10, -0.5))


# Multiples of 2^-10 add exactly, whatever constant is added to all of them.
LOSSES = st.lists(st.integers(0, 2**20).map(lambda n: n / 1024), min_size=2, max_size=20)


@given(LOSSES, st.integers(-1000, 1000))
def test_loss_weights_are_a_contrast_of_unit_length(losses: list[float], constant: int) -> None:
    weights = np.array(loss_weights(losses))
    assert weights.sum() == pytest.approx(0, abs=1e-9)
    if len(set(losses)) > 1:
        assert np.linalg.norm(weights) == pytest.approx(1, rel=1e-9)
        assert weights[int(np.argmin(losses))] == weights.max() > 0 > weights.min()
    moved = loss_weights([loss + constant for loss in losses])
    np.testing.assert_allclose(moved, weights, rtol=0, atol=1e-9)


@given(st.floats(0, 20), st.integers(2, 20))
@example(0.1, 3)
def test_equal_losses_give_no_direction(loss: float, m: int) -> None:
    assert loss_weights([loss] * m) == [0.0] * m


@pytest.mark.parametrize(
    "step",
    [
        n_spsa([1, 2, 3], 0.1),
        gv([1, 2, 3], 0.1, 0.5, "loss", "reuse"),
        gv([1, 2, 3], 0.1, 0.5, "loss", "central"),
        gv([1, 2, 3], 0.1, 0.5, "split", "reuse"),
        greedy([1, 2, 3], 0.1, "reuse"),
    ],
    ids=["n-spsa", "gv loss", "gv loss central", "gv split", "greedy"],
)
def test_equal_losses_move_nothing(step: Asking) -> None:
    found = run_step(step, lambda points: [0.5] * len(points))
    assert [found.slope * weight for _, weight in found.direction.terms] == pytest.approx(
        [0.0] * len(found.direction.terms), abs=0
    )


@given(LOSSES, st.fractions(0, 1))
def test_split_weights_are_a_difference_of_means(losses: list[float], alpha: Any) -> None:
    m = len(losses)
    top = int(np.floor(float(alpha) * m))
    if not 0 < top < m:
        return
    weights = np.array(split_weights(losses, float(alpha)))
    low, high = np.array(losses)[weights > 0], np.array(losses)[weights < 0]
    assert len(low) == top
    assert len(high) == m - top
    assert low.max() <= high.min()
    assert weights @ losses == pytest.approx(low.mean() - high.mean(), abs=1e-9)


MakeStep = Callable[[list[int], float], Asking]
CASES: dict[str, tuple[dict[str, Any], MakeStep, Callable[[int], int]]] = {
    "mezo": ({"strategy": "mezo"}, lambda s, eps: mezo(s[0], eps), lambda m: 2),
    "n-spsa": ({"strategy": "n-spsa"}, n_spsa, lambda m: 2 * m),
    "greedy": (
        {"strategy": "greedy", "probe": "central"},
        lambda s, eps: greedy(s, eps, "central"),
        lambda m: m + 2,
    ),
    "greedy reuse": (
        {"strategy": "greedy", "probe": "reuse"},
        lambda s, eps: greedy(s, eps, "reuse"),
        lambda m: m + 1,
    ),
    "gv": (
        {"strategy": "gv", "weighting": "split", "probe": "central"},
        lambda s, eps: gv(s, eps, 0.5, "split", "central"),
        lambda m: m + 2,
    ),
    "gv reuse": ({}, lambda s, eps: gv(s, eps, 0.5, "loss", "reuse"), lambda m: m),
}


@pytest.mark.parametrize("m", [3, 4, 16])
@pytest.mark.parametrize("case", CASES)
def test_the_configuration_counts_the_passes_of_a_step(case: str, m: int, tmp_path: Path) -> None:
    settings, step, expected = CASES[case]
    problem = Problem(0)
    run_step(step(problem.seeds(m), EPS), problem.evaluate)
    config = ZOConfig(str(tmp_path), use_cpu=True, num_candidates=m, **settings)
    assert len(problem.asked) == config.forward_passes_per_step == expected(m)
    config.gradient_accumulation_steps = 3
    assert config.forward_passes_per_step == 3 * expected(m)


@pytest.mark.parametrize(
    ("step", "m", "alignment"),
    [
        (lambda s: mezo(s[0], 1.0), 1, 1.0),
        (lambda s: n_spsa(s, 1.0), 4, 4.0),
        (lambda s: greedy(s, 1.0, "reuse"), 2, 1.0),
        (lambda s: greedy(s, 1.0, "central"), 4, 1.55),
        (lambda s: greedy(s, 1.0, "reuse"), 8, 2.40),
        (lambda s: gv(s, 1.0, 0.5, "split", "central"), 2, 1.0),
        (lambda s: gv(s, 1.0, 0.5, "split", "central"), 4, 2.10),
        (lambda s: gv(s, 1.0, 0.5, "split", "reuse"), 16, 9.6),
        (lambda s: gv(s, 1.0, 0.5, "loss", "reuse"), 16, 15.0),
    ],
    ids=["mezo", "n-spsa4", "greedy2", "greedy4", "greedy8", "gv2", "gv4", "gv16", "loss16"],
)
def test_alignment_is_that_of_the_linear_regime(
    step: Callable[[list[int]], Asking], m: int, alignment: float
) -> None:
    """c = d * E[cos^2(v, g)] of the table in design.md, for the loss g . theta with g = e_1."""
    width, draws = 1000, 3000
    rng = np.random.default_rng(1)
    cosines = []
    for _ in range(draws):
        z = rng.standard_normal((m, width))
        found = run_step(
            step(list(range(m))),
            lambda points, z=z: [sum(w * z[s, 0] for s, w in p.terms) for p in points],
        )
        v = sum(w * z[s] for s, w in found.direction.terms)
        cosines.append(v[0] ** 2 / (v @ v))
    assert width * np.mean(cosines) == pytest.approx(alignment, rel=0.1)


WEIGHTS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8)


@given(WEIGHTS, st.floats(-1e3, 1e3))
def test_a_direction_is_the_sum_of_its_terms(weights: list[float], scale: float) -> None:
    z = Problem(0).z
    seeds = list(itertools.islice(itertools.cycle(z), len(weights)))
    direction = Direction.combine(seeds, weights)

    def vector(d: Direction) -> Vector:
        return sum((w * z[seed] for seed, w in d.terms), np.zeros(WIDTH))

    exact = np.array(weights) @ np.array([z[seed] for seed in seeds])
    np.testing.assert_allclose(vector(direction), exact, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(vector(scale * direction), scale * exact, rtol=1e-9, atol=1e-3)
    assert (-direction).terms == tuple((s, -w) for s, w in zip(seeds, weights))
    assert -1.0 * -direction == direction
    assert np.array_equal(vector(Direction.of(seeds[0])), z[seeds[0]])


def test_a_direction_is_a_value() -> None:
    direction = Direction.combine([1, 2], [0.5, -0.5])
    assert direction == Direction(((1, 0.5), (2, -0.5)))
    assert len({direction, Direction.combine([1, 2], [0.5, -0.5])}) == 1
    assert Direction().terms == (0.0 * Direction()).terms == ()
    with pytest.raises(ValueError, match="argument"):
        Direction.combine([1, 2], [1.0])


@pytest.mark.parametrize("strategy", ["mezo", "n-spsa", "greedy", "gv"])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_of_a_batch_combine_to_the_mean_of_their_gradients(strategy: str, parts: int) -> None:
    problems = [Problem(seed) for seed in range(parts)]
    for problem in problems:
        problem.z = problems[0].z
    seeds = [[100 + 4 * part + index for index in range(4)] for part in range(parts)]
    steps: dict[str, Callable[[list[int]], Asking]] = {
        "mezo": lambda own: mezo(own[0], EPS),
        "n-spsa": lambda own: n_spsa(own, EPS),
        "greedy": lambda own: greedy(own, EPS, "reuse"),
        "gv": lambda own: gv(own, EPS, 0.5, "loss", "reuse"),
    }
    alone = [
        run_step(steps[strategy](own), problem.evaluate) for own, problem in zip(seeds, problems)
    ]
    found = combine(
        run_steps(
            [steps[strategy](own) for own in seeds],
            lambda points: [problem.evaluate(p) for problem, p in zip(problems, points)],
        )
    )
    vector = problems[0].vector
    expected = np.mean([e.slope * vector(e.direction) for e in alone], axis=0)
    np.testing.assert_allclose(found.slope * vector(found.direction), expected, rtol=1e-9)
    np.testing.assert_allclose(found.losses, np.mean([e.losses for e in alone], axis=0))


@given(
    losses=st.lists(st.floats(-100, 100), min_size=4, max_size=8),
    bad=st.sets(st.integers(0, 7), max_size=6),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
    weighting=st.sampled_from(["split", "loss"]),
)
def test_gv_without_bad_candidates_is_gv_of_the_others(
    losses: list[float], bad: set[int], value: float, weighting: Weighting
) -> None:
    seeds = list(range(len(losses)))
    kept = [seed for seed in seeds if seed not in bad]
    given_losses = [value if seed in bad else losses[seed] for seed in seeds]
    found = run_step(gv(seeds, EPS, 0.5, weighting, "reuse"), lambda _: given_losses)
    if len(kept) < 2:
        assert not np.isfinite(found.slope)
        return
    alone = run_step(
        gv(kept, EPS, 0.5, weighting, "reuse"), lambda _: [losses[seed] for seed in kept]
    )
    assert (found.direction, found.slope, found.elite) == (
        alone.direction,
        alone.slope,
        alone.elite,
    )
    assert found.loss == alone.loss


def test_n_spsa_and_greedy_drop_what_is_not_finite() -> None:
    losses = [1.0, 0.5, np.nan, 0.25, 2.0, 1.0]
    found = run_step(n_spsa([1, 2, 3], EPS), lambda _: losses)
    alone = run_step(n_spsa([1, 3], EPS), lambda _: [1.0, 0.5, 2.0, 1.0])
    assert (found.direction, found.slope) == (alone.direction, alone.slope)
    answers = iter([[np.nan, 0.5, -np.inf], [1.5]])
    greedily = run_step(greedy([1, 2, 3], EPS, "reuse"), lambda _: next(answers))
    assert (greedily.elite, greedily.slope) == (2, (0.5 - 1.5) / (2 * EPS))
    assert greedily.loss == 1.0


@pytest.mark.parametrize("probe", ["central", "reuse"])
@pytest.mark.parametrize("strategy", ["mezo", "n-spsa", "greedy", "gv"])
def test_nothing_finite_is_no_slope(strategy: str, probe: Any) -> None:
    step = {
        "mezo": lambda: mezo(1, EPS),
        "n-spsa": lambda: n_spsa([1, 2], EPS),
        "greedy": lambda: greedy([1, 2, 3], EPS, probe),
        "gv": lambda: gv([1, 2, 3], EPS, 0.5, "loss", probe),
    }[strategy]()
    found = run_step(step, lambda points: [np.nan] * len(points))
    assert not np.isfinite(found.slope)
    assert found.loss == np.inf


def test_parts_without_a_slope_do_not_count() -> None:
    good, other = Estimate(Direction.of(1), 2.0, (1.0,)), Estimate(Direction.of(2), 4.0, (3.0,))
    bad = Estimate(Direction.of(3), np.nan, (np.nan,))
    found, alone = combine([good, bad, other]), combine([good, other])
    assert (found.direction, found.slope, found.loss) == (
        alone.direction,
        alone.slope,
        alone.loss,
    )
    assert not np.isfinite(combine([bad, bad]).slope)
