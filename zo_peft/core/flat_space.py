"""Parameters as a space: `theta` lies in one flat float32 buffer and is perturbed on a copy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from zo_peft.core.direction import Direction
from zo_peft.core.lanes import Lanes
from zo_peft.core.low_rank import LowRank
from zo_peft.core.noise import CHUNK, Distribution, Layout
from zo_peft.core.space import Noise, check_fit
from zo_peft.errors import UserError


class _Flat:
    """The tuned parameters of one device: `theta`, and the `live` copy that the model reads."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: torch.device) -> None:
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.layout = Layout({name: p.numel() for name, p in parameters.items()}, device)
        self.theta = torch.zeros(self.layout.numel, device=device)
        for name, parameter in parameters.items():
            self.theta[self.layout.slices[name]] = parameter.detach().flatten().float()
        self.live = self.theta.clone()
        for name, parameter in parameters.items():
            parameter.data = self.live[self.layout.slices[name]].view(parameter.shape)

    def add(self, into: Tensor, directions: Sequence[Direction], noise: Noise) -> None:
        """Add each direction to its row of `into` [rows, numel]; noise they share is made once."""
        if isinstance(noise, LowRank):
            for name, where in self.layout.slices.items():
                own = noise.dense(directions, name, self.shapes[name], into.device)
                into[:, where] += own.flatten(1)
        else:
            self._add_full(into, directions, noise)

    def _add_full(
        self, into: Tensor, directions: Sequence[Direction], distribution: Distribution
    ) -> None:
        """Chunk by chunk.

        Product and sum round separately, alike on every device (a sign's product is exact, so that
        the two may be one operation); a seed's terms go one by one.
        """
        rows: dict[int, list[tuple[int, float]]] = {}
        for row, direction in enumerate(directions):
            for seed, weight in direction.terms:
                rows.setdefault(seed, []).append((row, weight))
        width = min(CHUNK, self.layout.numel)
        for start in range(0, self.layout.numel, width):
            stop = min(start + width, self.layout.numel)
            part = into[:, start:stop].unbind()
            noises = self.layout.noises(list(rows), start, stop, distribution)
            for terms, noise in zip(rows.values(), noises):
                for row, weight in terms:
                    if distribution == "rademacher":
                        part[row].add_(noise, alpha=weight)
                    else:
                        part[row].add_(noise * weight)


class FlatSpace:
    """The tuned parameters of a model, float32, and nothing else.

    The model's parameters become views into a flat buffer; evaluations write `theta + displacement`
    into it and put `theta` back, so `theta` itself only ever changes in `move`.

    Args:
        parameters: the tuned parameters by name, floating point. They may lie on several devices.
        noise: its distribution; or low-rank noise.

    Attributes:
        parameters: as given.
        numel: how many numbers are tuned.

    Raises:
        UserError: a parameter is not floating point, or there is none.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], noise: Noise = "gaussian") -> None:
        if not parameters:
            raise UserError("there is nothing to tune: the adapter has no trainable parameter")
        for name, parameter in parameters.items():
            if not parameter.is_floating_point():
                raise UserError(f"{name} is {parameter.dtype}; only floating point can be tuned")
        self.noise = noise
        by_device: dict[torch.device, dict[str, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            by_device.setdefault(parameter.device, {})[name] = parameter
        self._flats = [_Flat(group, device) for device, group in by_device.items()]
        self.parameters = dict(parameters)
        self.numel = sum(parameter.numel() for parameter in parameters.values())

    @property
    def buffers(self) -> list[Tensor]:
        """`theta`, one flat float32 tensor a device."""
        return [flat.theta for flat in self._flats]

    @property
    def lane_numel(self) -> int:
        """How many numbers a candidate holds while it is evaluated."""
        return self.numel

    @contextmanager
    def displaced(self, displacement: Direction) -> Iterator[None]:
        """Within the context the model is at `theta + displacement`; after it, at `theta` again."""
        try:
            for flat in self._flats:
                flat.live.copy_(flat.theta)
                flat.add(flat.live[None], [displacement], self.noise)
            yield
        finally:
            self._restore()

    def lanes(self, displacements: Sequence[Direction]) -> Lanes:
        """Each parameter at `theta` plus every displacement, for all in one forward."""
        values: dict[Tensor, Tensor] = {}
        for flat in self._flats:
            points = flat.theta.repeat(len(displacements), 1)
            flat.add(points, displacements, self.noise)
            for name, where in flat.layout.slices.items():
                parameter = self.parameters[name]
                values[parameter] = points[:, where].view(-1, *parameter.shape)
        return Lanes(values, len(displacements))

    def move(self, displacement: Direction, shrink: Mapping[str, float] | None = None) -> None:
        """`theta <- theta + displacement`; `shrink` first multiplies the parameters it names."""
        try:
            for flat in self._flats:
                flat.live.copy_(flat.theta)
                for name, factor in (shrink or {}).items():
                    if name in flat.layout.slices:
                        flat.live[flat.layout.slices[name]] *= factor
                flat.add(flat.live[None], [displacement], self.noise)
        except BaseException:
            self._restore()
            raise
        for flat in self._flats:
            flat.theta.copy_(flat.live)

    def dense(self, index: int, direction: Direction) -> Tensor:
        """The direction as a tensor like `buffers[index]`."""
        flat = self._flats[index]
        tensor = torch.zeros_like(flat.theta)
        flat.add(tensor[None], [direction], self.noise)
        return tensor

    def shift(self, index: int, step: Tensor, scale: float, shrink: Mapping[str, float]) -> None:
        """`theta <- theta + scale * step`, in `buffers[index]`; `shrink` as in `move`."""
        flat = self._flats[index]
        for name, factor in shrink.items():
            if name in flat.layout.slices:
                flat.theta[flat.layout.slices[name]] *= factor
        flat.theta.add_(step, alpha=scale)
        flat.live.copy_(flat.theta)

    def views(self, index: int, flat: Tensor) -> dict[str, Tensor]:
        """A tensor like `buffers[index]` by parameter, in its shape; views, not copies."""
        slices = self._flats[index].layout.slices
        return {
            name: flat[where].view(self.parameters[name].shape) for name, where in slices.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """`theta` by parameter name and in its shape; views, not copies."""
        views = (self.views(index, flat) for index, flat in enumerate(self.buffers))
        return dict(chain.from_iterable(view.items() for view in views))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set `theta` from tensors by name, all of them and no others.

        Raises:
            UserError: names or shapes differ from this space's; nothing has been changed then.
        """
        mine = self.tensors()
        check_fit(mine, tensors)
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)
        self._restore()

    def _restore(self) -> None:
        for flat in self._flats:
            flat.live.copy_(flat.theta)
