"""The scales of a tuned quantized base as a file of their own, for the same base, known by hash."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from zo_peft.errors import UserError
from zo_peft.models.identity import base_hash
from zo_peft.models.in_place_space import InPlaceSpace
from zo_peft.models.numbers import find_scales

SCALES_NAME = "zo_scales.safetensors"


def save_scales(folder: str, space: InPlaceSpace, base: str) -> None:
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
    InPlaceSpace({name: owner for name, owner in kept.items() if owner[1]}, "gaussian").load(
        tensors
    )
