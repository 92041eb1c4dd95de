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
        self._kept, self._heads = passes[0].kept, passes[0].heads
        self._saved = list(zip(*(one.saved for one in passes)))

    def kept(self, batch: int, length: int, positions: int, exact_layers: int) -> int:
        """Bytes that the readings of the layers below the exact ones keep.

        Args:
            positions: the scored ones of the batch; if as many as examples, each has one.
        """
        layers = self._kept[: self.layers - exact_layers]
        if positions == batch:
            return positions * sum(layer.alone for layer in layers)
        return sum(positions * each.scored + batch * length * each.tokens for each in layers)

    def weights(self, batch: int, length: int, scored: int) -> int:
        """Bytes of a layer's attention weights at `scored` positions of each example, twice."""
        return 2 * 4 * batch * self._heads * scored * length

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
    """The bytes that reading a layer keeps.

    Attributes:
        alone: of a scored position that is the only one of its row.
        scored: of a scored position where rows have several; `tokens`: of any token then.
    """

    alone: int = 0
    scored: int = 0
    tokens: int = 0


class _Pass:
    """A forward pass with a backward graph for each layer by itself.

    Attributes:
        saved: the bytes that each layer keeps for its backward pass, parameters among them.
        kept: what reading each layer keeps.
        heads: those of the queries.
    """

    def __init__(self, model: PeftModel, layers: list[nn.Module], length: int) -> None:
        self.saved: list[int] = []
        self.kept: list[_Kept] = []
        self.heads = 0
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
        size = hidden.element_size()
        for module in _loras(layer):
            if module.out_features == hidden.shape[-1] and id(module) not in self._attended:
                self.kept[-1].alone += size * module.in_features
                self.kept[-1].scored += size * module.in_features
        storages = [tensor.untyped_storage() for tensor in self._storages.values()]
        self.saved.append(sum(storage.nbytes() for storage in storages))

    def _interface(self, get: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        return partial(self._attention, get(*args), args[0])

    def _attention(
        self,
        function: Callable[..., Any],
        name: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        _, self.heads, _, width = query.shape
        made = [_leaves(tensor) for tensor in (query, key, value)]
        size, kept = query.element_size(), self.kept[-1]
        before = kept.tokens
        for lora in _loras(module):
            ids = {id(p) for p in lora.parameters()}
            of_query, of_key, of_value = (not ids.isdisjoint(leaves) for leaves in made)
            if of_query or of_key or of_value:
                self._attended.add(id(lora))
            if of_query:
                kept.alone += size * (self.heads * width * (width + 2) + lora.in_features)
                kept.scored += size * (self.heads * width + lora.in_features)
                kept.tokens += size * key.shape[1] * width
            elif of_value:
                kept.alone += size * self.heads * lora.in_features
                kept.tokens += size * lora.in_features
        if kept.tokens > before:
            # From these the attention weights are computed.
            kept.scored += size * self.heads * width
            kept.tokens += size * key.shape[1] * width
        if self._prefix:
            numbers = size * self.heads * (2 * width + self._prefix)
            kept.alone, kept.scored = kept.alone + numbers, kept.scored + numbers
        if name == "eager":
            return function(module, query, key, value, *args, **kwargs)
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
