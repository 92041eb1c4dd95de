"""Eps, the size of the perturbations: when a run chooses it, and how."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zo_peft.core.batch import Batch
from zo_peft.core.direction import Direction
from zo_peft.core.evaluator import Evaluator
from zo_peft.core.noise import derive_seed
from zo_peft.core.strategies import EvaluateParts

#: The eps that a run starts with, half a decade apart, and the factors that it tries later.
LADDER = tuple(10.0 ** (exponent / 2) for exponent in range(-8, 1))
NEIGHBOURS = (10.0**-0.5, 1.0, 10.0**0.5)

#: The share of a difference of losses that need not be slope: curvature grows with eps, rounding
#: as eps falls. Where rounding alone is above it, an error may be so many times the least one.
TOLERANCE, ABOVE_LEAST = 0.1, 1.5

#: The same for the likelihood of drawn completions. There the error is the bound sqrt(KL / 2) on
#: the total variation (Pinsker): at most this share of completions becomes others.
COMPLETIONS_TOLERANCE = 0.3

#: Random directions that the parts of a batch try together; each part tries at least one.
DIRECTIONS = 8

#: Eps is tried again after these shares of a run that has at least so many steps.
AGAIN, AGAIN_STEPS = (1 / 8, 1 / 4, 1 / 2), 100

#: Batches in; out come an evaluator whose losses do not jump, and its batches.
Smooth = Callable[[Sequence[Batch]], tuple[Evaluator, Sequence[Batch]]]


@dataclass(frozen=True)
class Calibration:
    """A choice of eps: after which forward pass, and how far the losses were from a line."""

    forward_passes: int
    zo_eps: float
    error: float


class EpsChoice:
    """The eps of a run: given, or chosen in the first step and again in a few later ones.

    Where losses jump, as rewards do, `smooth` gives an evaluator of the likelihood of drawn
    completions, by which eps is chosen in their place. `eps` is 0.0 before the first choice;
    `calibrations` has the choices so far.
    """

    def __init__(self, given: float | None = None, smooth: Smooth | None = None) -> None:
        self.given, self.smooth, self.eps = given, smooth, given or 0.0
        self.calibrations: list[Calibration] = []

    def due(self, step: int, total_steps: int) -> bool:
        """Whether the step of a run of so many steps begins with a choice."""
        return self.given is None and (step in steps(total_steps) or not self.eps)

    def choose(
        self, evaluator: Evaluator, batches: Sequence[Batch], parts: int, seed: int
    ) -> tuple[Calibration, str]:
        """The largest eps for which losses are near a line, and a message that says so."""
        judge, tolerance = evaluator, TOLERANCE
        if self.smooth is not None:
            (judge, batches), tolerance = self.smooth(batches), COMPLETIONS_TOLERANCE
        ladder = [self.eps * factor for factor in NEIGHBOURS] if self.eps else list(LADDER)
        drawn = range(directions(parts))
        seeds = [[derive_seed(seed, part, index) for index in drawn] for part in range(parts)]
        found = errors(lambda tried: judge.evaluate(tried, batches).losses, seeds, ladder)
        eps, error = choose(ladder, found, tolerance)
        if judge is not evaluator:
            evaluator.forward_passes += judge.forward_passes
            evaluator.examples_forwarded += judge.examples_forwarded
            if 0 < error < tolerance:
                # The error grows with eps; so does what a jump says of the slope, over its noise.
                grown = min(tolerance / error, NEIGHBOURS[-1])
                eps, error = eps * grown, error * grown
        tried = f"the largest of {len(ladder)} from {ladder[0]:.2g} to {ladder[-1]:.2g}"
        message = f"candidates are tried at a distance of zo_eps={eps:.2g}, {tried} at which the "
        message += f"loss still changes in proportion (within {error:.0%})"
        return Calibration(evaluator.forward_passes, eps, error), message

    def adopt(self, calibration: Calibration) -> bool:
        """Go on with a choice; returns whether eps is another one now."""
        before, self.eps = self.eps, calibration.zo_eps
        self.calibrations.append(calibration)
        return before != self.eps


def steps(total_steps: int) -> set[int]:
    """The steps of a run that begin with a choice of eps."""
    again = {int(share * total_steps) for share in AGAIN} if total_steps >= AGAIN_STEPS else set()
    return {0} | again


def directions(parts: int) -> int:
    """The number of random directions that each of the parts of a batch tries."""
    return math.ceil(DIRECTIONS / parts)


def points(parts: int, ladder: Sequence[float] = LADDER) -> int:
    """The number of displacements that a choice tries on each part of a batch."""
    return 1 + 2 * len(ladder) * directions(parts)


def forward_passes(parts: int, total_steps: int) -> int:
    """The forward passes of all choices of a run."""
    return points(parts) + (len(steps(total_steps)) - 1) * points(parts, NEIGHBOURS)


def errors(
    evaluate: EvaluateParts, seeds: Sequence[Sequence[int]], ladder: Sequence[float]
) -> list[float]:
    """How far the loss is from a line along random noise, for each eps of the ladder.

    `|l(+) + l(-) - 2 l(0)| / |l(+) - l(-)|`, both root mean square over parts and directions, of
    which there is a seed each. Infinite where no loss differs, or one is not finite.
    """
    signed = [sign * eps for eps in ladder for sign in (1.0, -1.0)]
    noise = [[Direction.of(seed) for seed in own] for own in seeds]
    tried = [[Direction()] + [scale * z for z in own for scale in signed] for own in noise]
    even, odd = [0.0] * len(ladder), [0.0] * len(ladder)
    for start, *losses in evaluate(tried):
        for index, (plus, minus) in enumerate(zip(losses[::2], losses[1::2])):
            even[index % len(ladder)] += (plus + minus - 2 * start) ** 2
            odd[index % len(ladder)] += (plus - minus) ** 2
    ratios = (math.sqrt(e / o) if o else math.inf for e, o in zip(even, odd))
    return [ratio if math.isfinite(ratio) else math.inf for ratio in ratios]


def choose(
    ladder: Sequence[float], found: Sequence[float], tolerance: float = TOLERANCE
) -> tuple[float, float]:
    """The largest eps whose error is tolerable, and its error.

    Tolerable is an error of at most `tolerance`, or of `ABOVE_LEAST` times the least one. Where all
    are above 1, losses jump, as accuracies do: then the smallest eps that changes a loss.
    """
    tried = list(zip(ladder, found))
    limit = max(tolerance, min(ABOVE_LEAST * min(found), 1.0))
    tolerable = [(eps, error) for eps, error in tried if error <= limit]
    changing = [(eps, error) for eps, error in tried if math.isfinite(error)]
    return (tolerable[-1:] or changing[:1] or tried[-1:])[0]
