"""The model card that is written beside an adapter."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel, TaskType

from zo_peft.loading import public_name

TEXT = """\
# {title}

A {peft_type} adapter for `{base}`, tuned with forward passes only (zeroth-order optimization) by
zo_peft.

{results}
```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{base}"{arguments})
model = PeftModel.from_pretrained(base, "{title}")
```

The method is that of Jin, Cen, Tan, arXiv:2601.04710, on MeZO, arXiv:2305.17333.
"""

RESULTS = """\
| | before | after |
| --- | --- | --- |
| {metric_name} | {metric_before:.4f} | {metric_after:.4f} |
| evaluation loss | {eval_loss_before:.4f} | {eval_loss_after:.4f} |

Strategy {strategy}, {steps} steps, {forward_passes} forward passes, {examples_forwarded} examples
forwarded, {wall_seconds:.0f} seconds, peak memory {peak_memory_bytes:,} bytes.
"""


def write_model_card(folder: str, model: PeftModel, summary: dict[str, Any]) -> None:
    """Write `README.md` into `folder`.

    Args:
        summary: the contents of `zo_metrics.json`; without evaluation results, they are left out.
    """
    config = model.active_peft_config
    base = public_name(config.base_model_name_or_path)
    quantization = getattr(model.config, "quantization_config", None)
    classifies = config.task_type == TaskType.SEQ_CLS
    data = ModelCardData(
        library_name="peft",
        base_model=base if "/" in base else None,
        tags=["zo_peft", "zeroth-order", config.peft_type.value.lower()],
    )
    text = TEXT.format(
        title=Path(folder).resolve().name,
        peft_type=config.peft_type.value,
        base=base,
        results=RESULTS.format(**summary) if summary.get("metric_after") is not None else "",
        auto="AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM",
        arguments=_arguments(quantization, model.config.num_labels if classifies else None),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(Path(folder) / "README.md")


def _arguments(quantization: Any, num_labels: int | None) -> str:
    arguments = "" if num_labels is None else f", num_labels={num_labels}"
    if getattr(quantization, "load_in_8bit", False):
        arguments += ", quantization_config=BitsAndBytesConfig(load_in_8bit=True)"
    if getattr(quantization, "load_in_4bit", False):
        arguments += (
            ', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")'
        )
    return arguments
