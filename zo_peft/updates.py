"""Update rules: how a direction and a slope move `theta`."""

from collections.abc import Mapping
from typing import Any

import torch

from zo_peft.spaces import AdapterSpace
from zo_peft.strategies import Estimate


class SGD(torch.optim.Optimizer):
    """`theta <- (1 - lr * weight_decay) * theta - lr * slope * direction` (MeZO, eq. 4).

    A torch optimizer, so that transformers' schedulers and callbacks drive it; it reads no
    gradient. Set `estimate` before each `step`.

    Args:
        decayed: names of the parameters that `weight_decay` shrinks.
    """

    def __init__(
        self,
        space: AdapterSpace,
        learning_rate: float,
        weight_decay: float = 0.0,
        decayed: tuple[str, ...] = (),
    ) -> None:
        super().__init__(space.buffers, {"lr": learning_rate, "weight_decay": weight_decay})
        self.space, self.decayed = space, decayed
        self.estimate: Estimate | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move `theta` by the estimate, once."""
        if self.estimate is None:
            return
        group = self.param_groups[0]
        keep = 1.0 - group["lr"] * group["weight_decay"]
        shrink: Mapping[str, float] = dict.fromkeys(self.decayed, keep) if keep != 1.0 else {}
        direction = self.estimate.direction
        self.space.move(-(group["lr"] * self.estimate.slope) * direction, shrink)
        self.estimate = None
