"""One optimisation step against a plain loop written as the MeZO paper describes it.

Both sides take one GV step (loss weights, slope from the candidates' own losses) over the same
prompts with two label words, from the same kind of model with random weights. The plain loop
perturbs the adapter in place, evaluates one candidate and one label word at a time, and takes the
logits of every position. It is timed beside its own bare forwards, and must stay within 1.1 of
them, so that it is no straw man.

Both run alternately in one process; times are medians. Peak memory above the weights is measured
in a process for each side: the resident set on a CPU, the allocator's peak on CUDA.

    python scripts/bench_step.py                    # the table of docs/benchmarks.md
    python scripts/bench_step.py --rows "OPT-125M"  # rows whose names contain this
    python scripts/bench_step.py --deviations       # losses in one forward against one by one
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from datasets import disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from zo_peft import Direction, ZOConfig, ZOTrainer
from zo_peft.models.loading import quantization_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LABEL_TOKENS = (10, 11)
EMBEDDED = Path(__file__).parent.parent / "zo_peft" / "embedded" / "model"
EPS = 1e-2

SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "OPT-125M": OPTConfig,
    "OPT-1.3B": lambda: OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32
    ),
    "OPT-13B": lambda: OPTConfig(
        hidden_size=5120, ffn_dim=20480, num_hidden_layers=40, num_attention_heads=40
    ),
    "Llama, 128k vocabulary, 4 layers": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "embedded": lambda: LlamaConfig.from_pretrained(EMBEDDED),
}


@dataclass(frozen=True)
class Row:
    """A workload.

    Attributes:
        base: float32, bfloat16, int8 or nf4.
        top: tune only this share of the layers, from the top.
        candidates_per_forward: None: the default.
    """

    shape: str
    base: str = "float32"
    batch: int = 16
    length: int = 48
    candidates: int = 8
    top: float = 1.0
    candidates_per_forward: int | None = None
    steps: int = 2

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
    Row("embedded", "int8", batch=4, length=26, candidates=16, steps=15),
    Row("embedded", batch=4, length=26, candidates=16, steps=15),
    Row("OPT-125M", top=0.25),
    Row("OPT-125M", "bfloat16"),
]
CUDA_ROWS = [
    Row(shape, base, batch=batch)
    for shape in ("OPT-1.3B", "OPT-13B")
    for base, batch in (("bfloat16", 16), ("int8", 16), ("nf4", 16), ("int8", 4), ("nf4", 4))
]


def load(row: Row) -> PreTrainedModel:
    """The row's shape with random weights; a quantized base is quantized on loading, as ever."""
    torch.manual_seed(0)
    config = SHAPES[row.shape]()
    dtype = torch.float32 if row.base == "float32" or DEVICE == "cpu" else torch.bfloat16
    if row.base == "bfloat16":
        dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantization = quantization_config(row.base == "int8", row.base == "nf4", dtype)
    if quantization is None:
        return model.to(DEVICE).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=quantization, device_map={"": DEVICE}
        ).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in name only: the prompts are made of token ids."""
    words = {"<pad>": 1, "</s>": 2, **{f"w{index}": index for index in (0, *range(3, 900))}}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def examples(row: Row) -> list[dict[str, Any]]:
    """A batch of prompts of random words and two label words of one token each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(12, 900, (row.batch, row.length), generator=generator).tolist()
    options = [f" w{token}" for token in LABEL_TOKENS]
    return [
        {"prompt": " ".join(f"w{i}" for i in line), "options": options, "label": number % 2}
        for number, line in enumerate(ids)
    ]


def make_trainer(row: Row, folder: str) -> ZOTrainer:
    """A trainer on the row's shape."""
    return trainer_on(load(row), row, folder)


def trainer_on(model: PreTrainedModel, row: Row, folder: str) -> ZOTrainer:
    """A trainer of LoRA r=8 on query and value; B starts as noise, so that no work is by zeros."""
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
        num_candidates=row.candidates,
        candidates_per_forward=row.candidates_per_forward,
        zo_eps=EPS,
        learning_rate=1e-5,
        max_steps=100,
        per_device_train_batch_size=row.batch,
        report_to="none",
    )
    trainer = ZOTrainer(
        model, args, train_dataset=examples(row), processing_class=tokenizer(), peft_config=lora
    )
    trainer.create_optimizer_and_scheduler(args.max_steps)
    trainer.batch = trainer.data_collator([trainer.train_dataset[i] for i in range(row.batch)])
    return trainer


def our_step(trainer: ZOTrainer) -> None:
    """A step as `Trainer` runs it: one batch, the estimate, the update."""
    batches, count = trainer.get_batch_samples(iter([trainer.batch]), 1, trainer.args.device)
    trainer.training_step(trainer.model, batches[0], count)
    trainer.optimizer.step()


class PlainLoop:
    """GV on a plain PEFT model, as the published pseudo code has it."""

    def __init__(self, trainer: ZOTrainer, row: Row) -> None:
        self.model = trainer.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.candidates, self.labels = row.candidates, trainer.batch["labels"].to(DEVICE)
        prompts = trainer.batch["input_ids"]
        self.inputs = [
            torch.cat([prompts, torch.full((row.batch, 1), token)], dim=1).to(DEVICE)
            for token in LABEL_TOKENS
        ]

    def perturb(self, seed: int, scale: float) -> None:
        """Add the seed's noise times the scale, in place."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        for parameter in self.parameters:
            noise = torch.randn(parameter.shape, generator=generator, device=DEVICE)
            parameter.data.add_(noise, alpha=scale)

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
        """M candidates, the guiding vector from their losses, and the update."""
        losses = []
        for seed in range(self.candidates):
            self.perturb(seed, EPS)
            losses.append(self.loss())
            self.perturb(seed, -EPS)
        mean = sum(losses) / len(losses)
        for seed, loss in enumerate(losses):
            self.perturb(seed, 1e-9 * (mean - loss))

    @torch.no_grad()
    def bare_forwards(self) -> None:
        """The step's forwards alone."""
        for _ in range(self.candidates):
            for ids in self.inputs:
                self.forward(ids)


def seconds(action: Callable[[], object]) -> float:
    """Of one call."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_time(row: Row) -> dict[str, float]:
    """Median seconds, in alternation: our step, the plain loop and its bare forwards, and the base
    without adapter on all candidates' sequences at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(row, folder)
        plain, base = PlainLoop(trainer, row), load(row)
        prompts = trainer.batch["input_ids"].repeat(row.candidates, 1).to(DEVICE)
        actions = {
            "ours": lambda: our_step(trainer),
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
    found = {name: statistics.median(values) for name, values in times.items()}
    found["passes"] = trainer.args.forward_passes_per_step
    return found


def measure_memory(row: Row, what: str) -> int:
    """Peak bytes above what the process held with the weights."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(row, folder)
        plain = PlainLoop(trainer, row)
        prompts = trainer.batch["input_ids"].to(DEVICE)
        action = {
            "ours": lambda: our_step(trainer),
            "plain": plain.step,
            "inference": lambda: plain.forward(prompts),
        }[what]
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before = psutil.Process().memory_info().rss
        with torch.no_grad():
            action()
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 - before


def print_deviations() -> None:
    """How far losses of candidates that share a forward are from one by one, on embedded weights.

    With outliers: three channels of every layer norm are 50 times as large, so that LLM.int8()
    finds outlier columns at its default threshold.
    """
    print("| base | largest relative deviation of a loss | of the candidates' spread |")
    print("| --- | --- | --- |")
    formats: dict[str, tuple[BitsAndBytesConfig | None, bool]] = {
        "float32": (None, False),
        "nf4": (quantization_config(False, True), False),
        "int8": (quantization_config(True, False), False),
        "int8, outliers": (quantization_config(True, False), True),
        "int8, outliers, llm_int8_threshold=0": (
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
            True,
        ),
    }
    for name, (quantization, outliers) in formats.items():
        model = AutoModelForCausalLM.from_pretrained(
            EMBEDDED, quantization_config=quantization, device_map={"": DEVICE}
        )
        if outliers:
            for layer in model.model.layers:
                layer.input_layernorm.weight.data[:3] *= 50
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_on(model, Row("embedded", batch=8, length=26), folder)
            batch = {key: value.to(DEVICE) for key, value in trainer.batch.items()}
            points = [EPS * Direction.of(seed) for seed in range(16)]
            trainer.evaluator.candidates_per_forward = 1
            one = torch.tensor(trainer.evaluator(points, [batch]))
            trainer.evaluator.candidates_per_forward = len(points)
            many = torch.tensor(trainer.evaluator(points, [batch]))
        deviation = (many - one).abs()
        print(f"| {name} | {(deviation / one).max():.1e} | {deviation.max() / one.std():.1e} |")


def in_a_process(row: Row, what: str) -> int:
    """`measure_memory` in a fresh process."""
    command = [sys.executable, __file__, "--memory", what, "--rows", row.name]
    if row.candidates_per_forward:
        command += ["--candidates_per_forward", str(row.candidates_per_forward)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def print_row(row: Row) -> None:
    """Measure and print one row of the table."""
    times = measure_time(row)
    if times["plain"] > 1.1 * times["bare"]:
        print(f"the plain loop takes {times['plain'] / times['bare']:.2f} of its bare forwards")
    memory = {what: in_a_process(row, what) / 2**20 for what in ("ours", "plain", "inference")}
    tokens = row.candidates * row.batch * row.length
    plain_tokens = len(LABEL_TOKENS) * row.candidates * row.batch * (row.length + 1)
    cells = [
        row.name,
        f"{row.candidates}",
        f"{tokens:,} / {plain_tokens:,}",
        f"{times['ours']:.3f} / {times['plain']:.3f}",
        f"**{times['ours'] / times['plain']:.2f}**",
        f"{times['plain'] / times['bare']:.2f}",
        f"{times['base'] / times['ours']:.2f}",
        f"{memory['ours']:.0f} / {memory['plain']:.0f}",
        f"**{memory['ours'] / memory['plain']:.2f}**",
        f"{memory['inference']:.0f}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--candidates_per_forward", type=int, help="default: zo_peft's")
    parser.add_argument("--deviations", action="store_true", help="a table of losses instead")
    parser.add_argument("--memory", choices=["ours", "plain", "inference"], help="for its own use")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    if given.deviations:
        print_deviations()
        return
    rows = [
        replace(row, candidates_per_forward=given.candidates_per_forward)
        for row in (CUDA_ROWS if DEVICE == "cuda" else CPU_ROWS)
    ]
    if given.memory:
        (row,) = (row for row in rows if row.name == given.rows)
        print(measure_memory(row, given.memory))
        return
    device = (
        torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} cores"
    )
    print(f"{device}; ours / plain loop; memory in MiB above the weights")
    print(
        "| work | forward passes | tokens through the base | seconds | ratio | plain / its bare "
        "forwards | throughput / the base alone | peak memory | ratio | plain inference |"
    )
    print("|" + " --- |" * 10)
    for row in rows:
        if given.rows in row.name:
            print_row(row)


if __name__ == "__main__":
    main()
