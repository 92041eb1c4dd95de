"""The model card that is written beside an adapter, or beside a tuned base."""

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

from zo_peft.data.tasks import TASKS
from zo_peft.models.adapters import classifies, peft_config_of
from zo_peft.models.hub import public_name
from zo_peft.runs.arguments import ModelArguments
from zo_peft.train.checks import GRADIENT

CARD_NAME = "README.md"

ADAPTER = """\
A PEFT adapter ({kind}) for {base}, tuned {how} by
zo_peft, which loading it does not need."""

BASE = """\
{base}, its {kind} tuned {how} by zo_peft."""

MERGED = """\
{base} with the adapter `{adapter}` merged into its weights by zo_peft, which loading it does not
need."""

FORWARD_ONLY = "with forward passes only (zeroth-order optimization)"
BACKPROPAGATION = "with gradients (backpropagation)"

NOT_ON_THE_HUB = "The base was a folder, `{name}`: give the folder of your copy in its place."

LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import {classes}

base = {auto}.from_pretrained("{name}"{arguments})
model = PeftModel.from_pretrained(base, "{title}")"""

LOAD_BASE = """\
from transformers import {auto}

model = {auto}.from_pretrained("{title}"{trusted})"""

LOAD_SCALES = """\
from transformers import {classes}
from zo_peft.scales import load_scales

base = {auto}.from_pretrained("{name}"{arguments})
load_scales(base, "{title}")"""

#: The lines above that name what the card is of: a folder, which on the Hub has another name.
NAMED = re.compile(
    r'^(model = \w+\.from_pretrained\((?:base, )?|load_scales\(base, )"[^"/\n]+"', re.MULTILINE
)

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


class _Base(NamedTuple):
    """The base: how readers know it, whether the Hub has it under this name, and its commit."""

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
    title = Path(folder).resolve().name
    config = peft_config_of(model)
    settings = summary.get("settings", {})
    base = _base(model, settings)
    kind = tune if config is None else config.peft_type.value
    gradients = summary.get("strategy") in GRADIENT
    sections = [
        f"# {title}",
        *_opening(title, base, kind, model, tune, summary),
        *_section("Results", _results(summary)),
        *_section("Data", _data(settings)),
        *_section("Training", _costs(summary), _command(summary), _settings(settings)),
        *_section("Adapter", _adapter(config)),
        *_section("Citation", "" if gradients else _block("bibtex", CITATION)),
    ]
    _write(folder, sections, _metadata(title, base, kind, model, summary))


def write_merged_card(folder: str, merged: PreTrainedModel, given: ModelArguments) -> None:
    """Write `README.md` into `folder`: which base and adapter it is made of, and how it loads.

    Args:
        given: base and adapter, of which `merged` is made.
    """
    title = Path(folder).resolve().name
    base = _base(merged, vars(given))
    named = {
        "base": _shown(base),
        "adapter": public_name(given.adapter_name_or_path),
        "auto": _auto_class(merged),
        "title": title,
        "trusted": _arguments({"trust_remote_code": given.trust_remote_code or None}),
    }
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_task(merged),
        base_model=base.name if base.on_hub else None,
        tags=["zo_peft"],
        model_name=title,
    )
    sections = [MERGED.format(**named), _block("python", LOAD_BASE.format(**named))]
    _write(folder, [f"# {title}", *sections], data)


def for_repository(text: str, repo_id: str) -> str:
    """A card whose lines of code load from a repository of the Hub what was in a folder."""
    return NAMED.sub(lambda found: f'{found[1]}"{repo_id}"', text)


def _write(folder: str, sections: list[str], data: ModelCardData) -> None:
    text = "\n\n".join(sections)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(Path(folder) / CARD_NAME)


def _metadata(
    title: str,
    base: _Base,
    kind: str,
    model: PreTrainedModel | PeftModel,
    summary: dict[str, Any],
) -> ModelCardData:
    """What the Hub searches and shows."""
    settings, value = summary.get("settings", {}), summary.get("metric_after")
    task = _task(model)
    method = [] if summary.get("strategy") in GRADIENT else ["zeroth-order"]
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
        base_model=base.name if base.on_hub else None,
        datasets=None if dataset is None else [dataset],
        metrics=None if results is None else [summary["metric_name"]],
        tags=["zo_peft", *method, kind.lower()],
        model_name=title,
        eval_results=results,
    )


def _hub_dataset(settings: dict[str, Any]) -> str | None:
    """The data set's id on the Hub, where it came from there."""
    if "task" in settings:
        return None if "task_data_dir" in settings else TASKS[settings["task"]].hub[0]
    name = settings.get("dataset_name", "")
    return name if _on_hub(name, CARD_NAME, repo_type="dataset") else None


def _on_hub(name: str, filename: str, **where: Any) -> bool:
    """Whether a name is one of the Hub: it has an owner, or a file of it was asked for there."""
    try:
        found = try_to_load_from_cache(name, filename, **where)
    except HFValidationError:
        return False
    return HUB_ID.fullmatch(name) is not None or found is not None


def _base(model: PreTrainedModel | PeftModel, settings: dict[str, Any]) -> _Base:
    """The base, with the commit that was loaded from the Hub, as the cache knows it."""
    config = peft_config_of(model)
    loaded = model.config.name_or_path
    name = public_name(loaded if config is None else config.base_model_name_or_path)
    place, revision = Path(loaded), settings.get("model_revision")
    is_folder = place.name == name and (place.is_absolute() or place.is_dir())
    if is_folder or not _on_hub(name, "config.json", revision=revision):
        return _Base(name, False, None)
    if revision is not None:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        revision = Path(cached).parent.name if isinstance(cached, str) else revision
    return _Base(name, True, revision)


def _shown(base: _Base) -> str:
    return f"`{base.name}`" + (f" (revision `{base.revision}`)" if base.revision else "")


def _auto_class(model: PreTrainedModel | PeftModel) -> str:
    return "AutoModelForSequenceClassification" if classifies(model) else "AutoModelForCausalLM"


def _task(model: PreTrainedModel | PeftModel) -> str:
    return "text-classification" if classifies(model) else "text-generation"


def _opening(
    title: str,
    base: _Base,
    kind: str,
    model: PreTrainedModel | PeftModel,
    tune: str,
    summary: dict[str, Any],
) -> list[str]:
    """What it is, and the lines that load it."""
    auto, settings = _auto_class(model), summary.get("settings", {})
    quantization = _quantization(model.config.to_dict().get("quantization_config"))
    dtype = settings.get("dtype", "auto")
    trusted = {"trust_remote_code": settings.get("trust_remote_code")}
    arguments = {
        "revision": None if base.revision is None else f'"{base.revision}"',
        "num_labels": model.config.num_labels if classifies(model) else None,
        "dtype": None if dtype == "auto" else f'"{dtype}"',
        "quantization_config": quantization,
        **trusted,
    }
    named = {
        "title": title,
        "kind": kind,
        "how": BACKPROPAGATION if summary.get("strategy") in GRADIENT else FORWARD_ONLY,
        "name": base.name,
        "base": _shown(base),
        "auto": auto,
        "classes": auto + (", BitsAndBytesConfig" if quantization else ""),
        "arguments": _arguments(arguments),
        "trusted": _arguments(trusted),
    }
    adapts = isinstance(model, PeftModel)
    lines = [
        (ADAPTER if adapts else BASE).format(**named),
        _block("python", (LOAD_ADAPTER if adapts else LOAD_BASE).format(**named)),
    ]
    if tune == "scales":
        lines.append("`zo_scales.safetensors` holds the scales alone, for the same base:")
        lines.append(_block("python", LOAD_SCALES.format(**named)))
    if (adapts or tune == "scales") and not base.on_hub:
        lines.append(NOT_ON_THE_HUB.format(name=base.name))
    return lines


def _arguments(given: dict[str, Any]) -> str:
    """Further arguments of a call, as code; None leaves one out."""
    return "".join(f", {name}={value}" for name, value in given.items() if value is not None)


def _quantization(config: dict[str, Any] | None) -> str | None:
    """bitsandbytes' configuration, as code."""
    if config is None:
        return None
    if config.get("load_in_8bit"):
        return "BitsAndBytesConfig(load_in_8bit=True)"
    kind, dtype = config.get("bnb_4bit_quant_type", "nf4"), config.get("bnb_4bit_compute_dtype")
    computes = "" if dtype in (None, "float32") else f', bnb_4bit_compute_dtype="{dtype}"'
    return f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{kind}"{computes})'


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
