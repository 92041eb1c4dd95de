"""How a base is recognised, so that a run goes on with the base that it started from."""

import hashlib
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from zo_peft.models.loading import bits_of


def base_hash(model: nn.Module) -> str:
    """A hash of names and bits of all tensors in the model's state dict, on whatever device.

    The trained tensors of an adapter are left out.
    """
    digest = hashlib.blake2b(digest_size=16)
    named = model.named_parameters() if isinstance(model, PeftModel) else ()
    trained = {name for name, parameter in named if parameter.requires_grad}
    for name, tensor in sorted(model.state_dict().items()):
        if name in trained:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        bits = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(bits.numpy()))
    return digest.hexdigest()


def identity(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """A hash of the base's files, or of its tensors if it is of the Hub; and its format.

    The format, `loaded`, is int8, 4-bit, or the dtype.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    bits = bits_of(base.config)
    loaded = {8: "int8", 4: "4-bit"}[bits] if bits else str(base.dtype)
    name = model.config.name_or_path
    files = sorted(Path(name).glob("*.safetensors")) if name else []
    if not files:
        return {"tensors": base_hash(model), "loaded": loaded}
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return {"files": digest.hexdigest(), "loaded": loaded}
