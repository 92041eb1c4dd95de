"""Low-rank noise of matrices: a seed read as two thin factors, `z(seed) = left @ right^T`.

Three ways, for a matrix of m rows and n columns and rank r:

* `eggroll`: `U V^T / sqrt(r)`, both factors from the seed (EGGROLL, arXiv:2511.16652).
* `lozo`: `U V^T / sqrt(r)`, V from a basis that is kept for a while (LOZO, arXiv:2410.07698). With
  its eps times sqrt(r), a step of it is LOZO's `U V^T / r` times the projected gradient.
* `subzero`: `U Z V^T`, orthonormal U, V from the basis, Z [r, r] from the seed (arXiv:2410.08989).

Whatever has not two dimensions gets full noise.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from zo_peft.core.direction import Direction
from zo_peft.core.noise import Distribution, Layout, chunk, noise_blocks

Structure = Literal["eggroll", "lozo", "subzero"]

#: Steps after which each structure draws its basis anew; eggroll has none.
BASIS_STEPS: dict[Structure, int] = {"eggroll": 1, "subzero": 1000, "lozo": 100}


class LowRank:
    """Low-rank noise; the factors that seeds share are of `basis_seed`, for `basis_steps` steps."""

    def __init__(
        self, rank: int, structure: Structure = "eggroll", distribution: Distribution = "gaussian"
    ) -> None:
        self.rank, self.structure, self.distribution = rank, structure, distribution
        self.basis_seed, self.basis_steps = 0, BASIS_STEPS[structure]
        self._orthonormal: dict[str, tuple[int, Tensor]] = {}

    def factors(
        self, directions: Sequence[Direction], name: str, shape: torch.Size, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Of K directions for the matrix `name`: left [K, m, R], right [K or 1, n, R], float32.

        R is the rank, for `eggroll` times the number of seeds of a direction.
        """
        rows, columns = shape
        rank = min(self.rank, rows, columns)
        if self.structure == "eggroll":
            return self._own(directions, name, (rows, columns, rank), device)
        if self.structure == "lozo":
            left = summed(directions, f"{name}, left", 0, rows * rank, self.distribution, device)
            right = self._factor([self.basis_seed], f"{name}, right", columns, rank, device)
            return left.view(-1, rows, rank) / math.sqrt(rank), right
        core = summed(directions, name, 0, rank * rank, self.distribution, device)
        left = self._basis(f"{name}, left", rows, rank, device)
        right = self._basis(f"{name}, right", columns, rank, device)
        return left @ core.view(-1, rank, rank), right[None]

    def dense(
        self, directions: Sequence[Direction], name: str, shape: torch.Size, device: torch.device
    ) -> Tensor:
        """The directions themselves, float32 `[K, *shape]`."""
        if len(shape) != 2:
            flat = summed(directions, name, 0, shape.numel(), self.distribution, device)
            return flat.view(-1, *shape)
        left, right = self.factors(directions, name, shape, device)
        return left @ right.transpose(1, 2)

    def _own(
        self,
        directions: Sequence[Direction],
        name: str,
        sizes: tuple[int, int, int],
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        rows, columns, rank = sizes
        seeds = list(dict.fromkeys(seed for d in directions for seed, _ in d.terms)) or [0]
        number = {seed: index for index, seed in enumerate(seeds)}
        most = max(1, *(len(d.terms) for d in directions))
        padded = [[*d.terms, *[(seeds[0], 0.0)] * (most - len(d.terms))] for d in directions]
        which = torch.tensor([[number[s] for s, _ in terms] for terms in padded], device=device)
        weights = torch.tensor([[w for _, w in terms] for terms in padded], device=device)
        left = self._factor(seeds, f"{name}, left", rows, rank, device)[which]
        left = left * (weights / math.sqrt(rank))[..., None, None]
        right = self._factor(seeds, f"{name}, right", columns, rank, device)[which]
        # The terms of a direction stand side by side: [K, T, rows, r] as [K, rows, T * r].
        return left.transpose(1, 2).flatten(2), right.transpose(1, 2).flatten(2)

    def _factor(
        self, seeds: Sequence[int], name: str, rows: int, rank: int, device: torch.device
    ) -> Tensor:
        """A factor of each seed, float32 [S, rows, rank]."""
        noise = noise_blocks(seeds, name, 0, rows * rank, self.distribution, device)
        return noise.view(-1, rows, rank)

    def _basis(self, name: str, rows: int, rank: int, device: torch.device) -> Tensor:
        seed, basis = self._orthonormal.get(name, (None, torch.empty(0)))
        if seed != self.basis_seed:
            noise = noise_blocks([self.basis_seed], name, 0, rows * rank, "gaussian", device)
            basis = torch.linalg.qr(noise.view(rows, rank)).Q
            self._orthonormal[name] = self.basis_seed, basis
        return basis


#: What the numbers of a seed are: independent ones of a distribution, or low-rank noise.
Noise = Distribution | LowRank


def add_directions(
    into: Tensor, directions: Sequence[Direction], noise: Noise, layout: Layout
) -> None:
    """Add each direction to its row of `into` [rows, numel]; noise they share is made once.

    Full noise goes chunk by chunk. Product and sum round separately, so that they are alike on
    every device (the product with a sign is exact: there both may be one operation).
    """
    if isinstance(noise, LowRank):
        for name, where in layout.slices.items():
            own = noise.dense(directions, name, layout.shapes[name], into.device)
            into[:, where] += own.flatten(1)
        return
    rows: dict[int, list[tuple[int, float]]] = {}
    for row, direction in enumerate(directions):
        for seed, weight in direction.terms:
            rows.setdefault(seed, []).append((row, weight))
    width = min(chunk(into.device), layout.numel)
    for start in range(0, layout.numel, width):
        stop = min(start + width, layout.numel)
        part = into[:, start:stop].unbind()
        for terms, numbers in zip(rows.values(), layout.noises(list(rows), start, stop, noise)):
            for row, weight in terms:
                if noise == "rademacher":
                    part[row].add_(numbers, alpha=weight)
                else:
                    part[row].add_(numbers * weight)


def summed(
    directions: Sequence[Direction],
    name: str,
    start: int,
    stop: int,
    distribution: Distribution,
    device: torch.device,
) -> Tensor:
    """Numbers `start` to `stop` of K directions of full noise: float32 [K, stop - start]."""
    seeds = list(dict.fromkeys(seed for d in directions for seed, _ in d.terms))
    weights = [dict.fromkeys(seeds, 0.0) for _ in directions]
    for mine, direction in zip(weights, directions):
        for seed, weight in direction.terms:
            mine[seed] += weight
    matrix = torch.tensor([list(mine.values()) for mine in weights], device=device)
    sums = torch.zeros(len(directions), stop - start, device=device)
    at_once = max(1, chunk(device) // (stop - start))
    for first in range(0, len(seeds), at_once):
        part = slice(first, first + at_once)
        noise = noise_blocks(seeds[part], name, start, stop, distribution, device)
        sums.addmm_(matrix[:, part], noise)
    return sums
