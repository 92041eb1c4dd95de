"""Parameters as a space: `theta` lies in one flat float32 buffer and is perturbed on a copy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zo_peft.core.direction import Direction
from zo_peft.core.lanes import Lanes
from zo_peft.core.low_rank import Noise, add_directions
from zo_peft.core.noise import Layout
from zo_peft.core.space import fill
from zo_peft.errors import UserError


class _Flat:
    """The tuned parameters of one device: `theta`, and the `live` copy that the model reads."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
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


class FlatSpace:
    """Parameters of a model, float32; see `Space` for the methods.

    The parameters become views into a flat buffer. Evaluations write `theta + displacement` into
    it and put `theta` back, so `theta` itself changes in moves alone. Parameters may lie on
    several devices. A UserError says that one is not floating point, or that there is none.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], noise: Noise = "gaussian") -> None:
        if not parameters:
            raise UserError("there is nothing to tune: the adapter has no trainable parameter")
        by_device: dict[torch.device, dict[str, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            if not parameter.is_floating_point():
                raise UserError(f"{name} is {parameter.dtype}; only floating point can be tuned")
            by_device.setdefault(parameter.device, {})[name] = parameter
        self.noise, self.parameters = noise, dict(parameters)
        self.numel = sum(parameter.numel() for parameter in parameters.values())
        self._flats = [_Flat(group, device) for device, group in by_device.items()]
        self._vectors: list[Mapping[str, Tensor]] = []

    @property
    def buffers(self) -> list[Tensor]:
        """`theta`, one flat float32 tensor a device."""
        return [flat.theta for flat in self._flats]

    @property
    def lane_numel(self) -> int:
        """As of `Space`: all numbers, for each candidate has a copy of its own."""
        return self.numel

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
        """As of `Space`."""
        values: dict[Tensor, Tensor] = {}
        for flat in self._flats:
            points = flat.theta.repeat(len(displacements), 1)
            self._add(flat, points, displacements)
            views = flat.layout.views(points)
            values |= {self.parameters[name]: view for name, view in views.items()}
        return Lanes(values, len(displacements))

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
        fill(self.tensors(), tensors)
        self._restore()

    @contextmanager
    def vectors(self, vectors: Sequence[Mapping[str, Tensor]]) -> Iterator[list[int]]:
        """Within the context (negative) seeds stand for vectors: tensors by name, else zeros."""
        self._vectors = list(vectors)
        try:
            yield [-1 - index for index in range(len(vectors))]
        finally:
            self._vectors = []

    def check(self) -> None:
        """Raise a UserError where a parameter was changed by others since the space was made."""
        for flat in self._flats:
            live = flat.layout.views(flat.live)
            for name, view in flat.layout.views(flat.theta).items():
                now = self.parameters[name]
                if now.data_ptr() != live[name].data_ptr() or not torch.equal(now, view):
                    why = f"{name} was changed after the trainer was built, which would be lost"
                    raise UserError(f"{why}; change it before, and build the trainer then")

    def _add(self, flat: _Flat, into: Tensor, displacements: Sequence[Direction]) -> None:
        noise = [Direction(tuple(t for t in d.terms if t[0] >= 0)) for d in displacements]
        add_directions(into, noise, self.noise, flat.layout)
        for row, displacement in enumerate(displacements):
            for seed, weight in displacement.terms:
                for name, tensor in self._vectors[-1 - seed].items() if seed < 0 else ():
                    if name in flat.layout.slices:
                        into[row, flat.layout.slices[name]].add_(tensor.flatten(), alpha=weight)

    def _restore(self) -> None:
        for flat in self._flats:
            flat.live.copy_(flat.theta)
