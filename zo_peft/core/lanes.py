"""Many candidates in one forward pass: lanes.

Within `Lanes.active(...)` the rows of a batch are K lanes of R rows each, one lane behind the
other, and each lane is at a point of its own. The model sees all rows together; only the modules
that own tuned parameters work lane by lane. Those of plain PyTorch are here, those of PEFT in
`zo_peft.models.peft_layers`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_peft.core.batch import Batch

#: Where a module works lane by lane: the module, its method to replace, and the replacement, which
#: takes (module, lanes, name of the module) before the method's own arguments.
Replacement = tuple[nn.Module, str, Callable[..., Tensor]]


class NotInLanes(Exception):
    """A module that owns tuned parameters cannot work lane by lane; the message names it."""


class Lanes:
    """K values of every tuned parameter: [K, *shape], by parameter.

    `read` are the parameters of which a module has asked for the values; `candidates` share the
    forward, and each of them is K / candidates lanes.
    """

    def __init__(self, values: Mapping[Tensor, Tensor], count: int) -> None:
        self._values, self.count = values, count
        self._rows = self._scored = self.candidates = 1
        self.read: set[Tensor] = set()

    def of(self, parameter: Tensor) -> Tensor:
        """[K, *shape]; [1, *shape] for a parameter that is not tuned."""
        self.read.add(parameter)
        return self._values.get(parameter, parameter[None])

    def split(self, x: Tensor, name: str) -> Tensor:
        """[K * R, ...] as [K, R, ...].

        `NotInLanes` if the input of the module `name` does not hold all the rows of the batch.
        """
        if x.shape[0] % (self.count * self._rows) and x.shape[0] != self.count * self._scored:
            raise NotInLanes(f"{name} (its input of shape {list(x.shape)} is not the batch)")
        return x.unflatten(0, (self.count, -1))

    @contextmanager
    def active(
        self, replacements: Mapping[str, Replacement], rows: int, scored: int, candidates: int = 1
    ) -> Iterator[None]:
        """Within the context the modules of `find_replacements` work lane by lane.

        Args:
            rows: R, the rows of a lane.
            scored: positions of a lane that the model's head sees.
            candidates: how many share the forward.
        """
        self._rows, self._scored, self.candidates = rows, scored, candidates
        methods = [
            (module, method, partial(replacement, module, self, name))
            for name, (module, method, replacement) in replacements.items()
        ]
        with replaced(methods):
            yield


@contextmanager
def replaced(methods: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Within the context each (object, attribute, value) holds; afterwards what was before."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for module, method, replacement in methods:
            before.append((module, method, module.__dict__.get(method)))
            setattr(module, method, replacement)
        yield
    finally:
        for module, method, own in reversed(before):
            module.__dict__.pop(method, None)
            if own is not None:
                setattr(module, method, own)


def plain_replacement(module: nn.Module, name: str) -> Replacement:
    """The replacement of a linear layer or an embedding of plain PyTorch; else `NotInLanes`."""
    known: dict[type, Callable[..., Tensor]] = {nn.Linear: _linear, nn.Embedding: _embedding}
    replacement = known.get(type(module))
    if replacement is None:
        raise NotInLanes(f"{name} (a {type(module).__name__} of {type(module).__module__})")
    return module, "forward", replacement


def find_replacements(
    model: nn.Module,
    tuned: Mapping[str, nn.Parameter],
    replacement_of: Callable[[nn.Module, str], Replacement] = plain_replacement,
    layers: tuple[type, ...] = (),
) -> dict[str, Replacement]:
    """How each module that owns tuned parameters works lane by lane, by name; or `NotInLanes`.

    Args:
        replacement_of: gives the replacement of a module and its name, or raises `NotInLanes`.
        layers: kinds of modules that own all parameters inside of them.
    """
    names = {id(parameter): name for name, parameter in tuned.items()}
    found: dict[str, Replacement] = {}
    covered: set[int] = set()
    for name, module in model.named_modules():
        inner = isinstance(module, layers)
        own = names.keys() & {id(parameter) for parameter in module.parameters(recurse=inner)}
        inside = any(name.startswith(f"{layer}.") for layer in found)
        if own and not inside and not isinstance(module, nn.ParameterDict):
            found[name] = replacement_of(module, name)
            covered |= own
    for parameter, name in names.items():
        if parameter not in covered:
            raise NotInLanes(name)
    return found


def lane_product(x: Tensor, weights: Tensor) -> Tensor:
    """`x [K, N, in] @ weights [K or 1, out, in]^T`, lane by lane."""
    if len(weights) == 1:
        return F.linear(x, weights[0])
    return torch.bmm(x, weights.transpose(1, 2))


def _linear(module: nn.Linear, lanes: Lanes, name: str, x: Tensor) -> Tensor:
    y = lane_product(lanes.split(x, name).flatten(1, -2), lanes.of(module.weight))
    if module.bias is not None:
        y = y + lanes.of(module.bias)[:, None]
    return y.view(*x.shape[:-1], -1)


def _embedding(module: nn.Embedding, lanes: Lanes, name: str, ids: Tensor) -> Tensor:
    weights, ids = lanes.of(module.weight), lanes.split(ids, name)
    lane = torch.arange(lanes.count, device=ids.device).view(-1, *[1] * (ids.dim() - 1))
    return weights[lane, ids].flatten(0, 1)


@dataclass(frozen=True)
class Host:
    """What an evaluator is told about the model that it runs.

    Attributes:
        replacements: how the modules with tuned parameters work lane by lane; or why one cannot.
        fit: the most candidates of one forward pass, for a batch and a number of parts.
        reused: gets a forward pass on a batch; within its context the layers below everything that
            is tuned are not run again on that batch.
        head_is_tuned: the head that sees only scored positions owns tuned parameters.
    """

    replacements: dict[str, Replacement] | NotInLanes
    fit: Callable[[Batch, int], int] = lambda batch, parts: 1 << 20
    reused: Callable[[Callable[[], object]], AbstractContextManager[object]] = nullcontext
    head_is_tuned: bool = False

    @classmethod
    def of_module(cls, model: nn.Module, tuned: Mapping[str, nn.Parameter]) -> "Host":
        """Of a module of plain PyTorch."""
        try:
            return cls(find_replacements(model, tuned))
        except NotInLanes as reason:
            return cls(reason)
