"""The tensors of a base that are tuned: where each is stored, and how a step changes it."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_peft.core.noise import chunk
from zo_peft.models.adapters import matching
from zo_peft.models.quantized import Linear4bit, Linear8bitLt, QuantState, dequantize_blockwise
from zo_peft.models.rounding import round_float

#: Codes of int8 weights lie between minus and plus this.
MAX_CODE = 127


class Numbers:
    """A tensor of the base that is tuned. Its subclasses are the formats of such tensors.

    The methods are of R rows of `matrix`: `steps` are float32 [R, width], and `uniforms`, in [0, 1)
    and of that shape, round the result (empty for float32, which is not rounded).

    Attributes:
        name: the tensor's name, as in the model's state dict where it is there.
        parameter: the parameter that holds the tensor or belongs to it.
        stored: the tensor itself, as the model holds it.
        matrix: `stored` with all dimensions but the first flattened; a vector is a single row.
        moved, saturated: how many numbers the last move changed, and how many it could not move on
            because they are at the end of their range; int64 on the device.
    """

    def __init__(self, name: str, parameter: nn.Parameter, stored: Tensor | None = None) -> None:
        self.name, self.parameter = name, parameter
        self.stored = parameter.data if stored is None else stored
        self.matrix = self.stored.view(1 if self.stored.dim() < 2 else len(self.stored), -1)
        self.start_counting()

    def start_counting(self) -> None:
        """Set `moved` and `saturated` to zero."""
        zeros = torch.zeros(2, dtype=torch.int64, device=self.parameter.device)
        self.moved, self.saturated = zeros.unbind()

    def stepped(self, rows: slice | Tensor, steps: Tensor, uniforms: Tensor) -> Tensor:
        """What the rows are after the steps. What is stored stays as it is."""
        raise NotImplementedError

    def write(self, rows: slice, steps: Tensor, uniforms: Tensor) -> None:
        """Store what the rows are after the steps, and count what has changed."""
        self._store(rows, self.stepped(rows, steps, uniforms))

    def _store(self, rows: slice, after: Tensor) -> None:
        self.moved += (after != self.matrix[rows]).sum()
        self.matrix[rows] = after

    def value(self, rows: slice) -> Tensor:
        """The numbers that steps are added to, float32 [R, width]."""
        return self.matrix[rows].float()

    def chunks(self) -> Iterator[slice]:
        """All rows, a few at a time, so that scratch memory stays small."""
        count, width = self.matrix.shape
        rows = max(1, chunk(self.matrix.device) // max(1, width))
        for start in range(0, count, rows):
            yield slice(start, min(start + rows, count))


class FloatNumbers(Numbers):
    """Floating-point weights. Below float32 they are rounded stochastically."""

    def stepped(self, rows: slice | Tensor, steps: Tensor, uniforms: Tensor) -> Tensor:
        """`w + step`."""
        values = self.matrix[rows]
        if values.dtype == torch.float32:
            return values + steps
        return round_float(values.float() + steps, values.dtype, uniforms)


class Int8Codes(Numbers):
    """The codes of LLM.int8() weights, `w = code * SCB / 127`. Steps are steps of `w`."""

    def __init__(self, name: str, layer: Linear8bitLt) -> None:
        super().__init__(name, layer.weight)
        self.scales: Tensor = layer.state.SCB

    def stepped(self, rows: slice | Tensor, steps: Tensor, uniforms: Tensor) -> Tensor:
        """Codes are rounded stochastically (QuZO, arXiv:2502.12346) and stop at the ends."""
        return self._moved(rows, steps, uniforms).clamp_(-MAX_CODE, MAX_CODE).to(torch.int8)

    def write(self, rows: slice, steps: Tensor, uniforms: Tensor) -> None:
        """As of `Numbers`; codes that would leave their range are counted as saturated."""
        moved = self._moved(rows, steps, uniforms)
        self.saturated += (moved.abs() > MAX_CODE).sum()
        self._store(rows, moved.clamp_(-MAX_CODE, MAX_CODE))

    def _moved(self, rows: slice | Tensor, steps: Tensor, uniforms: Tensor) -> Tensor:
        """Whole numbers, float32, also beyond the ends; opposite steps are rounded alike."""
        per_code = (MAX_CODE / self.scales[rows])[:, None].nan_to_num(0.0, posinf=0.0)
        steps = steps * per_code
        return steps.abs().add_(uniforms).floor_().copysign_(steps).add_(self.matrix[rows])

    def value(self, rows: slice) -> Tensor:
        """`w`."""
        return self.matrix[rows] * (self.scales[rows] / MAX_CODE)[:, None]


class Scales(Numbers):
    """Quantization scales. Steps are steps of their logarithm, so scales stay positive.

    There is one, float32, for each row of int8 weights or each block of NF4 weights. The codes stay
    as they are; this is how QZO tunes (arXiv:2505.13430).
    """

    def stepped(self, rows: slice | Tensor, steps: Tensor, uniforms: Tensor) -> Tensor:
        """`s * exp(step)`."""
        return self.matrix[rows] * steps.exp()

    def value(self, rows: slice) -> Tensor:
        """`log s`."""
        return self.matrix[rows].log()


#: The tuned numbers of a module by attribute (`weight`, `bias`, `SCB` or `absmax`).
Own = dict[str, Numbers]
#: The modules that own tuned numbers by name, each with its own numbers.
Owners = dict[str, tuple[nn.Module, Own]]


def find_scales(model: PreTrainedModel, unquantized: bool = False) -> Owners:
    """The scales (nested ones made float32), with `unquantized` also all float parameters."""
    owners: Owners = {}
    for name, layer in _quantized(model):
        if isinstance(layer, Linear8bitLt):
            own: Own = {"SCB": Scales(f"{name}.SCB", layer.weight, layer.state.SCB)}
        else:
            scales = _unnested(model, layer.weight.quant_state)
            own = {"absmax": Scales(f"{name}.weight.absmax", layer.weight, scales)}
        owners[name] = layer, own
    return _with_floats(model, owners) if unquantized else owners


def find_weights(model: PreTrainedModel, unquantized: bool = False) -> Owners:
    """The codes of int8 layers; with `unquantized`, or if there are none, all float parameters."""
    owners: Owners = {
        name: (layer, {"weight": Int8Codes(f"{name}.weight", layer)})
        for name, layer in _quantized(model)
    }
    return _with_floats(model, owners) if unquantized or not owners else owners


def choose(owners: Owners, tunable: str | None) -> Owners:
    """The numbers whose names are `matching`."""
    names = {numbers.name for _, own in owners.values() for numbers in own.values()}
    return named(owners, matching(names, tunable))


def named(owners: Owners, names: Collection[str]) -> Owners:
    """The numbers of these names, with the modules that own them."""
    narrowed = {
        name: (module, {a: numbers for a, numbers in own.items() if numbers.name in names})
        for name, (module, own) in owners.items()
    }
    return {name: owner for name, owner in narrowed.items() if owner[1]}


def _with_floats(model: nn.Module, owners: Owners) -> Owners:
    """The owners and every float parameter of the model. Tied parameters are one `Numbers`."""
    names = {id(p): name for name, p in model.named_parameters() if p.is_floating_point()}
    shared: dict[int, Numbers] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in names:
                mine = FloatNumbers(names[id(parameter)], parameter)
                numbers = shared.setdefault(id(parameter), mine)
                owners.setdefault(module_name, (module, {}))[1][attribute] = numbers
    return owners


def _quantized(model: nn.Module) -> Iterator[tuple[str, Linear8bitLt | Linear4bit]]:
    """The quantized layers with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Linear8bitLt) and module.weight.CB is not None:
            # This puts codes and scales where the first forward pass would put them.
            module.init_8bit_state()
        if isinstance(module, Linear8bitLt | Linear4bit):
            yield name, module


def _unnested(model: PreTrainedModel, state: QuantState) -> Tensor:
    """The scales of NF4 weights. Those that are quantized themselves are dequantized for good."""
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.absmax, state.offset, state.state2 = absmax.float(), None, None
        state.nested = False
        model.config.quantization_config.bnb_4bit_use_double_quant = False
    return state.absmax
