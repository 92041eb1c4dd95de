"""Update rules: how a direction and a slope move `theta`.

Each is a torch optimizer, so that schedulers can drive it; it reads no gradient. Set `estimate`
before each `step`. The estimated gradient is `g = estimate.slope * estimate.direction`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from zo_peft.core.orthogonal import orthogonalized
from zo_peft.core.space import Space
from zo_peft.core.strategies import Estimate


def unit(tensor: Tensor) -> Tensor:
    """A tensor at a root mean square of 1; zero stays zero."""
    return tensor * (math.sqrt(tensor.numel()) / tensor.norm()).nan_to_num(0.0, posinf=0.0)


class UpdateRule(torch.optim.Optimizer):
    """What all rules share: weight decay and the automatic step size.

    Args:
        learning_rate: as the rule defines it. With `automatic` it is in nats: how far a step in a
            random direction moves the loss of an example (root mean square). It is divided by
            `Estimate.sensitivity`, averaged over about `1 / (1 - momentum)` steps.
        decayed: names of the parameters that `weight_decay` shrinks.
        momentum, beta2: how much is kept of the last steps' gradient, and of its square; in [0, 1).

    Attributes:
        buffers: what the rule remembers, by name: float32, one like each of the space's buffers.
        steps: taken so far.
        sensitivity: averaged, in nats per unit of root-mean-square displacement; 0 before a step.
        backoff: the factor on every step (see `Backoff`).
        step_size: the length of the last step, schedule and automatic choice included.
    """

    BUFFERS: ClassVar[tuple[str, ...]] = ()
    #: What else a rule carries from step to step.
    NUMBERS: ClassVar[tuple[str, ...]] = ("steps", "sensitivity", "backoff")

    def __init__(
        self,
        space: Space,
        learning_rate: float,
        weight_decay: float = 0.0,
        decayed: tuple[str, ...] = (),
        automatic: bool = False,
        momentum: float = 0.9,
        beta2: float = 0.999,
    ) -> None:
        super().__init__(space.buffers, {"lr": learning_rate, "weight_decay": weight_decay})
        self.space, self.decayed, self.automatic = space, decayed, automatic
        self.momentum, self.beta2 = momentum, beta2
        self.estimate: Estimate | None = None
        self.steps, self.sensitivity, self.backoff, self.step_size = 0, 0.0, 1.0, 0.0
        self.buffers = {
            name: [torch.zeros_like(theta, dtype=torch.float32) for theta in space.buffers]
            for name in self.BUFFERS
        }

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move `theta` by the estimate, once."""
        if self.estimate is None:
            return
        self.steps += 1
        rate = self.param_groups[0]["lr"] * self.backoff
        if self.automatic:
            kept = min(self.momentum, 1.0 - 1.0 / self.steps)
            square = kept * self.sensitivity**2 + (1.0 - kept) * self.estimate.sensitivity**2
            self.sensitivity = math.sqrt(square)
            rate /= self.sensitivity or 1.0
        self.step_size = rate
        keep = 1.0 - rate * self.param_groups[0]["weight_decay"]
        shrink = dict.fromkeys(self.decayed, keep) if keep != 1.0 else {}
        self._move(rate, self.estimate, shrink)
        self.estimate = None

    def _gradient(self, index: int, estimate: Estimate) -> Tensor:
        """The estimated gradient of a buffer; zero where it is not known."""
        if estimate.gradients is None:
            return self.space.dense(index, estimate.slope * estimate.direction)
        gradient = torch.zeros_like(self.space.buffers[index])
        views = self.space.views(index, gradient)
        if known := views.keys() & estimate.gradients.keys():
            given = [estimate.gradients[name] for name in known]
            torch._foreach_copy_([views[name] for name in known], given)
        return gradient

    def _move(self, rate: float, estimate: Estimate, shrink: Mapping[str, float]) -> None:
        raise NotImplementedError


class SGD(UpdateRule):
    """`theta <- (1 - lr * weight_decay) * theta - lr * g` (MeZO, arXiv:2305.17333, eq. 4)."""

    def _move(self, rate: float, estimate: Estimate, shrink: Mapping[str, float]) -> None:
        self.space.move(-(rate * estimate.slope) * estimate.direction, shrink)


class FZOO(UpdateRule):
    """SGD with `g / spread`: a step of like length whatever the slope (arXiv:2506.09034, eq. 4).

    The length depends on the number of candidates alone; where it is chosen automatically, it is 1.
    """

    def _move(self, rate: float, estimate: Estimate, shrink: Mapping[str, float]) -> None:
        spread = estimate.spread
        if self.automatic:
            spread = abs(estimate.slope) * estimate.direction.length
        scale = estimate.slope / spread if spread else 0.0
        self.space.move(-(rate * scale) * estimate.direction, shrink)


class Momentum(UpdateRule):
    """`m <- momentum * m + g`, `theta <- theta - lr * m`, as `torch.optim.SGD` does."""

    BUFFERS: ClassVar[tuple[str, ...]] = ("momentum",)

    def _move(self, rate: float, estimate: Estimate, shrink: Mapping[str, float]) -> None:
        for index, m in enumerate(self.buffers["momentum"]):
            with self._known(index, estimate) as known:
                g = self._gradient(index, estimate)
                m.mul_(self.momentum).add_(g)
                self._remember(index, g)
                step = self._step(index)
            self.space.shift(index, step if known is None else step * known, -rate, shrink)

    @contextmanager
    def _known(self, index: int, estimate: Estimate) -> Iterator[Tensor | None]:
        """Which numbers of a buffer an estimate knows, if not all; the others' memory is kept."""
        buffer = self.space.buffers[index]
        names = self.space.views(index, buffer).keys()
        if estimate.gradients is None or estimate.gradients.keys() >= names:
            yield None
            return
        known = torch.ones_like(buffer, dtype=torch.bool)
        views, given = self.space.views(index, known), estimate.gradients
        torch._foreach_zero_([view for name, view in views.items() if name not in given])
        before = {name: flats[index].clone() for name, flats in self.buffers.items()}
        yield known
        for name, flats in self.buffers.items():
            flats[index].copy_(torch.where(known, flats[index], before[name]))

    def _remember(self, index: int, g: Tensor) -> None:
        """For a subclass: what to keep of the gradient of a buffer beside `m`."""

    def _step(self, index: int) -> Tensor:
        """What a buffer of `theta` moves against, for a learning rate of 1."""
        return self.buffers["momentum"][index]


class Normalized(Momentum):
    """Each tensor's `m` at a root mean square of 1, so the learning rate is how far a number moves.

    Normalized SGD with momentum (arXiv:2002.03305), tensor by tensor (as LARS, arXiv:1708.03888).
    """

    def _step(self, index: int) -> Tensor:
        step = self.buffers["momentum"][index].clone()
        for tensor in self.space.views(index, step).values():
            tensor.copy_(self._unit(tensor))
        return step

    def _unit(self, m: Tensor) -> Tensor:
        return unit(m)


class Spectral(Normalized):
    """As `Normalized`, each matrix made orthogonal first: all its singular values count alike.

    Muon's Newton-Schulz iteration; for zeroth-order estimates ZO-Muon (arXiv:2602.17155).
    """

    def _unit(self, m: Tensor) -> Tensor:
        return super()._unit(orthogonalized(m) if m.dim() == 2 and min(m.shape) > 1 else m)


class Adam(Momentum):
    """Adam on the estimate, number by number (ZO-AdaMM, arXiv:1910.06513)."""

    BUFFERS: ClassVar[tuple[str, ...]] = ("momentum", "square")

    def _remember(self, index: int, g: Tensor) -> None:
        square = self.buffers["square"][index]
        square.mul_(self.beta2).addcmul_(g, g, value=1.0 - self.beta2)

    def _step(self, index: int) -> Tensor:
        first = (1.0 - self.momentum) / (1.0 - self.momentum**self.steps)
        second = 1.0 / (1.0 - self.beta2**self.steps)
        # Below it a square is zero, so that nothing is known of a number's size.
        least = math.sqrt(torch.finfo(torch.float32).tiny)
        m, square = self.buffers["momentum"][index], self.buffers["square"][index]
        return first * m / (second * square).sqrt_().clamp_min(least)


class Guided(Adam, Normalized):
    """`Adam` for gradients that a guide has read, `Normalized` for what candidates have found.

    A step with candidates is longer, by the square root of its forward passes, as in a run of such
    steps alone, of which there are so many times fewer. Their estimates are hundreds of times as
    long as a gradient, so the guide forgets what they left where they have made whole steps.
    """

    NUMBERS: ClassVar[tuple[str, ...]] = (*UpdateRule.NUMBERS, "forgets")
    forgets = False

    def _move(self, rate: float, estimate: Estimate, shrink: Mapping[str, float]) -> None:
        self._from_candidates = bool(estimate.direction.terms)
        if self._from_candidates:
            rate *= math.sqrt(len(estimate.losses))
            self.forgets |= estimate.gradients is None
        elif self.forgets and estimate.gradients:
            for flat in (flat for flats in self.buffers.values() for flat in flats):
                flat.zero_()
            self.forgets, self.steps = False, 1
        super()._move(rate, estimate, shrink)

    def _step(self, index: int) -> Tensor:
        return (Normalized if self._from_candidates else Adam)._step(self, index)


#: The rules by name.
RULES: dict[str, type[UpdateRule]] = {"sgd": SGD, "momentum": Momentum, "normalized": Normalized}
RULES |= {"spectral": Spectral, "adam": Adam, "fzoo": FZOO, "guided": Guided}

#: The rules whose step has a root mean square of about 1 at a learning rate of 1, whatever the
#: gradient, so that a learning rate can be chosen by what such a step does.
AUTOMATIC = frozenset({"normalized", "spectral", "adam", "fzoo", "guided"})
