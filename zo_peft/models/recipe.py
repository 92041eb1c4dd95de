"""The parts of a run that depend on its settings and its model: space, evaluator, update rule."""

from contextlib import nullcontext
from typing import Any

from peft import PeftModel
from torch import Tensor

from zo_peft.core.batch import Objective
from zo_peft.core.evaluator import Evaluator
from zo_peft.core.flat_space import FlatSpace
from zo_peft.core.lanes import Host, NotInLanes, Replacement
from zo_peft.core.low_rank import LowRank, Structure
from zo_peft.core.noise import Distribution
from zo_peft.core.ranks import Ranks
from zo_peft.core.space import Space
from zo_peft.core.updates import RULES, UpdateRule
from zo_peft.errors import UserError
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.hub import AnyModel
from zo_peft.models.in_place_space import InPlaceSpace
from zo_peft.models.int8 import base_replacements
from zo_peft.models.loading import bits_in, check_bits, is_packed, quantization_of
from zo_peft.models.memory import Fit
from zo_peft.models.numbers import choose, find_scales, find_weights
from zo_peft.models.peft_layers import find_replacements
from zo_peft.models.trunk import Trunk

#: The fields of `ZOConfig` that decide what is tuned: the arguments of `space_of`.
SPACE_FIELDS = ("tune", "tune_unquantized", "tunable", "noise", "noise_rank", "low_rank_noise")


def space_of(
    model: AnyModel,
    tune: str,
    tune_unquantized: bool,
    tunable: str | None,
    noise: Distribution,
    noise_rank: int,
    low_rank_noise: Structure | None,
) -> Space:
    """The space of what is tuned, from fields of `ZOConfig`; a UserError where it is empty."""
    kind: Distribution | LowRank = noise
    if low_rank_noise is not None:
        kind = LowRank(noise_rank, low_rank_noise, noise)
    if tune == "adapter":
        return FlatSpace(tuned_parameters(model, tunable), kind)
    quantized = bool(quantization_of(model.config)) or is_packed(model)
    check_bits(bits_in(model), quantized, model.config.name_or_path, tune)
    model.requires_grad_(False)
    find = find_scales if tune == "scales" else find_weights
    return InPlaceSpace(choose(find(model, tune_unquantized), tunable), kind)


def check_in_place(model: AnyModel, tune: str) -> None:
    """Raise a UserError where a base itself is tuned (`tune`), and part of it is offloaded."""
    if tune != "adapter" and any(parameter.is_meta for parameter in model.parameters()):
        why = f"tune={tune!r} needs the whole base, but part is offloaded to the CPU or the disk"
        raise UserError(f"{why}; tune an adapter, or load a base that fits (load_in_4bit)")


def rule_of(
    space: Space, update_rule: str, learning_rate: float = 0.0, **settings: Any
) -> UpdateRule:
    """The update rule of this name; in a replay each step brings its own learning rate."""
    return RULES[update_rule](space, learning_rate, **settings)


def trained(model: AnyModel, space: Space) -> dict[str, Tensor]:
    """The tensors that are tuned and the others that PEFT made trainable, by name."""
    trainable = tuned_parameters(model) if isinstance(model, PeftModel) else {}
    return trainable | space.tensors()


def load_trained(model: AnyModel, space: Space, tensors: dict[str, Tensor]) -> None:
    """Set the tensors that `trained` gave; a UserError refuses others, and theta stays."""
    tuned = space.tensors().keys()
    others = {name: p for name, p in trained(model, space).items() if name not in tuned}
    space.load({name: tensor for name, tensor in tensors.items() if name not in others})
    for name, parameter in others.items():
        parameter.data.copy_(tensors[name])


def evaluator_of(
    model: AnyModel,
    space: Space,
    objective: Objective,
    candidates_per_forward: int | None = None,
    ranks: Ranks | None = None,
) -> Evaluator:
    """An evaluator that knows how this model works lane by lane and how many lanes fit."""
    new_tokens = getattr(objective, "max_completion_length", 0)
    repeats = getattr(objective, "repeatable", False) and not new_tokens
    tuned = set(map(id, space.parameters.values()))
    if new_tokens:
        space.keep_values()
    head = model.get_output_embeddings()
    host = Host(
        replacements_of(model, space),
        Fit(model, space.lane_numel, new_tokens),
        Trunk(model, space.parameters.values()).reused if repeats else nullcontext,
        head is not None and any(id(parameter) in tuned for parameter in head.parameters()),
    )
    return Evaluator(model, space, objective, host, candidates_per_forward, ranks)


def replacements_of(model: AnyModel, space: Space) -> dict[str, Replacement] | NotInLanes:
    """How the modules with tuned parameters work lane by lane, or which of them cannot."""
    try:
        if isinstance(space, InPlaceSpace):
            return base_replacements(model) | space.replacements()
        return base_replacements(model) | find_replacements(model, space.parameters)
    except NotInLanes as reason:
        return reason
