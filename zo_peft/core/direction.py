"""A direction in parameter space as a short list of (seed, weight): `v = sum_i w_i z(seed_i)`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Direction:
    """The vector `sum_i weight_i * z(seed_i)`; holds no tensor.

    >>> 0.5 * Direction.of(7)
    Direction(terms=((7, 0.5),))
    """

    terms: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, seed: int) -> Direction:
        """The noise `z(seed)` itself."""
        return cls(((seed, 1.0),))

    @classmethod
    def combine(cls, seeds: Iterable[int], weights: Iterable[float]) -> Direction:
        """`sum_i weights[i] * z(seeds[i])`; one weight a seed."""
        return cls(tuple(zip(seeds, weights, strict=True)))

    @property
    def length(self) -> float:
        """The root mean square of its numbers, in expectation."""
        return math.hypot(*(weight for _, weight in self.terms))

    def __rmul__(self, scale: float) -> Direction:
        return Direction(tuple((seed, scale * weight) for seed, weight in self.terms))

    def __neg__(self) -> Direction:
        return -1.0 * self
