"""Parameters as a space: `theta` lies in one flat float32 buffer and is perturbed on a copy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from zo_peft.core.direction import Direction
from zo_peft.core.lanes import Lanes
from zo_peft.core.low_rank import Noise, add_directions
from zo_peft.core.noise import Layout
from zo_peft.core.space import Space
from zo_peft.errors import UserError

#: A buffer has at most so many numbers, or those of one parameter: candidates hold the values of
#: few buffers at a time.
BLOCK = 1 << 19


class _Flat:
    """Parameters of one device: `theta`, and the `live` copy that the model reads."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        device = next(iter(parameters.values())).device
        self.layout = Layout({name: p.shape for name, p in parameters.items()}, device)
        self.theta = torch.zeros(self.layout.numel, device=device)
        for name, view in self.layout.views(self.theta).items():
            view.copy_(parameters[name].detach())
        self.live = self.theta.clone()
        for name, view in self.layout.views(self.live).items():
            parameters[name].data = view

    def shrink(self, buffer: Tensor, factors: Mapping[str, float]) -> None:
        """Multiply the parameters that are named, in `theta` or `live`."""
        for name in factors.keys() & self.layout.slices.keys():
            buffer[self.layout.slices[name]] *= factors[name]


class FlatSpace(Space):
    """Parameters of a model, float32; see `Space` for the methods.

    The parameters become views into a flat buffer. Evaluations write `theta + displacement` into
    it and put `theta` back, so `theta` itself changes in moves alone. Parameters may lie on
    several devices. A UserError says that one is not floating point, or that there is none.
    `held` is of how many buffers lanes keep the values.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], noise: Noise = "gaussian") -> None:
        if not parameters:
            raise UserError("there is nothing to tune: the adapter has no trainable parameter")
        blocks: list[dict[str, nn.Parameter]] = []
        size, device = 0, None
        for name, parameter in parameters.items():
            if not parameter.is_floating_point():
                raise UserError(f"{name} is {parameter.dtype}; only floating point can be tuned")
            size += parameter.numel()
            if parameter.device != device or size > BLOCK:
                blocks.append({})
                size, device = parameter.numel(), parameter.device
            blocks[-1][name] = parameter
        self.noise, self.parameters, self.held = noise, dict(parameters), 2
        self.numel = sum(parameter.numel() for parameter in parameters.values())
        self._flats = [_Flat(block) for block in blocks]
        self._homes: dict[Tensor, _Flat] = {
            p: flat for flat, block in zip(self._flats, blocks) for p in block.values()
        }
        self._vectors: list[Mapping[str, Tensor]] = []

    @property
    def buffers(self) -> list[Tensor]:
        """`theta`: flat float32 tensors, each of neighbouring parameters of one device."""
        return [flat.theta for flat in self._flats]

    @property
    def lane_numel(self) -> int:
        """As of `Space`: those of the largest buffers, of which `held` are there at a time."""
        return sum(sorted(buffer.numel() for buffer in self.buffers)[-self.held :])

    def keep_values(self) -> None:
        """As of `Space`: those of all buffers."""
        self.held = len(self.buffers)

    @contextmanager
    def displaced(self, displacement: Direction) -> Iterator[None]:
        """As of `Space`."""
        try:
            for flat in self._flats:
                flat.live.copy_(flat.theta)
                self._add(flat, flat.live[None], [displacement])
            yield
        finally:
            self._restore()

    def lanes(self, displacements: Sequence[Direction]) -> Lanes:
        """As of `Space`; their values are made when the model reads them."""
        return _Lanes(self, displacements)

    def _values(self, flat: _Flat, displacements: Sequence[Direction]) -> dict[Tensor, Tensor]:
        points = flat.theta.repeat(len(displacements), 1)
        self._add(flat, points, displacements)
        views = flat.layout.views(points)
        return {self.parameters[name]: view for name, view in views.items()}

    def move(self, displacement: Direction, shrink: Mapping[str, float] | None = None) -> None:
        """As of `Space`; an exception leaves all as it was."""
        try:
            for flat in self._flats:
                flat.live.copy_(flat.theta)
                flat.shrink(flat.live, shrink or {})
                add_directions(flat.live[None], [displacement], self.noise, flat.layout)
        except BaseException:
            self._restore()
            raise
        for flat in self._flats:
            flat.theta.copy_(flat.live)

    def dense(self, index: int, direction: Direction) -> Tensor:
        """As of `Space`."""
        flat = self._flats[index]
        tensor = torch.zeros_like(flat.theta)
        add_directions(tensor[None], [direction], self.noise, flat.layout)
        return tensor

    def shift(self, index: int, step: Tensor, scale: float, shrink: Mapping[str, float]) -> None:
        """As of `Space`."""
        flat = self._flats[index]
        flat.shrink(flat.theta, shrink)
        flat.theta.add_(step, alpha=scale)
        flat.live.copy_(flat.theta)

    def views(self, index: int, flat: Tensor) -> dict[str, Tensor]:
        """As of `Space`."""
        return self._flats[index].layout.views(flat)

    def tensors(self) -> dict[str, Tensor]:
        """As of `Space`."""
        views = [flat.layout.views(flat.theta) for flat in self._flats]
        return {name: view for group in views for name, view in group.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """As of `Space`."""
        super().load(tensors)
        self._restore()

    @contextmanager
    def vectors(self, vectors: Sequence[Mapping[str, Tensor]]) -> Iterator[list[int]]:
        """Within the context (negative) seeds stand for vectors: tensors by name, else zeros.

        Vectors that are in one direction have no name in common.
        """
        self._vectors = list(vectors)
        try:
            yield [-1 - index for index in range(len(vectors))]
        finally:
            self._vectors = []

    def check(self) -> None:
        """Raise a UserError where a parameter was changed by others since the space was made."""
        # A GPU is waited for once, whatever the number of buffers.
        first = self.buffers[0].device
        edited = bool(sum((flat.live != flat.theta).any().to(first) for flat in self._flats))
        live = [flat.layout.views(flat.live).items() for flat in self._flats]
        for (name, view), kept in zip(chain(*live), self.tensors().values()):
            now = self.parameters[name]
            if now.data_ptr() != view.data_ptr() or (edited and not torch.equal(now, kept)):
                why = f"{name} was changed after the trainer was built, which would be lost"
                raise UserError(f"{why}; change it before, and build the trainer then")

    def _add(self, flat: _Flat, into: Tensor, displacements: Sequence[Direction]) -> None:
        noise = [Direction(tuple(t for t in d.terms if t[0] >= 0)) for d in displacements]
        add_directions(into, noise, self.noise, flat.layout)
        for row, displacement in zip(into, displacements):
            given = [(self._vectors[-1 - s], weight) for s, weight in displacement.terms if s < 0]
            terms = [(x, n, weight) for vector, weight in given for n, x in vector.items()]
            if terms := [term for term in terms if term[1] in flat.layout.slices]:
                tensors, names, weights = zip(*terms)
                added = torch._foreach_mul([x.flatten() for x in tensors], weights)
                torch._foreach_add_([row[flat.layout.slices[name]] for name in names], added)

    def _restore(self) -> None:
        for flat in self._flats:
            flat.live.copy_(flat.theta)


class _Lanes(Lanes):
    """Lanes that hold the values of few buffers: what is read next is mostly of the same ones."""

    def __init__(self, space: FlatSpace, displacements: Sequence[Direction]) -> None:
        super().__init__({}, len(displacements))
        self._space, self._displacements = space, displacements
        self._made: dict[_Flat, dict[Tensor, Tensor]] = {}

    def of(self, parameter: Tensor) -> Tensor:
        """As of `Lanes`."""
        flat = self._space._homes.get(parameter)
        if flat is None:
            return super().of(parameter)
        self.read.add(parameter)
        if flat not in self._made:
            if len(self._made) == self._space.held:
                del self._made[next(iter(self._made))]
            self._made[flat] = self._space._values(flat, self._displacements)
        return self._made[flat][parameter]
