"""How a base's modules read their tuned numbers: at one point, or at many in one forward pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zo_peft.core.direction import Direction
from zo_peft.core.lanes import Lanes, replaced
from zo_peft.core.low_rank import LowRank, Noise, summed
from zo_peft.core.noise import SignSums, derive_seed, noise_rows
from zo_peft.models.int8 import matmul
from zo_peft.models.numbers import Numbers, Own
from zo_peft.models.quantized import Linear8bitLt
from zo_peft.models.rounding import row_words, uniform_rows

#: Gives some rows of a matrix: float32 [R, width].
Rows = Callable[[slice | Tensor], Tensor]


def direction_rows(direction: Direction, numbers: Numbers, noise: Noise) -> Rows:
    """Gives rows of a direction for one tuned matrix, computed when they are asked for."""
    stored, name, width = numbers.stored, numbers.name, numbers.matrix.shape[1]
    if isinstance(noise, LowRank):
        if stored.dim() == 2:
            left, right = noise.factors([direction], name, stored.shape, stored.device)
            columns = right[0].T.contiguous()
            return lambda rows: left[0][rows] @ columns
        noise = noise.distribution
    signs = SignSums(direction.terms, name, stored.numel(), stored.device)

    def full(rows: slice | Tensor) -> Tensor:
        if isinstance(rows, Tensor):
            sums = torch.zeros(len(rows), width, device=stored.device)
            for seed, weight in direction.terms:
                sums += weight * noise_rows(seed, name, rows, width, noise)
            return sums
        ends = rows.start * width, rows.stop * width
        if noise == "rademacher":
            return signs(*ends).view(-1, width)
        return summed([direction], name, *ends, noise, stored.device).view(-1, width)

    return full


def rounding_rows(numbers: Numbers, seed: int) -> Rows:
    """The random numbers in [0, 1) that round rows of a matrix; none for float32."""
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
        steps = direction_rows(point, numbers, self.noise)
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


class Site:
    """A module that owns tuned numbers; called in place of the module's forward.

    Attributes:
        own: the module's tuned numbers by attribute.
        forward: the module's own forward.
        stand_in: takes the site, the lanes and the arguments of the forward.
    """

    #: Whether a forward of the module is under way.
    running = False

    def __init__(self, name: str, module: Any, own: Own, noise: Noise) -> None:
        self.name, self.module, self.own, self.forward = name, module, own, module.forward
        self.stand_in = self._stand_in(isinstance(noise, LowRank))

    def _stand_in(self, low_rank: bool) -> Callable[..., Tensor]:
        if "absmax" in self.own:
            return _blocks
        if isinstance(self.module, Linear8bitLt):
            return _int8 if low_rank or "weight" not in self.own else _int8_codes
        if isinstance(self.module, nn.Linear):
            return _linear if low_rank or "weight" not in self.own else _swapped
        if type(self.module) is nn.Embedding:
            return _embedding if low_rank else _embedding_rows
        vectors = all(p.dim() == 1 for p in self.module.parameters(recurse=False))
        return _affine if vectors and self.own.keys() <= {"weight", "bias"} else _swapped

    def __call__(self, _: Any, lanes: BaseLanes, __: str, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output at the points of the lanes."""
        with replaced([(self, "running", True)]):
            return self.stand_in(self, lanes, *args, **kwargs)


def _swapped(site: Site, lanes: BaseLanes, *args: Any, **kwargs: Any) -> Tensor:
    """Any module: its parameters are replaced by copies at the point."""
    copies = {attribute: lanes.copy(numbers) for attribute, numbers in site.own.items()}
    with _parameters(site.module, copies):
        return site.forward(*args, **kwargs)


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


def _affine(site: Site, lanes: BaseLanes, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A norm: its output is linear in its weight, and its bias is added. It may take a gate."""
    if lanes.count == 1:
        return _swapped(site, lanes, x, *args, **kwargs)
    zeros = {name: torch.zeros_like(numbers.stored) for name, numbers in site.own.items()}
    with _parameters(site.module, zeros):
        y = site.forward(x, *args, **kwargs)
    y = lanes.split(y, site.name).flatten(1, -2)
    if "weight" in site.own:
        with _parameters(site.module, zeros | {"weight": torch.ones_like(zeros["weight"])}):
            scaled = site.forward(x, *args, **kwargs).view_as(y) - y
        y = y + scaled * lanes.values(site.own["weight"])[:, None]
    if "bias" in site.own:
        y = y + lanes.values(site.own["bias"])[:, None]
    return y.view_as(x)


def _add_bias(y: Tensor, site: Site, lanes: BaseLanes) -> Tensor:
    """The output of a linear layer, whose bias is already added, with the displaced bias."""
    if "bias" not in site.own:
        return y
    change = lanes.values(site.own["bias"]) - site.own["bias"].stored
    return (lanes.split(y, site.name).flatten(1, -2) + change[:, None]).view_as(y)


def _linear(site: Site, lanes: BaseLanes, x: Tensor) -> Tensor:
    """`x W^T` once for all lanes, plus the low-rank term of each lane (arXiv:2511.16652)."""
    is_int8 = isinstance(site.module, Linear8bitLt)
    y = matmul(site.module, lanes, site.name, x) if is_int8 else site.forward(x)
    y = _add_bias(y, site, lanes)
    if "weight" not in site.own:
        return y
    left, right = (factor.to(x.dtype) for factor in lanes.factors(site.own["weight"]))
    inputs = lanes.split(x, site.name).flatten(1, -2)
    hidden = inputs @ right[0] if len(right) == 1 else torch.bmm(inputs, right)
    lanes.split(y, site.name).flatten(1, -2).baddbmm_(hidden, left.transpose(1, 2))
    return y


def _int8(site: Site, lanes: BaseLanes, x: Tensor) -> Tensor:
    """int8 codes stay; row scales multiply the output, and low-rank noise is added to it."""
    if "SCB" not in site.own:
        return _linear(site, lanes, x)
    y = matmul(site.module, lanes, site.name, x, site.module.state.CB)
    y = lanes.split(y, site.name).flatten(1, -2)
    y = y * lanes.steps(site.own["SCB"]).exp_()[:, None].to(y.dtype)
    if "bias" in site.own:
        y = y + lanes.values(site.own["bias"])[:, None]
    elif site.module.bias is not None:
        y = y + site.module.bias
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def _int8_codes(site: Site, lanes: BaseLanes, x: Tensor) -> Tensor:
    """int8 codes are copied and moved by noise that is rounded stochastically."""
    bias = lanes.copy(site.own["bias"]) if "bias" in site.own else site.module.bias
    return matmul(site.module, lanes, site.name, x, lanes.copy(site.own["weight"]), bias)


def _blocks(site: Site, lanes: BaseLanes, x: Tensor) -> Tensor:
    """NF4 codes are read with a displaced copy of their block scales."""
    with replaced([(site.module.weight.quant_state, "absmax", lanes.copy(site.own["absmax"]))]):
        y = site.forward(x)
    return _add_bias(y, site, lanes)


def _embedding(site: Site, lanes: BaseLanes, ids: Tensor) -> Tensor:
    """The rows of an embedding, plus the low-rank term of each lane for those rows."""
    y = site.forward(ids)
    left, right = lanes.factors(site.own["weight"])
    lane_ids = lanes.split(ids, site.name).flatten(1)
    lane = torch.arange(lanes.count, device=ids.device)[:, None]
    change = left[lane, lane_ids] @ right.transpose(1, 2)
    return y + change.view_as(y).to(y.dtype)


def _embedding_rows(site: Site, lanes: BaseLanes, ids: Tensor) -> Tensor:
    """Only the rows of an embedding that the batch reads are displaced."""
    rows, inverse = ids.unique(return_inverse=True)
    return F.embedding(inverse, lanes.rows_of(site.own["weight"])(rows))


#: The functions that work on several lanes at once. The others see a single point.
IN_LANES = {_affine, _linear, _int8, _embedding}
