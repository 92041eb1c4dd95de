"""The int8 matmul of bitsandbytes for several candidates, on a CPU."""

import copy

import bitsandbytes
import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn

from zo_peft.core.lanes import Lanes, Replacement

#: Rows are quantized, and their products scaled, so many numbers at a time: they stay in the cache.
CHUNK = 1 << 17


def base_replacements(model: nn.Module) -> dict[str, Replacement]:
    """How the int8 layers of a base on a CPU work where candidates share a forward pass."""
    found: dict[str, Replacement] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Linear8bitLt) or module.weight.device.type != "cpu":
            continue
        if not module.state.has_fp16_weights:
            found[name] = module, "forward", _forward
    return found


def _forward(module: Linear8bitLt, lanes: Lanes, _: str, x: Tensor) -> Tensor:
    if module.weight.CB is not None:
        module.init_8bit_state()
    return matmul(module, x, module.state.CB, module.bias, lanes.candidates)


def matmul(
    module: Linear8bitLt, x: Tensor, codes: Tensor, bias: Tensor | None, candidates: int = 1
) -> Tensor:
    """`x [..., in] @ codes [out, in]^T`, scaled as in the layer, plus a bias [out].

    The rows of x are those of the candidates in turn. On a CPU each candidate's output is then what
    bitsandbytes gives for its rows by themselves: outlier columns are its own.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if candidates > 1 and x.device.type == "cpu":
        rows = x.reshape(-1, x.shape[-1])
        groups = candidates if len(rows) % candidates == 0 else 1
        scales, threshold = module.state.SCB, module.state.threshold
        return _in_chunks(rows, groups, codes, scales, bias, threshold).view(*x.shape[:-1], -1)
    state = copy.copy(module.state)
    state.CB, state.is_training = codes, False
    return bitsandbytes.matmul(x, codes, bias=bias, state=state)


def _in_chunks(
    x: Tensor, groups: int, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """The arithmetic of bitsandbytes, with one matrix product and no other large tensors."""
    ops, dtype, step = torch.ops.bitsandbytes, x.dtype, max(1, CHUNK // max(codes.shape))
    own = torch.empty_like(x, dtype=torch.int8)
    largest = torch.empty(len(x), 1)
    inputs = x.chunk(groups)
    outliers = [
        _quantize(*parts, threshold, step)
        for parts in zip(inputs, own.chunk(groups), largest.chunk(groups))
    ]
    products = ops.int8_linear_matmul(own, codes)
    # In float32 the output takes the place of the products, chunk by chunk.
    is_float = dtype == torch.float32
    y = products.view(dtype) if is_float else torch.empty_like(products, dtype=dtype)
    for to, some, most in zip(*(tensor.split(step) for tensor in (y, products, largest))):
        to.copy_(ops.int8_mm_dequant(some, most, scales, dtype=dtype, bias=bias))
    for to, rows, columns in zip(y.chunk(groups), inputs, outliers):
        if len(columns):
            weights = ops.int8_vectorwise_dequant(codes[:, columns].contiguous(), scales)
            to.addmm_(rows[:, columns], weights.to(dtype).t())
    return y


def _quantize(x: Tensor, codes: Tensor, largest: Tensor, threshold: float, step: int) -> Tensor:
    """Fill in the codes and the largest size of each row, and return the columns of outliers."""
    is_outlier = torch.zeros(x.shape[1], dtype=torch.bool)
    for some, own, most in zip(x.split(step), codes.split(step), largest.split(step)):
        # bitsandbytes rounds its input to float16; in float32 what follows is faster, and the same.
        rows = some.half().float()
        sizes = rows.abs()
        torch.amax(sizes, 1, keepdim=True, out=most)
        if 0 < threshold <= most.max():
            above = sizes >= threshold
            is_outlier |= above.any(dim=0)
            rows.masked_fill_(above, 0)
            torch.amax(sizes.masked_fill_(above, 0), 1, keepdim=True, out=most)
        own.copy_(rows.mul_(127.0 / most).round_())
    columns = is_outlier.nonzero()[:, 0]
    codes[:, columns] = 0
    return columns
