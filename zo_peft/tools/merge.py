"""`zo-peft merge`: put an adapter into the weights of its base, so that it loads without PEFT."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

from zo_peft.errors import UserError, explained
from zo_peft.models.adapters import load_adapter, merged_model, saved_adapter
from zo_peft.models.hub import check_apart, public_name
from zo_peft.runs.arguments import ModelArguments
from zo_peft.runs.run import load
from zo_peft.train.card import write_model_card
from zo_peft.train.results import METRICS_NAME, read_results, write_json

SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]?B", re.IGNORECASE)


@dataclass
class MergeArguments:
    """Where a merged model goes, and how it is made."""

    output_dir: str = HfArg(help="Folder for the merged model.")
    max_shard_size: str = HfArg(default="5GB", help="The largest file, as in transformers.")
    dequantize: bool = HfArg(
        default=False, help="Merge into what a quantized base stands for, in floating point."
    )


def merge(model: ModelArguments, given: MergeArguments) -> dict[str, Any]:
    """Write the base with `W + change` for every weight that the adapter changes.

    The sum is made in float32 and rounded once to the base's dtype. With the model go the
    tokenizer, the figures of the adapter's run, and a card. Of `model`, `adapter_name_or_path` and
    what concerns the base count.

    Returns `output_dir`, the `files` of weights in it, and their `dtype`. A UserError says that the
    adapter cannot be merged, or the base is quantized and `dequantize` is not given; nothing has
    been written then.
    """
    if model.adapter_name_or_path is None:
        raise UserError("nothing to merge; give --adapter_name_or_path")
    if not SHARD_SIZE.fullmatch(given.max_shard_size):
        raise UserError(f"max_shard_size={given.max_shard_size!r}; give a size such as 5GB")
    check_apart(given.output_dir, model.model_name_or_path, model.adapter_name_or_path)
    config, classes = saved_adapter(model.adapter_name_or_path)
    if config.is_prompt_learning:
        why = "it adds tokens, or keys and values, and changes no weight; load it with PEFT"
        raise UserError(f"{config.peft_type.value} cannot be merged: {why}")
    tokenizer = model.tokenizer()
    summary = read_results(model.adapter_name_or_path)
    base = load(model, "adapter", classes, summary.get("label_words") or ())
    dtype = base.dtype
    if quantized := getattr(base, "is_quantized", False):
        base = _dequantized(base, model.model_name_or_path, given.dequantize)
    merged = merged_model(load_adapter(base, model.adapter_name_or_path))
    if quantized:
        merged.to(dtype)
    merged.save_pretrained(given.output_dir, max_shard_size=given.max_shard_size)
    tokenizer.save_pretrained(given.output_dir)
    adapter = public_name(model.adapter_name_or_path)
    found = {"model_revision": model.model_revision, "trust_remote_code": model.trust_remote_code}
    shown = summary | {"settings": summary.get("settings", {}) | found}
    write_model_card(given.output_dir, merged, "weights", shown, adapter)
    if summary:
        # With it, the merged model is asked as the adapter was.
        write_json(Path(given.output_dir) / METRICS_NAME, summary)
    return {
        "output_dir": given.output_dir,
        "files": sorted(path.name for path in Path(given.output_dir).glob("*.safetensors")),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _dequantized(base: PreTrainedModel, name: str, wanted: bool) -> PreTrainedModel:
    """The weights that a quantized base stands for, in float32."""
    if not wanted:
        what = f"{public_name(name)} is quantized, and rounding to its codes may undo the adapter"
        cure = "give --dequantize to merge in floating point into the weights that the codes stand"
        other = "merge into the base as it was before it was quantized"
        raise UserError(f"{what}; {cure} for, or {other}")
    with explained(f"{public_name(name)} cannot be merged into", NotImplementedError):
        return base.dequantize(torch.float32)
