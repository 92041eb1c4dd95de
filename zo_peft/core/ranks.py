"""Several processes: each evaluates its share of a step, and all get every loss."""

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from zo_peft.core.batch import Batch
from zo_peft.core.direction import Direction
from zo_peft.errors import UserError

Parallel = Literal["data", "candidates"]
CPU = torch.device("cpu")

#: All processes compare what is tuned after every so many steps.
CHECK_STEPS = 100

#: Displacements [M][G] and a batch in, losses [M, examples] out.
EvaluateBatch = Callable[[Sequence[Sequence[Direction]], Batch], Tensor]


class Ranks:
    """This process among those that `torchrun` or `accelerate launch` started; or it works alone.

    Every rank draws the same directions from the same seeds and gets the same losses, so each makes
    the same step by itself; losses of examples are all that is exchanged, in float32 as they were
    computed. What a rank evaluates: with `data` every displacement on its own part of the batch;
    with `candidates` its own displacements on the whole batch; without `parallel` everything.

    Attributes:
        count: the number of processes.
        batches: the number of ranks whose batches make one batch of the run.
        divided: the number of ranks among which the candidates of a step are divided.
        wire_bytes: bytes that this rank has handed to collective operations so far.
    """

    def __init__(self, parallel: Parallel | None = None, device: torch.device = CPU) -> None:
        self.parallel, self.device, self.wire_bytes = parallel, device, 0
        self.rank = distributed.get_rank() if parallel else 0
        self.count = distributed.get_world_size() if parallel else 1
        self.batches = self.count if parallel == "data" else 1
        self.divided = self.count if parallel == "candidates" else 1

    def shares(self, length: int) -> list[range]:
        """Which of so many things each rank has."""
        edges = [rank * length // self.count for rank in range(self.count + 1)]
        return [range(start, stop) for start, stop in pairwise(edges)]

    def collator(self, collate: Callable[[Any], Batch]) -> Callable[[Any], Batch]:
        """A collator that makes this rank's share of a whole batch."""

        def shared(features: Sequence[Any]) -> Batch:
            share = self.shares(len(features))[self.rank]
            # A rank without an example still needs a batch; nothing of this one is counted.
            own = features[share.start : share.stop] or features[:1]
            return Batch({**collate(own), "share": (share.start, share.stop, len(features))})

        return shared if self.parallel == "data" else collate

    def losses(
        self, points: Sequence[Sequence[Direction]], batch: Batch, evaluate: EvaluateBatch
    ) -> Tensor:
        """The losses [M, examples] of the whole batch, on every rank.

        The points [M][G] are for the whole batch, with a G of 1 or the number of its examples;
        `batch` is this rank's share of it, and `evaluate` gives losses [m, n] of its n examples.
        Each rank computes its rows or its columns.
        """
        if self.count == 1:
            return evaluate(points, batch)
        examples, rows = batch.examples, self.parallel == "candidates"
        shares = self.shares(len(points) if rows else examples)
        own = slice(shares[self.rank].start, shares[self.rank].stop)
        if rows:
            points = points[own]
        elif len(points[0]) > 1:
            points = [candidate[own] for candidate in points]
        losses = evaluate(points, batch) if shares[self.rank] else torch.empty(0)
        sizes = [len(share) * (examples if rows else len(points)) for share in shares]
        if losses.numel() != sizes[self.rank]:
            what = f"{losses.numel()} losses for {sizes[self.rank]} candidates and examples"
            raise UserError(f"the objective gave {what}; several processes need one for each")
        padded = torch.zeros(max(sizes), dtype=torch.float32, device=self.device)
        padded[: losses.numel()] = losses.flatten()
        gathered = self._exchange(padded).view(self.count, -1)
        parts = [row[:size] for row, size in zip(gathered, sizes)]
        if rows:
            return torch.cat([part.view(-1, examples) for part in parts])
        return torch.cat([part.view(len(points), -1) for part in parts], dim=1)

    def parts(self, parts: int) -> int:
        """The parts that a batch can have on all ranks, where on this one it can have so many."""
        return parts if self.parallel == "candidates" else self.least(parts)

    def mean(self, values: Sequence[Tensor], batch: Batch) -> list[Tensor]:
        """Means over the examples of the whole batch, where each rank has those over its own.

        Every rank adds up the same numbers in the same order.
        """
        if self.count == 1:
            return list(values)
        first, last, _ = batch.share or (0, batch.examples, 0)
        own = [torch.ones(1, device=self.device), *(value.flatten() for value in values)]
        flat = torch.cat([part.to(self.device, torch.float32) for part in own]) * (last - first)
        total = self._exchange(flat).view(self.count, -1).sum(dim=0)
        count, *sums = total.split([1, *(value.numel() for value in values)])
        return [(s / count).view_as(value).to(value.device) for s, value in zip(sums, values)]

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers (64 bits); each rank waits for all others."""
        return number if self.count == 1 else min(self._numbers(number))

    def check(self, what: str, *content: Tensor | Any) -> None:
        """Stop all ranks, with a UserError, where one holds other tensors or JSON than most.

        They compare hashes of eight bytes.
        """
        if self.count == 1:
            return
        digest = hashlib.blake2b(digest_size=8)
        for part in content:
            digest.update(_bytes(part))
        found = self._numbers(int.from_bytes(digest.digest(), "little", signed=True))
        usual = max(found, key=found.count)
        if different := [rank for rank, number in enumerate(found) if number != usual]:
            # With two ranks nobody can tell which one is wrong.
            names = " and ".join(map(str, [0, 1] if self.count == 2 else different))
            why = f"{what} of rank {names} differs from that of the others; all ranks need"
            good = "Checkpoints and the journal up to the last check are good"
            raise UserError(f"{why} the same files, library versions and kind of device. {good}")

    def _numbers(self, number: int) -> list[int]:
        return self._exchange(torch.tensor([number], device=self.device)).tolist()

    def _exchange(self, values: Tensor) -> Tensor:
        self.wire_bytes += values.numel() * values.element_size()
        gathered = values.new_empty(self.count * len(values))
        distributed.all_gather_into_tensor(gathered, values)
        return gathered


def _bytes(part: Tensor | Any) -> Any:
    if isinstance(part, Tensor):
        return part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return json.dumps(part, sort_keys=True).encode()
