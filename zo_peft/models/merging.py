"""Adapters put into the weights of their base."""

import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, SEQ_CLS_HEAD_NAMES
from safetensors import safe_open
from transformers import PreTrainedModel

from zo_peft.errors import UserError
from zo_peft.models.adapters import unreadable_adapter
from zo_peft.models.hub import LOAD_ERRORS

#: The last layer of a head for sequence classification.
HEAD = re.compile(rf"\b({'|'.join(SEQ_CLS_HEAD_NAMES)})(\.out_proj)?\.weight$")


@torch.no_grad()
def merged_model(model: PeftModel) -> PreTrainedModel:
    """Return the base of a model; its weights are changed in place by the adapter.

    A UserError says that PEFT cannot merge this kind of adapter, that a weight has a second use
    (tied embeddings), or that a merged weight would not be finite.
    """
    kind = model.active_peft_config.peft_type.value
    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    dtypes = {p: p.dtype for layer in layers for p in layer.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in dtypes and ".base_layer." not in name:
            raise UserError(
                f"{kind} cannot be merged: it changes a weight of one layer that the base also "
                f"uses as {name.removeprefix('base_model.model.')}; load it with PEFT"
            )
    # In another dtype PEFT would round the change before it adds it.
    for parameter in dtypes:
        parameter.data = parameter.data.float()
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{kind} cannot be merged: {error}; load it with PEFT") from error
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
    return merged


def saved_adapter(name: str) -> tuple[PeftConfig, int | None]:
    """An adapter's configuration, and how many classes its head has, if any; or a UserError."""
    try:
        config = PeftConfig.from_pretrained(name)
        path = Path(name) / SAFETENSORS_WEIGHTS_NAME
        if not Path(name).is_dir():
            path = Path(hf_hub_download(name, SAFETENSORS_WEIGHTS_NAME))
        with safe_open(path, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except LOAD_ERRORS as error:
        raise unreadable_adapter(name, error) from error
    heads = [shape[0] for key, shape in shapes.items() if HEAD.search(key)]
    return config, heads[0] if heads and config.task_type == TaskType.SEQ_CLS else None
