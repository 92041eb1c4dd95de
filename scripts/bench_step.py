"""One optimisation step against a plain loop that is written as the MeZO paper describes it.

Both sides take one GV step (loss weights, slope from the candidates' own losses) over the same
prompts with two label words, from the same kind of model with random weights. The plain loop
perturbs the adapter in place, evaluates one candidate and one label word at a time, and takes the
logits of every position. It is timed beside its own bare forwards, and must stay within 1.1 of
them: a slow loop would prove nothing. On a CPU two of its candidates are timed, and stand for all.

Bare inference is the base without adapter on all candidates' sequences at once. bitsandbytes has a
kernel for NF4 on some CPUs that rounds to bfloat16, whatever `bnb_4bit_compute_dtype` says. Rows of
nf4 compute in float32, so bare inference does without it there; rows of `nf4 in bfloat16` set that
dtype, and bare inference has the kernel.

Both sides take turns in one process, and times are medians: of the process's CPU seconds on a CPU,
which other programs disturb less than a clock. Peak memory above the weights is measured in a
process of its own: the resident set on a CPU, where freed memory goes back at once (`MALLOC`),
and the allocator's peak on CUDA.

    python scripts/bench_step.py                    # the table of docs/benchmarks.md
    python scripts/bench_step.py --rows int8        # only rows whose names contain this
    python scripts/bench_step.py --deviations       # losses in one forward against one by one
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from bench_plan import MALLOC
from bitsandbytes.nn import Linear4bit
from measuring import (
    DEVICE,
    IDS,
    SHAPES,
    in_a_process,
    named_like,
    peak_above,
    print_header,
    print_row,
    quiet,
    tokenizer,
)
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from zo_peft import Direction, ZOConfig, ZOTrainer
from zo_peft.core.batch import Batch
from zo_peft.models.loading import quantization_config
from zo_peft.models.memory import weight_bytes
from zo_peft.tools.demo import EMBEDDED

LABEL_TOKENS = (10, 11)
#: The candidates of the plain loop that are timed.
LOOP_CANDIDATES = 2 if DEVICE == "cpu" else 8
EPS = 1e-2


@dataclass(frozen=True)
class Row:
    """What both sides work on.

    Attributes:
        base: float32, bfloat16, int8, nf4 or nf4 in bfloat16.
        top: the share of the layers that have an adapter, counted from the top.
        candidates_per_forward: as in `ZOConfig`; None is the default.
        steps: how many are timed.
    """

    shape: str
    base: str = "float32"
    batch: int = 16
    length: int = 48
    candidates: int = 8
    top: float = 1.0
    candidates_per_forward: int | None = None
    steps: int = 3

    @property
    def name(self) -> str:
        """What the table calls it."""
        parts = [self.shape, self.base, f"{self.batch} x {self.length}", f"M={self.candidates}"]
        if self.top < 1:
            parts.append(f"top {self.top:.0%} of the layers")
        if self.candidates_per_forward:
            parts.append(f"candidates_per_forward={self.candidates_per_forward}")
        return ", ".join(parts)


CPU_ROWS = [
    Row("OPT-125M"),
    Row("Llama, 128k vocabulary, 4 layers", steps=1),
    Row("OPT-125M", "int8", batch=4),
    Row("OPT-125M", "nf4", batch=4),
    Row("OPT-125M", "nf4 in bfloat16", batch=4),
    Row("embedded", "int8", batch=4, length=26, candidates=16, steps=9),
    Row("embedded", batch=4, length=26, candidates=16, steps=9),
    Row("OPT-125M", top=0.25),
    Row("OPT-125M", "bfloat16"),
]
CUDA_ROWS = [
    Row(shape, base, batch=batch)
    for shape in ("OPT-1.3B", "OPT-13B")
    for base, batch in (("bfloat16", 16), ("int8", 16), ("nf4", 16), ("int8", 4), ("nf4", 4))
]


def load(row: Row) -> PreTrainedModel:
    """The row's shape with random weights; a quantized base is quantized as it is loaded."""
    torch.manual_seed(0)
    dtype = torch.float32 if row.base == "float32" or DEVICE == "cpu" else torch.bfloat16
    if row.base == "bfloat16":
        dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(SHAPES[row.shape](), dtype=dtype)
    compute = torch.bfloat16 if row.base.endswith("in bfloat16") else dtype
    quantization = quantization_config(row.base == "int8", row.base.startswith("nf4"), compute)
    if quantization is None:
        return model.to(DEVICE).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=quantization, device_map={"": DEVICE}
        ).eval()


def examples(row: Row) -> list[dict[str, Any]]:
    """A batch of prompts of random words, with two label words of one token each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(12, IDS, (row.batch, row.length), generator=generator).tolist()
    options = [f" w{token}" for token in LABEL_TOKENS]
    return [
        {"prompt": " ".join(f"w{i}" for i in line), "options": options, "label": number % 2}
        for number, line in enumerate(ids)
    ]


def trainer_on(model: PreTrainedModel, row: Row, folder: str) -> tuple[ZOTrainer, Batch]:
    """A trainer of LoRA r=8 on query and value, and its batch.

    B starts as noise, so that no matrix product is spared because of zeros.
    """
    layers = model.config.num_hidden_layers
    first = layers - round(layers * row.top)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=None if row.top == 1 else list(range(first, layers)),
        init_lora_weights=False,
    )
    args = ZOConfig(
        folder,
        strategy="gv",
        num_candidates=row.candidates,
        candidates_per_forward=row.candidates_per_forward,
        zo_eps=EPS,
        learning_rate=1e-5,
        per_device_train_batch_size=row.batch,
        report_to="none",
    )
    trainer = ZOTrainer(
        model, args, train_dataset=examples(row), processing_class=tokenizer(), peft_config=lora
    )
    (batch,) = trainer.get_train_dataloader()
    return trainer, batch


class OurStep:
    """zo_peft's steps on one batch: each finds its estimate and moves the adapter."""

    def __init__(self, trainer: ZOTrainer, batch: Batch) -> None:
        self.tuner, self.batch, self.numbers = trainer.tuner, batch, itertools.count()

    def step(self) -> None:
        """Take the next step."""
        self.tuner.step([self.batch], next(self.numbers))


def perturb(parameters: Iterable[Tensor], seed: int, scale: float) -> None:
    """Add the seed's noise times the scale to parameters in place, as MeZO's code does."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, device=DEVICE)
        parameter.data.add_(noise, alpha=scale)


class PlainLoop:
    """GV on a plain PEFT model, as the published pseudo code has it."""

    def __init__(self, trainer: ZOTrainer, batch: Batch, candidates: int) -> None:
        self.model = trainer.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.candidates, self.labels = candidates, batch["labels"]
        prompts = batch["input_ids"]
        self.inputs = [
            torch.cat([prompts, torch.full_like(prompts[:, :1], token)], dim=1)
            for token in LABEL_TOKENS
        ]

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of all positions."""
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    def loss(self) -> float:
        """Cross entropy over the label words' log-likelihoods, one forward for each word."""
        scores = []
        for ids in self.inputs:
            logits = self.forward(ids)[:, -2].float()
            scores.append(logits.log_softmax(-1).gather(1, ids[:, -1:]).squeeze(1))
        return F.cross_entropy(torch.stack(scores, dim=1), self.labels).item()

    @torch.no_grad()
    def step(self) -> None:
        """Evaluate all candidates, and move along the guiding vector that their losses give."""
        losses = []
        for seed in range(self.candidates):
            perturb(self.parameters, seed, EPS)
            losses.append(self.loss())
            perturb(self.parameters, seed, -EPS)
        mean = sum(losses) / len(losses)
        for seed, loss in enumerate(losses):
            perturb(self.parameters, seed, 1e-9 * (mean - loss))

    @torch.no_grad()
    def bare_forwards(self) -> None:
        """Run the step's forwards alone."""
        for _ in range(self.candidates):
            for ids in self.inputs:
                self.forward(ids)


def seconds(action: Callable[[], object]) -> float:
    """The seconds that one call takes; on a CPU those of all its threads together."""
    if DEVICE == "cpu":
        start = time.process_time()
        action()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_time(row: Row) -> dict[str, float]:
    """Median seconds of our step, of the plain loop and of its bare forwards, taken in turns.

    `base` is a forward of the base without adapter on all candidates' sequences at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer, batch = trainer_on(load(row), row, folder)
        timed = min(LOOP_CANDIDATES, row.candidates)
        plain, base = PlainLoop(trainer, batch, timed), load(row)
        for module in base.modules():
            if isinstance(module, Linear4bit) and module.compute_dtype == torch.float32:
                module.support_avx512bf16_for_cpu = False
        prompts = batch["input_ids"].repeat(row.candidates, 1)
        actions = {
            "ours": OurStep(trainer, batch).step,
            "plain": plain.step,
            "bare": plain.bare_forwards,
            "base": torch.no_grad()(lambda: base(input_ids=prompts, logits_to_keep=1)),
        }
        for action in actions.values():
            action()
        times: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(row.steps):
            for name, action in actions.items():
                times[name].append(seconds(action))
    scales = {"plain": row.candidates / timed, "bare": row.candidates / timed}
    return {name: statistics.median(t) * scales.get(name, 1) for name, t in times.items()}


def measure_memory(row: Row) -> dict[str, float]:
    """Peaks above what the process held with the weights, and the weights themselves, MiB."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trainer, batch = trainer_on(load(row), row, folder)
        plain = PlainLoop(trainer, batch, 1)
        actions = {
            "ours": OurStep(trainer, batch).step,
            "plain": plain.step,
            "inference": lambda: plain.forward(batch["input_ids"]),
        }
        for action in actions.values():
            action()  # Libraries keep some memory for good when they are first used.
        peaks = {name: peak_above(action) for name, action in actions.items()}
        return {**peaks, "weights": weight_bytes(trainer.model) / 2**20}


#: The bases whose losses in one forward are compared with those one by one. With outliers, three
#: channels of every layer norm are 50 times as large, so that LLM.int8() finds outlier columns at
#: its default threshold.
DEVIATIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "nf4": {"quantization_config": quantization_config(False, True)},
    "nf4 in bfloat16": {"quantization_config": quantization_config(False, True, torch.bfloat16)},
    "int8": {"quantization_config": quantization_config(True, False)},
    "int8, outliers": {"quantization_config": quantization_config(True, False)},
    "int8, outliers, llm_int8_threshold=0": {
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    },
}


def losses_of(name: str, **loading: Any) -> tuple[Tensor, Tensor]:
    """The losses of candidates in one forward, and one by one, with the embedded weights."""
    model = AutoModelForCausalLM.from_pretrained(
        EMBEDDED / "model", device_map={"": DEVICE}, **loading
    )
    if "outliers" in name:
        for layer in model.model.layers:
            layer.input_layernorm.weight.data[:3] *= 50
    with tempfile.TemporaryDirectory() as folder:
        trainer, batch = trainer_on(model, Row("embedded", batch=8, length=26), folder)
        points = [EPS * Direction.of(seed) for seed in range(16)]
        trainer.evaluator.candidates_per_forward = 1
        one = torch.tensor(trainer.evaluator(points, [batch]))
        trainer.evaluator.candidates_per_forward = len(points)
        many = torch.tensor(trainer.evaluator(points, [batch]))
    return many, one


def cells(losses: Tensor, expected: Tensor) -> list[str]:
    """The largest deviation of a loss from what it should be, and in units of their spread."""
    difference = (losses - expected).abs()
    return [f"{(difference / expected).max():.1e}", f"{difference.max() / expected.std():.1e}"]


def deviation(name: str, **loading: Any) -> list[str]:
    """How far losses of candidates that share a forward are from those found one by one."""
    return cells(*losses_of(name, **loading))


def print_deviations() -> None:
    """Print the deviations of all bases."""
    print_header("base", "largest relative deviation of a loss", "of the candidates' spread")
    for name, loading in DEVIATIONS.items():
        print_row(name, *deviation(name, **loading))
    formats = {name: DEVIATIONS[name] for name in ("nf4 in bfloat16", "nf4")}
    rounded, expected = (losses_of(name, **loading)[0] for name, loading in formats.items())
    print_row("nf4 in bfloat16, against nf4", *cells(rounded, expected))


def measure(row: Row) -> None:
    """Measure and print one row of the table."""
    times = measure_time(row)
    if (loop := times["plain"] / times["bare"]) > 1.1:
        print(f"the plain loop takes {loop:.2f} of its bare forwards", file=sys.stderr)
    ours, plain, inference, weights = in_a_process(measure_memory, row).values()
    tokens = row.candidates * row.batch * row.length
    plain_tokens = len(LABEL_TOKENS) * row.candidates * row.batch * (row.length + 1)
    print_row(
        row.name,
        f"{row.candidates}",
        f"{tokens:,} / {plain_tokens:,}",
        f"{times['ours']:.3f} / {times['plain']:.3f}",
        f"**{times['ours'] / times['plain']:.2f}**",
        f"{loop:.2f}",
        f"{times['base']:.3f}",
        f"**{times['base'] / times['ours']:.2f}**",
        f"{ours:.0f} / {plain:.0f}",
        f"**{ours / plain:.2f}**",
        f"{inference:.0f}",
        f"**{(weights + ours) / (weights + inference):.2f}**",
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help="only rows whose names contain this")
    parser.add_argument("--steps", type=int, help="how many are timed; the default is the row's")
    parser.add_argument("--candidates_per_forward", type=int, help="the default is zo_peft's")
    parser.add_argument("--deviations", action="store_true", help="a table of losses instead")
    given = parser.parse_args()
    quiet()
    os.environ |= MALLOC  # for the processes that measure memory
    if given.deviations:
        print_deviations()
        return
    device = (
        torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} cores"
    )
    print(f"{device}; ours / plain loop; memory in MiB above the weights")
    print_header(
        "work",
        "forward passes",
        "tokens through the base",
        "seconds",
        "ratio",
        "plain / its bare forwards",
        "bare inference, seconds",
        "throughput / bare inference",
        "peak memory",
        "ratio",
        "plain inference",
        "peak with the weights / plain inference",
    )
    for row in named_like(CUDA_ROWS if DEVICE == "cuda" else CPU_ROWS, given.rows):
        measure(
            replace(
                row,
                steps=given.steps or row.steps,
                candidates_per_forward=given.candidates_per_forward,
            )
        )


if __name__ == "__main__":
    main()
