"""What the benchmarks of time and memory share. This module is imported by them and not run itself.

Models have random weights, so that a shape of any size needs no download, and prompts are random
token ids. Peaks of memory are those of the resident set, which only Linux tells (/proc), or of
CUDA's allocator where there is a GPU.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
import torch
from datasets import disable_progress_bars
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.utils import logging

from zo_peft.tools.demo import EMBEDDED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Every shape has token ids below this one.
IDS = 900
#: Settings of a run that saves nothing and prints nothing.
SILENT: dict[str, Any] = {
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}


def _opt(width: int, layers: int, heads: int) -> OPTConfig:
    return OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


def _llama(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )


#: The configuration of each shape. The embedded model's is the only one that takes no time.
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "OPT-125M": lambda: _opt(768, 12, 12),
    "OPT-1.3B": lambda: _opt(2048, 24, 32),
    "OPT-13B": lambda: _opt(5120, 40, 40),
    "Llama, 128k vocabulary": lambda: _llama(16),
    "Llama, 128k vocabulary, 4 layers": lambda: _llama(4),
    "Llama 7B, 128k vocabulary": lambda: LlamaConfig(vocab_size=128256),
    "embedded": lambda: LlamaConfig.from_pretrained(EMBEDDED / "model"),
}


def add_shape_option(parser: argparse.ArgumentParser, default: str | None, what: str) -> None:
    """Give a parser the option `--shape`, whose value may be in letters of either case."""
    names = {name.lower(): name for name in SHAPES}
    parser.add_argument(
        "--shape",
        type=lambda given: names.get(given.lower(), given),
        choices=[*SHAPES],
        default=default,
        help=what,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words like `w17`, which is token 17. Most prompts here are ids already."""
    words = {"<pad>": 1, "</s>": 2, **{f"w{index}": index for index in (0, *range(3, IDS))}}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def random_rows(batch: int, length: int, scored: int = 1) -> list[dict[str, list[int]]]:
    """A batch of prompts of random tokens, of which the last `scored` ones have a label."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, IDS, (batch, length), generator=generator).tolist()
    first = length - scored
    return [{"input_ids": row, "labels": [-100] * first + row[first:]} for row in ids]


class StepClock(TrainerCallback):
    """Takes the seconds of each step, and those of them that are spent inside the model's forward.

    Attributes:
        steps: seconds of each step so far.
        forwards: seconds inside the forward, of each step so far.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.steps: list[float] = []
        self.forwards: list[float] = []
        self.inside = 0.0
        forward = model.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = forward(*args, **kwargs)
            self.inside += time.perf_counter() - start
            return output

        model.forward = timed

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the step's clock."""
        self.inside, self.start = 0.0, time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the step's clock."""
        self.steps.append(time.perf_counter() - self.start)
        self.forwards.append(self.inside)


def resident_mib() -> float:
    """The resident set of this process, MiB."""
    return psutil.Process().memory_info().rss / 2**20


def reset_peak() -> None:
    """Forget the peak of the resident set so far."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The peak of the resident set since `reset_peak`, MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak_above(action: Callable[[], object]) -> float:
    """How far memory rises while an action runs above what is held before it, MiB."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        action()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    reset_peak()
    before = resident_mib()
    action()
    return peak_mib() - before


def quiet() -> None:
    """Hide warnings, messages and progress bars of libraries."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


def _begin_child() -> None:
    quiet()
    # The standard output has the table, and nothing that a trainer logs.
    sys.stdout = sys.stderr


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that is called in a fresh process.

    What this process has loaded or freed would be part of a peak that is measured here.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), _begin_child) as pool:
        return pool.submit(function, *arguments).result()


class Named(Protocol):
    """A row of a table that has a name."""

    @property
    def name(self) -> str:
        """What the table calls it."""


Row = TypeVar("Row", bound=Named)


def named_like(rows: Iterable[Row], text: str) -> list[Row]:
    """The rows whose names contain a text, in letters of either case; ends the script if none."""
    found = [row for row in rows if text.lower() in row.name.lower()]
    if not found:
        raise SystemExit(f"no row's name contains {text!r}")
    return found


def print_row(*cells: str) -> None:
    """Print a row of a Markdown table at once."""
    print(f"| {' | '.join(cells)} |", flush=True)


def print_header(*names: str) -> None:
    """Print the first two lines of a Markdown table."""
    print_row(*names)
    print("|" + " --- |" * len(names), flush=True)
