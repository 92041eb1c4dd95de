"""How modules of a base read their tuned numbers at a displacement, or at many in one forward."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from zo_peft.core.direction import Direction
from zo_peft.core.lanes import Lanes, Replacement
from zo_peft.core.low_rank import LowRank, Noise, summed
from zo_peft.core.noise import SignSums, derive_seed, noise_rows
from zo_peft.models.numbers import Numbers, Own
from zo_peft.models.rounding import row_words, uniform_rows


class DirectionRows:
    """A direction's numbers for some rows of a matrix, made when asked for."""

    def __init__(self, direction: Direction, numbers: Numbers, noise: Noise) -> None:
        self.direction, self.name, self.noise = direction, numbers.name, noise
        self.width, self.device = numbers.matrix.shape[1], numbers.stored.device
        self.kind = noise.distribution if isinstance(noise, LowRank) else noise
        self.signs = SignSums(direction.terms, self.name, numbers.stored.numel(), self.device)
        self.factors: tuple[Tensor, Tensor] | None = None
        if isinstance(noise, LowRank) and numbers.stored.dim() == 2:
            shape = numbers.stored.shape
            left, right = noise.factors([direction], self.name, shape, self.device)
            self.factors = left[0], right[0].T.contiguous()

    def __call__(self, rows: slice | Tensor) -> Tensor:
        """Float32 [R, width]."""
        if self.factors is not None:
            return self.factors[0][rows] @ self.factors[1]
        if isinstance(rows, Tensor):
            sums = torch.zeros(len(rows), self.width, device=self.device)
            for seed, weight in self.direction.terms:
                sums += weight * noise_rows(seed, self.name, rows, self.width, self.kind)
            return sums
        ends = rows.start * self.width, rows.stop * self.width
        if self.kind == "rademacher":
            return self.signs(*ends).view(-1, self.width)
        sums = summed([self.direction], self.name, *ends, self.kind, self.device)
        return sums.view(-1, self.width)


class Uniforms:
    """What rounds the rows of a matrix; of float32, which is not rounded, nothing."""

    def __init__(self, numbers: Numbers, seed: int) -> None:
        self.matrix = numbers.matrix
        self.words = torch.empty(0)
        if self.matrix.dtype != torch.float32:
            rows = torch.arange(len(self.matrix), device=self.matrix.device)
            self.words = row_words(seed, numbers.name, rows)

    def __call__(self, rows: slice | Tensor) -> Tensor:
        """Float32 [R, width] in [0, 1)."""
        if not len(self.words):
            return self.words
        return uniform_rows(self.words[rows], self.matrix.shape[1])


class BaseLanes(Lanes):
    """K displacements of the base, of which each module makes its own part when it runs."""

    def __init__(self, displacements: Sequence[Direction], noise: Noise) -> None:
        super().__init__({}, len(displacements))
        self.displacements, self.noise = displacements, noise

    def steps(self, numbers: Numbers) -> Tensor:
        """Of a vector: float32 [K, size]."""
        kind = self.noise.distribution if isinstance(self.noise, LowRank) else self.noise
        stored = numbers.stored
        ends = 0, stored.numel()
        return summed(self.displacements, numbers.name, *ends, kind, stored.device)

    def values(self, numbers: Numbers) -> Tensor:
        """A vector at every displacement: [K, size], in its own dtype."""
        rows = slice(0, 1)
        steps = self.steps(numbers)
        points = zip(steps, self.displacements)
        return torch.cat(
            [
                numbers.stepped(rows, step[None], Uniforms(numbers, _seed_of(point))(rows))
                for step, point in points
            ]
        )

    def factors(self, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """Of a matrix with low-rank noise: left [K, m, R], right [K or 1, n, R]."""
        assert isinstance(self.noise, LowRank)
        stored = numbers.stored
        return self.noise.factors(self.displacements, numbers.name, stored.shape, stored.device)

    def copy(self, numbers: Numbers) -> Tensor:
        """A scratch copy of the numbers at the only displacement."""
        (point,) = self.displacements
        steps, uniforms = (
            DirectionRows(point, numbers, self.noise),
            Uniforms(numbers, _seed_of(point)),
        )
        scratch = torch.empty_like(numbers.matrix)
        for rows in numbers.chunks():
            scratch[rows] = numbers.stepped(rows, steps(rows), uniforms(rows))
        return scratch.view(numbers.stored.shape)

    def rows(self, numbers: Numbers, rows: Tensor) -> Tensor:
        """Some rows (int64 [R]) of a matrix at the only displacement."""
        (point,) = self.displacements
        steps = DirectionRows(point, numbers, self.noise)(rows)
        return numbers.stepped(rows, steps, Uniforms(numbers, _seed_of(point))(rows))


def _seed_of(point: Direction) -> int:
    """What rounds the numbers at a point; the same for its negative."""
    return derive_seed(*(seed for seed, _ in point.terms))


Forward = Callable[..., Tensor]


def replacement(module: nn.Module, own: Own, noise: Noise) -> Replacement:
    """How a module with tuned numbers reads them: it, its method, and what stands in for that."""

    def bound(function: Callable[..., Tensor]) -> Replacement:
        return module, "forward", _Reading(function, own, module.forward)

    low_rank = isinstance(noise, LowRank)
    if "absmax" in own:
        return bound(_blocks)
    if isinstance(module, Linear8bitLt):
        weight = own.get("weight")
        return bound(_int8 if weight is None or low_rank else _int8_codes)
    if isinstance(module, nn.Linear):
        return bound(_linear if low_rank or "weight" not in own else _swapped)
    if type(module) is nn.Embedding:
        return bound(_embedding if low_rank else _embedding_rows)
    vectors = all(p.dim() == 1 for p in module.parameters(recurse=False))
    return bound(_affine if vectors and own.keys() <= {"weight", "bias"} else _swapped)


class _Reading:
    """A replacement: a function with the module's tuned numbers and its own forward."""

    def __init__(self, func: Callable[..., Tensor], own: Own, forward: Forward) -> None:
        self.func, self.own, self.forward = func, own, forward

    def __call__(self, module: Any, lanes: BaseLanes, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.func(module, lanes, name, self.own, self.forward, *args, **kwargs)


def _swapped(
    module: nn.Module,
    lanes: BaseLanes,
    _: str,
    own: Own,
    forward: Forward,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Any module, with a scratch copy in place of its parameters."""
    copies = {attribute: lanes.copy(numbers) for attribute, numbers in own.items()}
    with _in_place(module, copies):
        return forward(*args, **kwargs)


@contextmanager
def _in_place(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context the module's parameters are these tensors."""
    before = {name: module._parameters[name] for name in tensors}
    try:
        for name, tensor in tensors.items():
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        module._parameters.update(before)


def _affine(
    module: nn.Module, lanes: BaseLanes, name: str, own: Own, forward: Forward, x: Tensor
) -> Tensor:
    """A module whose output is linear in each number of its vectors, as those of all norms are."""
    if lanes.count == 1:
        return _swapped(module, lanes, name, own, forward, x)
    vectors = {attribute: numbers.stored for attribute, numbers in own.items()}
    zeros = {attribute: torch.zeros_like(vector) for attribute, vector in vectors.items()}
    with _in_place(module, zeros):
        y = forward(x)
    y = lanes.split(y, name).flatten(1, -2)
    if "weight" in own:
        with _in_place(module, zeros | {"weight": torch.ones_like(vectors["weight"])}):
            scaled = forward(x).view_as(y) - y
        y = y + scaled * lanes.values(own["weight"])[:, None]
    if "bias" in own:
        y = y + lanes.values(own["bias"])[:, None]
    return y.view_as(x)


def _add_bias(y: Tensor, lanes: BaseLanes, name: str, own: Own) -> Tensor:
    """A linear layer's output that has its bias, with the bias displaced."""
    if "bias" not in own:
        return y
    change = lanes.values(own["bias"]) - own["bias"].stored
    return (lanes.split(y, name).flatten(1, -2) + change[:, None]).view_as(y)


def _linear(
    module: nn.Module, lanes: BaseLanes, name: str, own: Own, forward: Forward, x: Tensor
) -> Tensor:
    """`x W^T` once for all lanes, and each lane's low-rank term beside it (arXiv:2511.16652)."""
    y = _add_bias(forward(x), lanes, name, own)
    if "weight" not in own:
        return y
    left, right = (factor.to(x.dtype) for factor in lanes.factors(own["weight"]))
    inputs = lanes.split(x, name).flatten(1, -2)
    hidden = inputs @ right[0] if len(right) == 1 else torch.bmm(inputs, right)
    lanes.split(y, name).flatten(1, -2).baddbmm_(hidden, left.transpose(1, 2))
    return y


def _int8(
    module: Linear8bitLt, lanes: BaseLanes, name: str, own: Own, forward: Forward, x: Tensor
) -> Tensor:
    """int8 codes as they are: row scales multiply the output, low-rank noise is added to it."""
    if "SCB" not in own:
        return _linear(module, lanes, name, own, forward, x)
    y = _matmul(module, x, module.state.CB, None)
    y = lanes.split(y, name).flatten(1, -2) * lanes.steps(own["SCB"]).exp_()[:, None].to(y.dtype)
    if "bias" in own:
        y = y + lanes.values(own["bias"])[:, None]
    elif module.bias is not None:
        y = y + module.bias
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def _int8_codes(
    module: Linear8bitLt, lanes: BaseLanes, name: str, own: Own, forward: Forward, x: Tensor
) -> Tensor:
    """A scratch copy of the layer's codes, moved by stochastically rounded noise."""
    bias = module.bias
    if "bias" in own:
        bias = nn.Parameter(lanes.copy(own["bias"]), requires_grad=False)
    return _matmul(module, x, lanes.copy(own["weight"]), bias)


def _matmul(module: Linear8bitLt, x: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    state = copy.copy(module.state)
    state.CB, state.is_training = codes, False
    bias = None if bias is None else bias.to(x.dtype)
    return bitsandbytes.matmul(x, codes, bias=bias, state=state)


def _blocks(
    module: Linear4bit, lanes: BaseLanes, name: str, own: Own, forward: Forward, x: Tensor
) -> Tensor:
    """NF4 with a scratch copy of its block scales."""
    quant_state: QuantState = module.weight.quant_state
    before = quant_state.absmax
    try:
        quant_state.absmax = lanes.copy(own["absmax"])
        y = forward(x)
    finally:
        quant_state.absmax = before
    return _add_bias(y, lanes, name, own)


def _embedding(
    module: nn.Embedding, lanes: BaseLanes, name: str, own: Own, forward: Forward, ids: Tensor
) -> Tensor:
    """An embedding's rows, and each lane's low-rank term of those rows."""
    y = forward(ids)
    left, right = lanes.factors(own["weight"])
    lane_ids = lanes.split(ids, name).flatten(1)
    lane = torch.arange(lanes.count, device=ids.device)[:, None]
    change = left[lane, lane_ids] @ right.transpose(1, 2)
    return y + change.view_as(y).to(y.dtype)


def _embedding_rows(
    module: nn.Embedding, lanes: BaseLanes, name: str, own: Own, forward: Forward, ids: Tensor
) -> Tensor:
    """An embedding of which only the rows that the batch reads are perturbed."""
    rows, inverse = ids.unique(return_inverse=True)
    return F.embedding(inverse, lanes.rows(own["weight"], rows))


#: What works on several lanes at once.
IN_LANES = {_affine, _linear, _int8, _embedding}
