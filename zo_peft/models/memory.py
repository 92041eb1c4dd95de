"""Memory from shapes: what a run holds, and how many candidates fit into one forward."""

import resource
import sys
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_peft.core.batch import Batch

#: The peak stays within this many times the peak of plain inference on the same batch ...
PEAK_RATIO = 1.05

#: ... or within this many bytes of it, where the model is tiny: less than the libraries themselves.
FLOOR_BYTES = 16 << 20

#: Tokens after which a float base on a CPU gains nothing from more: activations leave the cache.
CPU_TOKENS = 1024

#: bitsandbytes' int8 matmul on a CPU takes this many times the activations: each is quantized,
#: multiplied to int32 and scaled in separate tensors (scripts/bench_step.py). That is with what
#: malloc keeps of the freed ones; held at once are fewer (scripts/bench_plan.py).
CPU_INT8_COPIES, CPU_INT8_HELD = 5, 1.5


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they are stored: codes, and their scales."""
    scales = (tensor for module in model.modules() for tensor in _scales(module))
    tensors = [*model.parameters(), *model.buffers(), *scales]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _scales(module: nn.Module) -> list[Tensor]:
    """What a quantized layer holds beside its codes; of an offloaded one nothing."""
    found: list[Tensor | None] = []
    if isinstance(module, Linear8bitLt):
        # A layer's first forward moves them from its weight into its state.
        found = [module.state.SCB, getattr(module.weight, "SCB", None)]
    elif isinstance(module, Linear4bit) and module.weight.quant_state is not None:
        state = module.weight.quant_state
        found = [state.absmax, state.state2.absmax if state.nested else None]
    return [tensor for tensor in found if tensor is not None]


class Fit:
    """How many candidates of one forward keep its peak near that of plain inference.

    Plain inference: the weights, and the activations of one layer or the logits of all positions,
    whichever is more. A candidate: the activations of one layer or the logits of the scored
    positions, and its own copy of the adapter. Depends on shapes and the kind of device alone.

    Args:
        adapter_numel: float32 numbers of a candidate.
        new_tokens: the most that each sequence generates; their keys and values are kept, too.
        device: its kind, where it is not the model's: of a model on the meta device.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        adapter_numel: int,
        new_tokens: int = 0,
        device: str | None = None,
    ) -> None:
        self.new_tokens = new_tokens
        self.config = model.config.get_text_config()
        self.size = model.get_input_embeddings().weight.element_size()
        self.weights, self.adapter = weight_bytes(model), 4 * adapter_numel
        dtypes = {parameter.dtype for parameter in model.parameters()}
        on_cpu = (device or model.device.type) == "cpu"
        is_float = all(dtype.is_floating_point for dtype in dtypes)
        offloaded = device is None and any(p.is_meta for p in model.parameters())
        # Streaming weights costs more than leaving the cache.
        self.max_tokens = CPU_TOKENS if is_float and on_cpu and not offloaded else None
        int8_on_cpu = torch.int8 in dtypes and on_cpu
        self.copies = CPU_INT8_COPIES if int8_on_cpu else 1
        self.held = CPU_INT8_HELD if int8_on_cpu else 1.0

    def __call__(self, batch: Batch, parts: int = 1) -> int:
        """Candidates that fit on the batch, each with `parts` copies of the adapter; at least 1."""
        rows, length = batch["input_ids"].shape
        layer = self.layer(rows, length, self.copies)
        vocabulary = self.config.vocab_size if "rows" in batch else 0
        plain = max(layer, rows * length * vocabulary * self.size)
        own = max(layer, self.logits(batch.scored)) + parts * self.adapter
        slack = max((PEAK_RATIO - 1) * (self.weights + plain), FLOOR_BYTES)
        fit = int((plain + slack) / own)
        if self.max_tokens is not None:
            fit = min(fit, self.max_tokens // (rows * length))
        return max(1, fit)

    def layer(self, rows: int, length: int, copies: float) -> int:
        """Bytes of a layer's activations, so many times over, and of kept keys and values."""
        layer = int(copies * rows * layer_bytes(self.config, length, self.size))
        if self.new_tokens:
            layer += rows * cache_bytes(self.config, length + self.new_tokens, self.size)
        return layer

    def logits(self, positions: int) -> int:
        """Bytes of logits, which are there twice in float32: as they are, and in the loss."""
        return 2 * 4 * positions * self.config.vocab_size


def cache_bytes(config: Any, length: int, size: int) -> int:
    """Bytes of the keys and values of one sequence in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * length * size


def layer_bytes(config: Any, length: int, size: int) -> int:
    """Bytes of what a transformer layer holds at its peak for one sequence.

    The residual stream and its normalised copy, and the MLP's two branches and their product; also
    attention scores and their softmax, where attention is computed as a whole.
    """
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
    numbers = length * (2 * hidden + 3 * (wide or 4 * hidden))
    if config._attn_implementation == "eager":
        numbers += 2 * config.num_attention_heads * length * length
    return numbers * size


def peak_memory_bytes() -> int:
    """Peak so far: of the allocator on CUDA (all devices), else of the process's resident set."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
