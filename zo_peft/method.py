"""What a run tunes and how it moves that, from plain settings: the same for trainer and replay."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from zo_peft.errors import UserError
from zo_peft.journal import Record
from zo_peft.loading import peft_config_of, tuned_parameters
from zo_peft.low_rank import LowRank, Structure
from zo_peft.noise import Distribution
from zo_peft.scales import base_hash
from zo_peft.spaces import AdapterSpace, BaseSpace, Space, choose, find_scales, find_weights
from zo_peft.strategies import Estimate
from zo_peft.updates import RULES, UpdateRule


def space_of(
    model: PreTrainedModel | PeftModel,
    tune: str,
    tune_unquantized: bool,
    tunable: str | None,
    noise: Distribution,
    noise_rank: int,
    low_rank_noise: Structure | None,
) -> Space:
    """The numbers that are tuned, by the fields of `ZOConfig` of the same names."""
    kind: Distribution | LowRank = noise
    if low_rank_noise is not None:
        kind = LowRank(noise_rank, low_rank_noise, noise)
    if tune == "adapter":
        return AdapterSpace(tuned_parameters(model, tunable), kind)
    check_in_place(model, tune)
    model.requires_grad_(False)
    find = find_scales if tune == "scales" else find_weights
    return BaseSpace(choose(find(model, tune_unquantized), tunable), kind)


def check_in_place(model: PreTrainedModel, tune: str) -> None:
    """A base that is tuned itself must be where it can be changed.

    Raises:
        UserError: part of it is not.
    """
    if tune != "adapter" and any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"tune={tune!r} changes the base in place, but part of it is offloaded to the CPU or "
            "the disk; tune an adapter, or load a base that fits (load_in_4bit)"
        )


def rule_of(
    space: Space,
    update_rule: str,
    weight_decay: float,
    decayed: Sequence[str],
    automatic: bool,
    momentum: float,
    beta2: float,
    learning_rate: float = 0.0,
) -> UpdateRule:
    """The update rule, by the arguments of `UpdateRule`; `apply` sets its learning rate."""
    return RULES[update_rule](
        space, learning_rate, weight_decay, tuple(decayed), automatic, momentum, beta2
    )


def apply(rule: UpdateRule, record: Record) -> None:
    """Move `theta` as a record says."""
    noise = rule.space.noise
    if isinstance(noise, LowRank):
        noise.basis_seed = record.basis_seed
    rule.param_groups[0]["lr"], rule.backoff = record.learning_rate, record.backoff
    rule.estimate = None if "skipped" in record.chosen else estimate_of(record)
    rule.step()


def estimate_of(record: Record) -> Estimate:
    """What the step found, of which a record has the mean loss alone."""
    return Estimate(
        record.direction,
        record.slope,
        (record.loss,),
        record.elite,
        record.spread,
        record.sensitivity,
    )


def trained(model: PreTrainedModel | PeftModel, space: Space) -> dict[str, Tensor]:
    """What is tuned, and what else PEFT made trainable, by name."""
    trainable = tuned_parameters(model) if isinstance(model, PeftModel) else {}
    return trainable | space.tensors()


def load_trained(
    model: PreTrainedModel | PeftModel, space: Space, tensors: dict[str, Tensor]
) -> None:
    """Set what `trained` gave.

    Raises:
        UserError: names or shapes differ; nothing that is tuned has been changed then.
    """
    tuned = space.tensors().keys()
    others = {name: p for name, p in trained(model, space).items() if name not in tuned}
    space.load({name: tensor for name, tensor in tensors.items() if name not in others})
    for name, parameter in others.items():
        parameter.data.copy_(tensors[name])


def identity(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """What a base is known by: a hash of its files, its commit on the Hub, or a hash of tensors.

    And how it was loaded: int8, 4-bit, or its dtype.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    quantization = getattr(base.config, "quantization_config", None)
    bits = {"int8": "load_in_8bit", "4-bit": "load_in_4bit"}
    loaded = [name for name, key in bits.items() if getattr(quantization, key, False)]
    return {**_source(model), "loaded": (loaded or [str(base.dtype)])[0]}


def _source(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    name, commit = model.config.name_or_path, getattr(model.config, "_commit_hash", None)
    files = sorted(Path(name).glob("*.safetensors")) if name else []
    if files:
        digest = hashlib.blake2b(digest_size=16)
        for path in files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        return {"files": digest.hexdigest()}
    return {"tensors": base_hash(model)} if commit is None else {"commit": commit}


def adapter_settings(model: PreTrainedModel | PeftModel) -> dict[str, Any] | None:
    """The adapter's configuration as JSON has it; None without one."""
    config = peft_config_of(model)
    return config and json.loads(json.dumps(config.to_dict(), default=sorted))
