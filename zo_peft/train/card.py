"""The model card that is written beside an adapter, or beside a tuned base.

What it says is in `card.md.jinja`; this module collects the values that the template shows.
"""

import json
import math
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from zo_peft.models.adapters import classifies, peft_config_of
from zo_peft.models.hub import public_name
from zo_peft.models.loading import quantization_of
from zo_peft.train.checks import GRADIENT

CARD_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")

#: The card's lines of code that load its own folder, which has another name on the Hub.
NAMED = re.compile(
    r'^(model = \w+\.from_pretrained\((?:base, )?|load_scales\(base, )"[^"/\n]+"', re.MULTILINE
)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

#: Fields of an adapter's configuration that say nothing about how it was made.
UNSAID = {"base_model_name_or_path", "auto_mapping", "inference_mode", "peft_type", "peft_version"}


class Base(NamedTuple):
    """A base model: its name for readers, whether the Hub has it, and its commit there."""

    name: str
    on_hub: bool
    revision: str | None


def write_model_card(
    folder: str, model: PreTrainedModel | PeftModel, tune: str, summary: dict[str, Any]
) -> None:
    """Write `README.md` into `folder`.

    Args:
        tune: adapter, scales or weights.
        summary: the contents of `zo_metrics.json`; what it lacks is left out.
    """
    settings, value = summary.get("settings", {}), summary.get("metric_after")
    config = peft_config_of(model)
    dataset = summary.get("dataset") or _hub_dataset(settings)
    kind = tune if config is None else config.peft_type.value
    gradients, adapts = summary.get("strategy") in GRADIENT, isinstance(model, PeftModel)
    result = None
    if value is not None and math.isfinite(value):
        shown = dataset or settings.get("dataset_name") or settings.get("eval_file") or "custom"
        result = EvalResult(
            task_type=_task(model),
            dataset_type=dataset or "custom",
            dataset_name=shown,
            dataset_config=settings.get("dataset_config"),
            dataset_split=settings.get("dataset_test_split"),
            metric_type=summary["metric_name"],
            metric_value=value,
        )
    metadata = {
        "library_name": "peft" if adapts else "transformers",
        "datasets": dataset and [dataset],
        "metrics": result and [result.metric_type],
        "tags": ["zo_peft", *([] if gradients else ["zeroth-order"]), kind.lower()],
        "eval_results": result and [result],
    }
    values = {"adapts": adapts, "kind": kind, "gradients": gradients, "dataset": dataset}
    values["config"] = None if config is None else _chosen(config)
    _write(folder, model, settings, metadata, summary=summary, **values)


def write_merged_card(folder: str, merged: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Write `README.md` into `folder`: which base and adapter it is made of, and how it loads.

    Args:
        settings: how the base and the adapter (`adapter_name_or_path`) were loaded.
    """
    adapter = public_name(settings["adapter_name_or_path"])
    metadata = {"library_name": "transformers", "tags": ["zo_peft"]}
    _write(folder, merged, settings, metadata, merged=adapter, summary={})


def for_repository(text: str, repo_id: str) -> str:
    """A card's text whose code loads a repository of the Hub instead of the card's folder."""
    return NAMED.sub(lambda found: f'{found[1]}"{repo_id}"', text)


def _write(
    folder: str,
    model: PreTrainedModel | PeftModel,
    settings: dict[str, Any],
    metadata: dict[str, Any],
    **values: Any,
) -> None:
    """Write the card; the Hub searches its metadata, and `values` fill the template."""
    title, base = Path(folder).resolve().name, _base(model, settings)
    data = ModelCardData(
        pipeline_tag=_task(model),
        base_model=base.name if base.on_hub else None,
        model_name=title,
        **metadata,
    )
    card = ModelCard.from_template(
        data,
        str(TEMPLATE),
        title=title,
        base=base,
        settings=settings,
        num_labels=model.config.num_labels if classifies(model) else None,
        quantization=quantization_of(model.config),
        block=_block,
        yaml=_yaml,
        **values,
    )
    card.save(Path(folder) / CARD_NAME)


def _task(model: PreTrainedModel | PeftModel) -> str:
    return "text-classification" if classifies(model) else "text-generation"


def _hub_dataset(settings: dict[str, Any]) -> str | None:
    """The data set's id, if it came from the Hub."""
    name = settings.get("dataset_name", "")
    return name if _on_hub(name, CARD_NAME, repo_type="dataset") else None


def _on_hub(name: str, filename: str, **where: Any) -> bool:
    """Whether a name is one of the Hub: it has an owner, or the Hub was asked for a file of it."""
    try:
        found = try_to_load_from_cache(name, filename, **where)
    except HFValidationError:
        return False
    return HUB_ID.fullmatch(name) is not None or found is not None


def _base(model: PreTrainedModel | PeftModel, settings: dict[str, Any]) -> Base:
    """The base, with the commit that was loaded from the Hub, as the cache knows it."""
    config = peft_config_of(model)
    loaded = model.config.name_or_path
    name = public_name(loaded if config is None else config.base_model_name_or_path)
    place, revision = Path(loaded), settings.get("model_revision")
    is_folder = place.name == name and (place.is_absolute() or place.is_dir())
    if is_folder or not _on_hub(name, "config.json", revision=revision):
        return Base(name, False, None)
    if revision is not None:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        revision = Path(cached).parent.name if isinstance(cached, str) else revision
    return Base(name, True, revision)


def _chosen(config: PeftConfig) -> dict[str, Any]:
    """An adapter's configuration without PEFT's defaults."""
    chosen: dict[str, Any] = {"peft_type": config.peft_type.value}
    for field in fields(config):
        made, value = field.default_factory, getattr(config, field.name)
        default = field.default if made is MISSING else made()
        if field.name not in UNSAID and value not in (None, default):
            is_name = field.name.endswith("name_or_path")
            chosen[field.name] = public_name(value) if is_name else value
    return chosen


def _yaml(values: dict[str, Any]) -> str:
    """Values as YAML: sets are sorted, and enumerations and the like written as text."""
    plain = json.loads(
        json.dumps(values, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )
    return yaml.safe_dump(plain, sort_keys=False, width=100, allow_unicode=True).rstrip()


def _block(language: str, text: str) -> str:
    """A block of code, fenced by more backticks than the text has in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
