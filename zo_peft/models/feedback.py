"""Errors taken down through post-norm layers, in closed form and at few positions.

Where norms lie in the residual stream, as in BERT, the identity is a poor guess of a layer. Behind
its attention such a layer works on each position alone. The error at its output is taken through
that part with what hooks have kept of the pass. It is then also the error at the layer's input, but
for what goes through the attention, which is left out. Other layers stay the identity.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from zo_peft.models.heads import Scored
from zo_peft.models.peft_layers import is_plain_lora, lora_factors
from zo_peft.models.quantized import Linear8bitLt
from zo_peft.models.trunk import first_of, hidden_of

#: The most positions of a row at which errors are taken through the layers.
POSITIONS = 4
#: The distance of the differences that give the slope of an activation.
STEP = 1e-2


@dataclass(frozen=True)
class PostNorm:
    """The parts of a layer `last(m + down(act(up(m))))`, with `m = first(x + out(attention(x)))`.

    They are modules, and `act` has no parameters.
    """

    out: nn.Module
    first: nn.LayerNorm
    up: nn.Module
    act: nn.Module
    down: nn.Module
    last: nn.LayerNorm


#: Modules with their inputs and outputs, [S, ...].
Calls = dict[nn.Module, tuple[Tensor, Tensor]]


class Feedback:
    """One forward pass at S of the scored positions, evenly spaced in each row.

    Args:
        known: the parts of each layer that was seen (None: the identity), to which this pass adds.
    """

    def __init__(self, scored: Scored, known: dict[nn.Module, PostNorm | None]) -> None:
        self._scored, self._known = scored, known
        self._sample, self._nearest = _sample(scored.rows)
        self._calls: Calls = {}
        self._hidden = torch.empty(0)
        #: From the bottom: the parts of post-norm layers, and the inputs of norms and activation.
        self._passed: list[tuple[PostNorm, list[Tensor]]] = []

    @contextmanager
    def hooks(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Within the context a forward pass is kept."""
        with ExitStack() as stack:
            for layer in layers:
                parts = self._known.get(layer)
                known = (parts.first, parts.act, parts.last) if parts else ()
                for module in known if layer in self._known else layer.modules():
                    if module is not layer:
                        stack.enter_context(module.register_forward_hook(self._called))
                stack.enter_context(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(self._leave))
            yield

    @torch.no_grad()
    def down(self, errors: Tensor) -> Callable[[nn.Module], Tensor]:
        """Take errors [N, d] at the output of the last layer to the outputs of modules.

        Each position gets the error of one that is sampled, or none where it had none. Where the
        errors of positions differ otherwise, they stay as they are in all layers.
        """
        own, some = errors[self._sample], errors.any(dim=1, keepdim=True)
        found: dict[nn.Module, Tensor] = {}
        if self._passed and torch.allclose(own[self._nearest] * some, errors, rtol=1e-3):
            for parts, (first, act, last) in reversed(self._passed):
                found[parts.down] = own = _through_norm(parts.last, last, own)
                slopes = (parts.act(act + STEP) - parts.act(act - STEP)) / (2 * STEP)
                inner = through_linear(parts.up, through_linear(parts.down, own) * slopes)
                found[parts.out] = own = _through_norm(parts.first, first, own + inner)
        return lambda m: found[m][self._nearest] * some if m in found else errors

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls, self._hidden = {}, hidden_of(*args, **kwargs)

    def _called(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in (*args[:1], output) if isinstance(x, Tensor)]
        if [x.shape[:2] for x in tensors] == [self._hidden.shape[:2]] * 2:
            x, y = (self._scored.of(x, self._sample) for x in tensors)
            self._calls[module] = x, y

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        calls, self._calls = self._calls, {}
        if layer not in self._known:
            ends = (self._scored.of(x, self._sample) for x in (self._hidden, first_of(output)))
            self._known[layer] = _parts_of(linears_of(layer), calls, *ends)
        if (parts := self._known[layer]) is not None:
            inputs = [calls[part][0].float() for part in (parts.first, parts.act, parts.last)]
            self._passed.append((parts, inputs))


def _sample(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The sampled of N positions, [S], and which of these is next before each, [N]."""
    sample: list[int] = []
    nearest: list[int] = []
    start = 0
    for count in rows.unique_consecutive(return_counts=True)[1].tolist():
        few = min(count, POSITIONS)
        nearest += [len(sample) + i * few // count for i in range(count)]
        sample += [start + -(-i * count // few) for i in range(few)]
        start += count
    return torch.tensor(sample, device=rows.device), torch.tensor(nearest, device=rows.device)


def _parts_of(
    linears: Sequence[nn.Module], calls: Calls, hidden: Tensor, output: Tensor
) -> PostNorm | None:
    """The parts of a layer, if what they were called with is that of a post-norm, bit for bit."""
    norms = [module for module in calls if isinstance(module, nn.LayerNorm)]
    if len(norms) != 2 or not _same(calls[norms[1]][1], output):
        return None
    (before, middle), (end, _) = (calls[norm] for norm in norms)
    linear = [(module, *calls[module]) for module in linears if module in calls]
    outs = [m for m, _, y in linear if y.shape == hidden.shape and _same(hidden + y, before)]
    ups = [m for m, x, _ in linear if _same(x, middle)]
    downs = [m for m, _, y in linear if y.shape == middle.shape and _same(middle + y, end)]
    if [len(outs), len(ups), len(downs)] != [1, 1, 1]:
        return None
    ends = calls[ups[0]][1], calls[downs[0]][0]
    acts = [
        module
        for module, pair in calls.items()
        if all(map(_same, pair, ends)) and next(module.parameters(), None) is None
    ]
    return PostNorm(outs[0], norms[0], ups[0], acts[0], downs[0], norms[1]) if acts else None


def _same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x, y)


def _through_norm(norm: nn.LayerNorm, x: Tensor, errors: Tensor) -> Tensor:
    """Take errors through a layer norm, to its input x."""
    errors = errors if norm.weight is None else errors * norm.weight.float()
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    size = (variance + norm.eps).sqrt()
    normed = (x - mean) / size
    along = normed * (errors * normed).mean(dim=-1, keepdim=True)
    return (errors - errors.mean(dim=-1, keepdim=True) - along) / size


def through_linear(module: Any, errors: Tensor) -> Tensor:
    """Take errors through a linear module, to its input."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    back = errors @ _weight(base).float()
    if is_plain_lora(module):
        a, b, scaling = lora_factors(module)
        back = back + scaling * (errors @ b) @ a
    return back


def _weight(module: Any) -> Tensor:
    """The weight of a linear layer in floating point, [out, in]."""
    if isinstance(module, Linear8bitLt):
        scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return module.weight.data * (scales / 127.0)[:, None]
    return dequantize_module_weight(module)


def linears_of(layer: nn.Module) -> list[nn.Module]:
    """The linear modules of a layer, an adapter's with what it wraps as one."""
    adapters = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    inner = {part for adapter in adapters for part in adapter.modules()} - set(adapters)
    kinds = (nn.Linear, BaseTunerLayer)
    return [m for m in layer.modules() if isinstance(m, kinds) and m not in inner]
