"""The base's own numbers as a space: weights, int8 codes, quantization scales; perturbed on read.

A layer's forward sees a scratch copy of that layer's numbers, or adds a low-rank term to its
output. What the model holds is written by moves alone, so an evaluation, finished or not, leaves it
bit for bit as it was, and scratch memory is that of one layer.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_peft.direction import Direction
from zo_peft.errors import UserError
from zo_peft.loading import matching
from zo_peft.low_rank import LowRank, summed
from zo_peft.noise import CHUNK, Distribution, derive_seed, noise_rows, row_words, uniform_rows
from zo_peft.rounding import MAX_CODE, round_codes, round_float
from zo_peft.spaces.lanes import Lanes, NotInLanes, Replacement

Noise = Distribution | LowRank


class Numbers:
    """A tensor of the base that is tuned, and how a step changes it.

    Subclasses say where it is stored and what `theta + step` is in that format.

    Attributes:
        name: as in the model's state dict.
        parameter: of the module that owns it.
        moved, saturated: how many numbers the last move changed and kept from passing an end, on
            the device.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        zero = torch.zeros(2, dtype=torch.int64, device=parameter.device)
        self.moved, self.saturated = zero.unbind()

    @property
    def stored(self) -> Tensor:
        """What the model holds; one of its own tensors."""
        return self.parameter.data

    def stepped(self, rows: slice | Tensor, steps: Tensor, uniforms: Tensor) -> Tensor:
        """Rows of the stored matrix after steps [R, width]; the stored one stays as it is."""
        raise NotImplementedError

    def value(self, rows: slice) -> Tensor:
        """What steps are added to, float32 [R, width]."""
        return self.matrix[rows].float()

    @property
    def matrix(self) -> Tensor:
        """`stored` as a matrix: all but the first dimension flattened; a vector is one row."""
        stored = self.stored
        return stored.view(1, -1) if stored.dim() < 2 else stored.view(len(stored), -1)

    def chunks(self) -> Iterator[slice]:
        """Its rows, in parts that bound the scratch memory."""
        count, width = self.matrix.shape
        rows = max(1, CHUNK // max(1, width))
        for start in range(0, count, rows):
            yield slice(start, min(start + rows, count))


class FloatNumbers(Numbers):
    """Weights of a float dtype; below float32 rounded stochastically."""

    def stepped(self, rows: slice | Tensor, steps: Tensor, uniforms: Tensor) -> Tensor:
        """`w + step`."""
        values = self.matrix[rows]
        if values.dtype == torch.float32:
            return values + steps
        return round_float(values.float() + steps, values.dtype, uniforms)


class Int8Codes(Numbers):
    """The codes of LLM.int8() weights `w = code * SCB / 127`; steps are of `w`."""

    def __init__(self, name: str, layer: Linear8bitLt) -> None:
        super().__init__(name, layer.weight)
        self.scales: Tensor = layer.state.SCB

    def stepped(self, rows: slice | Tensor, steps: Tensor, uniforms: Tensor) -> Tensor:
        """Codes rounded stochastically (QuZO, arXiv:2502.12346), saturating at the ends."""
        per_code = (MAX_CODE / self.scales[rows])[:, None].nan_to_num(0.0, posinf=0.0)
        codes, beyond = round_codes(self.matrix[rows], steps * per_code, uniforms)
        self.saturated += beyond
        return codes

    def value(self, rows: slice) -> Tensor:
        """`w`."""
        return self.matrix[rows] * (self.scales[rows] / MAX_CODE)[:, None]


class Scales(Numbers):
    """Quantization scales; steps are of their logarithm, so they stay positive.

    Perturbing scales and leaving codes alone is QZO's way (arXiv:2505.13430).
    """

    def __init__(self, name: str, parameter: nn.Parameter, stored: Tensor) -> None:
        super().__init__(name, parameter)
        self._stored = stored

    @property
    def stored(self) -> Tensor:
        """Float32 [rows] of int8 weights, [blocks] of NF4 weights."""
        return self._stored

    def stepped(self, rows: slice | Tensor, steps: Tensor, uniforms: Tensor) -> Tensor:
        """`s * exp(step)`."""
        return self.matrix[rows] * steps.exp()

    def value(self, rows: slice) -> Tensor:
        """`log s`."""
        return self.matrix[rows].log()


#: The tuned numbers of a module by attribute, and the modules that have some, by name.
Own = dict[str, Numbers]
Owners = dict[str, tuple[nn.Module, Own]]


class BaseSpace:
    """Numbers of a base model that are tuned in place.

    Args:
        owners: of every module that owns tuned numbers, those, by attribute: `weight`, `bias`,
            `SCB`, `absmax`. Tied weights are one `Numbers` with several owners.
        noise: its distribution; or low-rank noise, which many candidates can share a forward with.

    Attributes:
        parameters: the parameters of those modules that hold or belong to tuned numbers, by name.
        numel: how many numbers are tuned.
        moves: so far; rounding depends on it.

    Raises:
        UserError: there is nothing to tune.
    """

    def __init__(self, owners: Owners, noise: Noise) -> None:
        self.noise = noise
        self.owners = dict(owners)
        self.numbers = {n.name: n for _, own in owners.values() for n in own.values()}
        if not self.numbers:
            raise UserError("there is nothing to tune: no tensor of the base was chosen")
        self.parameters = {name: numbers.parameter for name, numbers in self.numbers.items()}
        self.numel = sum(numbers.stored.numel() for numbers in self.numbers.values())
        self.moves = 0
        self._replacements = {
            name: _replacement(module, own, noise) for name, (module, own) in owners.items()
        }

    @property
    def lane_numel(self) -> int:
        """How many numbers a candidate holds while it is evaluated: those of one layer."""
        rank = self.noise.rank if isinstance(self.noise, LowRank) else 0
        sizes = [
            rank * sum(n.stored.shape) if rank and n.stored.dim() == 2 else n.stored.numel()
            for n in self.numbers.values()
        ]
        return max(sizes)

    def replacements(self, model: nn.Module) -> dict[str, Replacement]:
        """How each module that owns tuned numbers works lane by lane.

        Raises:
            NotInLanes: a module has numbers of its own for each candidate.
        """
        for name, (module, _, function) in self._replacements.items():
            if getattr(function, "func", None) not in _IN_LANES:
                raise NotInLanes(f"{name} (a {type(module).__name__})")
        return self._replacements

    @contextmanager
    def displaced(self, displacement: Direction) -> Iterator[None]:
        """Within the context the model is at `theta + displacement`; after it, at `theta` again."""
        with self.lanes([displacement]).active(self._replacements, 1, 1):
            yield

    def lanes(self, displacements: Sequence[Direction]) -> "BaseLanes":
        """The model at `theta` plus every displacement, for all in one forward."""
        return BaseLanes(displacements, self.noise)

    def move(self, displacement: Direction, shrink: Mapping[str, float] | None = None) -> None:
        """`theta <- theta + displacement`; `shrink` first multiplies the parameters it names."""
        seed = self._rounding_seed()
        for numbers in self.numbers.values():
            steps = Steps(displacement, numbers, self.noise)
            self._write(numbers, steps, seed, (shrink or {}).get(numbers.name, 1.0))

    def shift(self, index: int, step: Tensor, scale: float, shrink: Mapping[str, float]) -> None:
        """`theta <- theta + scale * step`, in `buffers[index]`; `shrink` as in `move`."""
        numbers = list(self.numbers.values())[index]
        matrix = step.view(numbers.matrix.shape)
        keep = shrink.get(numbers.name, 1.0)
        self._write(numbers, lambda rows: matrix[rows] * scale, self._rounding_seed(), keep)

    def _rounding_seed(self) -> int:
        self.moves += 1
        return derive_seed(self.moves)

    def _write(
        self, numbers: Numbers, steps: Callable[[slice], Tensor], seed: int, keep: float
    ) -> None:
        device = numbers.stored.device
        numbers.moved, numbers.saturated = torch.zeros(2, dtype=torch.int64, device=device).unbind()
        uniforms = Uniforms(numbers, seed)
        for rows in numbers.chunks():
            before = numbers.matrix[rows]
            change = steps(rows)
            if keep != 1.0:
                change = change - (1.0 - keep) * numbers.value(rows)
            after = numbers.stepped(rows, change, uniforms(rows))
            numbers.moved += (after != before).sum()
            numbers.matrix[rows] = after

    def shares(self) -> dict[str, float]:
        """Of all numbers, the shares that the last move changed and kept from passing an end."""
        numbers = self.numbers.values()
        return {
            "moved": sum(int(n.moved) for n in numbers) / self.numel,
            "saturated": sum(int(n.saturated) for n in numbers) / self.numel,
        }

    @property
    def buffers(self) -> list[Tensor]:
        """The tuned tensors, as the model holds them."""
        return [numbers.stored for numbers in self.numbers.values()]

    def dense(self, index: int, direction: Direction) -> Tensor:
        """The direction as a float32 tensor of the shape of `buffers[index]`."""
        numbers = list(self.numbers.values())[index]
        steps = Steps(direction, numbers, self.noise)
        return torch.cat([steps(rows) for rows in numbers.chunks()]).view(numbers.stored.shape)

    def views(self, index: int, flat: Tensor) -> dict[str, Tensor]:
        """A tensor like `buffers[index]` by the name of its numbers."""
        return {list(self.numbers)[index]: flat}

    def tensors(self) -> dict[str, Tensor]:
        """The tuned tensors by name, as the model holds them."""
        return {name: numbers.stored for name, numbers in self.numbers.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the tuned tensors by name, all of them and no others.

        Raises:
            UserError: names, shapes or dtypes differ from this space's; nothing is changed then.
        """
        mine = self.tensors()
        wrong = sorted(
            name
            for name in mine.keys() | tensors.keys()
            if name not in mine
            or name not in tensors
            or (mine[name].shape, mine[name].dtype) != (tensors[name].shape, tensors[name].dtype)
        )
        if wrong:
            raise UserError(
                f"the saved state does not fit this base: {wrong[0]} and {len(wrong) - 1} more "
                "differ in name, shape or dtype. Use the model, tune and tunable of the saved run"
            )
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)


class Steps:
    """A direction's numbers for some rows of a matrix, made when asked for."""

    def __init__(self, direction: Direction, numbers: Numbers, noise: Noise) -> None:
        self.direction, self.name, self.noise = direction, numbers.name, noise
        self.width, self.device = numbers.matrix.shape[1], numbers.stored.device
        self.factors: tuple[Tensor, Tensor] | None = None
        if isinstance(noise, LowRank) and numbers.stored.dim() == 2:
            shape = numbers.stored.shape
            left, right = noise.factors([direction], self.name, shape, self.device)
            self.factors = left[0], right[0].T.contiguous()

    def __call__(self, rows: slice | Tensor) -> Tensor:
        """Float32 [R, width]."""
        if self.factors is not None:
            return self.factors[0][rows] @ self.factors[1]
        kind = self.noise.distribution if isinstance(self.noise, LowRank) else self.noise
        if isinstance(rows, Tensor):
            sums = torch.zeros(len(rows), self.width, device=self.device)
            for seed, weight in self.direction.terms:
                sums += weight * noise_rows(seed, self.name, rows, self.width, kind)
            return sums
        ends = rows.start * self.width, rows.stop * self.width
        return summed([self.direction], self.name, *ends, kind, self.device).view(-1, self.width)


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
        steps, uniforms = Steps(point, numbers, self.noise), Uniforms(numbers, _seed_of(point))
        scratch = torch.empty_like(numbers.matrix)
        for rows in numbers.chunks():
            scratch[rows] = numbers.stepped(rows, steps(rows), uniforms(rows))
        return scratch.view(numbers.stored.shape)

    def rows(self, numbers: Numbers, rows: Tensor) -> Tensor:
        """Some rows (int64 [R]) of a matrix at the only displacement."""
        (point,) = self.displacements
        steps = Steps(point, numbers, self.noise)(rows)
        return numbers.stepped(rows, steps, Uniforms(numbers, _seed_of(point))(rows))


def _seed_of(point: Direction) -> int:
    """What rounds the numbers at a point; the same for its negative."""
    return derive_seed(*(seed for seed, _ in point.terms))


# ---- How modules read ---------------------------------------------------------------------------


Forward = Callable[..., Tensor]


def _replacement(module: nn.Module, own: Own, noise: Noise) -> Replacement:
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
_IN_LANES = {_affine, _linear, _int8, _embedding}


# ---- What is tuned ------------------------------------------------------------------------------


def find_scales(model: PreTrainedModel, unquantized: bool = False) -> Owners:
    """The scales of every bitsandbytes layer, by the layer's name; un-nested, float32.

    Args:
        unquantized: also the float tensors: embeddings, norms, biases, a head.

    Raises:
        UserError: there is no quantized layer.
    """
    owners: Owners = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear8bitLt):
            _settle(module)
            scb = Scales(f"{name}.SCB", module.weight, module.state.SCB)
            owners[name] = module, {"SCB": scb}
        elif isinstance(module, Linear4bit):
            _unnest(model, module.weight.quant_state)
            absmax = module.weight.quant_state.absmax
            owners[name] = (
                module,
                {"absmax": Scales(f"{name}.weight.absmax", module.weight, absmax)},
            )
    if not owners:
        raise UserError(
            "tune='scales' needs a base with quantized layers, and this one has none; load it with "
            "load_in_8bit or load_in_4bit, or use tune='weights'"
        )
    return _with_floats(model, owners) if unquantized else owners


def find_weights(model: PreTrainedModel, unquantized: bool = False) -> Owners:
    """The codes of every int8 layer, by the layer's name; of a base without any, all weights.

    Args:
        unquantized: also the float tensors beside int8 layers.

    Raises:
        UserError: the base has NF4 layers.
    """
    owners: Owners = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            raise UserError(
                "tune='weights' cannot move the codes of 4-bit layers; load the base with "
                "load_in_8bit or unquantized, or use tune='scales'"
            )
        if isinstance(module, Linear8bitLt):
            _settle(module)
            owners[name] = module, {"weight": Int8Codes(f"{name}.weight", module)}
    return _with_floats(model, owners) if unquantized or not owners else owners


def choose(owners: Owners, tunable: str | None) -> Owners:
    """The owners of those numbers whose names `tunable` (a regular expression) is found in.

    Raises:
        UserError: it is no regular expression, or found in none.
    """
    numbers = {n.name for _, own in owners.values() for n in own.values()}
    chosen = matching(numbers, tunable)
    narrowed = {
        name: (module, {a: n for a, n in own.items() if n.name in chosen})
        for name, (module, own) in owners.items()
    }
    return {name: owner for name, owner in narrowed.items() if owner[1]}


def _with_floats(model: nn.Module, owners: Owners) -> Owners:
    """The owners, with every float parameter of the model; a tied one is the same for all."""
    names = {id(p): name for name, p in model.named_parameters() if p.is_floating_point()}
    shared: dict[int, Numbers] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in names:
                mine = FloatNumbers(names[id(parameter)], parameter)
                numbers = shared.setdefault(id(parameter), mine)
                owners.setdefault(module_name, (module, {}))[1][attribute] = numbers
    return owners


def _settle(layer: Linear8bitLt) -> None:
    """Codes and scales where a forward would put them first."""
    if layer.weight.CB is not None:
        layer.init_8bit_state()


def _unnest(model: PreTrainedModel, state: QuantState) -> None:
    """Scales that are quantized themselves, in float32: the numbers that a forward computes."""
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.absmax, state.offset, state.state2 = absmax.float(), None, None
        state.nested = False
        model.config.quantization_config.bnb_4bit_use_double_quant = False
