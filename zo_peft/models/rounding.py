"""Stochastic rounding: what lies between two representable numbers becomes either, without bias.

A number a share p of the way up is rounded up with probability p, so that steps smaller than half a
unit in the last place are kept on average, which plain rounding loses.
"""

import torch
from torch import Tensor

from zo_peft.core.noise import name_words, philox


def round_float(values: Tensor, dtype: torch.dtype, uniforms: Tensor) -> Tensor:
    """float32 values in bfloat16 or float16; beyond the largest finite number, that."""
    limit = torch.finfo(dtype).max
    values = values.clamp(-limit, limit)
    near = values.to(dtype)
    error = values - near.float()
    # Neighbouring floats of a sign have neighbouring bits; away from zero is one more.
    away = torch.signbit(error) == torch.signbit(near)
    bits = near.view(torch.int16)
    other = torch.where(away, bits + 1, bits - 1)
    smallest = torch.where(error < 0, torch.iinfo(torch.int16).min + 1, 1).to(torch.int16)
    other = torch.where(near == 0, smallest, other).view(dtype)
    share = error / (other.float() - near.float())
    return torch.where(uniforms < share, other, near)


def row_words(seed: int, name: str, rows: Tensor) -> Tensor:
    """Where `uniform_rows` starts some rows (int64 [R]) of `name`: Philox words, int32 [R]."""
    low, high = (torch.full_like(rows, word) for word in name_words(f"{name}, rounding"))
    return philox((rows & 0xFFFFFFFF, rows >> 32, low, high), [seed])[0][0].int()


def uniform_rows(words: Tensor, width: int) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2^-24, a row for each word: float32 [R, width].

    For rounding, where speed counts: pairs of a row are the halves of a Weyl sequence through the
    finalizer lowbias32 (Wellons), which has next to no bias; their last 8 bits are the row's own.
    """
    # int32 arithmetic wraps; shifts are arithmetic, so what they bring in on the left is masked.
    pairs = -(-width // 2)
    weyl = torch.arange(pairs, dtype=torch.int32, device=words.device).mul_(-1640531527)
    x = words[:, None] + weyl
    shifted = torch.empty_like(x)
    for shift, factor in ((16, 0x7FEB352D), (15, -2073254261), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))
        if factor != 1:
            x.mul_(factor)
    ends = (words >> 24).bitwise_and_(0xFF).float().mul_(2.0**-8).add_(2.0**15)
    return x.view(torch.int16)[:, :width].float().add_(ends[:, None]).mul_(2.0**-16)
