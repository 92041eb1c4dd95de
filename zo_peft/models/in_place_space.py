"""The base's own numbers as a space: weights, int8 codes, quantization scales; perturbed on read.

A layer's forward sees a scratch copy of that layer's numbers, or adds a low-rank term to its
output. What the model holds is written by moves alone, so an evaluation, finished or not, leaves it
bit for bit as it was, and scratch memory is that of one layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from zo_peft.core.direction import Direction
from zo_peft.core.lanes import NotInLanes, Replacement
from zo_peft.core.low_rank import LowRank, Noise
from zo_peft.core.noise import derive_seed
from zo_peft.core.space import check_fit
from zo_peft.errors import UserError
from zo_peft.models.in_place_layers import IN_LANES, BaseLanes, DirectionRows, Uniforms, replacement
from zo_peft.models.numbers import Numbers, Owners


class InPlaceSpace:
    """Numbers of a base model that are tuned in place.

    Args:
        owners: of every module that owns tuned numbers, those, by attribute: `weight`, `bias`,
            `SCB`, `absmax`. Tied weights are one `Numbers` with several owners.
        noise: its distribution; or low-rank noise, which many candidates can share a forward with.

    Attributes:
        parameters: the parameters of those modules that hold or belong to tuned numbers, by name.
        numel: how many numbers are tuned.
        moves: so far; rounding depends on it.

    Raises:
        UserError: there is nothing to tune.
    """

    def __init__(self, owners: Owners, noise: Noise) -> None:
        self.noise = noise
        self.owners = dict(owners)
        self.numbers = {n.name: n for _, own in owners.values() for n in own.values()}
        if not self.numbers:
            raise UserError("there is nothing to tune: no tensor of the base was chosen")
        self.parameters = {name: numbers.parameter for name, numbers in self.numbers.items()}
        self.numel = sum(numbers.stored.numel() for numbers in self.numbers.values())
        self.moves = 0
        self._replacements = {
            name: replacement(module, own, noise) for name, (module, own) in owners.items()
        }

    @property
    def lane_numel(self) -> int:
        """How many numbers a candidate holds while it is evaluated: those of one layer."""
        rank = self.noise.rank if isinstance(self.noise, LowRank) else 0
        sizes = [
            rank * sum(n.stored.shape) if rank and n.stored.dim() == 2 else n.stored.numel()
            for n in self.numbers.values()
        ]
        return max(sizes)

    def replacements(self) -> dict[str, Replacement]:
        """How each module that owns tuned numbers works lane by lane.

        Raises:
            NotInLanes: a module needs a copy of its numbers for each candidate.
        """
        for name, (module, _, function) in self._replacements.items():
            if getattr(function, "func", None) not in IN_LANES:
                raise NotInLanes(f"{name} (a {type(module).__name__})")
        return self._replacements

    @contextmanager
    def displaced(self, displacement: Direction) -> Iterator[None]:
        """Within the context the model is at `theta + displacement`; after it, at `theta` again."""
        with self.lanes([displacement]).active(self._replacements, 1, 1):
            yield

    def lanes(self, displacements: Sequence[Direction]) -> "BaseLanes":
        """The model at `theta` plus every displacement, for all in one forward."""
        return BaseLanes(displacements, self.noise)

    def move(self, displacement: Direction, shrink: Mapping[str, float] | None = None) -> None:
        """`theta <- theta + displacement`; `shrink` first multiplies the parameters it names."""
        seed = self._rounding_seed()
        for numbers in self.numbers.values():
            steps = DirectionRows(displacement, numbers, self.noise)
            self._write(numbers, steps, seed, (shrink or {}).get(numbers.name, 1.0))

    def shift(self, index: int, step: Tensor, scale: float, shrink: Mapping[str, float]) -> None:
        """`theta <- theta + scale * step`, in `buffers[index]`; `shrink` as in `move`."""
        numbers = list(self.numbers.values())[index]
        matrix = step.view(numbers.matrix.shape)
        keep = shrink.get(numbers.name, 1.0)
        self._write(numbers, lambda rows: matrix[rows] * scale, self._rounding_seed(), keep)

    def _rounding_seed(self) -> int:
        self.moves += 1
        return derive_seed(self.moves)

    def _write(
        self, numbers: Numbers, steps: Callable[[slice], Tensor], seed: int, keep: float
    ) -> None:
        device = numbers.stored.device
        numbers.moved, numbers.saturated = torch.zeros(2, dtype=torch.int64, device=device).unbind()
        uniforms = Uniforms(numbers, seed)
        for rows in numbers.chunks():
            change = steps(rows)
            if keep != 1.0:
                change = change - (1.0 - keep) * numbers.value(rows)
            numbers.write(rows, change, uniforms(rows))

    def shares(self) -> dict[str, float]:
        """Of all numbers, the shares that the last move changed and kept from passing an end."""
        numbers = self.numbers.values()
        return {
            "moved": sum(int(n.moved) for n in numbers) / self.numel,
            "saturated": sum(int(n.saturated) for n in numbers) / self.numel,
        }

    @property
    def buffers(self) -> list[Tensor]:
        """The tuned tensors, as the model holds them."""
        return [numbers.stored for numbers in self.numbers.values()]

    def dense(self, index: int, direction: Direction) -> Tensor:
        """The direction as a float32 tensor of the shape of `buffers[index]`."""
        numbers = list(self.numbers.values())[index]
        steps = DirectionRows(direction, numbers, self.noise)
        return torch.cat([steps(rows) for rows in numbers.chunks()]).view(numbers.stored.shape)

    def views(self, index: int, flat: Tensor) -> dict[str, Tensor]:
        """A tensor like `buffers[index]` by the name of its numbers."""
        return {list(self.numbers)[index]: flat}

    def tensors(self) -> dict[str, Tensor]:
        """The tuned tensors by name, as the model holds them."""
        return {name: numbers.stored for name, numbers in self.numbers.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the tuned tensors by name, all of them and no others.

        Raises:
            UserError: names, shapes or dtypes differ from this space's; nothing is changed then.
        """
        mine = self.tensors()
        check_fit(mine, tensors)
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
