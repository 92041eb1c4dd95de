"""The defaults, nothing tuned: against grids of the same method, under abuse, and by adapter.

Runs have strategy="gv", or the one that is given. `knobs` says how far the defaults bring the train
loss down, as a share of what the best learning rate of a grid does, for each base format and
adapter. `robust` gives the loss before and after with unusual settings; none may end above its
start by more than 5%. `adapters` compares train losses at equal forward passes.

    python scripts/bench_defaults.py knobs robust adapters
"""

import argparse
import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from measuring import print_header, print_row
from peft import LNTuningConfig, PeftConfig, RoadConfig, TinyLoraConfig, UniLoraConfig, VeraConfig
from workloads import IA3, PREFIX, embedded, encoder, lora

from zo_peft import NonFiniteLossError, ZOTrainer

Build = Callable[..., ZOTrainer]
LORA_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
#: Of each work: how to build its trainer, and learning rates of `update_rule="normalized"` to try.
KNOBS: dict[str, tuple[Build, tuple[float, ...]]] = {
    "LoRA, float32": (partial(embedded, lora()), LORA_RATES),
    "LoRA, bfloat16": (partial(embedded, lora(), "bfloat16"), LORA_RATES),
    "LoRA, int8": (partial(embedded, lora(), "int8"), LORA_RATES),
    "LoRA, NF4": (partial(embedded, lora(), "nf4"), LORA_RATES),
    "prefix, float32": (partial(embedded, PREFIX), (0.01, 0.03, 0.1, 0.3)),
    "IA3, float32": (partial(embedded, IA3), (3e-3, 1e-2, 3e-2, 1e-1)),
}
TARGETS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
ADAPTERS: dict[str, tuple[PeftConfig, dict[str, Any]]] = {
    "LoRA r=1": (lora(1, 2), {}),
    "LoRA r=4": (lora(4, 8), {}),
    "LoRA r=8": (lora(8, 16), {}),
    "LoRA r=8, B only": (lora(8, 16), {"tunable": "lora_B"}),
    "LoRA r=16": (lora(16, 32), {}),
    "TinyLoRA": (TinyLoraConfig(**TARGETS), {}),
    "VeRA": (VeraConfig(**TARGETS, r=64), {}),
    "UniLoRA": (UniLoraConfig(**TARGETS), {}),
    "IA3": (IA3, {}),
    "RoAd": (RoadConfig(**TARGETS, group_size=32), {}),
    "layer norms": (LNTuningConfig(task_type="CAUSAL_LM"), {}),
    "prefix": (PREFIX, {}),
}


@dataclass(frozen=True)
class Scope:
    """How much of the studies is run.

    Attributes:
        data_dir: has the folder `sst2`; without it there is no row of the encoder.
        rows: parts of the names of rows that are wanted; if there are none, all rows are.
        passes: the forward passes of a run; the encoder's grid gets twice as many.
        learning_rates: those of all grids; None leaves each grid its own.
    """

    data_dir: Path
    rows: list[str]
    passes: int
    learning_rates: list[float] | None
    seeds: int
    strategy: str = "gv"

    def wants(self, name: str) -> bool:
        """Whether the row is to be measured."""
        return not self.rows or any(part in name for part in self.rows)

    def encoder(self, **settings: Any) -> Build:
        """How to build a trainer of the encoder on SST-2."""
        files = (self.data_dir / "sst2/train.tsv", self.data_dir / "sst2/dev.tsv")
        return lambda **s: encoder(files, "{sentence}", **settings, **s)

    def mean_losses(self, build: Build, passes: int, **settings: Any) -> list[float]:
        """Train losses before and after so many forward passes, means over seeds."""
        made = {"strategy": self.strategy, "max_forward_passes": passes, **settings}
        found = [losses(build(seed=seed, **made)) for seed in range(self.seeds)]
        return [sum(column) / self.seeds for column in zip(*found)]


def losses(trainer: ZOTrainer) -> tuple[float, float]:
    """The train loss before and after training; infinite where the run broke off."""
    with contextlib.redirect_stdout(sys.stderr):
        before = trainer.evaluate(trainer.eval_dataset["train"])["eval_loss"]
        try:
            trainer.train()
        except NonFiniteLossError:
            return before, float("inf")
        return before, trainer.evaluate(trainer.eval_dataset["train"])["eval_loss"]


def shuffled(trainer: ZOTrainer) -> ZOTrainer:
    """The trainer with the labels of its training examples dealt out anew."""
    columns = trainer.train_dataset.to_dict()
    random.Random(0).shuffle(columns["label"])
    trainer.train_dataset = type(trainer.train_dataset).from_dict(columns)
    trainer.eval_dataset["train"] = trainer.train_dataset.select(range(500))
    return trainer


def knobs(scope: Scope) -> Iterator[list[str]]:
    """The defaults against a grid of learning rates."""
    yield ["work", "defaults", "grid", "share of the best improvement"]
    works = {name: (*work, scope.passes) for name, work in KNOBS.items()}
    if scope.data_dir.is_dir():
        works["encoder SST-2"] = (scope.encoder(), (5e-4, 1e-3, 2e-3, 4e-3), 2 * scope.passes)
    for name, (build, rates, passes) in works.items():
        if scope.wants(name):
            before, after = scope.mean_losses(build, passes)
            grid = {
                rate: scope.mean_losses(build, passes, learning_rate=rate)[1]
                for rate in scope.learning_rates or rates
            }
            share = (before - after) / (before - min(after, *grid.values()))
            tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in grid.items())
            yield [name, f"{after:.4f}", tried, f"{share:.3f}"]


def robust(scope: Scope) -> Iterator[list[str]]:
    """Unusual settings."""
    yield ["setting", "before", "after", "after / before"]
    works: dict[str, Build] = {
        "lora_alpha 4 (x 0.25)": partial(embedded, lora(8, 4)),
        "lora_alpha 64 (x 4)": partial(embedded, lora(8, 64)),
        "rank 2": partial(embedded, lora(2, 16)),
        "rank 64": partial(embedded, lora(64, 16)),
        "batch 4": partial(embedded, lora(), per_device_train_batch_size=4),
        "batch 64": partial(embedded, lora(), per_device_train_batch_size=64),
        "labels shuffled": lambda **s: shuffled(embedded(lora(), **s)),
    }
    budgets = dict.fromkeys(works, scope.passes)
    longer = f"labels shuffled, {8 * scope.passes:,} passes"
    works[longer], budgets[longer] = works["labels shuffled"], 8 * scope.passes
    if scope.data_dir.is_dir():
        works["encoder, head x 10"] = scope.encoder(head_scale=10.0)
    for name, build in works.items():
        if scope.wants(name):
            before, after = scope.mean_losses(build, budgets.get(name, scope.passes))
            yield [name, f"{before:.4f}", f"{after:.4f}", f"{after / before:.2f}"]


def adapters(scope: Scope) -> Iterator[list[str]]:
    """Adapters at equal forward passes."""
    budgets = (scope.passes, 2 * scope.passes)
    yield ["adapter", "numbers", *(f"{passes:,} passes" for passes in budgets)]
    for name, (config, settings) in ADAPTERS.items():
        if scope.wants(name):
            build = partial(embedded, config, **settings)
            ends = [scope.mean_losses(build, passes)[1] for passes in budgets]
            yield [name, f"{build().space.numel:,}", *(f"{loss:.4f}" for loss in ends)]


STUDIES = {"knobs": knobs, "robust": robust, "adapters": adapters}


def main() -> None:
    """Run the studies and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="*", default="all", choices=[*STUDIES, "all"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=500, help="the budget of a run")
    parser.add_argument("--learning_rates", nargs="*", type=float, help="in place of all grids'")
    parser.add_argument("--rows", nargs="*", default=[], help="only rows with these in their name")
    parser.add_argument("--strategy", default="gv")
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data"))
    given = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)  # more only wait for each other on models this small
    scope = Scope(
        given.data_dir,
        given.rows,
        given.passes,
        given.learning_rates,
        given.seeds,
        given.strategy,
    )
    for name, study in STUDIES.items():
        if name in given.studies or "all" in given.studies:
            rows = study(scope)
            print_header(*next(rows))
            for row in rows:
                print_row(*row)


if __name__ == "__main__":
    main()
