"""The embedded default: a tiny language model and labelled texts, shipped with the package."""

import shutil
from pathlib import Path
from typing import Any

from zo_peft.runs import run
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.train.config import ZOConfig

EMBEDDED = Path(__file__).parent / "embedded"
TEMPLATE = "{text} It was"
LABEL_WORDS = "terrible,great"
FORWARD_PASSES = 2000

LOAD = """\
from peft import PeftModel; from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base = AutoModelForCausalLM.from_pretrained("{base}", \
quantization_config=BitsAndBytesConfig(load_in_8bit=True))
model = PeftModel.from_pretrained(base, "{adapter}")"""


def demo(output_dir: str, **settings: Any) -> dict[str, Any]:
    """Tune a LoRA on the embedded model, int8-quantized, and save base and adapter.

    Args:
        output_dir: gets the folders `base` and `adapter`.
        settings: of `ZOConfig`, over the demo's own.

    Returns:
        The contents of `zo_metrics.json`, and `base` and `adapter`, the folders.
    """
    base, adapter = Path(output_dir) / "base", Path(output_dir) / "adapter"
    shutil.copytree(EMBEDDED / "model", base, dirs_exist_ok=True)
    model = ModelArguments(str(base), load_in_8bit=True, lora_target_modules=["q_proj", "v_proj"])
    data = DataArguments(
        train_file=str(EMBEDDED / "train.jsonl"),
        eval_file=str(EMBEDDED / "test.jsonl"),
        prompt_template=TEMPLATE,
        label_words=LABEL_WORDS,
    )
    args = ZOConfig(
        **{
            "output_dir": str(adapter),
            "max_forward_passes": FORWARD_PASSES,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 50,
            "logging_steps": 0.1,
            "save_strategy": "no",
            **settings,
        }
    )
    return run.train(model, data, args) | {"base": str(base), "adapter": str(adapter)}
