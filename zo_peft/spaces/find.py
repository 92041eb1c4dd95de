"""What is tuned of a base: the scales of its quantized layers, or its weights."""

from bitsandbytes.functional import QuantState, dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import PreTrainedModel

from zo_peft.errors import UserError
from zo_peft.loading import matching
from zo_peft.spaces.numbers import FloatNumbers, Int8Codes, Numbers, Owners, Scales


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
