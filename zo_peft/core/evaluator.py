"""Evaluators: displacements in, batch losses out."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from zo_peft.core.batch import Batch, Objective
from zo_peft.core.direction import Direction
from zo_peft.core.lanes import Host, NotInLanes
from zo_peft.core.ranks import Ranks
from zo_peft.core.space import Space
from zo_peft.errors import Notice


@dataclass(frozen=True)
class Evaluation:
    """The losses [G][M] of M displacements for each of G parts of a batch: means over examples.

    `spread` is their standard deviation over displacements, root mean square over parts;
    `example_spread` is that of one example's losses. Both are 0 for one displacement.
    """

    losses: list[list[float]]
    spread: float
    example_spread: float


class Evaluator:
    """Evaluates displacements, as many in one forward pass as fit.

    They are lanes of one batch then (`zo_peft.core.lanes`). Where a module cannot work so, or the
    objective is not `repeatable`, they are evaluated one by one, and one warning says why.

    Args:
        host: what is known of the model; default: that it is plain PyTorch.
        candidates_per_forward: the most displacements of a forward pass; None: as `Host.fit` says.
        ranks: the processes among which the work is divided; default: this one does all.

    Attributes:
        forward_passes: so far; one is one displacement through one micro-batch.
        examples_forwarded: so far; displacements times examples.
        read: the parameters whose values lanes have read in the last forward that had several.
    """

    def __init__(
        self,
        model: nn.Module,
        space: Space,
        objective: Objective,
        host: Host | None = None,
        candidates_per_forward: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.space, self.objective = model, space, objective
        self.host, self.ranks = host or Host.of_module(model, space.parameters), ranks or Ranks()
        self.candidates_per_forward = candidates_per_forward
        self.forward_passes, self.examples_forwarded, self._in_lanes = 0, 0, True
        self.read = set[Tensor]()
        if isinstance(self.host.replacements, NotInLanes):
            self.one_by_one(self.host.replacements)
        elif not getattr(objective, "repeatable", False):
            name = type(objective).__name__
            self.one_by_one(NotInLanes(f"objective {name} (it is not `repeatable`)"))

    def __call__(self, points: Sequence[Direction], batches: Sequence[Batch]) -> list[float]:
        """The mean loss over the examples of all micro-batches, at `theta` plus each point."""
        return self.evaluate([points], batches).losses[0]

    def parts(self, batches: Sequence[Batch]) -> int:
        """The number of equal parts of the batches that can have displacements of their own.

        Each example is one where lanes, rows and the sizes of micro-batches allow it; else all are.
        """
        sizes = {batch.examples for batch in batches}
        fit = self._in_lanes and len(sizes) == 1 and all(map(self._told_apart, batches))
        return self.ranks.parts(max(sizes) if fit else 1)

    def _told_apart(self, batch: Batch) -> bool:
        """Whether every tuned module sees which example a row of its input belongs to.

        A tuned head sees scored positions alone, so each row must have exactly one.
        """
        one_each = batch.scored in (0, batch.rows) or not self.host.head_is_tuned
        return one_each and len(batch.get("labels", ())) == batch.rows

    @torch.no_grad()
    def evaluate(
        self, points: Sequence[Sequence[Direction]], batches: Sequence[Batch]
    ) -> Evaluation:
        """The losses of every part of the batches, each at `theta` plus displacements of its own.

        Part g of G is the g-th G-th of each micro-batch's rows. The losses stay on the device until
        the last forward pass is queued, and are read once. `points` are [G][M]; G is 1 or what
        `parts` says.
        """
        by_candidate = list(zip(*points))
        parts, count = len(points), len(by_candidate)
        micro = [self.ranks.losses(by_candidate, batch, self.batch_losses) for batch in batches]
        losses = torch.cat([m.view(count, parts, -1) for m in micro], dim=2).double()
        self.forward_passes += count * len(batches)
        self.examples_forwarded += losses.numel()
        means = losses.mean(dim=2)
        if count == 1:
            return Evaluation(means.T.tolist(), 0.0, 0.0)
        spreads = [values.var(dim=0).mean().sqrt() for values in (means, losses)]
        read = torch.cat([means.T.flatten(), torch.stack(spreads)])
        *flat, spread, example_spread = read.tolist()
        if not math.isfinite(spread + example_spread):
            spread, example_spread = (_finite_spread(values) for values in (means, losses))
        by_part = [flat[start : start + count] for start in range(0, count * parts, count)]
        return Evaluation(by_part, spread, example_spread)

    def batch_losses(self, points: Sequence[Sequence[Direction]], batch: Batch) -> Tensor:
        """The losses [M, examples] of points [M][G], in waves: as many as fit at a time."""
        losses: list[Tensor] = []
        done = 0
        with self.host.reused(partial(self.objective.losses, self.model, batch)):
            while done < len(points):
                limit = self.candidates_per_forward or self.host.fit(batch, len(points[0]))
                wave = points[done : done + wave_size(len(points), limit)]
                try:
                    losses.append(self._wave_losses(wave, batch))
                    done += len(wave)
                except NotInLanes as error:
                    self.one_by_one(error)
                except torch.OutOfMemoryError:
                    if len(wave) == 1:
                        raise
                    half = self.candidates_per_forward = len(wave) // 2
                    message = f"{len(wave)} candidates do not fit into the GPU's memory at once"
                    message += f"; going on with candidates_per_forward={half}"
                    warnings.warn(message, Notice, stacklevel=2)
        return torch.cat(losses)

    def _wave_losses(self, points: Sequence[Sequence[Direction]], batch: Batch) -> Tensor:
        """The losses [M, examples] of points [M][G], from one forward pass."""
        count, parts = len(points), len(points[0])
        if not self._in_lanes:
            return torch.stack([self._alone(candidate, batch) for candidate in points])
        if count * parts == 1:
            return self._alone(points[0], batch)[None]
        lanes = self.space.lanes(list(chain(*points)))
        rows, scored = batch.rows, batch.scored or batch.rows
        assert not isinstance(self.host.replacements, NotInLanes)
        self.read = lanes.read
        with lanes.active(self.host.replacements, rows // parts, scored // parts, count):
            return self.objective.losses(self.model, batch.repeated(count)).view(count, -1)

    def _alone(self, candidate: Sequence[Direction], batch: Batch) -> Tensor:
        """The losses of a candidate [examples]: a forward pass for each part, whose rows it keeps.

        There is more than one part only in the step that finds that a module cannot work in lanes.
        """
        losses = []
        for part, point in enumerate(candidate):
            with self.space.displaced(point):
                whole = self.objective.losses(self.model, batch)
            losses.append(whole.view(len(candidate), -1)[part])
        return torch.cat(losses)

    def one_by_one(self, reason: NotInLanes) -> bool:
        """Evaluate candidates one by one from now on, and say why; False if it was so already."""
        was, self._in_lanes, self.candidates_per_forward = self._in_lanes, False, 1
        self.read = set()
        if not was:
            return False
        message = f"candidates are evaluated one by one: {reason} cannot work on several at once"
        warnings.warn(message, Notice, stacklevel=2)
        return True


def wave_size(count: int, limit: int) -> int:
    """Candidates of one forward pass: waves are of like size, and none is above the limit."""
    return math.ceil(count / math.ceil(count / limit))


def _finite_spread(values: Tensor) -> float:
    """The standard deviation down the columns of [M, N], of those that are finite throughout."""
    finite = values[:, values.isfinite().all(dim=0)]
    return finite.var(dim=0).mean().sqrt().item() if finite.numel() else 0.0
