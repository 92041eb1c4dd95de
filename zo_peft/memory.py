"""Memory from shapes: how many candidates fit into one forward beside plain inference."""

from typing import Any

from torch import nn

from zo_peft.objectives import Batch

#: The peak stays within this many times the peak of plain inference on the same batch ...
PEAK_RATIO = 1.05

#: ... or within this many bytes of it, where the model is tiny: less than the libraries themselves.
FLOOR_BYTES = 16 << 20


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they are stored (codes of a quantized base)."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def candidates_that_fit(model: nn.Module, batch: Batch, adapter_numel: int) -> int:
    """Candidates of one forward that keep its peak near that of plain inference on the batch.

    Plain inference: the weights, and the activations of one layer or the logits of all positions,
    whichever is more. A candidate: the activations of one layer or the logits of the scored
    positions, and its own copy of the adapter (`adapter_numel` float32 numbers). Depends on shapes
    alone; at least 1.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    rows, length = batch["input_ids"].shape
    size = model.get_input_embeddings().weight.element_size()  # type: ignore[operator]
    layer = rows * layer_bytes(config, length, size)
    vocabulary = getattr(config, "vocab_size", 0) if "rows" in batch else 0
    plain = max(layer, rows * length * vocabulary * size)
    # The logits of scored positions are there twice, as they are and in the loss.
    own = max(layer, 2 * 4 * len(batch.get("rows", ())) * vocabulary) + 4 * adapter_numel
    slack = max((PEAK_RATIO - 1) * (weight_bytes(model) + plain), FLOOR_BYTES)
    return max(1, int((plain + slack) / own))


def layer_bytes(config: Any, length: int, size: int) -> int:
    """Bytes of what a transformer layer holds at its peak for one sequence.

    The residual stream and its normalised copy, and the MLP's two branches and their product; the
    same again for attention scores where they are computed as a whole.
    """
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
    numbers = length * (2 * hidden + 3 * (wide or 4 * hidden))
    if config._attn_implementation == "eager":
        numbers += 2 * config.num_attention_heads * length * length
    return numbers * size
