"""How the modules of PEFT work lane by lane, so that candidates share a forward pass."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from zo_peft.core import lanes as plain
from zo_peft.core.lanes import Lanes, NotInLanes, Replacement, lane_product, plain_replacement
from zo_peft.errors import UserError


def find_replacements(
    model: PeftModel, tuned: Mapping[str, nn.Parameter]
) -> dict[str, Replacement]:
    """How each module with tuned parameters works lane by lane, by its name; or `NotInLanes`."""

    def replacement_of(module: nn.Module, name: str) -> Replacement:
        is_prompt = name.startswith("prompt_encoder.")
        if is_prompt and getattr(model, "peft_type", None) == PeftType.PROMPT_TUNING:
            return model, "get_prompt", _prompts
        if not isinstance(module, BaseTunerLayer):
            return plain_replacement(module, name)
        replacement = _LORA if _is_lora(module) else _BY_NAME.get(_name(module))
        if replacement is None or not _is_plain(module):
            raise NotInLanes(f"{name} (a {type(module).__name__} of {type(module).__module__})")
        return module, "forward", replacement

    return plain.find_replacements(model, tuned, replacement_of, (BaseTunerLayer,))


def _is_plain(layer: BaseTunerLayer) -> bool:
    """Whether the layer has one adapter, of the form that its method was first published in."""
    varied = getattr(layer, "lora_variant", {}) or any(getattr(layer, "lora_bias", {}).values())
    return len(layer.active_adapters) == 1 and not varied and not layer.merged


def _prompts(model: PeftModel, lanes: Lanes, _: str, batch_size: int, **kwargs: Any) -> Tensor:
    prompts = lanes.of(model.prompt_encoder[model.active_adapter].embedding.weight)
    return prompts.repeat_interleave(batch_size // lanes.count, dim=0)


def _ia3(layer: Any, lanes: Lanes, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    scale = lanes.of(layer.ia3_l[layer.active_adapters[0]]).flatten(1)

    def scaled(y: Tensor) -> Tensor:
        return (lanes.split(y, name).flatten(1, -2) * scale[:, None]).to(y.dtype).view_as(y)

    if layer.is_feedforward:
        return layer.base_layer(scaled(x), *args, **kwargs)
    return scaled(layer.base_layer(x, *args, **kwargs))


#: Gives A [K or 1, r, in], B [K, out, r] and the scaling of a layer's adapter of some name.
Factors = Callable[[Any, Lanes, str], tuple[Tensor, Tensor, float]]


def _low_rank(
    factors: Factors, layer: Any, lanes: Lanes, name: str, x: Tensor, *args: Any, **kw: Any
) -> Tensor:
    """The output of the base layer, whose bias may be tuned, plus `scaling * x A^T B^T`."""
    result = layer.base_layer(x, *args, **kw)
    a, b, scaling = factors(layer, lanes, layer.active_adapters[0])
    hidden = lane_product(lanes.split(x, name).flatten(1, -2).to(a.dtype), a)
    b = b.transpose(1, 2).expand(lanes.count, -1, -1)
    sums = result.view(*hidden.shape[:2], -1)
    bias = getattr(layer.get_base_layer(), "bias", None)
    if bias is not None and len(values := lanes.of(bias)) > 1:
        sums.add_((values - bias)[:, None])
    if result.dtype == b.dtype:
        sums.baddbmm_(hidden, b, alpha=scaling)
    else:
        sums.add_(torch.bmm(hidden, b).mul_(scaling))
    return result


def _lora_factors(layer: Any, lanes: Lanes, adapter: str) -> tuple[Tensor, Tensor, float]:
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return lanes.of(a), lanes.of(b), layer.scaling[adapter]


def _vera_factors(layer: Any, lanes: Lanes, adapter: str) -> tuple[Tensor, Tensor, float]:
    a = layer.vera_A[adapter][:, : layer.in_features]
    b = layer.vera_B[adapter][: layer.out_features]
    d, scale = lanes.of(layer.vera_lambda_d[adapter]), lanes.of(layer.vera_lambda_b[adapter])
    return a[None], scale[:, :, None] * b * d[:, None], 1.0


def _unilora_factors(layer: Any, lanes: Lanes, adapter: str) -> tuple[Tensor, Tensor, float]:
    theta = lanes.of(layer.unilora_theta_d[adapter])
    a = theta[:, layer.unilora_indices_A[adapter]] * layer.unilora_scales_A[adapter]
    b = theta[:, layer.unilora_indices_B[adapter]] * layer.unilora_scales_B[adapter]
    return a, b, 1.0


def _tinylora_factors(layer: Any, lanes: Lanes, adapter: str) -> tuple[Tensor, Tensor, float]:
    v = lanes.of(layer.tinylora_v[adapter][layer._tinylora_v_key[adapter]])
    r = torch.einsum("ki,ijl->kjl", v, layer.tinylora_P[adapter].to(v))
    return layer.tinylora_A[adapter][None].to(v), layer.tinylora_B[adapter].to(v) @ r, 1.0


_LORA = partial(_low_rank, _lora_factors)

#: By the names of PEFT's classes: some of these exist only in newer versions, or only where the
#: package that quantizes their layers is installed.
_BY_NAME: dict[str, Callable[..., Tensor]] = {
    "vera.layer.Linear": partial(_low_rank, _vera_factors),
    "unilora.layer.Linear": partial(_low_rank, _unilora_factors),
    "tinylora.layer.Linear": partial(_low_rank, _tinylora_factors),
    **dict.fromkeys(("ia3.layer.Linear", "ia3.bnb.Linear8bitLt", "ia3.bnb.Linear4bit"), _ia3),
}

#: LoRA on linear layers.
_LORAS = {"Linear", "Linear8bitLt", "Linear4bit", "AqlmLoraLinear", "AwqLoraLinear"}
_LORAS |= {"EetqLoraLinear", "GPTQLoraLinear", "HqqLoraLinear", "TorchaoLoraLinear"}


def _name(module: nn.Module) -> str:
    """The name of a module's class, from the package on that PEFT has its methods in."""
    return f"{type(module).__module__}.{type(module).__name__}".removeprefix("peft.tuners.")


def _is_lora(module: nn.Module) -> bool:
    method, *_, kind = _name(module).split(".")
    return method == "lora" and kind in _LORAS


def is_plain_lora(module: Any) -> bool:
    """Whether a module is a LoRA as first published, on a linear layer whose weight PEFT reads."""
    if not (_is_lora(module) and _is_plain(module)):
        return False
    base = module.get_base_layer()
    return hasattr(base, "weight") or hasattr(base, "W_q")  # the weight of HQQ


def check_options(model: PeftModel) -> None:
    """Raise a UserError for what PEFT passes over without a word on a quantized base."""
    # PEFT casts these to the dtype of the weights, which turns them to zero where that is int8.
    scales = (t for m in model.modules() for t in getattr(m, "unilora_scales_A", {}).values())
    if not all(tensor.is_floating_point() for tensor in scales):
        raise UserError("UNILORA does nothing on a quantized base; use VERA, IA3 or LORA")
    config = model.active_peft_config
    marked = [field.name for field in fields(config) if field.metadata.get("is_lora_variant")]
    # The lowest version of PEFT marks none.
    variants = marked or ["use_dora", "alora_invocation_tokens", "arrow_config"]
    asked = [name for name in variants if getattr(config, name, None)]
    if asked and not any(getattr(module, "lora_variant", None) for module in model.modules()):
        what = f"{asked[0]} does nothing on a quantized base"
        raise UserError(f"{what}; load it in floating point, or drop it")
