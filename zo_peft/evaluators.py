"""Evaluators: displacements in, batch losses out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zo_peft.direction import Direction
from zo_peft.objectives import Batch, Objective
from zo_peft.spaces import AdapterSpace


class SequentialEvaluator:
    """Evaluates displacements one by one: one forward pass for each on each micro-batch.

    Attributes:
        forward_passes: so far; one is one displacement through one micro-batch.
        examples_forwarded: so far; displacements times examples.
    """

    def __init__(self, model: nn.Module, space: AdapterSpace, objective: Objective) -> None:
        self.model, self.space, self.objective = model, space, objective
        self.forward_passes = 0
        self.examples_forwarded = 0

    @torch.no_grad()
    def __call__(self, points: Sequence[Direction], batches: Sequence[Batch]) -> list[float]:
        """The mean loss over the examples of all micro-batches, at `theta` plus each point.

        The losses stay on the device until the last forward is queued and are read once.
        """
        means = []
        for point in points:
            with self.space.displaced(point):
                means.append(self._mean_loss(batches))
        return torch.stack(means).tolist()

    def _mean_loss(self, batches: Sequence[Batch]) -> Tensor:
        losses = torch.cat([self.objective.losses(self.model, batch).double() for batch in batches])
        self.forward_passes += len(batches)
        self.examples_forwarded += len(losses)
        return losses.mean()
