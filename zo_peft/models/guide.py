"""The guide of a transformer: gradients of an adapter, read off one forward pass.

During the pass hooks keep what the closed forms of `zo_peft.core.guide` need, at the N positions
that the loss sees. Then the error at the output is taken through the final norm, the head and the
loss, which are all that is ever differentiated (with `exact_layers`, the layers below them, too).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear8bitLt
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zo_peft.core.batch import Batch, Objective
from zo_peft.core.guide import Gradients, covariance, low_rank, mixed, unrotated
from zo_peft.core.lanes import replaced
from zo_peft.models.peft_layers import is_plain_lora
from zo_peft.models.trunk import first_of, hidden_of, layers_of

#: A module writes into the residual stream if its layer's output follows it: the least cosine of
#: what it is displaced by and of what the layer's output is displaced by.
FOLLOWS = 0.3

#: Errors of the output [N, d] in, gradients out.
Reading = Callable[[Tensor], Gradients]


class ResidualGuide:
    """Reads gradients of an adapter off forward passes; see `zo_peft.core.guide.Guide`.

    What it knows: a LoRA on the values of attention, on its queries where each example has one
    scored position, and on modules that write into the residual stream; a prefix; and all that lies
    above the last layer. Which modules these are is found by looking at the first pass.

    Args:
        tuned: the tuned parameters by name.
        exact_layers: the uppermost layers through which the error is taken exactly.
    """

    def __init__(
        self,
        model: PeftModel,
        tuned: Mapping[str, nn.Parameter],
        objective: Objective,
        exact_layers: int = 0,
    ) -> None:
        self.model, self.objective = model, objective
        self.layers = layers_of(model)
        self.tuned = dict(tuned)
        self.names = {id(parameter): name for name, parameter in tuned.items()}
        self.read_layers = self.layers[: len(self.layers) - exact_layers]
        below = {
            id(p) for layer in self.read_layers for p in layer.parameters() if id(p) in self.names
        }
        #: The parts are the layers; what belongs to none is part -1.
        self._parts = {
            self.names[id(p)]: index
            for index, layer in enumerate(self.layers)
            for p in layer.parameters()
            if id(p) in self.names
        }
        self.above = {
            name: parameter for name, parameter in self.tuned.items() if id(parameter) not in below
        }
        self._roles: dict[nn.Module, dict[str, Any]] | None = None
        self._writers: set[nn.Module] = set()

    def part(self, name: str) -> int:
        """The index of the layer of a parameter, and -1 above and outside of the layers."""
        return self._parts.get(name, -1)

    @torch.no_grad()
    def read(self, batch: Batch) -> tuple[Tensor, Gradients]:
        """The losses [B] of a batch, and the gradients of their mean, by name."""
        reading = _Pass(self, batch)
        with reading.hooks():
            losses = self.objective.losses(self.model, batch)
        leaf = reading.boundary
        assert leaf is not None
        with torch.enable_grad():
            found = torch.autograd.grad(
                losses.mean(), [leaf, *self.above.values()], allow_unused=True
            )
        errors, *exact = found
        gradients = {n: g.float() for n, g in zip(self.above, exact) if g is not None}
        errors = reading.scored(errors).float()
        for read in reading.readings:
            for name, gradient in read(errors).items():
                gradients[name] = gradients.get(name, 0) + gradient
        if self._roles is None:
            self._roles = reading.roles
        return losses.detach(), gradients


class _Pass:
    """One forward pass: its hooks, and what they keep."""

    def __init__(self, guide: ResidualGuide, batch: Batch) -> None:
        self.guide, self.batch = guide, batch
        self.readings: list[Reading] = []
        self.boundary: Tensor | None = None
        #: What is known of an attention: its value and query modules, and the one behind it.
        self.roles: dict[nn.Module, dict[str, Any]] = guide._roles or {}
        self.first = guide._roles is None
        self._inputs: dict[nn.Module, Tensor] = {}
        self._outputs: dict[nn.Module, Tensor] = {}
        self._open: tuple[nn.Module, Tensor, Any] | None = None
        self._count = 0
        self._length = batch["input_ids"].shape[1]
        if "rows" in batch:
            self._rows, self._positions = batch["rows"], batch["positions"]
        else:
            mask = batch.get("attention_mask")
            mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
            self._rows, self._positions = mask.nonzero(as_tuple=True)
        #: Whether each row has exactly one scored position.
        self.single = self._rows.tolist() == list(range(batch.rows))

    def scored(self, x: Tensor) -> Tensor:
        """Of [B, T, ...] the N scored positions; virtual tokens stand in front."""
        return x[self._rows, self._positions + x.shape[1] - self._length]

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within the context a pass is read."""
        guide = self.guide
        with ExitStack() as stack:
            for layer in guide.read_layers:
                for module in _linears(layer):
                    stack.enter_context(module.register_forward_pre_hook(self._before))
                    stack.enter_context(module.register_forward_hook(self._after))
                stack.enter_context(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            if guide.read_layers:
                stack.enter_context(guide.read_layers[-1].register_forward_hook(self._leave))
            else:
                stack.enter_context(
                    guide.layers[0].register_forward_pre_hook(self._begin, with_kwargs=True)
                )
            function = partial(self._interface, ALL_ATTENTION_FUNCTIONS.get_interface)
            stack.enter_context(replaced([(ALL_ATTENTION_FUNCTIONS, "get_interface", function)]))
            yield

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs, self._outputs = {}, {}
        if self.first:
            self._find_writers(layer, args, kwargs)

    def _leave(self, _: nn.Module, args: Any, output: Any) -> Any:
        hidden = first_of(output).detach().requires_grad_()
        self.boundary = hidden
        torch.set_grad_enabled(True)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = hidden_of(*args, **kwargs).detach().requires_grad_()
        self.boundary = hidden
        torch.set_grad_enabled(True)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    # ---- Modules that write into the residual stream ---------------------------------------------

    def _find_writers(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Run a layer once for each LoRA that may write, with that module's output displaced."""
        width = hidden_of(*args, **kwargs).shape[-1]
        modules = [m for m in _linears(layer) if is_plain_lora(m) and m.out_features == width]
        if not modules:
            return
        if kwargs.get("past_key_values") is not None:
            return
        generator = torch.Generator().manual_seed(0)
        shape = hidden_of(*args, **kwargs).shape
        noise = torch.randn(shape, generator=generator).to(hidden_of(*args, **kwargs))
        start = first_of(layer.forward(*args, **kwargs))
        for module in modules:

            def displaced(m: nn.Module, _: Any, output: Tensor) -> Tensor:
                return output + noise * (0.1 * start.std())

            with module.register_forward_hook(displaced):
                moved = first_of(layer.forward(*args, **kwargs)) - start
            if F.cosine_similarity(moved.flatten(), noise.flatten(), dim=0) > FOLLOWS:
                self.guide._writers.add(module)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        self._inputs[module] = x
        if self._open is not None:
            attention, output, read = self._open
            role = self.roles[attention]
            if self.first and "out" not in role and x.numel() == output.numel():
                if torch.equal(x.flatten(), output.flatten()):
                    role["out"] = module
            if role.get("out") is module:
                self._open = None
                if read:
                    self.readings.append(partial(self._through, module, read))
        if module in self.guide._writers and self._few():
            self.readings.append(partial(self._of_lora, module, self.scored(x)))
        elif module in self.guide._writers:
            a = module.lora_A[module.active_adapters[0]].weight
            self.readings.append(
                partial(self._of_lora_b, module, self.scored(F.linear(x.to(a), a)))
            )

    def _after(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._outputs[module] = output

    def _few(self) -> bool:
        return self.single

    def _of_lora(self, module: Any, inputs: Tensor, errors: Tensor) -> Gradients:
        a, b, scaling = _factors(module)
        return self._named(module, *low_rank(errors, inputs.float(), a, b, scaling))

    def _of_lora_b(self, module: Any, inputs: Tensor, errors: Tensor) -> Gradients:
        _, b, scaling = _factors(module)
        return self._named(module, None, scaling * errors.T @ inputs.float())

    def _named(self, module: Any, a: Tensor | None, b: Tensor) -> Gradients:
        own = (module.lora_A, module.lora_B)
        names = [self.guide.names.get(id(m[module.active_adapters[0]].weight)) for m in own]
        return {n: g for n, g in zip(names, (a, b)) if n is not None and g is not None}

    # ---- Attention -------------------------------------------------------------------------------

    def _through(self, module: nn.Module, read: list[Reading], errors: Tensor) -> Gradients:
        """Take errors through the module behind an attention, to the outputs of its heads."""
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        back = errors @ _weight(base).float()
        if is_plain_lora(module):
            a, b, scaling = _factors(module)
            back = back + scaling * (errors @ b) @ a
        return {name: gradient for own in read for name, gradient in own(back).items()}

    def _interface(self, get: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        return partial(self._attention, get(*args))

    def _attention(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        output = function(module, query, key, value, mask, *args, **kwargs)
        index, self._count = self._count, self._count + 1
        if torch.is_grad_enabled():
            return output
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        shared = query.shape[1] // key.shape[1]
        states = tuple(x.repeat_interleave(shared, dim=1) for x in (key, value))
        weights = self._weights(module, query, states[0], mask, scaling)
        if module not in self.roles:
            self.roles[module] = self._role(module, query, value, output[0], weights, states[1])
        role = self.roles[module]
        if not role["agrees"]:
            return output
        read: list[Reading] = []
        if (values := role["value"]) is not None:
            read.append(self._of_values(values, weights))
        if (queries := role["query"]) is not None and self.single:
            read.append(self._of_queries(queries, query, weights, states, scaling))
        if self.guide.model.peft_type == PeftType.PREFIX_TUNING:
            read.append(self._of_prefix(index, query, weights, states, scaling))
        self._open = module, output[0], read
        return output

    def _role(
        self,
        module: nn.Module,
        query: Tensor,
        value: Tensor,
        output: Tensor,
        weights: list[Tensor],
        values: Tensor,
    ) -> dict[str, Any]:
        """Which modules made the states of an attention, and whether its weights are as here."""
        theirs = self.scored(output.reshape(*output.shape[:2], -1))
        mine = self._heads_first(weights, values)
        agrees = torch.allclose(
            mine.float(), theirs.float(), rtol=2e-2, atol=2e-2 * float(theirs.abs().max())
        )
        found: dict[str, Any] = {"agrees": agrees, "value": None, "query": None}
        for candidate in filter(is_plain_lora, module.modules()):
            made = self._outputs.get(candidate)
            if made is None:
                continue
            if made.shape[-1] == value.shape[1] * value.shape[3] and made.shape[:2] == (
                value.shape[0],
                value.shape[2],
            ):
                if torch.equal(_by_head(made, value.shape[3]), value):
                    found["value"] = candidate
                    continue
            if made.shape[-1] == query.shape[1] * query.shape[3]:
                before = _by_head(made, query.shape[3])
                if _turned(before, query):
                    found["query"] = candidate
        return found

    def _heads_first(self, weights: list[Tensor], values: Tensor) -> Tensor:
        """The outputs of the heads at the scored positions, [N, heads * width]."""
        if self.single:
            return torch.einsum("nhs,nhsw->nhw", weights[0], values[self._rows]).flatten(1)
        rows = [torch.einsum("nhs,hsw->nhw", w, v) for w, v in zip(weights, values)]
        return torch.cat(rows).flatten(1)

    def _weights(
        self, module: nn.Module, query: Tensor, keys: Tensor, mask: Tensor | None, scaling: float
    ) -> list[Tensor]:
        """Attention weights of the scored positions: [N, heads, S], or such of each row."""
        length, total = query.shape[2], keys.shape[2]
        where = self._positions + length - self._length
        causal = None
        if mask is None and getattr(module, "is_causal", False) and length > 1:
            causal = torch.ones(length, total, dtype=torch.bool, device=keys.device).tril(
                total - length
            )

        def of(q: Tensor, k: Tensor, m: Tensor | None) -> Tensor:
            scores = (q @ k.transpose(-1, -2)).float() * scaling
            if m is not None:
                m = m[..., :total]
                scores = scores.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else scores + m
            return scores.softmax(dim=-1).to(q.dtype)

        if self.single:
            rows = self._rows
            q = query[rows, :, where][:, :, None]
            m = None
            if mask is not None:
                m = mask.expand(len(query), -1, length, -1)[rows, :, where][:, :, None]
            elif causal is not None:
                m = causal[where][:, None, None]
            return [of(q, keys, m)[:, :, 0]]
        found = []
        for row in range(len(query)):
            mine = where[self._rows == row]
            m = None
            if mask is not None:
                m = mask.expand(len(query), -1, length, -1)[row][:, mine]
            elif causal is not None:
                m = causal[mine]
            found.append(of(query[row][:, mine], keys[row], m).transpose(0, 1))
        return found

    def _of_values(self, module: Any, weights: list[Tensor]) -> Reading:
        a, _, _ = _factors(module)
        x = self._inputs[module]
        if self.single:
            inputs = weights[0] @ x.to(weights[0])
        else:
            reduced = F.linear(x.to(a), a)
            inputs = torch.cat([w @ r.to(w) for w, r in zip(weights, reduced)])

        def read(back: Tensor) -> Gradients:
            a, b, scaling = _factors(module)
            errors = back.view(len(back), weights[0].shape[1], -1)
            if self.single:
                return self._named(module, *mixed(errors, inputs.float(), a, b, scaling))
            eye = torch.eye(len(a), device=a.device)
            return self._named(module, None, mixed(errors, inputs.float(), eye, b, scaling)[1])

        return read

    def _of_queries(
        self,
        module: Any,
        query: Tensor,
        weights: list[Tensor],
        states: tuple[Tensor, ...],
        scaling: float,
    ) -> Reading:
        carried = scaling * covariance(weights[0], *states).to(query.dtype)
        after = query[self._rows, :, self._positions + query.shape[2] - self._length]
        before = _by_head(self._outputs[module], query.shape[3])[
            self._rows, :, self._positions + query.shape[2] - self._length
        ]
        inputs = self.scored(self._inputs[module])

        def read(back: Tensor) -> Gradients:
            a, b, s = _factors(module)
            errors = back.view(len(back), weights[0].shape[1], -1, 1)
            turned = (carried.float() @ errors)[..., 0]
            own = unrotated(turned, before.float(), after.float()).flatten(1)
            return self._named(module, *low_rank(own, inputs.float(), a, b, s))

        return read

    def _of_prefix(
        self,
        index: int,
        query: Tensor,
        weights: list[Tensor],
        states: tuple[Tensor, ...],
        scaling: float,
    ) -> Reading:
        model = self.guide.model
        config = model.active_peft_config
        count = config.num_virtual_tokens
        parameter = model.prompt_encoder[model.active_adapter].embedding.weight
        name = self.guide.names[id(parameter)]
        outputs = self._heads_first(weights, states[1])
        queries = query.transpose(1, 2)
        queries = self.scored(queries)
        own = torch.cat([w[:, :, :count] for w in weights])
        values = states[1][0, :, :count]
        heads = config.num_attention_heads

        def read(back: Tensor) -> Gradients:
            errors = back.view(len(back), own.shape[1], -1)
            w = own.float()
            by_value = torch.einsum("nhp,nhw->phw", w, errors)
            scores = torch.einsum("nhw,hpw->nhp", errors, values.float())
            mean = (errors * outputs.float().view_as(errors)).sum(dim=-1, keepdim=True)
            by_key = scaling * torch.einsum("nhp,nhw->phw", w * (scores - mean), queries.float())
            gradient = torch.zeros_like(parameter, dtype=torch.float32).view(
                count, -1, 2, heads, errors.shape[-1]
            )
            for place, whole in enumerate((by_key, by_value)):
                gradient[:, index, place] = whole.view(count, heads, -1, errors.shape[-1]).sum(
                    dim=2
                )
            return {name: gradient.view_as(parameter)}

        return read


def _linears(layer: nn.Module) -> list[nn.Module]:
    """The linear modules of a layer, an adapter's with what it wraps as one."""
    inner = {
        m
        for a in layer.modules()
        if isinstance(a, BaseTunerLayer)
        for m in a.modules()
        if m is not a
    }
    kinds = (nn.Linear, BaseTunerLayer)
    return [m for m in layer.modules() if isinstance(m, kinds) and m not in inner]


def _weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer in floating point, [out, in]."""
    if isinstance(module, Linear8bitLt):
        scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return module.weight.data * (scales / 127.0)[:, None]
    return dequantize_module_weight(module)


def _factors(module: Any) -> tuple[Tensor, Tensor, float]:
    name = module.active_adapters[0]
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return a.detach().float(), b.detach().float(), module.scaling[name]


def _by_head(x: Tensor, width: int) -> Tensor:
    """[B, T, heads * width] as [B, heads, T, width]."""
    return x.view(*x.shape[:2], -1, width).transpose(1, 2)


def _turned(before: Tensor, after: Tensor) -> bool:
    """Whether queries are those before, each of their pairs turned and all scaled by one number."""
    if before.shape != after.shape:
        return False
    sizes = [torch.complex(*x.float().chunk(2, dim=-1)).abs() for x in (before, after)]
    ratio = sizes[1].norm() / sizes[0].norm()
    return torch.allclose(sizes[0] * ratio, sizes[1], rtol=2e-2, atol=1e-3 * float(sizes[1].max()))
