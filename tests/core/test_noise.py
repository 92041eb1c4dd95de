"""Noise: known answers, an independent Philox and Box-Muller, addressing, and statistics."""

import ctypes
import hashlib
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from tiny import noise_block

from zo_peft.core.noise import (
    ALIGNMENT,
    Distribution,
    Layout,
    SignSums,
    derive_seed,
    kernel_code,
    name_words,
    philox,
)

DISTRIBUTIONS: tuple[Distribution, ...] = ("gaussian", "rademacher")
WORD, SEED = st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1)
NAMES = [
    f"base_model.model.layers.{layer}.self_attn.{module}.lora_{side}.default.weight"
    for layer in (0, 1, 10)
    for module in ("q_proj", "k_proj", "v_proj")
    for side in "AB"
]


def philox_of_python(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as in the paper (Salmon et al., SC 2011), on Python's integers."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(x0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(x2 * 0xCD9E8D57, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def words(seed: int, name: str, first: int, count: int) -> NDArray[np.uint32]:
    """The words of `count` counters from `first` on, [count, 4]."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    low, high = np.frombuffer(digest, "<u4").tolist()
    blocks = range(first, first + count)
    key = (seed % 2**32, seed >> 32)
    return np.array(
        [philox_of_python((b % 2**32, b >> 32, low, high), key) for b in blocks], np.uint32
    )


def bits(numbers: torch.Tensor) -> NDArray[np.uint32]:
    return numbers.numpy().view(np.uint32)


@pytest.mark.parametrize(
    ("counter", "seed", "answer"),
    [
        ("00000000 00000000 00000000 00000000", 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, seed: int, answer: str) -> None:
    given_words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    found = philox((given_words[0], given_words[1], given_words[2], given_words[3]), [seed])
    assert " ".join(f"{word.item():08x}" for word in found) == answer


@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=20), WORD, WORD)
def test_philox_is_philox(counters: list[tuple[int, int, int, int]], low: int, high: int) -> None:
    c0, c1, c2, c3 = torch.tensor(counters).unbind(1)
    keys = [(low, high), (high, low)]
    found = torch.stack(philox((c0, c1, c2, c3), [k0 + 2**32 * k1 for k0, k1 in keys]), dim=2)
    expected = [[list(philox_of_python(c, key)) for c in counters] for key in keys]
    assert found.tolist() == expected


@given(SEED, st.sampled_from(NAMES), st.integers(0, 2**34))
def test_a_gaussian_is_box_muller_of_the_integers(seed: int, name: str, block: int) -> None:
    found = noise_block(seed, name, 4 * block, 4 * block + 256).numpy().astype(float)
    pairs = words(seed, name, block, 64).reshape(-1, 2)
    radius = np.sqrt(-2 * np.log((pairs[:, 0].astype(float) + 1) / 2**32))
    angle = 2 * np.pi * (pairs[:, 1] / 2**32)
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 12345])
def test_a_gaussian_is_within_a_few_units_in_the_last_place(seed: int) -> None:
    """Once the integers are rounded to float32, of which the logarithm and the angle are taken."""
    count = 4096
    found = noise_block(seed, "weight", 0, 4 * count).numpy().astype(float).reshape(-1, 2)
    pairs = words(seed, "weight", 0, count).reshape(-1, 2).astype(np.int64)
    uniform = (pairs[:, 0] + 1).astype(np.float32).astype(float) / 2**32
    angle = pairs[:, 1].astype(np.float32) * np.float32(2 * np.pi / 2**32)
    radius = np.sqrt(-2 * np.log(uniform))
    exact = radius * np.stack([np.cos(angle.astype(float)), np.sin(angle.astype(float))])
    ulp = np.spacing(radius.astype(np.float32))[:, None]
    assert (np.abs(found - exact.T) / ulp).max() < 3


@given(SEED, st.sampled_from(NAMES), st.integers(0, 2**34))
def test_a_rademacher_is_the_bits_of_the_integers(seed: int, name: str, block: int) -> None:
    found = noise_block(seed, name, 128 * block, 128 * (block + 2), "rademacher")
    flags = np.unpackbits(words(seed, name, block, 2).view(np.uint8), bitorder="little")
    assert found.tolist() == (2.0 * flags - 1).tolist()


@st.composite
def partitions(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    cuts = draw(st.lists(st.integers(0, size), max_size=8))
    edges = sorted({0, size, *cuts})
    return draw(st.permutations(list(itertools.pairwise(edges))))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@settings(max_examples=30)
@given(seed=SEED, blocks=partitions(3001))
def test_blocks_of_any_size_and_order_hold_the_same_bits(
    distribution: Distribution, seed: int, blocks: list[tuple[int, int]]
) -> None:
    whole = noise_block(seed, "weight", 0, 3001, distribution)
    for start, stop in blocks:
        part = noise_block(seed, "weight", start, stop, distribution)
        assert np.array_equal(bits(part), bits(whole[start:stop]))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [262_144, 262_143, 100_001])
def test_threads_do_not_change_a_bit(distribution: Distribution, size: int) -> None:
    found = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        found.append(bits(noise_block(5, "weight", 0, size, distribution)))
    assert all(np.array_equal(found[0], other) for other in found[1:])
    for start in range(0, size - 97, 9701):
        part = noise_block(5, "weight", start, start + 97, distribution)
        assert np.array_equal(bits(part), found[0][start : start + 97])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@settings(max_examples=25)
@given(
    sizes=st.dictionaries(st.sampled_from(NAMES), st.integers(1, 700), min_size=1),
    seed=SEED,
    data=st.data(),
)
def test_a_layout_holds_every_parameters_own_noise(
    distribution: Distribution, sizes: dict[str, int], seed: int, data: st.DataObject
) -> None:
    names = data.draw(st.permutations(sorted(sizes)))
    kept = names[: data.draw(st.integers(1, len(names)))]
    layout = Layout({name: torch.Size([sizes[name]]) for name in kept})
    runs = layout.numel // ALIGNMENT
    edges = sorted({0, runs, *data.draw(st.lists(st.integers(0, runs), max_size=4))})
    flat = torch.cat(
        [
            list(layout.noises([seed + 1, seed], ALIGNMENT * a, ALIGNMENT * b, distribution))[1]
            for a, b in itertools.pairwise(edges)
        ]
    )
    assert list(layout.slices) == kept
    for name, where in layout.slices.items():
        alone = noise_block(seed, name, 0, sizes[name], distribution)
        assert np.array_equal(bits(flat[where]), bits(alone))


def test_the_parameters_of_a_layout_do_not_overlap() -> None:
    layout = Layout(
        {
            n: torch.Size([size])
            for n, size in {"a": 1, "b": ALIGNMENT, "c": ALIGNMENT + 1, "d": 5}.items()
        }
    )
    covered = [i for where in layout.slices.values() for i in range(where.start, where.stop)]
    assert len(covered) == len(set(covered)) == 2 * ALIGNMENT + 7
    assert max(covered) < layout.numel == 5 * ALIGNMENT


def test_noise_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    noise_block(1, "weight", 0, 1000)
    derive_seed(1, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("seed", [0, 2**62])
def test_gaussians_fill_equally_probable_bins_equally(seed: int) -> None:
    numbers = noise_block(seed, "weight", 0, 1_000_000).numpy().astype(float)
    bins = np.minimum((stats.norm.cdf(numbers) * 200).astype(int), 199)
    assert stats.chisquare(np.bincount(bins, minlength=200)).pvalue > 1e-4
    # Neighbours, which come from one counter, are independent.
    pairs = np.bincount(20 * (bins[::2] // 10) + bins[1::2] // 10, minlength=400)
    assert stats.chisquare(pairs).pvalue > 1e-4
    halves = np.bincount(20 * (bins[:-2] // 10) + bins[2:] // 10, minlength=400)
    assert stats.chisquare(halves).pvalue > 1e-4


@pytest.mark.parametrize("seed", [0, 2**62])
def test_every_pattern_of_rademacher_signs_is_equally_likely(seed: int) -> None:
    numbers = noise_block(seed, "weight", 0, 1_048_576, "rademacher").numpy()
    assert set(numbers.tolist()) == {-1.0, 1.0}
    patterns = np.packbits(numbers > 0)
    assert stats.chisquare(np.bincount(patterns, minlength=256)).pvalue > 1e-4


def test_moments() -> None:
    n = 1_000_000
    gaussian = noise_block(7, "weight", 0, n).numpy().astype(float)
    assert abs(gaussian.mean()) < 5 / n**0.5
    assert abs(gaussian.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(stats.skew(gaussian)) < 5 * (6 / n) ** 0.5
    assert abs(stats.kurtosis(gaussian)) < 5 * (24 / n) ** 0.5
    assert 4.2 < np.abs(gaussian).max() < 6.7
    signs = noise_block(7, "weight", 0, n, "rademacher").numpy().astype(float)
    assert abs(signs.mean()) < 5 / n**0.5


def correlations(streams: list[torch.Tensor]) -> NDArray[np.float64]:
    r = np.corrcoef(np.stack([stream.numpy() for stream in streams]).astype(float))
    return r[np.triu_indices(len(streams), k=1)]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_two_parameters_correlate(distribution: Distribution) -> None:
    n = 1 << 15
    names = [*NAMES, *(f"prompt_encoder.{i}.weight" for i in range(30)), "a", "b", "c", "", "aa"]
    r = correlations([noise_block(3, name, 0, n, distribution) for name in names])
    assert len(r) == len(names) * (len(names) - 1) / 2
    assert np.abs(r).max() < 5 / n**0.5


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_two_seeds_correlate(distribution: Distribution) -> None:
    """Adjacent seeds, and seeds that differ in one bit."""
    n = 1 << 13
    seeds = sorted({*range(8), *(1 << bit for bit in range(63)), 2**63 - 1, 2**63 - 2})
    r = correlations([noise_block(seed, "weight", 0, n, distribution) for seed in seeds])
    assert np.abs(r).max() < 5 / n**0.5


def test_no_part_of_a_parameter_repeats_another() -> None:
    n = 1 << 14
    starts = [0, n, 2 * n, 4 * 2**31, 4 * 2**32, 4 * 2**33]
    r = correlations([noise_block(3, "weight", start, start + n) for start in starts])
    assert np.abs(r).max() < 5 / n**0.5


SIGNED = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(SIGNED, min_size=1, max_size=5), st.data())
def test_a_derived_seed_depends_on_every_part(parts: list[int], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(parts) - 1))
    other = data.draw(SIGNED.filter(lambda part: part != parts[index]))
    changed = [*parts[:index], other, *parts[index + 1 :]]
    assert 0 <= derive_seed(*parts) < 2**63
    assert derive_seed(*parts) != derive_seed(*changed)
    assert derive_seed(*parts) != derive_seed(*parts, 0)


def test_derived_seeds_are_uniform_and_do_not_collide() -> None:
    seeds = [
        derive_seed(seed, step, index)
        for seed in (0, 1, 42)
        for step in range(2000)
        for index in range(8)
    ]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(0, 1, 2) != derive_seed(0, 2, 1)
    bins = np.bincount([seed >> 57 for seed in seeds], minlength=64)
    assert stats.chisquare(bins).pvalue > 1e-4
    low = np.bincount([seed & 63 for seed in seeds], minlength=64)
    assert stats.chisquare(low).pvalue > 1e-4


@given(
    width=st.integers(1, 300),
    rows=st.integers(1, 20),
    at_once=st.integers(1, 7),
    ahead=st.sampled_from([128, 1024, SignSums.AHEAD]),
    count=st.integers(0, 3),
)
def test_sums_of_signs_are_those_of_the_blocks(
    width: int, rows: int, at_once: int, ahead: int, count: int
) -> None:
    terms = [(3, 0.5), (7, -1.25), (9, 2.0)][:count]
    sums = SignSums(terms, "layer.weight", rows * width, torch.device("cpu"))
    sums.AHEAD = ahead
    whole = torch.zeros(rows * width)
    for seed, weight in terms:
        whole += weight * noise_block(seed, "layer.weight", 0, rows * width, "rademacher")
    for start in range(0, rows, at_once):
        ends = start * width, min(start + at_once, rows) * width
        assert torch.equal(sums(*ends), whole[slice(*ends)])


#: The kernel of GPUs as a function of a C++ compiler, for arrays of counters and one seed.
IN_C = """
#include <cmath>
{kernel}
extern "C" void fill(int count, const long long *in, long long *out) {{
    for (int i = 0; i < count; ++i)
        numbers<long long>(in[4 * i], in[4 * i + 1], in[4 * i + 2], in[4 * i + 3],
                           out[2 * i], out[2 * i + 1]);
}}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_kernel_of_gpus_makes_the_same_numbers(
    distribution: Distribution, tmp_path: Path
) -> None:
    code = kernel_code("GAUSSIAN" if distribution == "gaussian" else "SIGNS")
    (tmp_path / "kernel.cpp").write_text(IN_C.format(kernel=code))
    command = ["g++", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o"]
    subprocess.run([*command, tmp_path / "kernel.so", tmp_path / "kernel.cpp"], check=True)
    seed, name, blocks = 2**62 + 12345, NAMES[0], [0, 1, 7, 40, 2**31, 2**33 + 5]
    counters = np.array([[block, *name_words(name), seed] for block in blocks], np.int64)
    out = np.zeros((len(blocks), 2), np.int64)
    fill = ctypes.CDLL(str(tmp_path / "kernel.so")).fill
    fill(len(blocks), counters.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p))
    parts = [noise_block(seed, name, 4 * b, 4 * b + 4, distribution) for b in blocks]
    expected = np.stack([part.numpy() for part in parts])
    np.testing.assert_allclose(out.view(np.float32), expected, rtol=2e-6, atol=2e-7)
