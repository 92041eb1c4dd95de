"""Bases of which accelerate keeps a part on the CPU or the disk."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import nn
from transformers import PreTrainedModel

#: Adapters that leave reading the base's weights to the base's layers.
ON_OFFLOADED = (
    PeftType.LORA,
    PeftType.ADALORA,
    PeftType.IA3,
    PeftType.VERA,
    PeftType.LOHA,
    PeftType.LOKR,
    PeftType.OFT,
    PeftType.BOFT,
    PeftType.FOURIERFT,
    PeftType.RANDLORA,
    PeftType.PREFIX_TUNING,
    PeftType.PROMPT_TUNING,
    PeftType.P_TUNING,
)


def offloaded_parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Parameters that accelerate keeps elsewhere, with their modules and names there."""
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta and hasattr(module, "_hf_hook")
    ]


@contextmanager
def stand_ins(offloaded: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> Iterator[None]:
    """Within the context, offloaded weights are NaN, without memory, where their layers run.

    PEFT puts an adapter where the weight is, which for an offloaded one is nowhere. What it
    computes from such a weight is NaN, too.
    """
    try:
        for module, name, parameter in offloaded:
            hook: Any = module._hf_hook
            value = torch.nan if parameter.is_floating_point() else 0
            one = torch.full((1,), value, dtype=parameter.dtype, device=hook.execution_device)
            stand_in = nn.Parameter(one.expand(parameter.shape), requires_grad=False)
            module.register_parameter(name, stand_in)
        yield
    finally:
        for module, name, parameter in offloaded:
            parameter.requires_grad_(getattr(module, name).requires_grad)
            module.register_parameter(name, parameter)


def input_device(model: PreTrainedModel | PeftModel) -> torch.device:
    """Where token ids go; of an offloaded model the CPU, from which accelerate moves them."""
    return torch.device("cpu") if model.device.type == "meta" else model.device
