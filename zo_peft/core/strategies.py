"""Strategies: which points to evaluate in a step, and the direction and slope that come out.

A strategy is a generator over floats. It yields lists of displacements (directions times eps) and
is sent their losses, one for each, all on the same batch; what it returns is the `Estimate`. It
never touches a tensor or the model. The rest of the package knows it by its line in `STRATEGIES`.

Notation as in arXiv:2601.04710 (Jin, Cen, Tan): M candidates `z_i`, losses
`l_i = L(theta + eps z_i)`, split ratio alpha (`elite_fraction`).
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from zo_peft.core.direction import Direction

Probe = Literal["central", "reuse"]
Weighting = Literal["split", "loss"]


@dataclass(frozen=True)
class Estimate:
    """What a step found: the loss changes by `slope` per unit of `direction` (at `theta`).

    Attributes:
        direction: `v`; the step of plain SGD is `-learning_rate * slope * v`.
        slope: the projected gradient along `v`; not finite where too few losses were to tell.
        losses: every loss of the step, in the order it was asked for.
        elite: seed of the candidate with the lowest loss; None where nothing is selected.
        spread: standard deviation of the candidates' batch losses, over eps.
        sensitivity: the same of one example's losses, root mean square over the batch.
        gradients: in place of the direction, the gradient of some parameters, float32 by name; the
            others stay where they are.
    """

    direction: Direction
    slope: float
    losses: tuple[float, ...]
    elite: int | None = None
    spread: float = 0.0
    sensitivity: float = 0.0
    gradients: Mapping[str, Tensor] | None = None

    @property
    def loss(self) -> float:
        """Mean of the step's finite losses (the batch loss at `theta`, blurred over eps)."""
        return mean_of_finite(self.losses)


def mean_of_finite(losses: Sequence[float]) -> float:
    """The mean of those that are finite; infinite where none is."""
    finite = list(filter(math.isfinite, losses))
    return sum(finite) / len(finite) if finite else math.inf


def _finite(values: Sequence[float]) -> list[int]:
    """The indices of values that are finite."""
    return [index for index, value in enumerate(values) if math.isfinite(value)]


#: A strategy under way: it asks for losses of displacements until it returns its estimate.
Asking = Generator[list[Direction], Sequence[float], Estimate]
#: One list of displacements in, their losses out; and the same for each part of a batch.
Evaluate = Callable[[Sequence[Direction]], Sequence[float]]
EvaluateParts = Callable[[Sequence[Sequence[Direction]]], Sequence[Sequence[float]]]


def run_step(step: Asking, evaluate: Evaluate) -> Estimate:
    """Drive a strategy's step: answer every list of displacements it asks for."""
    return run_steps([step], lambda points: [evaluate(points[0])])[0]


def run_steps(steps: Sequence[Asking], evaluate: EvaluateParts) -> list[Estimate]:
    """The same for several parts of a batch at once, each with points and losses of its own."""
    points = [next(step) for step in steps]
    while True:
        estimates = []
        for index, (step, losses) in enumerate(zip(steps, evaluate(points))):
            try:
                points[index] = step.send(losses)
            except StopIteration as stop:
                estimates.append(stop.value)
        if estimates:
            return estimates


def combine(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of the gradients `slope * direction` of equal parts of a batch.

    The slope is the length of the vector of the parts' shares; only its product with the direction
    is an estimate of the gradient. Losses are means. Parts whose slope is not finite do not count.
    """
    if len(estimates) == 1:
        return estimates[0]
    kept = [estimates[index] for index in _finite([estimate.slope for estimate in estimates])]
    shares = [estimate.slope / len(kept) for estimate in kept]
    slope = math.hypot(*shares) if kept else math.nan
    scales = [share / slope if slope else 0.0 for share in shares]
    parts = [scale * estimate.direction for scale, estimate in zip(scales, kept)]
    direction = Direction(tuple(term for part in parts for term in part.terms))
    losses = zip(*(estimate.losses for estimate in estimates))
    return Estimate(direction, slope, tuple(map(mean_of_finite, losses)))


def mezo(seed: int, eps: float) -> Asking:
    """MeZO: a central difference along one noise vector (arXiv:2305.17333, eq. 1). 2 passes."""
    z = Direction.of(seed)
    plus, minus = yield [eps * z, -eps * z]
    return Estimate(z, (plus - minus) / (2 * eps), (plus, minus))


def n_spsa(seeds: Sequence[int], eps: float) -> Asking:
    """The mean of q central differences (arXiv:2601.04710, eq. 1). 2q passes.

    `slope * direction` equals `mean_i(g_i z_i)`, with the root mean square of the g_i as the slope.
    A g_i that is not finite is dropped.
    """
    losses = yield [sign * eps * Direction.of(seed) for seed in seeds for sign in (1.0, -1.0)]
    all_slopes = [(plus - minus) / (2 * eps) for plus, minus in zip(losses[::2], losses[1::2])]
    kept = [(seed, g) for seed, g in zip(seeds, all_slopes) if math.isfinite(g)]
    slope = math.sqrt(sum(g * g for _, g in kept) / len(kept)) if kept else math.nan
    weighted = ((seed, g / (len(kept) * slope) if slope else 0.0) for seed, g in kept)
    return Estimate(Direction(tuple(weighted)), slope, tuple(losses))


def greedy(seeds: Sequence[int], eps: float, probe: Probe) -> Asking:
    """MeZO-Greedy: the candidate with the lowest loss (arXiv:2601.04710, Alg. 3, 4; eq. 7, 8).

    M + 2 passes as published (`probe="central"`). `probe="reuse"` takes `L(theta + eps z*)` from
    the selection: M + 1 passes, the same numbers.
    """
    losses = yield [eps * Direction.of(seed) for seed in seeds]
    best = min(_finite(losses) or range(len(seeds)), key=losses.__getitem__)
    z = Direction.of(seeds[best])
    if probe == "reuse":
        probes = yield [-eps * z]
        plus, minus = losses[best], probes[0]
    else:
        plus, minus = probes = yield [eps * z, -eps * z]
    return Estimate(z, (plus - minus) / (2 * eps), (*losses, *probes), seeds[best])


def split_weights(losses: Sequence[float], elite_fraction: float) -> list[float]:
    """Mean of the `floor(alpha M)` lowest minus mean of the rest (arXiv:2601.04710, eq. 5)."""
    order = sorted(range(len(losses)), key=losses.__getitem__)
    # Where candidates were dropped, the lowest is still above the others.
    top = max(1, math.floor(elite_fraction * len(losses)))
    weights = [0.0] * len(losses)
    for rank, index in enumerate(order):
        weights[index] = 1 / top if rank < top else -1 / (len(losses) - top)
    return weights


def loss_weights(losses: Sequence[float]) -> list[float]:
    """Weights in proportion to `mean - l_i`, of unit length, so that `v` is as long as one `z`."""
    gains = [losses[0] - loss for loss in losses]  # exactly zero where all are equal
    mean = sum(gains) / max(1, len(gains))
    length = math.sqrt(sum((gain - mean) ** 2 for gain in gains))
    return [(gain - mean) / length if length else 0.0 for gain in gains]


def gv(
    seeds: Sequence[int], eps: float, elite_fraction: float, weighting: Weighting, probe: Probe
) -> Asking:
    """MeZO-GV: a guiding vector, low-loss minus high-loss candidates (arXiv:2601.04710, Alg. 1, 2).

    As published: `weighting="split"`, `probe="central"` (eq. 5, 6), M + 2 passes.
    `weighting="loss"` weights each candidate by how far its loss is from the mean.
    `probe="reuse"` reads the slope off the candidates' own losses, M passes: with `sum w_i = 0`,
    `v . grad = sum w_i l_i / eps` to first order in eps. Losses that are not finite are dropped.
    """
    losses = yield [eps * Direction.of(seed) for seed in seeds]
    kept = _finite(losses)
    own = [losses[index] for index in kept]
    weights = split_weights(own, elite_fraction) if weighting == "split" else loss_weights(own)
    v = Direction.combine([seeds[index] for index in kept], weights)
    elite = seeds[min(kept or range(len(seeds)), key=losses.__getitem__)]
    if probe == "central":
        probes = yield [eps * v, -eps * v]
        slope = (probes[0] - probes[1]) / (2 * eps)
    else:
        probes, mean = (), mean_of_finite(own)
        slope = sum(w * (loss - mean) for w, loss in zip(weights, own)) / eps
    return Estimate(v, slope if len(kept) > 1 else math.nan, (*losses, *probes), elite)


@dataclass(frozen=True)
class Options:
    """What a strategy may depend on beside seeds and eps; fields of `ZOConfig` have these names."""

    num_candidates: int = 4
    elite_fraction: float = 0.5
    weighting: Weighting = "loss"
    probe: Probe = "reuse"
    carry_best: bool = False


@dataclass(frozen=True)
class Strategy:
    """A strategy, as the trainer, the planner and the command line know it.

    `start` begins a step, from a seed for each candidate, eps and the options. A strategy that
    `selects` compares candidates, so it needs at least two of them.
    """

    start: Callable[[Sequence[int], float, Options], Asking]
    selects: bool = False

    def asks(self, options: Options) -> list[int]:
        """How many losses a step asks for, each time; found by driving one with made-up losses."""
        counts: list[int] = []

        def evaluate(points: Sequence[Direction]) -> Sequence[float]:
            counts.append(len(points))
            return [float(index) for index in range(len(points))]

        run_step(self.start(range(options.num_candidates), 1.0, options), evaluate)
        return counts


#: The forward-only strategies. A new one is a generator above and a line here.
STRATEGIES: dict[str, Strategy] = {
    "mezo": Strategy(lambda seeds, eps, o: mezo(seeds[0], eps)),
    "n-spsa": Strategy(lambda seeds, eps, o: n_spsa(seeds, eps)),
    "greedy": Strategy(lambda seeds, eps, o: greedy(seeds, eps, o.probe), True),
    "gv": Strategy(
        lambda seeds, eps, o: gv(seeds, eps, o.elite_fraction, o.weighting, o.probe), True
    ),
}
