"""The order in which training sees examples."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from zo_peft.core.noise import derive_seed


class EpochSampler(Sampler[int]):
    """Batches of examples of like length, in an order that depends on seed and epoch alone.

    An epoch that is resumed therefore has the same order. `LengthGroupedSampler` by itself goes
    from long to short batches over and over, and losses and momentum would follow; here the
    batches come in random order.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; accelerate calls this when the epoch starts."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        self.sampler.generator = generator
        indices, size = list(self.sampler), self.sampler.batch_size
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        # A batch that is not full stays last.
        full = len(indices) // size
        order = [*torch.randperm(full, generator=generator).tolist(), *range(full, len(batches))]
        return chain.from_iterable(batches[index] for index in order)
