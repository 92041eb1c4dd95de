"""Base models (float, int8, NF4) and tokenizers."""

from typing import Any

import torch
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from zo_peft.errors import UserError
from zo_peft.models.hub import LOAD_ERRORS, public_name, reason


def quantization_config(
    load_in_8bit: bool,
    load_in_4bit: bool,
    compute_dtype: torch.dtype = torch.float32,
    has_classes: bool = False,
) -> BitsAndBytesConfig | None:
    """bitsandbytes' LLM.int8() or NF4, or None for a base in floating point.

    Args:
        has_classes: there is a head for sequence classification; it is new, and not quantized.
    """
    if load_in_8bit and load_in_4bit:
        raise UserError("load_in_8bit and load_in_4bit exclude each other; choose one")
    skipped = list(SEQ_CLS_HEAD_NAMES) if has_classes else None
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    if load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=skipped,
        )
    return None


def load_base(name: str, num_labels: int | None = None, **kwargs: Any) -> PreTrainedModel:
    """The base model `name` (Hub id or folder), from safetensors, placed as `device_map` says.

    Args:
        num_labels: classes of a sequence-classification head; None for a causal language model.
        kwargs: for `from_pretrained`.

    Raises:
        UserError: it cannot be found or read.
    """
    head = {} if num_labels is None else {"num_labels": num_labels}
    auto = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    try:
        return auto.from_pretrained(name, **{"use_safetensors": True, **head, **kwargs})
    except LOAD_ERRORS as error:
        raise UserError(_no_model(f"model {name!r}", error)) from error


def load_config(name: str, **kwargs: Any) -> PreTrainedConfig:
    """The configuration of the model `name` (Hub id or folder); no weights are opened.

    Raises:
        UserError: it cannot be found or read.
    """
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except LOAD_ERRORS as error:
        raise UserError(_no_model(f"model {name!r}", error)) from error


def check_quantization(name: str, tune: str, quantization: Any, **kwargs: Any) -> None:
    """Refuse, from the model's configuration alone, a base that cannot be tuned in this way.

    Args:
        tune: adapter, scales or weights.
        quantization: the `BitsAndBytesConfig` that it would be loaded with; None: as it was saved.

    Raises:
        UserError: weights of a 4-bit base, scales of a base without any, a model that is not found.
    """
    if tune == "adapter":
        return
    config = load_config(name, **kwargs)
    found = quantization or getattr(config, "quantization_config", None)
    settings = found if isinstance(found, dict) else getattr(found, "__dict__", {})
    eight, four = (
        settings.get(key, settings.get(f"_{key}")) for key in ("load_in_8bit", "load_in_4bit")
    )
    if tune == "weights" and four:
        raise UserError(
            "tune='weights' cannot move the codes of a 4-bit base; load it in 8 bit or "
            "unquantized, or use tune='scales'"
        )
    if tune == "scales" and not (eight or four):
        raise UserError(
            f"tune='scales' needs a quantized base, and {public_name(name)} is not; use "
            "load_in_8bit or load_in_4bit, or tune='weights'"
        )


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of `name`; its padding token is the end of sequence where it has none.

    Raises:
        UserError: it cannot be found or read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except LOAD_ERRORS as error:
        raise UserError(_no_model(f"the tokenizer of {name!r}", error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _no_model(what: str, error: BaseException) -> str:
    # Users of the command line set no `use_safetensors`.
    why = reason(error).partition(" and thus cannot be loaded with `safetensors`")[0].rstrip(".")
    return (
        f"{what} cannot be loaded: {why}. Give a folder that holds config.json and safetensors, or "
        "a model id of the Hub"
    )
