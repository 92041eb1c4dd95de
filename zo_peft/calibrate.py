"""Automatic eps: from the losses at both ends of a ladder of displacements."""

import math
from collections.abc import Callable, Sequence

from zo_peft.direction import Direction

#: The rungs that a run starts with: half a decade apart.
LADDER = tuple(10.0 ** (exponent / 2) for exponent in range(-8, 1))

#: What is tried again around an eps as training goes on.
NEIGHBOURS = (10.0**-0.5, 1.0, 10.0**0.5)

#: The share of a difference that may be no slope: curvature, which grows with eps, or rounding,
#: which grows as eps falls; and, where rounding alone is above it, how many times the least.
TOLERANCE, ABOVE_LEAST = 0.1, 1.5

#: The same of the likelihood of drawn completions, in whose place rewards jump. There the error is
#: the bound sqrt(KL / 2) on the total variation (Pinsker): at most the share of completions that a
#: candidate turns into others, so that shared random numbers keep the rest alike.
COMPLETIONS_TOLERANCE = 0.3

#: Directions that the parts of a batch try together; at least one each.
DIRECTIONS = 8

#: Shares of a run after which the neighbours are tried, and the fewest steps of such a run.
AGAIN, AGAIN_STEPS = (1 / 8, 1 / 4, 1 / 2), 100

#: [G][M] displacements in, [G][M] losses out.
EvaluateParts = Callable[[Sequence[Sequence[Direction]]], Sequence[Sequence[float]]]


def directions(parts: int) -> int:
    """Random directions that each of the parts of a batch tries."""
    return math.ceil(DIRECTIONS / parts)


def steps(max_steps: int) -> set[int]:
    """The steps of a run that choose eps first."""
    again = {int(share * max_steps) for share in AGAIN} if max_steps >= AGAIN_STEPS else set()
    return {0} | again


def forward_passes(parts: int, max_steps: int) -> int:
    """What all choices of a run cost."""
    first, again = (1 + 2 * len(ladder) * directions(parts) for ladder in (LADDER, NEIGHBOURS))
    return first + (len(steps(max_steps)) - 1) * again


def errors(
    evaluate: EvaluateParts, seeds: Sequence[Sequence[int]], ladder: Sequence[float]
) -> list[float]:
    """How far the loss is from a line along random noise, for each eps of the ladder.

    `|l(+) + l(-) - 2 l(0)| / |l(+) - l(-)|`, both root mean square over parts and directions. It is
    0 for a line; infinite where no displacement makes a difference, or a loss is not finite.
    `1 + 2 * len(ladder) * directions` forward passes.

    Args:
        seeds: of the noise: [G][directions].
    """
    signed = [sign * eps for eps in ladder for sign in (1.0, -1.0)]
    points = [
        [Direction()] + [scale * Direction.of(seed) for seed in own for scale in signed]
        for own in seeds
    ]
    even, odd = [0.0] * len(ladder), [0.0] * len(ladder)
    for start, *losses in evaluate(points):
        for index, (plus, minus) in enumerate(zip(losses[::2], losses[1::2])):
            rung = index % len(ladder)
            even[rung] += (plus + minus - 2 * start) ** 2
            odd[rung] += (plus - minus) ** 2
    ratios = (math.sqrt(e / o) if o else math.inf for e, o in zip(even, odd))
    return [ratio if math.isfinite(ratio) else math.inf for ratio in ratios]


def choose(
    ladder: Sequence[float], found: Sequence[float], tolerance: float = TOLERANCE
) -> tuple[float, float]:
    """The largest eps whose error is tolerable, and its error.

    Tolerable: `tolerance`, or `ABOVE_LEAST` times the least where none is that good. From 1 on no
    slope is left to see (so with accuracies, which jump): there it is the least alone.
    """
    least = min(found)
    limit = max(tolerance, least, min(ABOVE_LEAST * least, 1.0))
    return [(eps, error) for eps, error in zip(ladder, found) if error <= limit][-1]
