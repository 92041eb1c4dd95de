"""What a base is known by."""

import hashlib
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def base_hash(model: nn.Module) -> str:
    """A hash of the tensors of the model's state dict, names and bits, wherever they lie.

    Those of an adapter that are trained are left out.
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
    """What a base is known by: a hash of its files, its commit on the Hub, or a hash of tensors.

    And how it was loaded: int8, 4-bit, or its dtype.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    quantization = getattr(base.config, "quantization_config", None)
    bits = {"int8": "load_in_8bit", "4-bit": "load_in_4bit"}
    loaded = [name for name, key in bits.items() if getattr(quantization, key, False)]
    return {**_source(model), "loaded": (loaded or [str(base.dtype)])[0]}


def _source(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    name, commit = model.config.name_or_path, getattr(model.config, "_commit_hash", None)
    files = sorted(Path(name).glob("*.safetensors")) if name else []
    if files:
        digest = hashlib.blake2b(digest_size=16)
        for path in files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        return {"files": digest.hexdigest()}
    return {"tensors": base_hash(model)} if commit is None else {"commit": commit}
