"""The guide: what one forward pass tells about the gradient, and how far it is believed.

A forward pass yields the exact error at the output, `p = d loss / d h_L`, and the inputs of every
module. A transformer adds the output of each layer to a residual stream, so with the layers above
taken as the identity, `p` is the error at every layer (where norms lie in that stream, they and the
MLPs are not taken so). With it the gradients of an adapter have a closed form (`low_rank`), and no
backward pass is needed. To send the error of the output straight to every layer is direct feedback
alignment (arXiv:1609.01596), with the residual stream for random matrices.

`Guided` decides whether and which parts of such an estimate are followed. The measured loss has the
last word: the estimate is a candidate, as in guided evolution strategies (arXiv:1806.10230).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import compress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from zo_peft.core.batch import Batch, Objective
from zo_peft.core.direction import Direction
from zo_peft.core.evaluator import Evaluator
from zo_peft.core.flat_space import FlatSpace
from zo_peft.core.lanes import replaced
from zo_peft.core.noise import derive_seed
from zo_peft.core.strategies import Estimate

#: Gradients by parameter name, float32.
Gradients = dict[str, Tensor]

#: The first check of a guide uses this distance; later ones that of the check before.
EPS = 1e-2
#: Along the guide, a check goes as far as should change the loss by this share of it.
NEAR = 0.1
#: A guide is followed if the slope of the loss along it is at least this share of what it promises
#: (noise keeps about 1 / sqrt(its numbers), and gradients of other examples or labels what these
#: have in common) and at most promised / this share; two checks in a row that deny it drop it.
KEPT = 0.25
#: The forward passes of a check, and the most that the first one takes to find its distance.
CHECK_PASSES, FIRST_PASSES = 4, 12
#: Gradients of all examples are large if they take more bytes than this.
LARGE = 256 << 20
#: The steps from the first check to the second; from check to check they double.
FIRST_WAIT = 16
#: A guide that was dropped is followed again after so many checks in a row that agree.
AGAIN = 3
#: One step of so many is made with candidates, for the numbers that the guide does not know.
CANDIDATES_EVERY = 16


def low_rank(
    errors: Tensor, inputs: Tensor, a: Tensor, b: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of `A` and `B` of the LoRAs `y = W x + B A x` of L layers, sums of P parts.

    On the values of an attention, the error of a head at position n reaches the value at position j
    in proportion to the weight with which it attends to j. Heads that share a value are a group.
    Nothing that is made here is larger than the rank.

    Args:
        errors: d loss / d y at n positions, or d loss / d (the output of each head) at those of the
            m heads of each group, [L or 1, P, rows, groups, m * n, width]; of other modules there
            is one group.
        inputs: x there, [L, P, rows, n, in]; of values x at all positions j, or without `weights`
            its sums with them, [L, P, rows, groups * m * n, in].
        a, b: [L, r, in] and [L, groups * width, r].
        weights: [L, P, rows, groups * m * n, positions j].

    Returns:
        [L, P, r, in] and [L, P, groups * width, r].
    """
    by_group = b.unflatten(1, (errors.shape[3], -1))
    back = torch.einsum("lprgmw,lgwk->lprgmk", errors, by_group).flatten(3, 4)
    hidden = torch.einsum("lprsi,lki->lprsk", inputs, a)
    if weights is not None:
        back, hidden = weights.mT @ back, weights @ hidden
    hidden = hidden.unflatten(3, errors.shape[3:5])
    grad_a = torch.einsum("lprsk,lprsi->lpki", back, inputs)
    return grad_a, torch.einsum("lprgmw,lprgmk->lpgwk", errors, hidden).flatten(2, 3)


def covariance(weights: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What carries the error at a head's output to its query: [..., m, width, width].

    The weights w [..., m, S] are a softmax of scores q . k_j, so d output / d q is the covariance
    of values and keys [..., S, width] under w: `sum_j w_j k_j (v_j - v)^T`, `v = sum_j w_j v_j`.
    """
    centred = values.unsqueeze(-3) - (weights @ values).unsqueeze(-2)
    return torch.einsum("...sk,...msw->...mkw", keys, centred.mul_(weights[..., None]))


def at_queries(errors: Tensor, weights: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Errors [..., m, width] at the outputs of heads as errors at their queries.

    With weights, keys and values as of `covariance`, the error at score j is
    `w_j (e . v_j - sum_i w_i e . v_i)`.
    """
    scores = weights * (errors @ values.mT)
    return (scores - weights * scores.sum(dim=-1, keepdim=True)) @ keys


def unrotated(errors: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Errors of rotated queries as errors of the queries before: [..., heads, width].

    Rotary embeddings turn the pairs (i, i + width / 2) of a query, of all heads alike. The angles
    are read off the queries themselves, `before` and `after`; with no rotation they are zero. A
    pair that is zero in all heads tells no angle, and its errors become zero.
    """
    pairs = _pairs(before)
    size = pairs.abs().square().sum(dim=-2, keepdim=True)
    turn = (_pairs(after) * pairs.conj()).sum(dim=-2, keepdim=True) / size
    turn = turn.masked_fill(size == 0, 0)
    return torch.view_as_real(turn.conj() * _pairs(errors)).movedim(-1, -2).flatten(-2)


def _pairs(x: Tensor) -> Tensor:
    return torch.complex(*x.float().chunk(2, dim=-1))


class Guide(Protocol):
    """Reads gradients off forward passes; `zo_peft.models.guide` has the one for transformers.

    Attributes:
        objective: whose gradient it reads.
        in_nats: an objective of the same batches that says in nats how far noise moves the model.
        passes: what a reading costs, in forward passes, with all that has made its batch.
        looked: what the first one costs more.
        draws: how many batches it reads for each micro-batch.
    """

    objective: Objective
    in_nats: Objective
    passes: int
    looked: int
    draws: int

    def drawn(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches that it reads for those of a step."""

    def read(self, batch: Batch, parts: int = 1) -> tuple[Tensor, list[Gradients]]:
        """The losses [B] of a batch, and the gradients of their mean over each of equal parts."""

    def part(self, name: str) -> int:
        """The part of the model, for example the layer, to which a parameter belongs."""


@dataclass
class Guided:
    """Which parts of a guide are followed, and when it is checked again.

    A check compares losses on the batch that the guide has read, at both sides of `theta`: along
    the guide, and along it with a random sign for each of its parts. Every example has its own
    signs and goes along its own gradient, where lanes allow it: what the examples have in common,
    such as the frequency of labels, is soon learned and says little of the rest. That is four
    forward passes. The first check also measures how far noise moves the losses. Where the loss
    surely keeps less of what is promised than it did then, steps get shorter by the square of that.

    Attributes:
        followed: the parts whose measured slope agrees; none: candidates make the steps.
        due: the step of the next check.
        wait: the steps between the last check and the next.
        agreed, failed: how many of the last checks did, in a row.
        needed: how many must agree before the guide is followed.
        eps: the distance of noise in checks.
        sensitivity: how far noise moves an example's loss, over its distance; it only rises.
        at_first: the first one, and the share of what is promised that the loss kept then.
        tried: slope, promise and squared error of checks that were not sure.
    """

    guide: Guide
    evaluator: Evaluator
    seed: int
    followed: list[int] = field(default_factory=list)
    due: int = 0
    wait: int = FIRST_WAIT
    agreed: int = 0
    failed: int = 0
    needed: int = 1
    eps: float = EPS
    sensitivity: float = 0.0
    at_first: list[float] = field(default_factory=list)
    tried: list[list[float]] = field(default_factory=list)
    known: list[str] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Any]:
        """What is carried from step to step, in the types of JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)[3:]}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def estimate(
        self, batches: Sequence[Batch], number: int, parts: int
    ) -> tuple[Estimate, dict[str, Any]]:
        """The gradients of all parts that are followed, and what a check found.

        Where nothing is followed there are none, and the step moves nothing. Nor does it where they
        are zero, as with rewards that are all alike; a check that is due waits for others.

        Args:
            parts: those of the batches that may have displacements of their own.
        """
        batches = self.guide.drawn(batches)
        if number < self.due:
            parts = 1
        elif batches[0].share is None:
            parts = parts_of_check(parts, self.evaluator.space.numel)
        loss, scale, gradients, own = self._read(batches, parts)
        size = get_total_norm(gradients.values()).item()
        sound, chosen = bool(gradients) and math.isfinite(size), dict[str, Any]()
        if sound and not number:
            self._find_distance(batches, parts)
        if number >= self.due and (size or not gradients):
            self.due = number + self.wait
            chosen["guide"] = self._check(batches, number, scale, own) if sound else {}
        followed = self.followed if size else []
        known = {n: g for n, g in gradients.items() if self.guide.part(n) in followed}
        found = Estimate(Direction(), size, (loss,), sensitivity=self.sensitivity, gradients=known)
        return found, chosen

    def others(self, estimate: Estimate) -> Estimate:
        """What candidates found, for the numbers alone that the guide does not know."""
        space, found = self.evaluator.space, Gradients()
        for index in range(len(space.buffers)):
            views = space.views(index, space.dense(index, estimate.slope * estimate.direction))
            found |= {name: view for name, view in views.items() if name in self.rest}
        if self.jumps:
            estimate = replace(estimate, sensitivity=self.sensitivity)
        return replace(estimate, gradients=found)

    def passes(self, number: int) -> int:
        """The most forward passes of a step that reads the guide."""
        check = CHECK_PASSES if number >= self.due else 0
        return self.guide.draws * (self.guide.passes + check + (0 if number else FIRST_PASSES))

    @property
    def told(self) -> str:
        """What is known and followed, in one line."""
        count = len(self.evaluator.space.parameters)
        what = f"the guide reads {len(self.known)} of {count} tensors off each forward pass"
        if not self.followed:
            return f"{what}, but the loss does not follow; candidates make the steps"
        parts = len({self.guide.part(name) for name in self.known})
        rest = "; candidates tune the others" if self.rest else ""
        return f"{what}; losses confirm {len(self.followed)} of {parts} parts{rest}"

    def asks(self, number: int) -> bool:
        """Whether a step reads the guide; else candidates make it."""
        return number >= self.due or (bool(self.followed) and not self.mends(number))

    def mends(self, number: int) -> bool:
        """Whether candidates make a step for the numbers alone that the guide does not know."""
        return bool(self.followed and self.rest) and number % CANDIDATES_EVERY == 1

    @property
    def jumps(self) -> bool:
        """Whether losses of candidates jump, as rewards do, while the guide measures likelihoods.

        Then sensitivity and distance are the guide's in steps of candidates, too.
        """
        return self.guide.objective is not self.evaluator.objective

    @property
    def rest(self) -> set[str]:
        """The parameters that the guide does not know."""
        return self.evaluator.space.parameters.keys() - set(self.known)

    def _read(
        self, batches: Sequence[Batch], parts: int
    ) -> tuple[float, float, Gradients, list[Gradients]]:
        """The mean loss and size of losses, the gradients, and those of each part on this rank."""
        losses: list[Tensor] = []
        sums, own = Gradients(), [Gradients() for _ in range(parts)]
        for index, batch in enumerate(batches):
            first, last, _ = batch.share or (0, parts, parts)
            mine = own[first:last] if parts > 1 else own
            loss, found = self.guide.read(batch, max(1, len(mine)))
            whole, count = Gradients(), len(found)
            for part in found:
                add(whole, part, 1.0 / count)
            # Ranks whose batches have other masks may have read the layers in another order.
            whole = dict(sorted(whole.items()))
            if not self.known:
                self.evaluator.ranks.check("what the guide reads", *whole)
            for gradients in mine:
                # One at a time, so that no part is held twice.
                add(gradients, found.pop(0), 1.0 / len(batches))
            mean, *shares = self.evaluator.ranks.mean(
                [torch.stack([loss.mean(), loss.abs().mean()]), *whole.values()], batch
            )
            losses.append(mean.double())
            add(sums, dict(zip(whole, shares)), 1.0 / len(batches))
            # A run that goes on from a checkpoint looks again, and has counted that before.
            passes = self.guide.passes + self.guide.looked * (not index and not self.known)
            self.evaluator.forward_passes += passes
            self.evaluator.examples_forwarded += passes * batch.examples
        self.known = sorted(sums)
        mean, scale = torch.stack(losses).mean(dim=0).tolist()
        return mean, scale, sums, own

    def _check(
        self, batches: Sequence[Batch], number: int, scale: float, own: Sequence[Gradients]
    ) -> dict[str, Any]:
        """Measure the slope of the loss along each part of the model; follow those that agree."""
        parts = [self.guide.part(name) for name in self.known]
        each = sorted(set(parts))
        # Groups of neighbours: at most half as many as there are slopes to tell them apart.
        size = math.ceil(len(each) / max(1, len(own) // 2))
        groups = [each[start : start + size] for start in range(0, len(each), size)]
        members = torch.tensor([[part in group for part in parts] for group in groups]).double()
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number, -4) % 2**62)
        signs = torch.randint(2, (len(own), len(groups)), generator=generator).double() * 2 - 1
        promised, slopes = self._slopes(batches, scale, own, signs @ members)
        promised = members @ promised
        measured, covariances = _least_squares(signs, slopes[:, 1])
        agrees = measured + 2 * covariances.diagonal().sqrt() > 0
        # The sum is measured much better than its parts.
        whole = (slopes[:, 0].mean() - measured[~agrees].sum()).item()
        error, promise = covariances.sum().sqrt().item(), promised[agrees].sum().item()
        # Until it is followed, checks in a row count together.
        self.tried = [*self.tried, [whole, promise, error**2]]
        whole, promise, square = (sum(found) for found in zip(*self.tried))
        believed = bool(agrees.any()) and KEPT * promise < whole < promise / KEPT
        error, unsure = math.sqrt(square), believed and whole < 2 * math.sqrt(square)
        if unsure and not self.followed and len(self.tried) < AGAIN:
            self.due = number + 1
            return {"slope": whole, "promised": promise, "error": error, "followed": []}
        self.tried = []
        if believed:
            now = min(1.0, whole / promise)
            first, kept = self.at_first = self.at_first or [self.sensitivity, now]
            if 0 < 2 * error < kept * promise - whole:
                self.sensitivity = max(self.sensitivity, first * (kept / now) ** 2)
        agree = sorted(part for group in compress(groups, agrees) for part in group)
        self.followed = self._judged(agree if believed else [], number)
        return {"slope": whole, "promised": promise, "error": error, "followed": self.followed}

    def _slopes(
        self, batches: Sequence[Batch], scale: float, own: Sequence[Gradients], signs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The slopes along the gradients that each part of the batches has of its own, with every
        tensor at a root mean square of 1: those that are promised and those of the losses.

        Args:
            signs: of each part and each of the N tensors that are known, [G, N].

        Returns:
            What is promised of each tensor, a mean over parts [N]; and for each part how its loss
            changes along its gradients, and along them with its signs [G, 2] (as one that does not
            change, where it is not finite).
        """
        space, ranks = self.evaluator.space, self.evaluator.ranks
        assert isinstance(space, FlatSpace)
        vectors = [{n: g[n]} if n in g else {} for g in own for n in self.known]
        tensors = [tensor for vector in vectors for tensor in vector.values()]
        norms = iter(torch.stack(torch._foreach_norm(tensors)).tolist() if tensors else ())
        sizes = torch.tensor([next(norms) if vector else 0.0 for vector in vectors]).double()
        sizes = sizes.view(signs.shape)
        roots = torch.tensor([space.parameters[n].numel() for n in self.known]).double().sqrt()
        mine = max(1, sum(map(bool, own)))
        (promised,) = ranks.mean([roots * sizes.sum(dim=0) / mine], batches[0])
        whole = promised.sum().item()
        near = min(self.eps, NEAR * scale / whole) if whole else self.eps
        lengths = near * (roots / sizes).nan_to_num(posinf=0.0)
        points = []
        with space.vectors(vectors) as seeds:
            for part, (one, mix) in enumerate(zip(lengths.tolist(), (lengths * signs).tolist())):
                along = seeds[part * len(roots) : (part + 1) * len(roots)]
                lines = [Direction.combine(along, weights) for weights in (one, mix)]
                points.append([point for line in lines for point in (line, -line)])
            found = self._losses(self.guide.objective, points, batches)
        slopes = (found[:, ::2] - found[:, 1::2]) / (2 * near)
        return promised.double(), slopes.nan_to_num(0.0, 0.0, 0.0)

    def _judged(self, agree: list[int], number: int) -> list[int]:
        """The parts to follow after a check, and when the next one is due."""
        self.agreed = self.agreed + 1 if agree else 0
        self.failed = 0 if agree else self.failed + 1
        self.wait, new = self.wait * 2, not self.followed
        if self.followed and self.failed == 1:
            self.due = number + 1
            return self.followed
        if not agree:
            self.needed = AGAIN
        elif new and self.agreed < self.needed:
            self.due = number + 1
            return []
        elif new:
            self.wait = FIRST_WAIT
        self.due = number + self.wait
        return agree

    def doubt(self, number: int) -> None:
        """Check the guide in the next step, and often from then on: the loss has risen."""
        self.due, self.wait = number + 1, FIRST_WAIT // 2

    def _find_distance(self, batches: Sequence[Batch], parts: int) -> None:
        """The first distance along noise for which the losses are near a line, and their slope."""
        noise = [Direction.of(derive_seed(self.seed, i, -5)) for i in range(parts)]
        for _ in range(4):
            points = [[Direction(), self.eps * z, -self.eps * z] for z in noise]
            start, plus, minus = self._losses(self.guide.in_nats, points, batches).unbind(dim=1)
            self.sensitivity = ((plus - minus) / (2 * self.eps)).square().mean().sqrt().item()
            if (plus + minus - 2 * start).norm() < (plus - minus).norm():
                return
            self.eps /= 10

    def _losses(
        self, objective: Objective, points: Sequence[Sequence[Direction]], batches: Sequence[Batch]
    ) -> Tensor:
        """The losses of parts of the batches at points, float64."""
        with replaced([(self.evaluator, "objective", objective)]):
            return torch.tensor(self.evaluator.evaluate(points, batches).losses).double()


def parts_of_check(parts: int, numel: int) -> int:
    """How many gradients of so many numbers a check holds of a batch of so many parts.

    Where they are `LARGE`, two parts share one and its displacements, so that a check holds no more
    numbers than a candidate of each part.
    """
    return parts // 2 if parts % 2 == 0 and 4 * parts * numel > LARGE else parts


def _least_squares(signs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The slopes of parts, and their covariances; these are zero where too few values tell."""
    slopes = torch.linalg.lstsq(signs, values[:, None], driver="gelsd").solution[:, 0]
    free = len(values) - len(slopes)
    variance = (values - signs @ slopes).square().sum() / free if free > 0 else 0.0
    return slopes, variance * torch.linalg.pinv(signs.T @ signs)


def add(sums: Gradients, gradients: Gradients, scale: float) -> None:
    """Add gradients times a factor to others."""
    given = dict(gradients)
    if given and scale != 1.0:
        given = dict(zip(given, torch._foreach_mul([*given.values()], scale)))
    if both := [name for name in given if name in sums]:
        old, new = ([some[name] for name in both] for some in (sums, given))
        given |= zip(both, torch._foreach_add(old, new))
    sums |= given
