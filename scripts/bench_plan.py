"""What `zo-peft plan` says of a run's memory, against the measured peaks (Linux).

Each row is measured in a process of its own. The process first trains on the embedded model, so
that Python, the libraries and their buffers are there ("process before"). Then it loads the row's
shape with random weights from a file, by `from_pretrained`, and trains a step or two on random
tokens. Measured is the peak of the resident set while training, less the process before. Two things
are kept out of it. Freed memory, of which malloc usually keeps some, goes back at once (`MALLOC`).
And no page of the checkpoint is mapped any more, because such pages come and go as the kernel
likes, yet the resident set counts them.

    python scripts/bench_plan.py                      # the table of docs/benchmarks.md
    python scripts/bench_plan.py --rows OPT-125M      # only rows whose names contain this
    python scripts/bench_plan.py --rows guided        # or what makes their steps
    python scripts/bench_plan.py --shape embedded     # the same batches, all of one shape
"""

import argparse
import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measuring import (
    SHAPES,
    SILENT,
    add_shape_option,
    in_a_process,
    named_like,
    peak_mib,
    print_header,
    print_row,
    quiet,
    random_rows,
    reset_peak,
    resident_mib,
    tokenizer,
)
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from zo_peft import GradientTrainer, ZOConfig, ZOTrainer
from zo_peft.models.loading import load_base, quantization_config
from zo_peft.runs.arguments import ModelArguments
from zo_peft.tools.demo import EMBEDDED
from zo_peft.tools.plan import Planner

LLAMA = "Llama, 128k vocabulary"
#: Makes glibc hand back what is freed, so that the resident set is what is held.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
BASES = ("float32", "int8", "nf4")
#: Of the guided rows: none, some, and all of OPT-125M's.
EXACT_LAYERS = (0, 2, 12)
TARGETS = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Row:
    """A run.

    Attributes:
        base: float32, int8 or nf4.
        scored: the number of tokens of each example that have a label.
    """

    shape: str
    base: str
    batch: int
    length: int
    scored: int
    strategy: str = "gv"
    exact_layers: int = 0

    @property
    def run(self) -> str:
        """What the table calls it."""
        return f"{self.shape}, {self.base}, {self.batch} x {self.length}, {self.scored} scored"

    @property
    def name(self) -> str:
        """By which it is chosen."""
        return f"{self.run}, {self.how}"

    @property
    def how(self) -> str:
        """What makes its steps."""
        hows = {"adam": "gradients", "guided": f"guided, exact_layers={self.exact_layers}"}
        return hows.get(self.strategy, "forward only")

    @property
    def has_gradients(self) -> bool:
        """Whether it trains with gradients."""
        return self.strategy == "adam"

    def config(self, folder: str, steps: int) -> ZOConfig:
        """The run's settings."""
        return ZOConfig(
            folder,
            strategy=self.strategy,
            exact_layers=self.exact_layers,
            per_device_train_batch_size=self.batch,
            max_steps=steps,
            zo_eps=1e-3,
            **SILENT,
        )


ROWS = [
    *(Row("OPT-125M", base, 4, 48, 1) for base in BASES),
    *(Row("OPT-125M", base, 16, 64, 64) for base in BASES),
    *(Row("OPT-125M", base, 4, 48, 1, "adam") for base in BASES),
    Row("OPT-125M", "float32", 16, 64, 64, "adam"),
    *(Row("OPT-125M", base, 4, 48, 1, "guided", 2) for base in ("int8", "nf4")),
    *(Row("OPT-125M", "float32", 4, 48, 1, "guided", exact) for exact in EXACT_LAYERS),
    *(Row("OPT-125M", "float32", 16, 64, 64, "guided", exact) for exact in EXACT_LAYERS),
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
    """Put copies in the place of the pages of a checkpoint."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def train(model: PreTrainedModel, row: Row, steps: int) -> None:
    """Take steps on a batch of random tokens, of which the last ones are scored."""
    kind = GradientTrainer if row.has_gradients else ZOTrainer
    with tempfile.TemporaryDirectory() as folder:
        kind(
            model,
            row.config(folder, steps),
            train_dataset=random_rows(row.batch, row.length, row.scored),
            processing_class=tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS),
        ).train()


def measure(row: Row, folder: str) -> tuple[float, float]:
    """MiB of the process before, and above it while training."""
    train(load(EMBEDDED / "model", row.base), of_shape(row, "embedded"), 2)
    gc.collect()
    before = resident_mib()
    model = load(folder, row.base)
    unmap(model)
    reset_peak()
    # The optimizer of gradients has state from its second step on.
    train(model, row, 2 if row.has_gradients else 1)
    return before, peak_mib() - before


def planned(row: Row, folder: str) -> float:
    """MiB that the planner says."""
    model = ModelArguments(
        folder,
        load_in_8bit=row.base == "int8",
        load_in_4bit=row.base == "nf4",
        lora_target_modules=TARGETS,
    )
    planner = Planner(model, row.config(folder, 2), row.scored)
    of = planner.with_gradients if row.has_gradients else planner.forward_only
    memory = of(row.batch, row.length)
    return max(memory.step, memory.update) / 2**20


def of_shape(row: Row, shape: str) -> Row:
    """The row with a model of another shape, of which at most all layers are exact."""
    layers = SHAPES[shape]().num_hidden_layers
    return replace(row, shape=shape, exact_layers=min(row.exact_layers, layers))


@contextmanager
def saved(shape: str) -> Iterator[str]:
    """A folder that holds a model of the shape with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=torch.float32)
        model.save_pretrained(folder)
        del model
        yield folder


def print_rows(rows: Sequence[Row], folder: str) -> None:
    """Measure and print the rows of a saved model."""
    for row in rows:
        plan, (before, training) = planned(row, folder), in_a_process(measure, row, folder)
        print_row(
            row.run,
            row.how,
            f"{before:,.0f}",
            f"{plan:,.0f}",
            f"{training:,.0f}",
            f"{plan / training:.2f}",
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help="only rows whose names contain this")
    add_shape_option(parser, None, "have all rows of this shape, in place of their own")
    given = parser.parse_args()
    quiet()
    os.environ |= MALLOC  # for the processes that measure
    rows = [of_shape(row, given.shape) if given.shape else row for row in ROWS]
    chosen = named_like(dict.fromkeys(rows), given.rows)
    print_header("run", "how", "process before, MiB", "planned, MiB", "measured, MiB", "ratio")
    for shape in dict.fromkeys(row.shape for row in chosen):
        with saved(shape) as folder:
            print_rows([row for row in chosen if row.shape == shape], folder)


if __name__ == "__main__":
    main()
