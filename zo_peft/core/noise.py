"""Noise `z(seed)`: numbers addressed by seed, parameter name and offset, made from counters.

Any block can be generated alone, at any time, on any device: number `i` of parameter `name`
under `seed` is a pure function of the three. The generator is Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as key and
(block index, hash of the name) as counter, so no two parameters and no two seeds share a stream.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

#: Names what makes the numbers of a seed; another generator would have another name.
GENERATOR = "philox4x32-10"

Distribution = Literal["gaussian", "rademacher"]

#: Numbers that one 128-bit counter yields: four of 32 bits, or one for each bit.
NUMBERS_PER_COUNTER: dict[str, int] = {"gaussian": 4, "rademacher": 128}

#: Every parameter of a `Layout` starts at a multiple of this: whole counters, whatever the noise.
ALIGNMENT = 128

#: Numbers to make at a time; bounds the scratch memory (about 60 bytes a number) of large adapters.
CHUNK = 1 << 18

#: The same on a GPU, where starting a kernel takes longer than what it does with fewer numbers.
CUDA_CHUNK = 1 << 21

_MASK = 0xFFFFFFFF


def chunk(device: torch.device) -> int:
    """How many numbers are made at a time on a device."""
    return CUDA_CHUNK if device.type == "cuda" else CHUNK


def kernel_code(kind: str) -> str:
    """`philox` and what is made of its words as one kernel, for PyTorch to compile.

    It gives four numbers, two in each of its outputs: WORDS themselves, float32 of Box-Muller
    (GAUSSIAN), or float32 signs of four bits (SIGNS), of which 32 calls share a counter.
    """
    code = Path(__file__).with_name("noise.cuh").read_text()
    for other in ("GAUSSIAN", "SIGNS"):
        code = code.replace(other, f"{kind == other:d}")
    return code


@functools.cache
def _kernel(kind: str) -> Callable[..., Sequence[Tensor]]:
    """The kernel, compiled by PyTorch for the GPU at hand when it is first called."""
    return torch.cuda.jiterator._create_multi_output_jit_fn(kernel_code(kind), num_outputs=2)


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that depends on all of `parts` and on nothing else."""
    digest = hashlib.blake2b(b"".join(p.to_bytes(8, "little", signed=True) for p in parts))
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def name_words(name: str) -> tuple[int, int]:
    """The two 32-bit counter words that stand for a parameter's name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _keys(seeds: Sequence[int], device: torch.device) -> Tensor:
    # A copy from pinned memory does not wait for the device.
    keys = torch.tensor(seeds, dtype=torch.uint64, pin_memory=device.type == "cuda")
    return keys.view(torch.int64).to(device, non_blocking=True)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seeds: Sequence[int]) -> list[Tensor]:
    """Philox4x32-10 of int64 tensors [C] that hold uint32 values; four like them [seeds, C].

    The 64-bit products wrap in int64, which leaves all their bits right.
    """
    device = counter[0].device
    keys = _keys(seeds, device)
    if device.type == "cuda":
        pairs = _kernel("WORDS")(counter[0] | counter[1] << 32, *counter[2:], keys[:, None])
        return [pair >> shift & _MASK for pair in pairs for shift in (0, 32)]
    rounds = torch.arange(10, device=device)[:, None, None]
    keys0 = ((keys[:, None] & _MASK) + rounds * 0x9E3779B9) & _MASK
    keys1 = ((keys[:, None] >> 32 & _MASK) + rounds * 0xBB67AE85) & _MASK
    c0, c1, c2, c3 = (c.expand(len(seeds), -1) for c in counter)
    for k0, k1 in zip(keys0.unbind(), keys1.unbind()):
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0 = (p1 >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (p0 >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1 = p1.bitwise_and_(_MASK)
        c3 = p0.bitwise_and_(_MASK)
    return [c0, c1, c2, c3]


def _gaussian(words: list[Tensor]) -> Tensor:
    """Four N(0, 1) float32 numbers a counter, by Box-Muller on pairs of words."""
    numbers = []
    for radius_word, angle_word in (words[:2], words[2:]):
        # (word + 1) / 2^32 lies in (0, 1]: the logarithm is finite.
        radius = (radius_word + 1).float().mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = angle_word.float().mul_(2.0 * math.pi * 2.0**-32)
        numbers += [radius * angle.cos(), angle.sin_().mul_(radius)]
    return torch.stack(numbers, dim=-1).flatten(1)


def _octets(blocks: Tensor, low: Tensor, high: Tensor, seeds: Sequence[int]) -> Tensor:
    """The bytes of C counters' words, lowest first: int32 [seeds, 16 C] in [0, 256)."""
    words = philox((blocks & _MASK, blocks >> 32, low, high), seeds)
    # Conversion wraps: the bits stay as they are.
    return torch.stack([word.int() for word in words], dim=-1).view(torch.uint8).flatten(1).int()


@functools.cache
def _signs(device: torch.device) -> Tensor:
    """The signs of a byte's bits, lowest first: float32 [256, 8]."""
    octets, bits = torch.arange(256, device=device), torch.arange(8, device=device)
    return (octets[:, None] >> bits).bitwise_and_(1).float().mul_(2.0).sub_(1.0)


def _numbers(
    blocks: Tensor, low: Tensor, high: Tensor, seeds: Sequence[int], distribution: Distribution
) -> Tensor:
    """The numbers of C blocks of `per_block`: float32 [seeds, N]."""
    if blocks.is_cuda:
        kind = "GAUSSIAN" if distribution == "gaussian" else "SIGNS"
        pairs = _kernel(kind)(blocks, low, high, _keys(seeds, blocks.device)[:, None])
        return torch.stack([*pairs], dim=-1).view(torch.float32).flatten(1)
    if distribution == "gaussian":
        return _gaussian(philox((blocks & _MASK, blocks >> 32, low, high), seeds))
    # One sign, +1 or -1, for each bit of the words.
    octets = _octets(blocks, low, high, seeds)
    return _signs(octets.device).index_select(0, octets.flatten()).view(len(octets), -1)


def per_block(distribution: Distribution, device: torch.device) -> int:
    """How many numbers are made of one block: those of a counter, or four on a GPU."""
    return 4 if device.type == "cuda" else NUMBERS_PER_COUNTER[distribution]


def _counter(blocks: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    low, high = (torch.full_like(blocks, word) for word in name_words(name))
    return blocks, low, high


def noise_blocks(
    seeds: Sequence[int],
    name: str,
    start: int,
    stop: int,
    distribution: Distribution = "gaussian",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Numbers `start` to `stop` of parameter `name` (flattened) under each seed: float32 [S, N]."""
    each = per_block(distribution, torch.device(device))
    first = start // each
    blocks = torch.arange(first, -(-stop // each), device=device)
    numbers = _numbers(*_counter(blocks, name), seeds, distribution)
    return numbers[:, start - first * each : stop - first * each]


class SignSums:
    """Weighted sums of Rademacher noise, for who reads a parameter from one end to the other.

    The same numbers as `noise_blocks` has, several times as fast: many chunks' counters at once.
    """

    #: Numbers whose bits are made at once; a multiple of those of a counter.
    AHEAD = 1 << 21

    def __init__(
        self, terms: Sequence[tuple[int, float]], name: str, numel: int, device: torch.device
    ) -> None:
        self.seeds = [seed for seed, _ in terms]
        self.tables = [weight * _signs(device) for _, weight in terms]
        self.name, self.numel, self.device = name, numel, device
        self._first = self._stop = 0
        self._octets = torch.empty(0)

    def __call__(self, start: int, stop: int) -> Tensor:
        """Numbers `start` to `stop` of the flattened parameter: float32 [stop - start]."""
        if not self.seeds:
            return torch.zeros(stop - start, device=self.device)
        if not self._first <= start <= stop <= self._stop:
            self._make(start, stop)
        first, last = (start - self._first) // 8, -(-(stop - self._first) // 8)
        ranges = zip(self._octets[:, first:last], self.tables)
        terms = (table.index_select(0, octets) for octets, table in ranges)
        sums = functools.reduce(Tensor.add_, terms).flatten()
        offset = (start - self._first) % 8
        return sums[offset : offset + stop - start]

    def _make(self, start: int, stop: int) -> None:
        per_counter = NUMBERS_PER_COUNTER["rademacher"]
        ahead = max(stop, min(start + self.AHEAD, self.numel))
        first, last = start // per_counter, -(-ahead // per_counter)
        blocks = torch.arange(first, last, device=self.device)
        self._octets = _octets(*_counter(blocks, self.name), self.seeds)
        self._first, self._stop = first * per_counter, last * per_counter


def noise_rows(
    seed: int, name: str, rows: Tensor, width: int, distribution: Distribution = "gaussian"
) -> Tensor:
    """Rows (int64 [R]) of a matrix's noise, as `noise_blocks` has it: float32 [R, width]."""
    each = per_block(distribution, rows.device)
    start = rows * width
    first = start // each
    span = torch.arange(-(-width // each) + 1, device=rows.device)
    blocks = (first[:, None] + span).flatten()
    numbers = _numbers(*_counter(blocks, name), [seed], distribution)[0].view(len(rows), -1)
    columns = torch.arange(width, device=rows.device)
    return numbers.gather(1, (start - first * each)[:, None] + columns)


class Layout:
    """Named parameters side by side in one flat buffer, and the noise of any part of it.

    Each starts at a multiple of `ALIGNMENT`, and the padding behind it belongs to no parameter (its
    noise is never read). Noise is made on `device`.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], device: torch.device | str = "cpu"
    ) -> None:
        self.shapes, self.slices, self.numel = dict(shapes), {}, 0
        runs, words = [], []
        for name, shape in shapes.items():
            self.slices[name] = slice(self.numel, self.numel + shape.numel())
            runs.append(-(-shape.numel() // ALIGNMENT))
            words.append((self.numel, *name_words(name)))
            self.numel += runs[-1] * ALIGNMENT
        per_run = torch.tensor(words).reshape(-1, 3).repeat_interleave(torch.tensor(runs), dim=0)
        self._start, self._low, self._high = per_run.to(device).unbind(1)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters in a flat buffer, or in each row of [rows, numel]; no copies."""
        return {
            name: flat[..., where].view((*flat.shape[:-1], *self.shapes[name]))
            for name, where in self.slices.items()
        }

    def noises(
        self, seeds: Sequence[int], start: int, stop: int, distribution: Distribution
    ) -> Iterator[Tensor]:
        """Noise of `flat[start:stop]`, multiples of `ALIGNMENT`, seed by seed: float32 [N]."""
        each = per_block(distribution, self._start.device)
        index = torch.arange(start, stop, each, device=self._start.device)
        run = index // ALIGNMENT
        blocks = (index - self._start[run]) // each
        counter = blocks, self._low[run], self._high[run]
        # As many seeds at once as fit, in counters of gaussian numbers.
        at_once = max(1, chunk(blocks.device) // 4 // len(blocks))
        for first in range(0, len(seeds), at_once):
            some = seeds[first : first + at_once]
            if distribution == "gaussian" or blocks.is_cuda:
                yield from _numbers(*counter, some, distribution)
            else:
                # Signs take 32 times as much as the bytes that they are made of.
                for octets in _octets(*counter, some):
                    yield _signs(blocks.device).index_select(0, octets).flatten()
