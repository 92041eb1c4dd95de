"""What `zo-peft plan` says of a run's memory, against the measured peaks.

Each row is a process of its own. It trains on the embedded model first, so that Python, libraries
and their buffers are there ("process before"); then it loads the row's model by `from_pretrained`,
random weights of the shape from a file, and trains a step or two on random tokens. Measured is the
peak of the resident set (VmHWM, Linux) while training, less the process before. Two things are kept
out of it. What is freed goes back at once (MALLOC), of which malloc otherwise keeps some. And no
page of the checkpoint is mapped any more: such pages come and go as the kernel likes, yet the
resident set counts them.

    python scripts/bench_plan.py                      # the table of docs/benchmarks.md
    python scripts/bench_plan.py --rows OPT-125M      # rows whose names contain this
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from bench_cost import tokenizer
from bench_memory import peak_mib, reset_peak
from bench_step import EMBEDDED, SHAPES
from datasets import disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from zo_peft import ZOConfig, ZOTrainer
from zo_peft.models.loading import load_base, quantization_config
from zo_peft.runs.arguments import ModelArguments
from zo_peft.tools.plan import Planner
from zo_peft.train.config import StrategyName
from zo_peft.train.gradient import GradientTrainer

LLAMA = "Llama, 128k vocabulary"
SHAPES |= {
    LLAMA: lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
}
#: Has glibc hand back what is freed, so that the resident set is what is held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
BASES = ("float32", "int8", "nf4")
TARGETS = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Row:
    """A run; `scored`: tokens of each example that have a label."""

    shape: str
    base: str
    batch: int
    length: int
    scored: int
    strategy: StrategyName = "gv"

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.shape}, {self.base}, {self.batch} x {self.length}, {self.scored} scored"

    def config(self, folder: str, steps: int) -> ZOConfig:
        """The run's settings."""
        return ZOConfig(
            folder,
            strategy=self.strategy,
            per_device_train_batch_size=self.batch,
            max_steps=steps,
            zo_eps=1e-3,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )


ROWS = [
    *(Row("OPT-125M", base, 4, 48, 1) for base in BASES),
    *(Row("OPT-125M", base, 16, 64, 64) for base in BASES),
    *(Row("OPT-125M", base, 4, 48, 1, "adam") for base in BASES),
    Row("OPT-125M", "float32", 16, 64, 64, "adam"),
    *(Row("OPT-1.3B", base, 1, 32, 1) for base in BASES),
    *(Row("OPT-1.3B", base, 4, 32, 32) for base in BASES),
    *(Row(LLAMA, base, 1, 32, 1) for base in BASES),
    *(Row(LLAMA, base, 4, 32, 32) for base in BASES),
]


def load(folder: str | Path, base: str) -> PreTrainedModel:
    """The saved model, as `zo-peft train` loads it."""
    quantization = quantization_config(base == "int8", base == "nf4")
    quantized = {} if quantization is None else {"quantization_config": quantization}
    return load_base(str(folder), device_map={"": "cpu"}, **quantized)


def unmap(model: PreTrainedModel) -> None:
    """Copies in place of the pages of a checkpoint."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def train(model: PreTrainedModel, row: Row, steps: int) -> None:
    """Steps on batches of random tokens, of which the last ones are scored."""
    ids = torch.randint(4, 900, (row.batch, row.length)).tolist()
    first = row.length - row.scored
    examples = [{"input_ids": i, "labels": [-100] * first + i[first:]} for i in ids]
    kind = GradientTrainer if row.strategy == "adam" else ZOTrainer
    with tempfile.TemporaryDirectory() as folder:
        kind(
            model,
            row.config(folder, steps),
            train_dataset=examples * steps,
            processing_class=tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS),
        ).train()


def measure(row: Row, folder: str) -> dict[str, float]:
    """MiB of the process before, and above it while training."""
    train(load(EMBEDDED, row.base), row, 2)
    gc.collect()
    before = psutil.Process().memory_info().rss / 2**20
    model = load(folder, row.base)
    unmap(model)
    reset_peak()
    # The optimizer of gradients has state from its second step on.
    train(model, row, 2 if row.strategy == "adam" else 1)
    return {"before": before, "training": peak_mib() - before}


def planned(row: Row, folder: str) -> float:
    """MiB that the planner says."""
    model = ModelArguments(
        folder,
        load_in_8bit=row.base == "int8",
        load_in_4bit=row.base == "nf4",
        lora_target_modules=TARGETS,
    )
    planner = Planner(model, row.config(folder, 2), row.scored)
    of = planner.with_gradients if row.strategy == "adam" else planner.forward_only
    memory = of(row.batch, row.length)
    return max(memory.step, memory.update) / 2**20


def in_a_process(row: Row, folder: str) -> dict[str, float]:
    """`measure` in a fresh process."""
    values = json.dumps(list(vars(row).values()))
    command = [sys.executable, "-W", "ignore", __file__, "--measure", values, "--folder", folder]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        env=os.environ | MALLOC,
    )
    return json.loads(done.stdout.splitlines()[-1])


def print_row(row: Row, folder: str) -> None:
    """Measure and print one row of the table."""
    plan, found = planned(row, folder), in_a_process(row, folder)
    cells = [
        row.name,
        "gradients" if row.strategy == "adam" else "forward only",
        f"{found['before']:,.0f}",
        f"{plan:,.0f}",
        f"{found['training']:,.0f}",
        f"{plan / found['training']:.2f}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    if given.measure:
        print(json.dumps(measure(Row(*json.loads(given.measure)), given.folder)))
        return
    print("| run | how | process before, MiB | planned, MiB | measured, MiB | ratio |")
    print("|" + " --- |" * 6)
    rows = [row for row in ROWS if given.rows in row.name]
    for shape in dict.fromkeys(row.shape for row in rows):
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=torch.float32)
            model.save_pretrained(folder)
            del model
            for row in rows:
                if row.shape == shape:
                    print_row(row, folder)


if __name__ == "__main__":
    main()
