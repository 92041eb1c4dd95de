"""Evaluators: displacements in, batch losses out."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from zo_peft.direction import Direction
from zo_peft.memory import Fit, wave_size
from zo_peft.objectives import SHARE, Batch, Objective
from zo_peft.ranks import Ranks
from zo_peft.spaces import NotInLanes, Space
from zo_peft.trunk import Trunk, find_trunk


@dataclass(frozen=True)
class Evaluation:
    """The losses of M displacements for each of G parts of a batch.

    Attributes:
        losses: mean over a part's examples, [G][M].
        spread: standard deviation of a part's losses over the displacements, root mean square over
            the parts (whose losses are finite); 0 for one displacement.
        example_spread: the same of one example's losses.
    """

    losses: list[list[float]]
    spread: float
    example_spread: float


class Evaluator:
    """Evaluates displacements, as many in one forward as fit, and frozen layers once a batch.

    Several displacements in one forward are lanes of one batch (`zo_peft.spaces.lanes`). An
    adapter with a module that cannot work so, or an objective without `repeated`, has its
    displacements evaluated one by one, with one warning that says why.

    Args:
        candidates_per_forward: the most displacements in one forward; None: as many as keep the
            memory near that of plain inference on the same batch (`zo_peft.memory`).
        ranks: the processes among which the work is divided; None: this one does all.

    Attributes:
        forward_passes: so far; one is one displacement through one micro-batch.
        examples_forwarded: so far; displacements times examples.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        space: Space,
        objective: Objective,
        candidates_per_forward: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.space, self.objective = model, space, objective
        self.candidates_per_forward, self.ranks = candidates_per_forward, ranks
        self.forward_passes = 0
        self.examples_forwarded = 0
        self._fit: Fit | None = None
        self._trunk: Trunk | None = None
        self._repeats = hasattr(objective, "repeated")
        self._new_tokens = getattr(objective, "max_completion_length", 0)
        self._in_lanes = True
        try:
            self._replacements = space.replacements(model)
            if not self._repeats:
                raise NotInLanes(f"objective {type(objective).__name__} (it has no `repeated`)")
        except NotInLanes as error:
            self._one_by_one(error)

    def __call__(self, points: Sequence[Direction], batches: Sequence[Batch]) -> list[float]:
        """The mean loss over the examples of all micro-batches, at `theta` plus each point."""
        return self.evaluate([points], batches).losses[0]

    def parts(self, batches: Sequence[Batch]) -> int:
        """Into how many equal parts the batches can be cut for displacements of their own.

        As many as examples, where rows are examples, the tuned modules work lane by lane and
        micro-batches are of one size; else 1.
        """
        sizes = {self._examples(batch) for batch in batches}
        fit = self._in_lanes and len(sizes) == 1 and all(map(self._rows_are_examples, batches))
        parts = max(sizes) if fit else 1
        if self.ranks is None or self.ranks.parallel == "candidates":
            return parts
        return self.ranks.least(parts)

    def _examples(self, batch: Batch) -> int:
        """Of the whole batch, of which this rank may have a share."""
        if SHARE in batch:
            return batch[SHARE][2]
        return len(batch["labels" if "labels" in batch else "input_ids"])

    def _rows_are_examples(self, batch: Batch) -> bool:
        rows = len(batch["input_ids"])
        # A tuned head sees the scored positions alone, from which it could not tell the parts.
        told_apart = len(batch.get("rows", ())) in (0, rows) or not self._head_is_tuned()
        return len(batch.get("labels", ())) == rows and told_apart

    def _head_is_tuned(self) -> bool:
        head = self.model.get_output_embeddings()
        tuned = set(map(id, self.space.parameters.values()))
        return any(id(parameter) in tuned for parameter in head.parameters())

    @torch.no_grad()
    def evaluate(
        self, points: Sequence[Sequence[Direction]], batches: Sequence[Batch]
    ) -> Evaluation:
        """The losses of every part of the batches, each at `theta` plus displacements of its own.

        Part g of G is the g-th G-th of each micro-batch's rows. The losses stay on the device until
        the last forward is queued and are read once.

        Args:
            points: [G][M]; G is 1 or what `parts` says.

        Raises:
            torch.OutOfMemoryError: one displacement alone does not fit.
        """
        by_candidate = list(zip(*points))
        parts, count = len(points), len(by_candidate)
        micro = [self._all_losses(by_candidate, batch) for batch in batches]
        losses = torch.cat([m.view(count, parts, -1) for m in micro], dim=2).double()
        self.forward_passes += count * len(batches)
        self.examples_forwarded += losses.numel()
        means = losses.mean(dim=2)
        if count == 1:
            return Evaluation(means.T.tolist(), 0.0, 0.0)
        spreads = [values.var(dim=0).mean().sqrt() for values in (means, losses)]
        numbers = torch.cat([means.T.flatten(), torch.stack(spreads)]).tolist()
        *flat, spread, example_spread = numbers
        if not math.isfinite(spread + example_spread):
            spread, example_spread = (_finite_spread(values) for values in (means, losses))
        return Evaluation(
            [flat[start : start + count] for start in range(0, count * parts, count)],
            spread,
            example_spread,
        )

    def _all_losses(self, points: Sequence[Sequence[Direction]], batch: Batch) -> Tensor:
        if self.ranks is None:
            return self._batch_losses(points, batch)
        return self.ranks.losses(points, batch, self._examples(batch), self._batch_losses)

    def _batch_losses(self, points: Sequence[Sequence[Direction]], batch: Batch) -> Tensor:
        """Of points [M][G]: [M, examples]."""
        losses: list[Tensor] = []
        done = 0
        forward = partial(self.objective.losses, self.model, batch)
        if self._trunk is None:
            tuned = self.space.parameters.values()
            once = self._repeats and not self._new_tokens
            self._trunk = Trunk(find_trunk(self.model, tuned, forward) if once else [])
        with self._trunk.reused(forward):
            while done < len(points):
                wave = points[done : done + self._wave(points, batch)]
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

    def _wave_losses(self, points: Sequence[Sequence[Direction]], batch: Batch) -> Tensor:
        """Of points [M][G]: [M, examples], from one forward."""
        count, parts = len(points), len(points[0])
        if not self._in_lanes:
            return torch.stack([self._alone(candidate, batch) for candidate in points])
        if count * parts == 1:
            return self._alone(points[0], batch)[None]
        lanes = self.space.lanes(list(chain(*points)))
        repeated = self.objective.repeated(batch, count)  # type: ignore[attr-defined]
        rows = len(batch["input_ids"])
        scored = len(batch.get("rows", ())) or rows
        with lanes.active(self._replacements, rows // parts, scored // parts):
            return self.objective.losses(self.model, repeated).view(count, -1)

    def _alone(self, candidate: Sequence[Direction], batch: Batch) -> Tensor:
        """The losses of a candidate [examples]: a forward for each part, of which its rows count.

        More than one part only in the step that finds that a module cannot work lane by lane.
        """
        losses = []
        for part, point in enumerate(candidate):
            with self.space.displaced(point):
                whole = self.objective.losses(self.model, batch)
            losses.append(whole.view(len(candidate), -1)[part])
        return torch.cat(losses)

    def _wave(self, points: Sequence[Sequence[Direction]], batch: Batch) -> int:
        """Points of one forward: waves of like size, none above the limit."""
        limit = self.candidates_per_forward
        if limit is None:
            lane = self.space.lane_numel
            self._fit = self._fit or Fit(self.model, lane, self._new_tokens)
            limit = self._fit(batch, len(points[0]))
        return wave_size(len(points), limit)

    def _one_by_one(self, reason: NotInLanes) -> None:
        self.candidates_per_forward, self._in_lanes = 1, False
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


def _finite_spread(values: Tensor) -> float:
    """The standard deviation down the columns of [M, N], of those that are finite throughout."""
    finite = values[:, values.isfinite().all(dim=0)]
    return finite.var(dim=0).mean().sqrt().item() if finite.numel() else 0.0
