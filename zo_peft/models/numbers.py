"""The base's tuned tensors: where each is stored, and what a step makes of it."""

from collections.abc import Iterator

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_peft.core.noise import CHUNK
from zo_peft.errors import UserError
from zo_peft.models.adapters import matching
from zo_peft.models.rounding import MAX_CODE, round_codes, round_float


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

    def write(self, rows: slice, steps: Tensor, uniforms: Tensor) -> None:
        """Store rows after steps, and count those that moved."""
        self._store(rows, self.stepped(rows, steps, uniforms))

    def _store(self, rows: slice, after: Tensor) -> None:
        self.moved += (after != self.matrix[rows]).sum()
        self.matrix[rows] = after

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
        return _bounded(self._moved(rows, steps, uniforms))

    def write(self, rows: slice, steps: Tensor, uniforms: Tensor) -> None:
        """Store rows after steps, and count those that moved or saturated."""
        moved = self._moved(rows, steps, uniforms)
        self.saturated += (moved.abs() > MAX_CODE).sum()
        self._store(rows, _bounded(moved))

    def _moved(self, rows: slice | Tensor, steps: Tensor, uniforms: Tensor) -> Tensor:
        per_code = (MAX_CODE / self.scales[rows])[:, None].nan_to_num(0.0, posinf=0.0)
        return round_codes(self.matrix[rows], steps * per_code, uniforms)

    def value(self, rows: slice) -> Tensor:
        """`w`."""
        return self.matrix[rows] * (self.scales[rows] / MAX_CODE)[:, None]


def _bounded(codes: Tensor) -> Tensor:
    return codes.clamp_(-MAX_CODE, MAX_CODE).to(torch.int8)


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
