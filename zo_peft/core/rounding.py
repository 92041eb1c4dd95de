"""Stochastic rounding: what lies between two representable numbers becomes either, without bias.

A number a share p of the way up is rounded up with probability p, so that steps smaller than half a
unit in the last place are kept on average, which plain rounding loses.
"""

import torch
from torch import Tensor

#: Codes of int8 weights lie between minus and plus this.
MAX_CODE = 127


def round_codes(codes: Tensor, steps: Tensor, uniforms: Tensor) -> Tensor:
    """int8 codes moved by float steps: whole numbers, float32, also beyond the ends.

    The same uniforms round a step and its negative to opposite codes.

    Args:
        uniforms: in [0, 1), of the steps' shape.
    """
    whole = steps.abs().add_(uniforms).floor_().copysign_(steps)
    return whole.add_(codes)


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
