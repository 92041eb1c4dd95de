"""The model card that is written beside an adapter, or beside a tuned base."""

import json
import math
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from zo_peft.loading import classifies, peft_config_of, public_name
from zo_peft.tasks import TASKS

CARD_NAME = "README.md"

ADAPTER = """\
A PEFT adapter ({kind}) for {base}, tuned with forward passes only (zeroth-order optimization) by
zo_peft, which loading it does not need."""

BASE = """\
{base}, its {kind} tuned with forward passes only (zeroth-order optimization) by zo_peft."""

NOT_ON_THE_HUB = "The base was a folder, `{name}`: give the folder of your copy in its place."

LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import {classes}

base = {auto}.from_pretrained("{name}"{arguments})
model = PeftModel.from_pretrained(base, "{title}")"""

LOAD_BASE = """\
from transformers import {auto}

model = {auto}.from_pretrained("{title}")"""

LOAD_SCALES = """\
from transformers import {classes}
from zo_peft.scales import load_scales

base = {auto}.from_pretrained("{name}"{arguments})
load_scales(base, "{title}")"""

#: The lines above that name what the card is of, which on the Hub has another name.
NAMED = r'^((?:model = |load_scales\().*)"{title}"\)$'

CITATION = """\
@misc{jin2026steering,
  title = {Steering the Noise: Turning Random Perturbations into Effective Descent for
           Memory-Efficient {LLM} Fine-Tuning},
  author = {Jin, Feihu and Cen, Shipeng and Tan, Ying},
  year = {2026},
  eprint = {2601.04710},
  archivePrefix = {arXiv},
}

@misc{malladi2023finetuning,
  title = {Fine-Tuning Language Models with Just Forward Passes},
  author = {Malladi, Sadhika and Gao, Tianyu and Nichani, Eshaan and Damian, Alex and
            Lee, Jason D. and Chen, Danqi and Arora, Sanjeev},
  year = {2023},
  eprint = {2305.17333},
  archivePrefix = {arXiv},
}"""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

#: Of an adapter's configuration, what says nothing about how it was made.
UNSAID = {"base_model_name_or_path", "auto_mapping", "inference_mode", "peft_type", "peft_version"}


def write_model_card(
    folder: str, model: PreTrainedModel | PeftModel, tune: str, summary: dict[str, Any]
) -> None:
    """Write `README.md` into `folder`.

    Args:
        tune: adapter, scales or weights.
        summary: the contents of `zo_metrics.json`; what it lacks is left out.
    """
    title = Path(folder).resolve().name
    config = peft_config_of(model)
    base = public_name(
        model.config.name_or_path if config is None else config.base_model_name_or_path
    )
    settings = summary.get("settings", {})
    kind = tune if config is None else config.peft_type.value
    sections = [
        f"# {title}",
        *_opening(title, base, kind, model, tune, _commit(base, settings)),
        *_section("Results", _results(summary)),
        *_section("Data", _data(settings)),
        *_section("Training", _costs(summary), _command(summary), _settings(settings)),
        *_section("Adapter", _adapter(config)),
        *_section("Citation", _block("bibtex", CITATION)),
    ]
    text = "\n\n".join(sections)
    data = _metadata(title, base, kind, model, summary)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(Path(folder) / CARD_NAME)


def for_repository(text: str, title: str, repo_id: str) -> str:
    """A card whose lines of code load from a repository of the Hub what was in a folder `title`."""
    pattern = re.compile(NAMED.format(title=re.escape(title)), re.MULTILINE)
    return pattern.sub(lambda found: f'{found[1]}"{repo_id}")', text)


def _metadata(
    title: str,
    base: str,
    kind: str,
    model: PreTrainedModel | PeftModel,
    summary: dict[str, Any],
) -> ModelCardData:
    """What the Hub searches and shows."""
    settings, value = summary.get("settings", {}), summary.get("metric_after")
    task = "text-classification" if classifies(model) else "text-generation"
    dataset = _hub_dataset(settings)
    results = None
    if value is not None and math.isfinite(value):
        shown = dataset or settings.get("dataset_name") or settings.get("eval_file") or "custom"
        results = [
            EvalResult(
                task_type=task,
                dataset_type=dataset or "custom",
                dataset_name=shown,
                dataset_config=settings.get("dataset_config"),
                dataset_split=settings.get("dataset_test_split"),
                metric_type=summary["metric_name"],
                metric_value=value,
            )
        ]
    return ModelCardData(
        library_name="peft" if isinstance(model, PeftModel) else "transformers",
        pipeline_tag=task,
        base_model=base if HUB_ID.fullmatch(base) else None,
        datasets=None if dataset is None else [dataset],
        metrics=None if results is None else [summary["metric_name"]],
        tags=["zo_peft", "zeroth-order", kind.lower()],
        model_name=title,
        eval_results=results,
    )


def _hub_dataset(settings: dict[str, Any]) -> str | None:
    """The data set's id on the Hub, where it came from there."""
    if "task" in settings:
        return None if "task_data_dir" in settings else TASKS[settings["task"]].hub[0]
    name = settings.get("dataset_name", "")
    return name if HUB_ID.fullmatch(name) else None


def _commit(base: str, settings: dict[str, Any]) -> str | None:
    """The commit of the base that was loaded from the Hub, as the cache knows it."""
    if not HUB_ID.fullmatch(base) or "model_revision" not in settings:
        return None
    cached = try_to_load_from_cache(base, "config.json", revision=settings["model_revision"])
    return Path(cached).parent.name if isinstance(cached, str) else settings["model_revision"]


def _opening(
    title: str,
    base: str,
    kind: str,
    model: PreTrainedModel | PeftModel,
    tune: str,
    revision: str | None,
) -> list[str]:
    """What it is, and the lines that load it."""
    has_classes, quantization = classifies(model), model.config.to_dict().get("quantization_config")
    auto = "AutoModelForSequenceClassification" if has_classes else "AutoModelForCausalLM"
    arguments = {
        "revision": None if revision is None else f'"{revision}"',
        "num_labels": model.config.num_labels if has_classes else None,
        "quantization_config": _quantization(quantization),
    }
    given = "".join(f", {name}={value}" for name, value in arguments.items() if value is not None)
    named = {
        "title": title,
        "kind": kind,
        "name": base,
        "base": f"`{base}`" + (f" (revision `{revision}`)" if revision is not None else ""),
        "auto": auto,
        "classes": auto + (", BitsAndBytesConfig" if arguments["quantization_config"] else ""),
        "arguments": given,
    }
    adapts = isinstance(model, PeftModel)
    lines = [
        (ADAPTER if adapts else BASE).format(**named),
        _block("python", (LOAD_ADAPTER if adapts else LOAD_BASE).format(**named)),
    ]
    if tune == "scales":
        lines.append("`zo_scales.safetensors` holds the scales alone, for the same base:")
        lines.append(_block("python", LOAD_SCALES.format(**named)))
    if (adapts or tune == "scales") and not HUB_ID.fullmatch(base):
        lines.append(NOT_ON_THE_HUB.format(name=base))
    return lines


def _quantization(config: dict[str, Any] | None) -> str | None:
    """bitsandbytes' configuration, as code."""
    if config is None:
        return None
    if config.get("load_in_8bit"):
        return "BitsAndBytesConfig(load_in_8bit=True)"
    kind = config.get("bnb_4bit_quant_type", "nf4")
    return f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{kind}")'


def _results(summary: dict[str, Any]) -> str:
    if summary.get("metric_after") is None:
        return ""
    rows = {summary["metric_name"]: "metric", "evaluation loss": "eval_loss"}
    lines = ["| | before | after |", "| --- | --- | --- |"]
    for name, key in rows.items():
        values = [summary.get(f"{key}_{when}") for when in ("before", "after")]
        shown = ["not measured" if value is None else f"{value:.4f}" for value in values]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _data(settings: dict[str, Any]) -> str:
    """What was trained and evaluated on; of files their names."""
    parts = []
    if "task" in settings:
        source = settings.get("task_data_dir") or _hub_dataset(settings)
        parts.append(f"Benchmark task {settings['task']}, from `{source}`.")
    if "dataset_name" in settings:
        names = ("dataset_config", "dataset_train_split", "dataset_test_split")
        chosen = [f"`{settings[name]}`" for name in names if name in settings]
        parts.append(f"Data set `{settings['dataset_name']}`: {', '.join(chosen)}.")
    for name, use in (("train_file", "trained"), ("eval_file", "evaluated")):
        if name in settings:
            parts.append(f"The file `{settings[name]}`, {use} on.")
    return "\n".join(parts)


def _costs(summary: dict[str, Any]) -> str:
    memory = summary.get("peak_memory_bytes")
    rows = {
        "strategy": summary.get("strategy"),
        "steps": summary.get("steps"),
        "forward passes": summary.get("forward_passes"),
        "examples forwarded": summary.get("examples_forwarded"),
        "numbers tuned": summary.get("tuned_parameters"),
        "time (s)": summary.get("wall_seconds"),
        "peak memory (MiB)": None if memory is None else round(memory / 2**20),
    }
    shown = {name: value for name, value in rows.items() if value is not None}
    lines = [
        f"| {name} | {value if isinstance(value, str) else format(value, ',')} |"
        for name, value in shown.items()
    ]
    return "\n".join(["| | |", "| --- | --- |", *lines]) if lines else ""


def _command(summary: dict[str, Any]) -> str:
    """The command line, what it chose by itself spelled out."""
    return _block("bash", summary["command"]) if "command" in summary else ""


def _settings(settings: dict[str, Any]) -> str:
    if not settings:
        return ""
    return (
        f"<details><summary>Settings</summary>\n\n{_block('yaml', _yaml(settings))}\n\n</details>"
    )


def _adapter(config: PeftConfig | None) -> str:
    """PEFT's configuration, less what is as PEFT has it anyway."""
    if config is None:
        return ""
    said: dict[str, Any] = {"peft_type": config.peft_type.value}
    for field in fields(config):
        made = field.default_factory
        default = field.default if made is MISSING else made()
        value = getattr(config, field.name)
        if field.name in UNSAID or value in (None, default):
            continue
        said[field.name] = public_name(value) if field.name.endswith("name_or_path") else value
    return _block("yaml", _yaml(said))


def _yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML, sets in order, enumerations and the like by their value."""
    plain = json.loads(
        json.dumps(values, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )
    return yaml.safe_dump(plain, sort_keys=False, width=100, allow_unicode=True).rstrip()


def _section(name: str, *parts: str) -> list[str]:
    """A heading and what is under it, if anything."""
    said = [part for part in parts if part]
    return [f"## {name}", *said] if said else []


def _block(language: str, text: str) -> str:
    """A block of code, fenced by more backticks than it has in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
