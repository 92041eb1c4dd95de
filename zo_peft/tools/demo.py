"""The embedded default: a tiny language model and labelled texts, shipped with the package."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from zo_peft.core.journal import JOURNAL_NAME
from zo_peft.runs import run
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.train.config import ZOConfig
from zo_peft.train.results import METRICS_NAME

EMBEDDED = Path(__file__).parents[1] / "embedded"
TEMPLATE = "{text} It was"
LABEL_WORDS = "terrible,great"
FORWARD_PASSES = 200


@dataclass
class DemoArguments:
    """The demo's settings."""

    output_dir: str = HfArg(default="zo_peft_demo", help="Folder for the base and the adapter.")
    seed: int = HfArg(default=0, help="Seed of data order and noise.")
    strategy: str = HfArg(default="guided", help="How a direction is found.")
    max_forward_passes: int = HfArg(default=FORWARD_PASSES, help="The budget.")


def demo(given: DemoArguments) -> dict[str, Any]:
    """Tune a LoRA on the embedded model, int8-quantized, and save base and adapter.

    It returns the contents of `zo_metrics.json`, and `base` and `adapter`, the folders.
    """
    base, adapter = Path(given.output_dir) / "base", Path(given.output_dir) / "adapter"
    shutil.copytree(EMBEDDED / "model", base, dirs_exist_ok=True)
    for name in (JOURNAL_NAME, METRICS_NAME):
        # A demo begins anew each time.
        (adapter / name).unlink(missing_ok=True)
    model = ModelArguments(str(base), load_in_8bit=True, lora_target_modules=["q_proj", "v_proj"])
    data = DataArguments(
        train_file=str(EMBEDDED / "train.jsonl"),
        eval_file=str(EMBEDDED / "test.jsonl"),
        prompt_template=TEMPLATE,
        label_words=[LABEL_WORDS],
    )
    args = ZOConfig(
        **(asdict(given) | {"output_dir": str(adapter)}),
        per_device_train_batch_size=16,
        per_device_eval_batch_size=50,
        logging_steps=0.1,
        save_strategy="no",
    )
    return run.train(model, data, args) | {"base": str(base), "adapter": str(adapter)}
