"""Evaluators: displacements in, batch losses out."""

import math
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor

from zo_peft.direction import Direction
from zo_peft.memory import Fit
from zo_peft.objectives import Batch, Objective
from zo_peft.spaces import AdapterSpace, NotInLanes, find_replacements
from zo_peft.trunk import Trunk, find_trunk


class Evaluator:
    """Evaluates displacements, as many in one forward as fit, and frozen layers once a batch.

    Several displacements in one forward are lanes of one batch (`zo_peft.spaces.lanes`). An
    adapter with a module that cannot work so, or an objective without `repeated`, has its
    displacements evaluated one by one, with one warning that says why.

    Args:
        candidates_per_forward: the most displacements in one forward; None: as many as keep the
            memory near that of plain inference on the same batch (`zo_peft.memory`).

    Attributes:
        forward_passes: so far; one is one displacement through one micro-batch.
        examples_forwarded: so far; displacements times examples.
    """

    def __init__(
        self,
        model: PeftModel,
        space: AdapterSpace,
        objective: Objective,
        candidates_per_forward: int | None = None,
    ) -> None:
        self.model, self.space, self.objective = model, space, objective
        self.candidates_per_forward = candidates_per_forward
        self.forward_passes = 0
        self.examples_forwarded = 0
        self._fit: Fit | None = None
        self._trunk: Trunk | None = None
        self._repeats = hasattr(objective, "repeated")
        if candidates_per_forward == 1:
            return
        try:
            self._replacements = find_replacements(model, space.parameters)
            if not self._repeats:
                raise NotInLanes(f"objective {type(objective).__name__} (it has no `repeated`)")
        except NotInLanes as error:
            self._one_by_one(error)

    @torch.no_grad()
    def __call__(self, points: Sequence[Direction], batches: Sequence[Batch]) -> list[float]:
        """The mean loss over the examples of all micro-batches, at `theta` plus each point.

        The losses stay on the device until the last forward is queued and are read once.

        Raises:
            torch.OutOfMemoryError: one displacement alone does not fit.
        """
        losses = torch.cat([self._batch_losses(points, batch) for batch in batches], dim=1)
        self.forward_passes += len(points) * len(batches)
        self.examples_forwarded += losses.numel()
        return losses.double().mean(dim=1).tolist()

    def _batch_losses(self, points: Sequence[Direction], batch: Batch) -> Tensor:
        """[points, examples]"""
        losses: list[Tensor] = []
        done = 0
        forward = partial(self.objective.losses, self.model, batch)
        if self._trunk is None:
            tuned = self.space.parameters.values()
            self._trunk = Trunk(find_trunk(self.model, tuned, forward) if self._repeats else [])
        with self._trunk.reused(forward):
            while done < len(points):
                wave = points[done : done + self._wave(len(points), batch)]
                try:
                    losses.append(self._wave_losses(wave, batch))
                    done += len(wave)
                    continue
                except NotInLanes as error:
                    self._one_by_one(error)
                except torch.OutOfMemoryError:
                    if len(wave) == 1:
                        raise
                    self._halve(len(wave))
        return torch.cat(losses)

    def _wave_losses(self, points: Sequence[Direction], batch: Batch) -> Tensor:
        """[points, examples], from one forward."""
        if len(points) == 1:
            with self.space.displaced(points[0]):
                return self.objective.losses(self.model, batch)[None]
        lanes = self.space.lanes(points)
        repeated = self.objective.repeated(batch, len(points))  # type: ignore[attr-defined]
        rows = len(batch["input_ids"])
        with lanes.active(self._replacements, rows, len(batch.get("rows", ())) or rows):
            return self.objective.losses(self.model, repeated).view(len(points), -1)

    def _wave(self, points: int, batch: Batch) -> int:
        """Points of one forward: waves of like size, none above the limit."""
        limit = self.candidates_per_forward
        if limit is None:
            self._fit = self._fit or Fit(self.model, self.space.numel)
            limit = self._fit(batch)
        return math.ceil(points / math.ceil(points / limit))

    def _one_by_one(self, reason: NotInLanes) -> None:
        self.candidates_per_forward = 1
        warnings.warn(
            f"candidates are evaluated one by one: {reason} cannot work on several at once",
            UserWarning,
            stacklevel=2,
        )

    def _halve(self, size: int) -> None:
        self.candidates_per_forward = size // 2
        warnings.warn(
            f"{size} candidates do not fit into the GPU's memory at once; going on with "
            f"candidates_per_forward={size // 2}",
            UserWarning,
            stacklevel=2,
        )
