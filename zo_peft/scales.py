"""The scales of a tuned quantized base in a file of their own, to set on the same base again."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from zo_peft.errors import UserError, explained
from zo_peft.models.in_place_space import InPlaceSpace
from zo_peft.models.loading import base_hash
from zo_peft.models.numbers import find_scales, named

SCALES_NAME = "zo_scales.safetensors"


def save_scales(folder: str, space: InPlaceSpace, base: str) -> None:
    """Write the tuned tensors into `folder`; `base` is the `base_hash` of the untuned base."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in space.tensors().items()}
    save_file(tensors, Path(folder) / SCALES_NAME, metadata={"format": "pt", "base": base})


def load_scales(model: PreTrainedModel, folder: str) -> None:
    """Set the scales of a base that was just loaded to those that were saved in `folder`.

    A UserError says that the file cannot be read, or is of another base; nothing is changed then.
    """
    path, advice = Path(folder) / SCALES_NAME, "give a folder that tune=scales wrote"
    what = f"{path.parent.name}/{SCALES_NAME} cannot be read"
    with explained(what, OSError, SafetensorError, advice=advice), safe_open(path, "pt") as file:
        base = (file.metadata() or {}).get("base")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if base != base_hash(model):
        raise UserError(
            f"the scales in {path.parent.name} are of another base; load the model that they were "
            "tuned on, quantized in the same way"
        )
    unquantized = any(not name.endswith((".SCB", ".absmax")) for name in tensors)
    owners = named(find_scales(model, unquantized), tensors)
    InPlaceSpace(owners, "gaussian").load(tensors)
