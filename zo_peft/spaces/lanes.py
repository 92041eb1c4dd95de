"""Many candidates of an adapter in one forward: lanes.

Within `lanes.active(...)` the rows of a batch are K lanes of R rows each, one lane behind the
other, and each lane is at a point of its own. The base sees all rows together; only the modules
that own tuned parameters work lane by lane.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, PeftType
from peft.tuners import ia3, lora, tinylora, unilora, vera
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from zo_peft.replace import replaced

#: Where a module works lane by lane: the module, its method to replace, and the replacement, which
#: takes (module, lanes, name of the module) before the method's own arguments.
Replacement = tuple[nn.Module, str, Callable[..., Tensor]]


class NotInLanes(Exception):
    """A module that owns tuned parameters cannot work lane by lane; the message names it."""


class Lanes:
    """K values of every tuned parameter.

    Args:
        values: [K, *shape], by parameter.
        count: K.
    """

    def __init__(self, values: Mapping[Tensor, Tensor], count: int) -> None:
        self._values, self.count = values, count
        self._rows = self._scored = 1

    def of(self, parameter: Tensor) -> Tensor:
        """[K, *shape]; [1, *shape] for a parameter that is not tuned."""
        return self._values.get(parameter, parameter[None])

    def split(self, x: Tensor, name: str) -> Tensor:
        """[K * R, ...] as [K, R, ...].

        Raises:
            NotInLanes: the input of the module `name` has no rows of the batch, or some of them.
        """
        if x.shape[0] % (self.count * self._rows) and x.shape[0] != self.count * self._scored:
            raise NotInLanes(f"{name} (its input of shape {list(x.shape)} is not the batch)")
        return x.unflatten(0, (self.count, -1))

    @contextmanager
    def active(
        self, replacements: Mapping[str, Replacement], rows: int, scored: int
    ) -> Iterator[None]:
        """Within the context the modules of `find_replacements` work lane by lane.

        Args:
            rows: R, of a lane.
            scored: positions of a lane that the head sees.
        """
        self._rows, self._scored = rows, scored
        methods = [
            (module, method, partial(replacement, module, self, name))
            for name, (module, method, replacement) in replacements.items()
        ]
        with replaced(methods):
            yield


def find_replacements(
    model: PeftModel, tuned: Mapping[str, nn.Parameter]
) -> dict[str, Replacement]:
    """How each module that owns tuned parameters works lane by lane, by the module's name.

    Raises:
        NotInLanes: a module cannot.
    """
    names = {id(parameter): name for name, parameter in tuned.items()}
    found: dict[str, Replacement] = {}
    covered: set[int] = set()
    for name, module in model.named_modules():
        is_layer = isinstance(module, BaseTunerLayer)
        own = names.keys() & {id(parameter) for parameter in module.parameters(recurse=is_layer)}
        inside = any(name.startswith(f"{layer}.") for layer in found)
        if own and not inside and not isinstance(module, nn.ParameterDict):
            found[name] = _replacement(model, module, name)
            covered |= own
    for parameter, name in names.items():
        if parameter not in covered:
            raise NotInLanes(name)
    return found


def _replacement(model: PeftModel, module: nn.Module, name: str) -> Replacement:
    if getattr(model, "peft_type", None) == PeftType.PROMPT_TUNING and name.startswith(
        "prompt_encoder."
    ):
        return model, "get_prompt", _prompts
    replacement = _BY_TYPE.get(type(module))
    if replacement is None or (isinstance(module, BaseTunerLayer) and not _is_plain(module)):
        raise NotInLanes(f"{name} (a {type(module).__name__} of {type(module).__module__})")
    return module, "forward", replacement


def _is_plain(layer: BaseTunerLayer) -> bool:
    """One adapter, as its method was first published."""
    varied = getattr(layer, "lora_variant", {}) or any(getattr(layer, "lora_bias", {}).values())
    return len(layer.active_adapters) == 1 and not varied and not layer.merged


def _each(x: Tensor, weights: Tensor) -> Tensor:
    """`x [K, N, in] @ weights [K or 1, out, in]^T`, lane by lane."""
    if len(weights) == 1:
        return F.linear(x, weights[0])
    return torch.bmm(x, weights.transpose(1, 2))


def _linear(module: nn.Linear, lanes: Lanes, name: str, x: Tensor) -> Tensor:
    y = _each(lanes.split(x, name).flatten(1, -2), lanes.of(module.weight))
    if module.bias is not None:
        y = y + lanes.of(module.bias)[:, None]
    return y.view(*x.shape[:-1], -1)


def _embedding(module: nn.Embedding, lanes: Lanes, name: str, ids: Tensor) -> Tensor:
    weights, ids = lanes.of(module.weight), lanes.split(ids, name)
    lane = torch.arange(lanes.count, device=ids.device).view(-1, *[1] * (ids.dim() - 1))
    return weights[lane, ids].flatten(0, 1)


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


Factors = tuple[Tensor, Tensor, float]


def _low_rank(
    factors: Callable[[Any, Lanes, str], Factors],
    layer: Any,
    lanes: Lanes,
    name: str,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """The base's output plus `scaling * x A^T B^T`, with A [K or 1, r, in] and B [K, out, r]."""
    result = layer.base_layer(x, *args, **kwargs)
    a, b, scaling = factors(layer, lanes, layer.active_adapters[0])
    hidden = _each(lanes.split(x, name).flatten(1, -2).to(a.dtype), a)
    b = b.transpose(1, 2).expand(lanes.count, -1, -1)
    sums = result.view(*hidden.shape[:2], -1)
    if result.dtype == b.dtype:
        sums.baddbmm_(hidden, b, alpha=scaling)
    else:
        sums.add_(torch.bmm(hidden, b).mul_(scaling))
    return result


def _lora_factors(layer: lora.LoraLayer, lanes: Lanes, adapter: str) -> Factors:
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return lanes.of(a), lanes.of(b), layer.scaling[adapter]


def _vera_factors(layer: Any, lanes: Lanes, adapter: str) -> Factors:
    a = layer.vera_A[adapter][:, : layer.in_features]
    b = layer.vera_B[adapter][: layer.out_features]
    d, scale = lanes.of(layer.vera_lambda_d[adapter]), lanes.of(layer.vera_lambda_b[adapter])
    return a[None], scale[:, :, None] * b * d[:, None], 1.0


def _unilora_factors(layer: Any, lanes: Lanes, adapter: str) -> Factors:
    theta = lanes.of(layer.unilora_theta_d[adapter])
    a = theta[:, layer.unilora_indices_A[adapter]] * layer.unilora_scales_A[adapter]
    b = theta[:, layer.unilora_indices_B[adapter]] * layer.unilora_scales_B[adapter]
    return a, b, 1.0


def _tinylora_factors(layer: Any, lanes: Lanes, adapter: str) -> Factors:
    v = lanes.of(layer.tinylora_v[adapter][layer._tinylora_v_key[adapter]])
    r = torch.einsum("ki,ijl->kjl", v, layer.tinylora_P[adapter].to(v))
    return layer.tinylora_A[adapter][None].to(v), layer.tinylora_B[adapter].to(v) @ r, 1.0


_LORA = partial(_low_rank, _lora_factors)

_BY_TYPE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    lora.Linear: _LORA,
    lora.Linear8bitLt: _LORA,
    lora.Linear4bit: _LORA,
    vera.Linear: partial(_low_rank, _vera_factors),
    unilora.Linear: partial(_low_rank, _unilora_factors),
    tinylora.Linear: partial(_low_rank, _tinylora_factors),
    ia3.Linear: _ia3,
    ia3.Linear8bitLt: _ia3,
    ia3.Linear4bit: _ia3,
}
