"""Memory from shapes: how many candidates fit into one forward beside plain inference."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from zo_peft.objectives import Batch

#: The peak stays within this many times the peak of plain inference on the same batch ...
PEAK_RATIO = 1.05

#: ... or within this many bytes of it, where the model is tiny: less than the libraries themselves.
FLOOR_BYTES = 16 << 20

#: Tokens after which a float base on a CPU gains nothing from more: activations leave the cache.
CPU_TOKENS = 1024

#: bitsandbytes' int8 matmul on a CPU holds this many times the activations: each is quantized,
#: multiplied to int32 and scaled in separate tensors (scripts/bench_step.py).
CPU_INT8_COPIES = 5


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they are stored (codes of a quantized base)."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Fit:
    """How many candidates of one forward keep its peak near that of plain inference.

    Plain inference: the weights, and the activations of one layer or the logits of all positions,
    whichever is more. A candidate: the activations of one layer or the logits of the scored
    positions, and its own copy of the adapter. Depends on shapes and the kind of device alone.

    Args:
        adapter_numel: float32 numbers of a candidate.
        new_tokens: the most that each sequence generates; their keys and values are kept, too.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, adapter_numel: int, new_tokens: int = 0
    ) -> None:
        self.new_tokens = new_tokens
        self.config = model.config.get_text_config()
        self.size = model.get_input_embeddings().weight.element_size()
        self.weights, self.adapter = weight_bytes(model), 4 * adapter_numel
        dtypes = {parameter.dtype for parameter in model.parameters()}
        on_cpu = model.device.type == "cpu"
        is_float = all(dtype.is_floating_point for dtype in dtypes)
        offloaded = any(parameter.is_meta for parameter in model.parameters())
        # Streaming weights costs more than leaving the cache.
        self.max_tokens = CPU_TOKENS if is_float and on_cpu and not offloaded else None
        self.copies = CPU_INT8_COPIES if torch.int8 in dtypes and on_cpu else 1

    def __call__(self, batch: Batch, parts: int = 1) -> int:
        """Candidates that fit on the batch, each with `parts` copies of the adapter; at least 1."""
        rows, length = batch["input_ids"].shape
        layer = self.copies * rows * layer_bytes(self.config, length, self.size)
        if self.new_tokens:
            layer += rows * cache_bytes(self.config, length + self.new_tokens, self.size)
        vocabulary = self.config.vocab_size if "rows" in batch else 0
        plain = max(layer, rows * length * vocabulary * self.size)
        # The logits of scored positions are there twice, as they are and in the loss.
        own = max(layer, 2 * 4 * len(batch.get("rows", ())) * vocabulary) + parts * self.adapter
        slack = max((PEAK_RATIO - 1) * (self.weights + plain), FLOOR_BYTES)
        fit = int((plain + slack) / own)
        if self.max_tokens is not None:
            fit = min(fit, self.max_tokens // (rows * length))
        return max(1, fit)


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
