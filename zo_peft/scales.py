"""The scales of a tuned quantized base as a file of their own, for the same base, known by hash."""

import hashlib
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from zo_peft.errors import UserError
from zo_peft.spaces import BaseSpace, find_scales

SCALES_NAME = "zo_scales.safetensors"


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


def save_scales(folder: str, space: BaseSpace, base: str) -> None:
    """Write the tuned tensors into `folder`, for the base of that hash."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in space.tensors().items()}
    save_file(tensors, Path(folder) / SCALES_NAME, metadata={"format": "pt", "base": base})


def load_scales(model: PreTrainedModel, folder: str) -> None:
    """Set the scales of a base, just loaded, to those that were saved in `folder`.

    Raises:
        UserError: the file cannot be read, or is of another base; nothing is changed then.
    """
    path = Path(folder) / SCALES_NAME
    try:
        with safe_open(path, "pt") as file:
            base = (file.metadata() or {}).get("base")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path.parent.name}/{SCALES_NAME} cannot be read ({type(error).__name__}); give a "
            "folder that tune=scales wrote"
        ) from error
    if base != base_hash(model):
        raise UserError(
            f"the scales in {path.parent.name} are of another base; load the model that they were "
            "tuned on, quantized in the same way"
        )
    unquantized = any(not name.endswith((".SCB", ".absmax")) for name in tensors)
    owners = find_scales(model, unquantized)
    kept = {
        name: (module, {a: n for a, n in own.items() if n.name in tensors})
        for name, (module, own) in owners.items()
    }
    BaseSpace({name: owner for name, owner in kept.items() if owner[1]}, "gaussian").load(tensors)
