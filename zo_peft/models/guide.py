"""The guide of a transformer: gradients of an adapter, read off one forward pass.

During the pass hooks keep what the closed forms of `zo_peft.core.guide` need, at the N positions
that the loss sees. Then the error at the output is taken through the final norm, the head and the
loss, which are all that is ever differentiated (with `exact_layers`, the layers below them, too).
Below these it is the error at every layer, but for what `zo_peft.models.feedback` takes it through.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, PeftType
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zo_peft.core.batch import Batch, Objective
from zo_peft.core.guide import Gradients, add
from zo_peft.core.lanes import replaced
from zo_peft.errors import UserError
from zo_peft.models import heads
from zo_peft.models.feedback import Feedback, PostNorm, linears_of, through_linear
from zo_peft.models.heads import Call, Found, Heads, Role, Scored, lora_gradients, stacked
from zo_peft.models.peft_layers import is_plain_lora
from zo_peft.models.trunk import first_of, hidden_of, layers_of, with_hidden

#: A module writes into the residual stream if its layer's output follows it: the least cosine of
#: what it is displaced by and of what the layer's output is displaced by.
FOLLOWS = 0.3
#: Rows with several scored positions are read together up to so many tokens, longer ones alone:
#: something is kept of all their tokens.
TOKENS = 512
#: By what share of the standard deviation of its layer's output a module is displaced for that.
DISPLACED = 0.1


class ResidualGuide:
    """Reads gradients of an adapter off forward passes; see `zo_peft.core.guide.Guide`.

    What it knows: a LoRA on the values and queries of attention, and on modules that write into the
    residual stream; a prefix; and exactly all that lies above the last layer. Which modules these
    are is found by looking at the first pass.

    Args:
        tuned: the tuned parameters by name.
        exact_layers: through so many of the uppermost layers the error is taken by autograd.

    Raises:
        UserError: no stack of transformer layers is found, or it has fewer layers than that.
    """

    def __init__(
        self,
        model: PeftModel,
        tuned: Mapping[str, nn.Parameter],
        objective: Objective,
        exact_layers: int = 0,
    ) -> None:
        self.model, self.objective, self.in_nats, self.draws = model, objective, objective, 1
        layers = layers_of(model)
        if not layers or exact_layers > len(layers):
            what = f"strategy='guided' found {len(layers)} transformer layers in one stack"
            needs = f"one or more, and exact_layers={exact_layers} of them at most"
            raise UserError(f"{what}; it needs {needs}. Use strategy='gv'")
        self._depth = len(layers)
        self.read_layers = layers[: len(layers) - exact_layers]
        self.boundary = layers[len(self.read_layers)] if exact_layers else None
        self.names = {id(parameter): name for name, parameter in tuned.items()}
        self._parts = {
            self.names[id(parameter)]: index
            for index, layer in enumerate(layers)
            for parameter in layer.parameters()
            if id(parameter) in self.names
        }
        self._above = {
            name: parameter
            for name, parameter in tuned.items()
            if self._parts.get(name, len(layers)) >= len(self.read_layers)
        }
        # A backward pass takes about as long as two forward passes.
        self.passes, self.looked = 1 + math.ceil(2 * exact_layers / len(layers)), 0
        self.layer_runs = 0
        #: The virtual tokens of a prefix, [P, ...]; none of another adapter.
        self.prefix = nn.Parameter(torch.empty(0))
        config = model.active_peft_config
        if model.peft_type == PeftType.PREFIX_TUNING and not config.prefix_projection:
            self.prefix = model.prompt_encoder[model.active_adapter].embedding.weight
        linears = [module for layer in self.read_layers for module in linears_of(layer)]
        self.loras = {module for module in linears if is_plain_lora(module)}
        #: The modules that a pass looks into: all at first, then those that it needs.
        self.watched = linears
        self.roles: dict[nn.Module, Role] = {}
        self.post_norms: dict[nn.Module, PostNorm | None] = {}
        self.writers: set[nn.Module] = set()
        #: Those whose outputs are needed, too: LoRAs, then those of queries that are turned.
        self.turned: set[Any] = self.loras
        self.first = True

    def part(self, name: str) -> int:
        """The index of the layer of a parameter; -1 outside of the layers."""
        return self._parts.get(name, -1)

    def drawn(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches themselves."""
        return batches

    def read(self, batch: Batch, parts: int = 1) -> tuple[Tensor, list[Gradients]]:
        """The losses [B] of a batch, and the gradients of their mean over each of equal parts."""
        (rows, length), each = batch["input_ids"].shape, batch.rows // parts
        apart = getattr(self.objective, "repeatable", False) and rows == len(batch["labels"])
        whole = Scored(batch)
        count = rows if whole.single or not apart else rows_at_once(length)
        # A piece is a part, several, or some rows of one.
        count -= count % each if count > each else 0
        losses: list[Tensor] = []
        found = [Gradients() for _ in range(parts)]
        for start in range(0, rows, count):
            piece = batch if count == rows else batch.of_rows(start, start + count)
            scored = whole if count == rows else Scored(piece)
            own, gradients = self._read(piece, scored, max(1, piece.rows // each))
            losses.append(own)
            for sums in found[start // each :][: len(gradients)]:
                # One at a time, so that none is held twice.
                add(sums, gradients.pop(0), min(1.0, piece.rows / each))
        return torch.cat(losses), found

    # Within a pass gradients are enabled above its leaf.
    @torch.no_grad()
    def _read(self, batch: Batch, scored: Scored, parts: int) -> tuple[Tensor, list[Gradients]]:
        reading = _Pass(self, scored)
        with reading.hooks():
            losses = self.objective.losses(self.model, batch)
        # Rows have nothing to do with each other, so that a sum has the errors of all parts.
        split = losses.chunk(parts) if self._above else (parts * losses,)
        wanted, errors = [reading.leaf, *self._above.values()], torch.zeros_like(reading.leaf)
        found = [Gradients() for _ in range(parts)]
        for loss, gradients in zip(split, found):
            again = loss is not split[-1]
            own, *exact = torch.autograd.grad(loss.mean(), wanted, None, again, allow_unused=True)
            gradients |= {n: g.float() for n, g in zip(self._above, exact) if g is not None}
            errors += own
        for parameters, stack in reading.gradients(reading.scored.errors(errors), parts):
            names = [self.names.get(id(parameter)) for parameter in parameters]
            for gradients, part in zip(found, stack.unbind(1)):
                add(gradients, {n: g for n, g in zip(names, part.unbind()) if n is not None}, 1.0)
        if self.first:
            roles = [role for role in self.roles.values() if role.agrees]
            needed = self.writers.union(*({role.value, role.query} for role in roles))
            self.watched = [module for module in self.watched if module in needed]
            self.turned = {role.query for role in roles if role.scale is None}
        self.first, self.looked = False, math.ceil(self.layer_runs / self._depth)
        return losses.detach(), found


def may_read(model: PeftModel, tuned: Mapping[str, nn.Parameter]) -> bool:
    """Whether a guide knows something of what is tuned, as far as that can be told unseen."""
    layers = layers_of(model)
    if not layers:
        return False
    if model.peft_type == PeftType.PREFIX_TUNING:
        return not model.active_peft_config.prefix_projection
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    first = [model.get_input_embeddings(), getattr(model, "prompt_encoder", nn.Module())]
    below = {id(parameter) for module in first for parameter in module.parameters()}
    if any(id(parameter) not in inside | below for parameter in tuned.values()):
        return True
    ids = set(map(id, tuned.values()))
    loras = (module for layer in layers for module in layer.modules() if is_plain_lora(module))
    matrices: Any = (part for lora in loras for part in (lora.lora_A, lora.lora_B))
    return any(id(p) in ids for part in matrices for p in part.parameters())


def rows_at_once(length: int) -> int:
    """How many rows of so many tokens are read together, where they have several positions."""
    return max(1, TOKENS // length)


class _Pass:
    """One forward pass: its hooks, and the readings that they make.

    Attributes:
        leaf: the hidden states from which on the pass is differentiated, [B, T, d].
    """

    def __init__(self, guide: ResidualGuide, scored: Scored) -> None:
        self.guide, self.scored = guide, scored
        self.feedback = Feedback(self.scored, guide.post_norms)
        self.leaf = torch.empty(0)
        #: What can be stacked: writers with their inputs [B, n, in], and attentions.
        self._written: dict[Any, list[tuple[nn.Module, Tensor]]] = {}
        self._calls: dict[Any, list[Call]] = {}
        self._inputs: dict[Any, Tensor] = {}
        self._outputs: dict[Any, Tensor] = {}
        self._attentions, self._still = 0, False
        #: An attention whose outputs have not gone into a module yet.
        self._open: tuple[Role, Tensor] | None = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within the context a forward pass is read."""
        guide, get = self.guide, ALL_ATTENTION_FUNCTIONS.get_interface

        def interface(*args: Any) -> Callable[..., Any]:
            return partial(self._attention, get(*args))

        with ExitStack() as stack:
            within = stack.enter_context
            within(self.feedback.hooks(guide.read_layers))
            for module in guide.watched:
                within(module.register_forward_pre_hook(self._before))
                if module in guide.turned:
                    within(module.register_forward_hook(self._after))
            for layer in guide.read_layers if guide.first else ():
                within(layer.register_forward_hook(self._look_back, with_kwargs=True))
            if guide.boundary is None:
                within(guide.read_layers[-1].register_forward_hook(self._leave))
            else:
                within(guide.boundary.register_forward_pre_hook(self._begin, with_kwargs=True))
            within(replaced([(ALL_ATTENTION_FUNCTIONS, "get_interface", interface)]))
            yield

    def _leave(self, _: nn.Module, args: Any, output: Any) -> Any:
        hidden = self._differentiated(first_of(output))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_hidden(self._differentiated(hidden_of(*args, **kwargs)), args, kwargs)

    def _differentiated(self, hidden: Tensor) -> Tensor:
        """The hidden states, from which on the rest of the pass has a graph."""
        self.leaf = hidden.detach().requires_grad_()
        torch.set_grad_enabled(True)
        return self.leaf

    # ---- Modules that write into the residual stream ---------------------------------------------

    def _look_back(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Find the writers among a layer's LoRAs that no attention has taken."""
        inputs, outputs = self._inputs, self._outputs
        self._inputs, self._outputs = {}, {}
        hidden = hidden_of(*args, **kwargs)
        modules = [
            module
            for module in inputs
            if module.out_features == hidden.shape[-1] and outputs[module].numel() == hidden.numel()
        ]
        with replaced([(self, "_still", True)]):
            found = list(_writers(layer, modules, args, kwargs))
        self.guide.writers |= set(found)
        self.guide.layer_runs += 1 + len(modules) if modules else 0
        for module in found:
            self._write(module, inputs[module])

    def _write(self, module: nn.Module, x: Tensor) -> None:
        like = heads.lora_settings(module), x.dtype, x.device
        self._written.setdefault(like, []).append((module, self.scored.of(x)))

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._still:
            return
        # Some layers pass all tokens of a batch to their MLP as if they were one row.
        x = args[0] if args[0].dim() == 3 else args[0].unflatten(0, (self.scored.count, -1))
        if module in self.guide.writers:
            self._write(module, x)
        elif module in self.guide.loras:
            self._inputs[module] = x
        if self._open is not None:
            role, output = self._open
            if x.shape == output.shape and torch.equal(x, output):
                role.out, self._open = module, None

    def _after(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._outputs[module] = output

    # ---- Attention -------------------------------------------------------------------------------

    def _attention(
        self, function: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        output = function(module, *args, **kwargs)
        if self._still:
            return output
        (query, key, value, *rest), mask = args, kwargs.get("attention_mask")
        index, self._attentions = self._attentions, self._attentions + 1
        guide, scored, role = self.guide, self.scored, self.guide.roles.get(module)
        if torch.is_grad_enabled() or (role is not None and not role.agrees):
            return output
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        causal = getattr(module, "is_causal", False)
        bias = scored.bias(rest[0] if rest else mask, query, key, causal)
        kept = {"query": scored.of(query.transpose(1, 2)), "key": key, "value": value}
        call = Call(role or Role(), index, query.shape[1], key.shape[1], scaling, bias, kept)
        if role is None:
            role = heads.role_of(module, call, query, scored.of(output[0]), self._outputs)
            role.agrees &= bool(role.value or role.query or len(guide.prefix))
            guide.roles[module] = call.role = role
        # Of a layer that attends twice with the same values, the first time is read.
        if role.value in self._inputs:
            kept["inputs"] = self._inputs[role.value]
        if role.query in self._inputs:
            kept["asked"] = scored.of(self._inputs[role.query])
            if role.scale is None:
                kept["made"] = scored.of(self._outputs[role.query])
        else:
            del kept["value"]
        if len(guide.prefix):
            kept["output"] = scored.of(output[0].flatten(2))
        self._inputs, self._outputs = {}, {}
        self._open = None if role.out else (role, output[0].flatten(2))
        if role.agrees and kept.keys() & {"inputs", "asked", "output"}:
            width = kept["inputs"].shape[2] if "inputs" in kept else 0
            sizes = *query.shape[1::2], *key.shape[1:3], width, "asked" in kept
            if len(guide.prefix) or (scored.single and heads.sums_are_fewer(*sizes)):
                Heads([call]).sum_up(len(guide.prefix))
            self._calls.setdefault(call.like, []).append(call)
        return output

    # ---- Gradients -------------------------------------------------------------------------------

    @torch.no_grad()
    def gradients(self, errors: Tensor, parts: int) -> Iterator[Found]:
        """Those of all that was read, from the errors [B, n, d] at the output of the last layer."""
        # Nothing is read of several residual streams a token.
        if errors.dim() != 3:
            return
        # In units of the largest, because float16 would lose small ones on the way.
        unit = errors.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny)[None]
        errors_at, width = self.feedback.down((errors / unit).to(errors.dtype)), errors.shape[2]
        # A layer may have a residual stream of its own.
        for written in self._written.values():
            for some in _stacks(written, 12 * written[0][1].numel()):
                modules, inputs = zip(*some)
                if modules[0].out_features == width:
                    own = errors_at(modules)[:, :, None].float()
                    yield from lora_gradients(modules, unit, parts, own, stacked(inputs).float())
        for calls in self._calls.values():
            known = [c for c in calls if getattr(c.role.out, "out_features", 0) == width]
            for some in _stacks(known, calls[0].size):
                outs = [call.role.out for call in some]
                own = errors_at(outs).expand(len(outs), -1, -1, -1)
                back = stacked([through_linear(out, e) for out, e in zip(outs, own)])
                yield from Heads(some).gradients(back, unit, parts, self.guide.prefix)


def _stacks(things: list[Any], size: int) -> list[list[Any]]:
    """Those that are stacked together, of things with so many bytes each."""
    count = heads.at_once(size, len(things))
    return [things[start : start + count] for start in range(0, len(things), count)]


def _writers(
    layer: nn.Module, modules: list[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[nn.Module]:
    """Those of the modules whose displacement the layer's output follows; runs it for each once."""
    hidden = hidden_of(*args, **kwargs)
    if not modules or hidden.dim() != 3:
        return
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator).to(hidden)
    start = first_of(layer.forward(*args, **kwargs))
    noise *= DISPLACED * start.std()
    for module in modules:
        with module.register_forward_hook(lambda _, args, output: output + noise.view_as(output)):
            moved = first_of(layer.forward(*args, **kwargs)) - start
        if F.cosine_similarity(moved.flatten(), noise.flatten(), dim=0) > FOLLOWS:
            yield module
