"""A parameter space: the numbers that are tuned, and the model evaluated beside them."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from zo_peft.core.direction import Direction
from zo_peft.core.lanes import Lanes
from zo_peft.core.low_rank import Noise
from zo_peft.errors import UserError


class Space(Protocol):
    """The numbers that are tuned, called `theta`.

    An evaluation sees the model at `theta + displacement` and leaves `theta` bit for bit as it was,
    also when it raises. Only `move`, `shift` and `load` change `theta`. `FlatSpace` keeps numbers
    in a buffer of their own; `InPlaceSpace` (in `zo_peft.models`) tunes a base where it lies.

    `noise` is what a seed stands for, `numel` how many numbers are tuned.
    """

    noise: Noise
    numel: int
    parameters: dict[str, nn.Parameter]

    @property
    def buffers(self) -> list[Tensor]:
        """The tensors that hold `theta`."""

    @property
    def lane_numel(self) -> int:
        """How many float32 numbers a candidate holds while it is evaluated."""

    def keep_values(self) -> None:
        """Let lanes keep what they make, which generation reads again; `lane_numel` may be more."""

    def displaced(self, displacement: Direction) -> AbstractContextManager[None]:
        """Within the context the model is at `theta + displacement`; after it, at `theta` again."""

    def lanes(self, displacements: Sequence[Direction]) -> Lanes:
        """The model at `theta` plus every displacement, for all of them in one forward pass."""

    def move(self, displacement: Direction, shrink: Mapping[str, float] | None = None) -> None:
        """`theta <- theta + displacement`; `shrink` first multiplies the parameters it names."""

    def dense(self, index: int, direction: Direction) -> Tensor:
        """The direction as a float32 tensor of the shape of `buffers[index]`."""

    def shift(self, index: int, step: Tensor, scale: float, shrink: Mapping[str, float]) -> None:
        """`theta <- theta + scale * step` in `buffers[index]`; `shrink` as in `move`."""

    def views(self, index: int, flat: Tensor) -> dict[str, Tensor]:
        """A tensor of the shape of `buffers[index]`, cut into parameters by name; no copies."""

    def tensors(self) -> dict[str, Tensor]:
        """`theta` by parameter name and in its shape; no copies."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set `theta` from tensors by name; a UserError refuses others, and changes nothing."""
        fill(self.tensors(), tensors)


def fill(mine: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into those of the same names; a UserError where they do not fit."""
    one, other = ({(n, t.shape, t.dtype) for n, t in part.items()} for part in (mine, given))
    if wrong := sorted({name for name, *_ in one ^ other}):
        why = f"{wrong[0]} and {len(wrong) - 1} more differ in name, shape or dtype"
        advice = "use model, peft_config, tune, tunable of that run"
        raise UserError(f"the saved state does not fit what is tuned here: {why}; {advice}")
    for name, tensor in given.items():
        mine[name].detach().copy_(tensor)
