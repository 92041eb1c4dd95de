"""The numbers of a base as a space: weights, int8 codes or quantization scales.

A displacement is added while a layer runs: its forward sees a displaced copy of the layer's
numbers, or adds a low-rank term to its output. Only moves write to the model, so an evaluation
leaves it bit for bit as it was, also when it fails, and needs scratch memory for one layer only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zo_peft.core.direction import Direction
from zo_peft.core.lanes import NotInLanes, Replacement
from zo_peft.core.low_rank import LowRank, Noise
from zo_peft.core.noise import derive_seed
from zo_peft.core.space import Space
from zo_peft.models import in_place_layers as layers
from zo_peft.models.in_place_layers import BaseLanes, direction_rows
from zo_peft.models.numbers import Numbers, Owners


class InPlaceSpace(Space):
    """Numbers of a base that are tuned where they lie; see `Space` for the methods.

    Args:
        owners: the modules that own tuned numbers (`zo_peft.models.numbers`), at least one.
        noise: a distribution, or low-rank noise, with which candidates share a forward pass.

    Attributes:
        numbers: the tuned numbers by name. Tied weights are one `Numbers` of several owners.
        parameters: the parameters that hold tuned numbers or belong to them, by name.
        moves: how many moves were made; the random numbers that round a move depend on it.
    """

    def __init__(self, owners: Owners, noise: Noise) -> None:
        self.noise, self.owners, self.moves = noise, owners, 0
        self.numbers = {n.name: n for _, own in owners.values() for n in own.values()}
        self.parameters = {name: numbers.parameter for name, numbers in self.numbers.items()}
        self.numel = sum(numbers.stored.numel() for numbers in self.numbers.values())
        self._by_index = list(self.numbers.values())
        self._sites: dict[str, Replacement] = {
            name: (module, "forward", layers.Site(name, module, own, noise))
            for name, (module, own) in owners.items()
        }

    @property
    def lane_numel(self) -> int:
        """As of `Space`: the numbers of the largest layer, for each layer makes its own."""
        rank = self.noise.rank if isinstance(self.noise, LowRank) else 0
        return max(
            rank * sum(n.stored.shape) if rank and n.stored.dim() == 2 else n.stored.numel()
            for n in self._by_index
        )

    def keep_values(self) -> None:
        """As of `Space`: each layer makes its own anew, because all together are too many."""

    def replacements(self) -> dict[str, Replacement]:
        """How each module that owns tuned numbers works lane by lane; or `NotInLanes`."""
        for name, (module, _, site) in self._sites.items():
            if getattr(site, "stand_in", None) not in layers.IN_LANES:
                raise NotInLanes(f"{name} (a {type(module).__name__})")
        return self._sites

    def own_forwards(self) -> set[str]:
        """The tuned numbers that a module reads in its own forward, which is under way."""
        sites: Any = (site for _, _, site in self._sites.values())
        return {n.name for site in sites if site.running for n in site.own.values()}

    @contextmanager
    def displaced(self, displacement: Direction) -> Iterator[None]:
        """As of `Space`."""
        with self.lanes([displacement]).active(self._sites, 1, 1):
            yield

    def lanes(self, displacements: Sequence[Direction]) -> BaseLanes:
        """As of `Space`."""
        return BaseLanes(displacements, self.noise)

    def move(self, displacement: Direction, shrink: Mapping[str, float] | None = None) -> None:
        """As of `Space`."""
        self.moves += 1
        for numbers in self._by_index:
            self._write(numbers, direction_rows(displacement, numbers, self.noise), shrink or {})

    def shift(self, index: int, step: Tensor, scale: float, shrink: Mapping[str, float]) -> None:
        """As of `Space`."""
        self.moves += 1
        numbers = self._by_index[index]
        self._write(numbers, lambda rows: step.view(numbers.matrix.shape)[rows] * scale, shrink)

    def _write(
        self, numbers: Numbers, steps: Callable[[slice], Tensor], shrink: Mapping[str, float]
    ) -> None:
        keep = shrink.get(numbers.name, 1.0)
        numbers.start_counting()
        rounding = layers.rounding_rows(numbers, derive_seed(self.moves))
        for rows in numbers.chunks():
            change = steps(rows)
            if keep != 1.0:
                change = change - (1.0 - keep) * numbers.value(rows)
            numbers.write(rows, change, rounding(rows))

    def shares(self) -> dict[str, float]:
        """The shares of all numbers that the last move changed, and that it stopped at an end."""
        return {
            "moved": sum(int(n.moved) for n in self._by_index) / self.numel,
            "saturated": sum(int(n.saturated) for n in self._by_index) / self.numel,
        }

    @property
    def buffers(self) -> list[Tensor]:
        """As of `Space`: the tensors of the model itself, each in its own dtype."""
        return [numbers.stored for numbers in self._by_index]

    def dense(self, index: int, direction: Direction) -> Tensor:
        """As of `Space`."""
        numbers = self._by_index[index]
        steps = direction_rows(direction, numbers, self.noise)
        return torch.cat([steps(rows) for rows in numbers.chunks()]).view(numbers.stored.shape)

    def views(self, index: int, flat: Tensor) -> dict[str, Tensor]:
        """As of `Space`."""
        return {self._by_index[index].name: flat}

    def tensors(self) -> dict[str, Tensor]:
        """As of `Space`: the tensors of the model itself, each in its own dtype."""
        return {name: numbers.stored for name, numbers in self.numbers.items()}
