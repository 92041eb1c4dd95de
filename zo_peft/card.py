"""The model card that is written beside an adapter."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import PreTrainedModel

from zo_peft.loading import classifies, peft_config_of, public_name

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

BASE_TEXT = """\
# {title}

`{base}`, its {what} tuned with forward passes only (zeroth-order optimization) by zo_peft.

{results}
```python
from transformers import {auto}

model = {auto}.from_pretrained("{title}")
```
{delta}
The method is that of Jin, Cen, Tan, arXiv:2601.04710, on MeZO, arXiv:2305.17333.
"""

DELTA = """
`zo_scales.safetensors` holds the scales alone, for the same base:

```python
from transformers import {auto}, BitsAndBytesConfig
from zo_peft.scales import load_scales

base = {auto}.from_pretrained("{base}"{arguments})
load_scales(base, "{title}")
```
"""

RESULTS = """\
| | before | after |
| --- | --- | --- |
| {metric_name} | {metric_before:.4f} | {metric_after:.4f} |
| evaluation loss | {eval_loss_before:.4f} | {eval_loss_after:.4f} |

Strategy {strategy}, {steps} steps, {forward_passes} forward passes, {examples_forwarded} examples
forwarded, {wall_seconds:.0f} seconds, peak memory {peak_memory_bytes:,} bytes.
"""


def write_model_card(
    folder: str, model: PreTrainedModel | PeftModel, tune: str, summary: dict[str, Any]
) -> None:
    """Write `README.md` into `folder`.

    Args:
        tune: adapter, scales or weights.
        summary: the contents of `zo_metrics.json`; without evaluation results, they are left out.
    """
    config = peft_config_of(model)
    name = model.config.name_or_path if config is None else config.base_model_name_or_path
    base = public_name(name)
    quantization = getattr(model.config, "quantization_config", None)
    has_classes = classifies(model)
    kind = tune if config is None else config.peft_type.value
    data = ModelCardData(
        library_name="transformers" if config is None else "peft",
        base_model=base if "/" in base else None,
        tags=["zo_peft", "zeroth-order", kind.lower()],
    )
    fields = {
        "title": Path(folder).resolve().name,
        "peft_type": kind,
        "what": kind,
        "base": base,
        "results": RESULTS.format(**summary) if summary.get("metric_after") is not None else "",
        "auto": "AutoModelForSequenceClassification" if has_classes else "AutoModelForCausalLM",
        "arguments": _arguments(quantization, model.config.num_labels if has_classes else None),
    }
    delta = DELTA.format(**fields) if tune == "scales" else ""
    text = (TEXT if config is not None else BASE_TEXT).format(**fields, delta=delta)
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
