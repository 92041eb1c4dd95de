"""How a base's modules read their tuned numbers: at one point, or at many in one forward pass.

The functions that stand in for a module's forward take first what is bound to them (the module's
tuned numbers by attribute, and its own forward), then what `zo_peft.core.lanes` gives (the module,
the lanes and the module's name), and at last the arguments of the forward itself.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from zo_peft.core.direction import Direction
from zo_peft.core.lanes import Lanes, Replacement, replaced
from zo_peft.core.low_rank import LowRank, Noise, summed
from zo_peft.core.noise import SignSums, derive_seed, noise_rows
from zo_peft.models.numbers import Numbers, Own
from zo_peft.models.rounding import row_words, uniform_rows

Forward = Callable[..., Tensor]

#: Gives some rows of a matrix: float32 [R, width].
Rows = Callable[[slice | Tensor], Tensor]


class DirectionRows:
    """Rows of a direction for one tuned matrix; they are computed when they are asked for."""

    def __init__(self, direction: Direction, numbers: Numbers, noise: Noise) -> None:
        self.direction, self.name = direction, numbers.name
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


def rounding_rows(numbers: Numbers, seed: int) -> Rows:
    """The random numbers in [0, 1) that round rows of a matrix.

    A float32 matrix is not rounded, so its numbers are an empty tensor.
    """
    matrix = numbers.matrix
    if matrix.dtype == torch.float32:
        return lambda rows: torch.empty(0)
    words = row_words(seed, numbers.name, torch.arange(len(matrix), device=matrix.device))
    return lambda rows: uniform_rows(words[rows], matrix.shape[1])


class BaseLanes(Lanes):
    """Lanes of a base. Each module computes its numbers at the K displacements when it runs."""

    def __init__(self, displacements: Sequence[Direction], noise: Noise) -> None:
        super().__init__({}, len(displacements))
        self.displacements, self.noise = displacements, noise

    def steps(self, numbers: Numbers) -> Tensor:
        """The displacements of a vector: float32 [K, size]."""
        kind = self.noise.distribution if isinstance(self.noise, LowRank) else self.noise
        stored = numbers.stored
        ends = 0, stored.numel()
        return summed(self.displacements, numbers.name, *ends, kind, stored.device)

    def values(self, numbers: Numbers) -> Tensor:
        """A vector at every point: [K, size], in its own dtype."""
        rows, steps = slice(0, 1), self.steps(numbers)[:, None]
        seeds = map(_rounding_seed, self.displacements)
        rounding = [rounding_rows(numbers, seed)(rows) for seed in seeds]
        return torch.cat([numbers.stepped(rows, s, u) for s, u in zip(steps, rounding)])

    def factors(self, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """The displacements of a matrix as factors: left [K, m, R] and right [K or 1, n, R]."""
        assert isinstance(self.noise, LowRank)
        stored = numbers.stored
        return self.noise.factors(self.displacements, numbers.name, stored.shape, stored.device)

    def rows_of(self, numbers: Numbers) -> Rows:
        """Gives rows of a matrix at the only point, in its own dtype."""
        (point,) = self.displacements
        steps = DirectionRows(point, numbers, self.noise)
        rounding = rounding_rows(numbers, _rounding_seed(point))
        return lambda rows: numbers.stepped(rows, steps(rows), rounding(rows))

    def copy(self, numbers: Numbers) -> Tensor:
        """A copy of the numbers at the only point."""
        rows_of, scratch = self.rows_of(numbers), torch.empty_like(numbers.matrix)
        for rows in numbers.chunks():
            scratch[rows] = rows_of(rows)
        return scratch.view(numbers.stored.shape)


def _rounding_seed(displacement: Direction) -> int:
    """The seed that rounds the numbers at a point. A displacement and its negative share it."""
    return derive_seed(*(seed for seed, _ in displacement.terms))


def replacement(module: nn.Module, own: Own, noise: Noise) -> Replacement:
    """What stands in for the forward of a module with tuned numbers."""
    function = _function_of(module, own, isinstance(noise, LowRank))
    return module, "forward", partial(function, own, module.forward)


def _function_of(module: nn.Module, own: Own, low_rank: bool) -> Callable[..., Tensor]:
    if "absmax" in own:
        return _blocks
    if isinstance(module, Linear8bitLt):
        return _int8 if low_rank or "weight" not in own else _int8_codes
    if isinstance(module, nn.Linear):
        return _linear if low_rank or "weight" not in own else _swapped
    if type(module) is nn.Embedding:
        return _embedding if low_rank else _embedding_rows
    vectors = all(p.dim() == 1 for p in module.parameters(recurse=False))
    return _affine if vectors and own.keys() <= {"weight", "bias"} else _swapped


def _swapped(
    own: Own, forward: Forward, module: nn.Module, lanes: BaseLanes, _: str, *args: Any, **kw: Any
) -> Tensor:
    """Any module: its parameters are replaced by copies at the point."""
    copies = {attribute: lanes.copy(numbers) for attribute, numbers in own.items()}
    with _parameters(module, copies):
        return forward(*args, **kw)


@contextmanager
def _parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context the module's parameters are these tensors."""
    before = {name: module._parameters[name] for name in tensors}
    try:
        for name, tensor in tensors.items():
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        module._parameters.update(before)


def _affine(
    own: Own, forward: Forward, module: nn.Module, lanes: BaseLanes, name: str, x: Tensor
) -> Tensor:
    """A module that owns vectors and whose output is linear in each of them, such as a norm."""
    if lanes.count == 1:
        return _swapped(own, forward, module, lanes, name, x)
    vectors = {attribute: numbers.stored for attribute, numbers in own.items()}
    zeros = {attribute: torch.zeros_like(vector) for attribute, vector in vectors.items()}
    with _parameters(module, zeros):
        y = forward(x)
    y = lanes.split(y, name).flatten(1, -2)
    if "weight" in own:
        with _parameters(module, zeros | {"weight": torch.ones_like(vectors["weight"])}):
            scaled = forward(x).view_as(y) - y
        y = y + scaled * lanes.values(own["weight"])[:, None]
    if "bias" in own:
        y = y + lanes.values(own["bias"])[:, None]
    return y.view_as(x)


def _add_bias(y: Tensor, lanes: BaseLanes, name: str, own: Own) -> Tensor:
    """The output of a linear layer, whose bias is already added, with the displaced bias."""
    if "bias" not in own:
        return y
    change = lanes.values(own["bias"]) - own["bias"].stored
    return (lanes.split(y, name).flatten(1, -2) + change[:, None]).view_as(y)


def _linear(
    own: Own, forward: Forward, module: nn.Module, lanes: BaseLanes, name: str, x: Tensor
) -> Tensor:
    """`x W^T` once for all lanes, plus the low-rank term of each lane (arXiv:2511.16652)."""
    y = _add_bias(forward(x), lanes, name, own)
    if "weight" not in own:
        return y
    left, right = (factor.to(x.dtype) for factor in lanes.factors(own["weight"]))
    inputs = lanes.split(x, name).flatten(1, -2)
    hidden = inputs @ right[0] if len(right) == 1 else torch.bmm(inputs, right)
    lanes.split(y, name).flatten(1, -2).baddbmm_(hidden, left.transpose(1, 2))
    return y


def _int8(
    own: Own, forward: Forward, module: Linear8bitLt, lanes: BaseLanes, name: str, x: Tensor
) -> Tensor:
    """int8 codes are read as they are.

    Row scales multiply the output of the layer, and low-rank noise is added to it.
    """
    if "SCB" not in own:
        return _linear(own, forward, module, lanes, name, x)
    y = _matmul(module, x, module.state.CB, None)
    y = lanes.split(y, name).flatten(1, -2) * lanes.steps(own["SCB"]).exp_()[:, None].to(y.dtype)
    if "bias" in own:
        y = y + lanes.values(own["bias"])[:, None]
    elif module.bias is not None:
        y = y + module.bias
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def _int8_codes(
    own: Own, _: Forward, module: Linear8bitLt, lanes: BaseLanes, name: str, x: Tensor
) -> Tensor:
    """int8 codes are copied and moved by noise that is rounded stochastically."""
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
    own: Own, forward: Forward, module: Linear4bit, lanes: BaseLanes, name: str, x: Tensor
) -> Tensor:
    """NF4 codes are read with a displaced copy of their block scales."""
    quant_state: QuantState = module.weight.quant_state
    with replaced([(quant_state, "absmax", lanes.copy(own["absmax"]))]):
        y = forward(x)
    return _add_bias(y, lanes, name, own)


def _embedding(
    own: Own, forward: Forward, _: nn.Module, lanes: BaseLanes, name: str, ids: Tensor
) -> Tensor:
    """The rows of an embedding, plus the low-rank term of each lane for those rows."""
    y = forward(ids)
    left, right = lanes.factors(own["weight"])
    lane_ids = lanes.split(ids, name).flatten(1)
    lane = torch.arange(lanes.count, device=ids.device)[:, None]
    change = left[lane, lane_ids] @ right.transpose(1, 2)
    return y + change.view_as(y).to(y.dtype)


def _embedding_rows(
    own: Own, forward: Forward, _: nn.Module, lanes: BaseLanes, name: str, ids: Tensor
) -> Tensor:
    """Only the rows of an embedding that the batch reads are displaced."""
    rows, inverse = ids.unique(return_inverse=True)
    return F.embedding(inverse, lanes.rows_of(own["weight"])(rows))


#: The functions that work on several lanes at once. The others see a single point.
IN_LANES = {_affine, _linear, _int8, _embedding}
