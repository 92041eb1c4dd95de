"""The values of the model card beside an adapter or a tuned base; its text is `card.md.jinja`."""

import json
import math
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig

from zo_peft.data.tasks import TASKS
from zo_peft.models.adapters import classifies, peft_config_of
from zo_peft.models.hub import AnyModel, public_name
from zo_peft.models.loading import quantization_of
from zo_peft.train.checks import GRADIENT

CARD_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")

#: The card's lines of code that load its own folder, which has another name on the Hub.
NAMED = re.compile(
    r'^((?:model|tokenizer) = \w+\.from_pretrained\((?:base, )?|load_scales\(base, )"[^"/\n]+"',
    re.MULTILINE,
)

#: A column of a prompt template; braces that stand for themselves are found as well.
COLUMN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

#: Fields of an adapter's configuration that say nothing about how it was made.
UNSAID = {"base_model_name_or_path", "auto_mapping", "inference_mode", "peft_type", "peft_version"}


def write_model_card(
    folder: str, model: AnyModel, tune: str, summary: dict[str, Any], merged: str | None = None
) -> None:
    """Write `README.md` into `folder`; the Hub searches its metadata.

    `summary` is what `zo_metrics.json` holds; what it lacks is left out. `merged` is the name of
    the adapter that was merged into the model, which was measured before.
    """
    config, settings = peft_config_of(model), summary.get("settings", {})
    named, dataset = settings.get("dataset_name", ""), summary.get("dataset")
    if dataset is None and _on_hub(named, CARD_NAME, repo_type="dataset"):
        dataset = named
    num_labels = model.config.num_labels if classifies(model) else None
    names = model.config.id2label if num_labels else {}
    shown = {
        "title": Path(folder).resolve().name,
        "base": _base(model, settings),
        "settings": settings,
        "summary": summary,
        "merged": merged,
        "kind": tune if config is None else config.peft_type.value,
        "gradients": summary.get("strategy") in GRADIENT,
        "dataset": dataset,
        "num_labels": num_labels,
        "names": names if names != {index: f"LABEL_{index}" for index in names} else None,
        "quantization": quantization_of(model.config),
        "config": config and _chosen(config),
        "question": _question(summary, num_labels),
    }
    written: dict[str, Any] = {"literal": _literal, "block": _block, "yaml": _yaml}
    card = ModelCard.from_template(_metadata(shown), str(TEMPLATE), **shown, **written)
    card.save(Path(folder) / CARD_NAME)


def _metadata(card: dict[str, Any]) -> ModelCardData:
    """What the Hub searches, of the values that the card shows."""
    task = "text-generation" if card["num_labels"] is None else "text-classification"
    result = None if card["merged"] is not None else _result(card["summary"], card["dataset"], task)
    made = [] if card["gradients"] else ["zeroth-order"]
    return ModelCardData(
        license="unknown",
        library_name="transformers" if card["config"] is None else "peft",
        pipeline_tag=task,
        base_model=card["base"]["name"] if card["base"]["on_hub"] else None,
        datasets=card["dataset"] and [card["dataset"]],
        metrics=[result.metric_type] if result else None,
        tags=["zo_peft"] if card["merged"] else ["zo_peft", *made, card["kind"].lower()],
        model_name=card["title"],
        eval_results=[result] if result else None,
    )


def _result(summary: dict[str, Any], dataset: str | None, task: str) -> EvalResult | None:
    settings, value = summary.get("settings", {}), summary.get("metric_after")
    if value is None or not math.isfinite(value):
        return None
    named = dataset or settings.get("dataset_name") or settings.get("eval_file")
    return EvalResult(
        task_type=task,
        dataset_type=dataset or "custom",
        dataset_name=named or "custom",
        dataset_config=settings.get("dataset_config"),
        dataset_split=settings.get("dataset_test_split"),
        metric_type=summary["metric_name"],
        metric_value=value,
    )


def _question(summary: dict[str, Any], num_labels: int | None) -> dict[str, Any]:
    """What the card's code asks: `form`, `words`, and a `template` of Python with its `row`."""
    settings, words = summary.get("settings", {}), summary.get("label_words") or ()
    template, task = settings.get("prompt_template"), TASKS.get(settings.get("task"))
    if task is not None:
        template = (task.text if num_labels else None) or task.prompt
        words = [option for option in task.options if "{" not in option]
    names: dict[str, str] = {}

    def renamed(found: re.Match[str]) -> str:
        if (name := found[1]) is None:
            return found[0]
        names[name] = name if name.isidentifier() else f"column_{len(names)}"
        return f"{{{names[name]}}}"

    template = template and COLUMN.sub(renamed, template)
    form = "classes" if num_labels else summary.get("form") or "completions"
    row = {key: f"Write the {name} here." for name, key in names.items()}
    space = "" if template and template[-1].isspace() else " "
    spaced = [space + word.strip() for word in words or ("one option", "another option")]
    return {"form": form, "template": template, "row": row, "words": spaced}


def for_repository(text: str, repo_id: str) -> str:
    """A card's text whose code loads a repository of the Hub instead of the card's folder."""
    return NAMED.sub(lambda found: f'{found[1]}"{repo_id}"', text)


def _on_hub(name: str, filename: str, **where: Any) -> bool:
    """Whether a name is one of the Hub: it has an owner, or the Hub was asked for a file of it."""
    try:
        found = try_to_load_from_cache(name, filename, **where)
    except HFValidationError:
        return False
    return HUB_ID.fullmatch(name) is not None or found is not None


def _base(model: AnyModel, settings: dict[str, Any]) -> dict[str, Any]:
    """The base's name for readers, whether it is `on_hub`, and its commit there as cached."""
    config = peft_config_of(model)
    loaded = model.config.name_or_path
    name = public_name(loaded if config is None else config.base_model_name_or_path)
    place, revision = Path(loaded), settings.get("model_revision")
    is_here = place.name == name and (place.is_absolute() or place.exists())
    if is_here or not _on_hub(name, "config.json", revision=revision):
        return {"name": name, "on_hub": False}
    if revision is not None:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        revision = Path(cached).parent.name if isinstance(cached, str) else revision
    return {"name": name, "on_hub": True, "revision": revision}


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
    text = json.dumps(values, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    return yaml.safe_dump(json.loads(text), sort_keys=False, width=100, allow_unicode=True).rstrip()


def _literal(value: Any) -> str:
    """Texts as Python writes them, without backticks that would end the block they stand in."""
    return json.dumps(value, ensure_ascii=False).replace("```", r"\u0060" * 3)


def _block(language: str, text: str) -> str:
    """A block of code, fenced by more backticks than the text has in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
