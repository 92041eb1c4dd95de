"""The order of examples."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from zo_peft.core.noise import derive_seed


class EpochSampler(Sampler[int]):
    """Batches of like length, in an order that depends on seed and epoch alone.

    So a resumed epoch has it too. The sampler's own order runs from long to short batches, over and
    over, which losses and momentum would follow; here batches come in random order.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch."""
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
