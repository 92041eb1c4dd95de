"""The int8 matmul of bitsandbytes for several candidates, on a CPU."""

import copy

import torch
from torch import Tensor, nn

from zo_peft.core.lanes import Lanes, Replacement
from zo_peft.models.quantized import Linear8bitLt, bitsandbytes

#: Rows are quantized, and their products scaled, so many numbers at a time: they stay in the cache.
CHUNK = 1 << 17


def base_replacements(model: nn.Module) -> dict[str, Replacement]:
    """How the int8 layers of a base on a CPU work where candidates share a forward pass."""
    return {
        name: (module, "forward", matmul)
        for name, module in model.named_modules()
        if isinstance(module, Linear8bitLt)
        if (module.weight.device.type, module.weight.dtype) == ("cpu", torch.int8)
    }


def matmul(
    module: Linear8bitLt,
    lanes: Lanes,
    _: str,
    x: Tensor,
    codes: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`x [..., in] @ codes [out, in]^T`, scaled as in the layer, plus a bias [out].

    Without codes they and the bias are the layer's own. On a CPU the rows of each candidate have
    the output of bitsandbytes for them alone: the columns of outliers are its own.
    """
    if codes is None:
        if module.weight.CB is not None:
            module.init_8bit_state()
        codes, bias = module.state.CB, module.bias
    state, bias = copy.copy(module.state), None if bias is None else bias.to(x.dtype)
    if lanes.candidates == 1 or x.device.type != "cpu":
        state.CB, state.is_training = codes, False
        return bitsandbytes.matmul(x, codes, bias=bias, state=state)
    rows = x.reshape(-1, x.shape[-1])
    groups = lanes.candidates if len(rows) % lanes.candidates == 0 else 1
    ops, step = torch.ops.bitsandbytes, max(1, CHUNK // max(codes.shape))
    own, largest = torch.empty_like(rows, dtype=torch.int8), torch.empty(len(rows))
    inputs = rows.chunk(groups)
    parts = zip(inputs, own.chunk(groups), largest.chunk(groups))
    outliers = [_quantize(*part, state.threshold, step) for part in parts]
    products = ops.int8_linear_matmul(own, codes)
    # In float32 the output takes the place of the products.
    is_float = x.dtype == torch.float32
    y = products.view(x.dtype) if is_float else torch.empty_like(products, dtype=x.dtype)
    for to, *some in zip(*(tensor.split(step) for tensor in (y, products, largest))):
        to.copy_(ops.int8_mm_dequant(*some, state.SCB, dtype=x.dtype, bias=bias))
    for to, some_rows, columns in zip(y.chunk(groups), inputs, outliers):
        if len(columns):
            weights = ops.int8_vectorwise_dequant(codes[:, columns].contiguous(), state.SCB)
            to.addmm_(some_rows[:, columns], weights.to(x.dtype).t())
    return y.view(*x.shape[:-1], -1)


def _quantize(x: Tensor, codes: Tensor, largest: Tensor, threshold: float, step: int) -> Tensor:
    """Fill in the codes and the largest size of each row, and return the columns of outliers."""
    for some, own, most in zip(*(tensor.split(step) for tensor in (x, codes, largest))):
        # bitsandbytes rounds to float16; what follows is faster in float32, and the same.
        rows = some.half().float()
        torch.amax(rows.abs(), 1, out=most)
        own.copy_(rows.mul_(127.0 / most[:, None]).round_())
    if not 0 < threshold <= largest.max():
        return torch.empty(0)
    others, sizes, outliers = torch.ops.bitsandbytes.int8_vectorwise_quant(x.half(), threshold)
    codes.copy_(others)
    largest.copy_(sizes)
    return outliers
