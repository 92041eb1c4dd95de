"""The benchmark tasks at hand, trained with strategy="gv" and evaluated, with no setting tuned.

The embedded model sees each task of `--data_dir` as prompts, and the pretrained encoder of 22M
parameters sees it as sequence classification (LoRA on query and value and a new head). The training
loss is that of all training examples, before and after. Beside it stands the loss of the best
constant prediction, which is the entropy of their labels.

    python scripts/bench_tasks.py --data_dir ../shared/data
"""

import argparse
import contextlib
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from measuring import SILENT
from peft import LoraConfig
from workloads import MeanPooledClassifier, encoder_folder

from zo_peft import ZOConfig, ZOTrainer
from zo_peft.models.loading import load_tokenizer
from zo_peft.runs.arguments import DataArguments
from zo_peft.runs.sources import evaluation_examples, training_examples
from zo_peft.runs.texts import table
from zo_peft.tools.demo import EMBEDDED


def embedded(data: DataArguments, args: ZOConfig) -> ZOTrainer:
    """A trainer of the embedded model on prompts."""
    train, _ = training_examples(data, False, False, args.seed)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    test = evaluation_examples(data, False, False)
    return ZOTrainer(
        str(EMBEDDED / "model"), args, train_dataset=train, eval_dataset=test, peft_config=lora
    )


def encoder(data: DataArguments, args: ZOConfig) -> ZOTrainer:
    """A trainer of the encoder with a head on the mean of its tokens."""
    train, _ = training_examples(data, True, False, args.seed)
    torch.manual_seed(args.seed)
    classes = 1 + max(example["label"] for example in train)
    base = MeanPooledClassifier.from_pretrained(encoder_folder(), num_labels=classes)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    return ZOTrainer(
        base,
        args,
        train_dataset=train,
        eval_dataset=evaluation_examples(data, True, False),
        processing_class=load_tokenizer(str(encoder_folder())),
        peft_config=lora,
    )


MODELS: dict[str, Callable[[DataArguments, ZOConfig], ZOTrainer]] = {
    "embedded": embedded,
    "encoder": encoder,
}


def constant_loss(train: Dataset) -> float | None:
    """The least mean loss of one distribution for all examples; None without classes."""
    name = next((name for name in ("label", "labels") if name in train.column_names), None)
    if name is None or isinstance(train[0][name], list):
        return None
    counts = Counter(train[name])
    shares = [count / len(train) for count in counts.values()]
    return -sum(share * math.log(share) for share in shares)


@torch.no_grad()
def training_loss(trainer: ZOTrainer) -> float:
    """The mean of the training objective over all training examples."""
    batches = trainer.get_eval_dataloader(trainer.train_dataset)
    losses = [trainer.objective.losses(trainer.model.eval(), batch) for batch in batches]
    return torch.cat(losses).mean().item()


def row(task: str, model: str, given: argparse.Namespace) -> list[str]:
    """Train on a task and measure before and after; the cells of the row."""
    data = DataArguments(task=task, task_data_dir=str(given.data_dir / task), num_eval=500)
    args = ZOConfig(
        "out/tasks",
        strategy="gv",
        max_forward_passes=given.max_forward_passes,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        max_length=given.max_length,
        seed=given.seed,
        **SILENT,
    )
    with contextlib.redirect_stdout(sys.stderr):
        trainer = MODELS[model](data, args)
        start = time.perf_counter()
        before = training_loss(trainer), trainer.evaluate()["eval_accuracy"]
        trainer.train()
        after = training_loss(trainer), trainer.evaluate()["eval_accuracy"]
    constant = constant_loss(trainer.train_dataset)
    return [
        task,
        model,
        f"{len(trainer.train_dataset):,}",
        f"{given.max_forward_passes:,}",
        f"{before[0]:.4f} -> {after[0]:.4f}",
        "" if constant is None else f"{constant:.4f}",
        f"{before[1]:.3f} -> {after[1]:.3f}",
        f"{time.perf_counter() - start:.0f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--tasks", nargs="*", default=["sst2", "rte", "cb", "boolq", "copa"])
    parser.add_argument("--models", nargs="*", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--max_forward_passes", type=int, default=1000)
    parser.add_argument("--max_length", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)  # more only wait for each other on models this small
    header = ["task", "model", "examples", "forward passes", "training loss", "constant"]
    rows = []
    for model in given.models:
        for task in given.tasks:
            rows.append(row(task, model, given))
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print(table([*header, "test accuracy", "seconds"], rows))


if __name__ == "__main__":
    main()
