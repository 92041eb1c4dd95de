"""Offloaded bases: accelerate keeps part of their weights on the CPU or the disk."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

#: The adapters that leave it to the layers of the base to read its weights.
ON_OFFLOADED = ["LORA", "ADALORA", "IA3", "VERA", "LOHA", "LOKR", "OFT", "BOFT", "FOURIERFT"]
ON_OFFLOADED += ["RANDLORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"]


def offloaded_parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The offloaded parameters: of each its module, its name in that module, and itself."""
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta and hasattr(module, "_hf_hook")
    ]


@contextmanager
def stand_ins(offloaded: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> Iterator[None]:
    """Within the context, offloaded weights are NaN tensors on the devices that run their layers.

    PEFT puts an adapter on the device of the weight, and an offloaded weight has none. An adapter
    that PEFT computes from such a weight is NaN, too. The tensors are one expanded number, so they
    take no memory.
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
    """The device of token ids; for an offloaded model the CPU, from which accelerate moves them."""
    return torch.device("cpu") if model.device.type == "meta" else model.device
