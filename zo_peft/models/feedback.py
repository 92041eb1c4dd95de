"""Errors taken down through post-norm layers, in closed form and at few positions.

Where norms lie in the residual stream, as in BERT, the identity is a poor guess of a layer. Behind
its attention such a layer works on each position alone. The error at its output is taken through
that part with what hooks have kept of the pass. It is then also the error at the layer's input, but
for what goes through the attention, which is left out. Other layers stay the identity.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import compress, count
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from zo_peft.models.heads import Scored, lora_parameters, lora_settings
from zo_peft.models.peft_layers import is_plain_lora
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
        self._calls: Calls = {}
        self._hidden = torch.empty(0)
        #: From the bottom: post-norm layers; and the inputs of their norms and activations.
        self._layers: list[PostNorm] = []
        self._inputs: dict[nn.Module, Tensor] = {}

    @contextmanager
    def hooks(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Within the context a forward pass is kept."""
        with ExitStack() as stack:
            within = stack.enter_context
            for layer in layers:
                parts = self._known.get(layer)
                for module in (parts.first, parts.act, parts.last) if parts else ():
                    within(module.register_forward_pre_hook(self._keep))
                for module in [*layer.modules()][1:] if layer not in self._known else ():
                    within(module.register_forward_hook(self._called))
                if layer not in self._known:
                    within(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
                    within(layer.register_forward_hook(self._leave))
            yield
        self._layers = [parts for layer in layers if (parts := self._known[layer]) is not None]

    @torch.no_grad()
    def down(self, errors: Tensor) -> Callable[[Sequence[nn.Module]], Tensor]:
        """Take errors [B, n, d] at the output of the last layer to the outputs of L modules:
        [L, B, n, d], or [1, B, n, d] where these are all the same.

        Each position gets the error of one that is sampled, or none where it had none. Where the
        errors of positions differ otherwise, they stay as they are in all layers.
        """
        if not self._layers:
            return lambda _: errors[None]
        flat, found = errors.flatten(0, 1), dict[nn.Module, Tensor]()
        (sample, *_, nearest), some = self._sample, flat.any(dim=1, keepdim=True)
        own, near = flat[sample], 1e-3 if flat.dtype == torch.float32 else 1e-2
        if torch.allclose(own[nearest] * some, flat, rtol=near):
            act, x = self._layers[0].act, self._stacked("act").float()
            slopes = ((act(x + STEP) - act(x - STEP)) / (2 * STEP)).to(own.dtype)
            first, last = (self._norms_back(name) for name in ("first", "last"))
            for index, parts in reversed([*enumerate(self._layers)]):
                found[parts.down] = own = last(index, own)
                inner = through_linear(parts.down, own) * slopes[index]
                found[parts.out] = own = first(index, own + through_linear(parts.up, inner))

        def at(modules: Sequence[nn.Module]) -> Tensor:
            if found.keys().isdisjoint(modules):
                return errors[None]
            own = torch.stack([found.get(module, flat[sample]) for module in modules])
            return (own[:, nearest] * some).unflatten(1, errors.shape[:2])

        return at

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls, self._hidden = {}, hidden_of(*args, **kwargs)

    def _called(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in (*args[:1], output) if isinstance(x, Tensor)]
        if [x.shape[:2] for x in tensors] == [self._hidden.shape[:2]] * 2:
            x, y = map(self._of, tensors)
            self._calls[module] = x, y

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        calls, ends = self._calls, (self._of(x) for x in (self._hidden, first_of(output)))
        self._known[layer] = _parts_of(linears_of(layer), calls, *ends)
        if (parts := self._known[layer]) is not None:
            self._inputs |= {m: calls[m][0] for m in (parts.first, parts.act, parts.last)}

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._inputs[module] = self._of(args[0])

    def _of(self, x: Tensor) -> Tensor:
        """[S, ...] of [B, T, ...]."""
        _, rows, positions, _ = self._sample
        virtual = x.shape[1] - self._scored.length
        return x[rows, positions + virtual if virtual else positions]

    @cached_property
    def _sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Some slots of the grid of scored positions [S], counted through all rows, with their rows
        and positions; and which of these is next before each slot, [B * n].
        """
        scored, sample, nearest = self._scored, list[int](), list[int]()
        for row, kept in enumerate(scored.real.tolist()):
            own = [row * len(kept) + slot for slot in compress(range(len(kept)), kept)]
            few, ranks = min(len(own), POSITIONS), count()
            nearest += [len(sample) + next(ranks) * few // len(own) if real else 0 for real in kept]
            sample += [own[-(-index * len(own) // few)] for index in range(few)]
        slots, back = (torch.tensor(x, device=scored.real.device) for x in (sample, nearest))
        rows = slots // scored.each
        return slots, rows, scored.positions[rows, slots % scored.each], back

    def _stacked(self, name: str) -> Tensor:
        """The inputs of a part of all layers, [L, S, ...]."""
        return torch.stack([self._inputs[getattr(parts, name)] for parts in self._layers])

    def _norms_back(self, name: str) -> Callable[[int, Tensor], Tensor]:
        """Takes errors [S, d] through the layer norm of a layer, to its input."""
        norms, x = [getattr(parts, name) for parts in self._layers], self._stacked(name)
        weights, shape = torch.stack([norm.weight for norm in norms]).to(x.dtype), [x.shape[-1]]
        _, mean, size = torch.native_layer_norm(x, shape, None, None, norms[0].eps)
        back = partial(torch.ops.aten.native_layer_norm_backward, output_mask=[True, False, False])
        return lambda i, e: back(e, x[i], shape, mean[i], size[i], weights[i], None)[0]


def _parts_of(
    linears: Sequence[nn.Module], calls: Calls, hidden: Tensor, output: Tensor
) -> PostNorm | None:
    """The parts of a layer, if what they were called with is that of a post-norm, bit for bit."""
    norms = [norm for norm in calls if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine]
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


def through_linear(module: Any, errors: Tensor) -> Tensor:
    """Take errors [..., out] through a linear module, to its input, in their dtype."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    flat = errors.flatten(0, -2)
    if isinstance(base, Linear8bitLt):
        scales = base.state.SCB if base.weight.SCB is None else base.weight.SCB
        # Divided by 127 at once, small errors would be below the smallest numbers of float16.
        scaled, codes = (flat * scales).to(flat.dtype), base.weight.data.to(flat.dtype)
        back = torch.addmm(scaled[:, :1], scaled, codes, beta=0, alpha=1 / 127)
    else:
        weight = dequantize_module_weight(base)
        back = (flat.to(weight.dtype) @ weight).to(flat.dtype)
    if is_plain_lora(module):
        (a, b), (*_, scaling) = lora_parameters(module), lora_settings(module)
        back = torch.addmm(back, flat @ b.to(flat.dtype), a.to(flat.dtype), alpha=scaling)
    return back.unflatten(0, errors.shape[:-1])


def linears_of(layer: nn.Module) -> list[nn.Module]:
    """The linear modules of a layer, an adapter's with what it wraps as one."""
    adapters = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    inner = {part for adapter in adapters for part in adapter.modules()} - set(adapters)
    kinds = (nn.Linear, BaseTunerLayer)
    return [m for m in layer.modules() if isinstance(m, kinds) and m not in inner]
