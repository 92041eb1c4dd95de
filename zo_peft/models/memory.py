"""Memory computed from shapes, and how many candidates fit into one forward pass."""

import resource
import sys
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from zo_peft.core.batch import Batch
from zo_peft.models.hub import AnyModel
from zo_peft.models.loading import plain_tensors
from zo_peft.models.quantized import Linear4bit, Linear8bitLt

#: The peak of a step stays within this many times the peak of plain inference on the same batch ...
PEAK_RATIO = 1.05

#: ... or, for a tiny model, exceeds it by at most so many bytes, less than the libraries take.
FLOOR_BYTES = 16 << 20

#: The tokens of one forward pass of a float base on a CPU; with more, activations leave the cache.
CPU_TOKENS = 1024

#: On a CPU the int8 matmul of bitsandbytes holds so many times the activations, because they are
#: quantized, multiplied to int32 and scaled in separate tensors (scripts/bench_plan.py). That of
#: candidates that share a forward pass does not (`zo_peft.models.int8`).
CPU_INT8_HELD = 1.5


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they are stored, with the scales of codes."""
    scales = (tensor for module in model.modules() for tensor in _scales(module))
    tensors = chain(model.parameters(), model.buffers(), scales)
    return sum(part.nbytes for tensor in tensors for part in plain_tensors(tensor))


def _scales(module: nn.Module) -> list[Tensor]:
    """The scales of a quantized layer; none of an offloaded one."""
    found: list[Tensor | None] = []
    if isinstance(module, Linear8bitLt):
        # The first forward pass of the layer moves them from its weight into its state.
        found = [module.state.SCB, getattr(module.weight, "SCB", None)]
    elif isinstance(module, Linear4bit) and module.weight.quant_state is not None:
        state = module.weight.quant_state
        found = [state.absmax, state.state2.absmax if state.nested else None]
    return [tensor for tensor in found if tensor is not None]


class Fit:
    """How many candidates share a forward pass whose peak memory is near that of plain inference.

    Plain inference holds the weights, and the activations of one layer and what its weights are
    dequantized to, or the logits of all positions, whichever is more. A candidate holds the
    activations of one layer or the logits of the scored positions, and its own values of what is
    tuned, of large adapters those of a few layers at a time. Only shapes and the kind of device
    count.

    Attributes:
        largest: the numbers of the largest quantized layer.
        scratch: bytes of what it is dequantized to.

    Args:
        adapter_numel: the float32 numbers that a candidate holds.
        new_tokens: the most tokens that each sequence generates. Keys and values are kept then.
        device: cpu or cuda, for a model on the meta device; default: where the model is.
    """

    def __init__(
        self, model: AnyModel, adapter_numel: int, new_tokens: int = 0, device: str | None = None
    ) -> None:
        self.new_tokens = new_tokens
        self.config = model.config.get_text_config()
        self.size = model.dtype.itemsize
        self.weights, self.adapter = weight_bytes(model), 4 * adapter_numel
        dtypes = {parameter.dtype for parameter in model.parameters()}
        on_cpu = (device or model.device.type) == "cpu"
        is_float = all(dtype.is_floating_point for dtype in dtypes)
        offloaded = device is None and any(p.is_meta for p in model.parameters())
        # Streaming the weights of an offloaded base again costs more than leaving the cache.
        self.max_tokens = CPU_TOKENS if is_float and on_cpu and not offloaded else None
        self.held = CPU_INT8_HELD if torch.int8 in dtypes and on_cpu else 1.0
        layers = [m for m in model.modules() if isinstance(m, Linear8bitLt | Linear4bit)]
        self.largest = max((m.in_features * m.out_features for m in layers), default=0)
        # Without AVX-512, bitsandbytes multiplies int8 weights as float32.
        has_int8 = torch.backends.cpu.get_cpu_capability() == "AVX512" or not on_cpu
        self.scratch = 0 if has_int8 else 4 * self.largest
        for layer in layers:
            if isinstance(layer, Linear4bit):
                self.scratch = self.largest * (layer.compute_dtype or model.dtype).itemsize

    def __call__(self, batch: Batch, parts: int = 1) -> int:
        """How many candidates fit, each with `parts` copies of the adapter; at least 1."""
        rows, length = batch["input_ids"].shape
        layer, alone = (self.layer(rows, length, copies) for copies in (1, self.held))
        vocabulary = self.config.vocab_size if "rows" in batch else 0
        plain = max(self.scratch + alone, rows * length * vocabulary * self.size)
        own = max(layer, self.logits(batch.scored)) + parts * self.adapter
        slack = max((PEAK_RATIO - 1) * (self.weights + plain), FLOOR_BYTES)
        fit = int((plain + slack - self.scratch) / own)
        if self.max_tokens is not None:
            fit = min(fit, self.max_tokens // (rows * length))
        return max(1, fit)

    def layer(self, rows: int, length: int, copies: float) -> int:
        """Bytes of `copies` times the activations of a layer, and of the keys and values kept."""
        config = self.config
        layer = int(copies * rows * layer_bytes(config, length, self.size))
        if self.new_tokens:
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            head_width = config.hidden_size // config.num_attention_heads
            width = heads * (getattr(config, "head_dim", None) or head_width)
            tokens = rows * (length + self.new_tokens)
            layer += 2 * config.num_hidden_layers * width * tokens * self.size
        return layer

    def logits(self, positions: int) -> int:
        """Bytes of logits, which are held twice in float32: by the model and by the loss."""
        return 2 * 4 * positions * self.config.vocab_size


def layer_bytes(config: Any, length: int, size: int) -> int:
    """Bytes that a transformer layer holds at its peak for one sequence; `size` bytes a number.

    These are the residual stream and its normalised copy, the two branches of the MLP and their
    product and, where attention is not computed in blocks, its scores and their softmax.
    """
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
    # Some have a width for each layer.
    wide = max(wide) if isinstance(wide, list | tuple) else wide
    numbers = length * (2 * hidden + 3 * (wide or 4 * hidden))
    if config._attn_implementation == "eager":
        # A model without attention has no heads.
        numbers += 2 * getattr(config, "num_attention_heads", 0) * length * length
    return numbers * size


def peak_memory_bytes() -> int:
    """The peak so far of CUDA's allocator on all devices, else of the process's resident set."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
