"""The memory of a guided step beside plain inference, computed from shapes.

What `zo_peft.models.guide` keeps depends on which modules make queries and values, and what exact
layers keep for their backward pass on all of their operations. A few forward passes tell both, of
very short examples and with tensors that hold no bytes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zo_peft.core.lanes import replaced
from zo_peft.errors import UserError
from zo_peft.models.feedback import linears_of
from zo_peft.models.heads import at_once, sums_are_fewer
from zo_peft.models.peft_layers import is_plain_lora
from zo_peft.models.trunk import first_of, hidden_of, layers_of, with_hidden

#: The lengths of the examples that are passed. Bytes are a square function of the length.
LENGTHS = (2, 3, 4)


class GuideMemory:
    """What is kept of a forward pass that a guide reads.

    Args:
        model: on the meta device, with its adapter and in floating point.

    Attributes:
        layers: how many transformer layers there are.

    Raises:
        UserError: the model has no stack of transformer layers.
    """

    def __init__(self, model: PeftModel) -> None:
        layers = layers_of(model)
        self.layers = len(layers)
        if not layers:
            raise UserError("strategy='guided' needs a stack of transformer layers; use 'gv'")
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
            passes = [_Pass(model, layers, length) for length in LENGTHS]
        self._kept = passes[0].kept
        self._saved = list(zip(*(one.saved for one in passes)))

    def kept(self, batch: int, length: int, positions: int, exact_layers: int) -> int:
        """Bytes that the readings of the layers below the exact ones keep.

        Args:
            positions: the scored ones of the batch; if as many as examples, each has one.
        """
        layers = self._kept[: self.layers - exact_layers]
        return batch * sum(each.of_row(length, positions // batch)[0] for each in layers)

    def stacked(self, batch: int, length: int, positions: int, exact_layers: int) -> int:
        """Bytes of the layers that are stacked at a time, once all is read."""
        count = self.layers - exact_layers
        sizes = [each.of_row(length, positions // batch)[1] for each in self._kept[:count]]
        most = batch * max(sizes, default=0)
        return most and most * min(count, at_once(most, count))

    def graph(self, batch: int, length: int, exact_layers: int) -> int:
        """Bytes that the exact layers keep for their backward pass."""
        exact = self._saved[self.layers - exact_layers :]
        return batch * sum(_growth(saved, length) for saved in exact)


def _growth(saved: tuple[int, ...], length: int) -> int:
    """What grows with the length, of a square function of which the values at 2, 3 and 4 are."""
    first, second = (more - less for less, more in pairwise(saved))
    square = (second - first) // 2
    return length * (first - 5 * square) + length**2 * square


@dataclass
class _Kept:
    """What reading a layer keeps, in numbers of `size` bytes.

    Attributes:
        scored: of each scored position, whatever is done with the tokens.
        inputs: of the LoRA on its values; 0 without one.
        has_query: there is one on its queries.
        prefix: virtual tokens of a prefix.
    """

    size: int = 0
    scored: int = 0
    heads: int = 0
    groups: int = 0
    width: int = 0
    inputs: int = 0
    has_query: bool = False
    prefix: int = 0

    def of_row(self, length: int, scored: int) -> tuple[int, int]:
        """The bytes of a row with so many tokens and scored ones; and once it is stacked."""
        has_any, values = self.inputs > 0 or self.has_query, 1 + self.has_query
        sizes = self.heads, self.width, self.groups, length, self.inputs, self.has_query
        # Scored queries are counted with their LoRA, if there is one.
        own = has_any * length * (self.inputs + values * self.groups * self.width)
        own += (has_any and not self.has_query) * scored * self.heads * self.width
        weights = has_any * 3 * self.heads * scored * length
        if scored == 1 and sums_are_fewer(*sizes):
            own, weights = self.heads * (self.inputs + self.has_query * self.width**2), 0
        own += self.prefix * scored * self.heads
        kept = self.size * (own + scored * self.scored)
        return kept, self.size * (own + weights) + 12 * scored * self.scored


class _Pass:
    """A forward pass with a backward graph for each layer by itself.

    Attributes:
        saved: the bytes that each layer keeps for its backward pass, parameters among them.
        kept: what reading each layer keeps.
    """

    def __init__(self, model: PeftModel, layers: list[nn.Module], length: int) -> None:
        self.saved: list[int] = []
        self.kept: list[_Kept] = []
        self._storages: dict[int, Tensor] = {}
        is_prefix = model.peft_type == PeftType.PREFIX_TUNING
        self._prefix = model.active_peft_config.num_virtual_tokens if is_prefix else 0
        self._attended: set[int] = set()
        with self._hooks(layers):
            model.get_base_model().base_model(input_ids=torch.zeros(1, length, dtype=torch.long))

    @contextmanager
    def _hooks(self, layers: list[nn.Module]) -> Iterator[None]:
        interface = partial(self._interface, ALL_ATTENTION_FUNCTIONS.get_interface)
        with ExitStack() as stack:
            within = stack.enter_context
            for layer in layers:
                within(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
                within(layer.register_forward_hook(self._leave))
            within(replaced([(ALL_ATTENTION_FUNCTIONS, "get_interface", interface)]))
            within(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))
            yield

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._storages, self._attended = {}, set()
        self.kept.append(_Kept())
        return with_hidden(hidden_of(*args, **kwargs).detach().requires_grad_(), args, kwargs)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        hidden = first_of(output)
        self.kept[-1].size = hidden.element_size()
        for module in _loras(layer):
            if module.out_features == hidden.shape[-1] and id(module) not in self._attended:
                self.kept[-1].scored += module.in_features
        storages = [tensor.untyped_storage() for tensor in self._storages.values()]
        self.saved.append(sum(storage.nbytes() for storage in storages))

    def _interface(self, get: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        return partial(self._attention, get(*args), args[0])

    def _attention(
        self, function: Callable[..., Any], name: str, module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        query, key, value, *_ = args
        kept = self.kept[-1]
        (_, heads, _, width), kept.prefix = query.shape, self._prefix
        kept.heads, kept.groups, kept.width = heads, key.shape[1], width
        kept.scored += 2 * heads * width * (self._prefix > 0)
        made = [_leaves(tensor) for tensor in (query, key, value)]
        for lora in _loras(module):
            ids = {id(p) for p in lora.parameters()}
            of_query, of_key, of_value = (not ids.isdisjoint(leaves) for leaves in made)
            if of_query or of_key or of_value:
                self._attended.add(id(lora))
            if of_query:
                # Its input, and its outputs before and after they are turned.
                kept.scored += lora.in_features + 2 * heads * width
                kept.has_query = True
            elif of_value:
                kept.inputs = lora.in_features
        if name == "eager":
            return function(module, *args, **kwargs)
        # Others keep queries, keys and values by head, outputs and the sums of a softmax, and the
        # mask of padded examples as numbers, but no attention weights.
        output = query.transpose(1, 2) + (key.sum() + value.sum())
        mask = query.new_empty(len(query), 1, query.shape[2], key.shape[2])
        sums = torch.empty(query.shape[:3], dtype=torch.float32)
        for tensor in (query, *map(torch.empty_like, (query, query)), output, mask, sums):
            self._keep(tensor)
        return output, None


def _loras(module: nn.Module) -> list[Any]:
    return [linear for linear in linears_of(module) if is_plain_lora(linear)]


def _leaves(tensor: Tensor) -> set[int]:
    """The ids of the leaves of a tensor's graph."""
    todo, done, found = [tensor.grad_fn], set[Any](), set[int]()
    while todo:
        node = todo.pop()
        if node is None or node in done:
            continue
        done.add(node)
        todo += [before for before, _ in node.next_functions]
        if hasattr(node, "variable"):
            found.add(id(node.variable))
    return found
