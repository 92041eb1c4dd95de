"""The defaults, nothing tuned: against grids of the same method, under abuse, and by adapter.

    python scripts/bench_defaults.py knobs robust adapters

`knobs`: improvement of the train loss with defaults, as a share of that of the best learning rate
of a grid, for each base format and adapter. `robust`: the loss before and after with unusual
settings; none may end above its start by more than 5%. `adapters`: train loss at equal forward
passes.
"""

import argparse
import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from peft import LNTuningConfig, PeftConfig, RoadConfig, TinyLoraConfig, UniLoraConfig, VeraConfig
from workloads import IA3, PREFIX, embedded, encoder, lora

from zo_peft import NonFiniteLossError, ZOTrainer

PASSES, ENCODER_PASSES = 500, 1000
LORA_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
#: By name: how to build the trainer, and learning rates of `update_rule="normalized"` to try.
KNOBS: dict[str, tuple[Callable[..., ZOTrainer], tuple[float, ...]]] = {
    "LoRA, float32": (lambda **s: embedded(lora(), **s), LORA_RATES),
    "LoRA, bfloat16": (lambda **s: embedded(lora(), "bfloat16", **s), LORA_RATES),
    "LoRA, int8": (lambda **s: embedded(lora(), "int8", **s), LORA_RATES),
    "LoRA, NF4": (lambda **s: embedded(lora(), "nf4", **s), LORA_RATES),
    "prefix, float32": (lambda **s: embedded(PREFIX, **s), (0.01, 0.03, 0.1, 0.3)),
    "IA3, float32": (lambda **s: embedded(IA3, **s), (3e-3, 1e-2, 3e-2, 1e-1)),
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


def losses(trainer: ZOTrainer) -> tuple[float, float]:
    """Train loss before and after; infinite where the run broke off."""
    with contextlib.redirect_stdout(sys.stderr):
        before = trainer.evaluate(trainer.eval_dataset["train"])["eval_loss"]
        try:
            trainer.train()
        except NonFiniteLossError:
            return before, float("inf")
        return before, trainer.evaluate(trainer.eval_dataset["train"])["eval_loss"]


def mean_losses(build: Callable[..., ZOTrainer], seeds: int, **settings: Any) -> list[float]:
    """The same, means over seeds."""
    found = [losses(build(seed=seed, **settings)) for seed in range(seeds)]
    return [sum(column) / seeds for column in zip(*found)]


def shuffled(trainer: ZOTrainer) -> ZOTrainer:
    """With the labels of the training examples dealt out anew."""
    columns = trainer.train_dataset.to_dict()
    random.Random(0).shuffle(columns["label"])
    trainer.train_dataset = type(trainer.train_dataset).from_dict(columns)
    trainer.eval_dataset["train"] = trainer.train_dataset.select(range(500))
    return trainer


def knobs(seeds: int, data_dir: Path) -> Iterator[list[str]]:
    """Defaults against a grid of learning rates."""
    yield ["work", "defaults", "grid", "share of the best improvement"]
    sst2 = (data_dir / "sst2/train.tsv", data_dir / "sst2/dev.tsv")
    works = {name: (*work, PASSES, seeds) for name, work in KNOBS.items()}
    if data_dir.is_dir():
        build = lambda **s: encoder(sst2, "{sentence}", **s)  # noqa: E731
        works["encoder SST-2"] = (build, (5e-4, 1e-3, 2e-3, 4e-3), ENCODER_PASSES, 1)
    for name, (build, rates, passes, count) in works.items():
        before, after = mean_losses(build, count, max_forward_passes=passes)
        grid = {
            rate: mean_losses(build, count, max_forward_passes=passes, learning_rate=rate)[1]
            for rate in rates
        }
        share = (before - after) / (before - min(after, *grid.values()))
        tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in grid.items())
        yield [name, f"{after:.4f}", tried, f"{share:.3f}"]


def robust(seeds: int, data_dir: Path) -> Iterator[list[str]]:
    """Unusual settings."""
    yield ["setting", "before", "after", "after / before"]
    works: dict[str, Callable[..., ZOTrainer]] = {
        "lora_alpha 4 (x 0.25)": lambda **s: embedded(lora(8, 4), **s),
        "lora_alpha 64 (x 4)": lambda **s: embedded(lora(8, 64), **s),
        "rank 2": lambda **s: embedded(lora(2, 16), **s),
        "rank 64": lambda **s: embedded(lora(64, 16), **s),
        "batch 4": lambda **s: embedded(lora(), per_device_train_batch_size=4, **s),
        "batch 64": lambda **s: embedded(lora(), per_device_train_batch_size=64, **s),
        "labels shuffled": lambda **s: shuffled(embedded(lora(), **s)),
        "labels shuffled, 4,000 passes": lambda **s: shuffled(
            embedded(lora(), **(s | {"max_forward_passes": 4000}))
        ),
    }
    sst2 = (data_dir / "sst2/train.tsv", data_dir / "sst2/dev.tsv")
    if data_dir.is_dir():
        works["encoder, head x 10"] = lambda **s: encoder(sst2, "{sentence}", head_scale=10.0, **s)
    for name, build in works.items():
        before, after = mean_losses(build, seeds, max_forward_passes=PASSES)
        yield [name, f"{before:.4f}", f"{after:.4f}", f"{after / before:.2f}"]


def adapters(seeds: int, _: Path) -> Iterator[list[str]]:
    """Adapters at equal forward passes."""
    yield ["adapter", "numbers", f"{PASSES} passes", f"{2 * PASSES} passes"]
    for name, (config, settings) in ADAPTERS.items():

        def build(config: PeftConfig = config, **s: Any) -> ZOTrainer:
            return embedded(config, **s)

        numel = build(**settings).space.numel
        ends = [
            mean_losses(build, seeds, max_forward_passes=passes, **settings)[1]
            for passes in (PASSES, 2 * PASSES)
        ]
        yield [name, f"{numel:,}", *(f"{loss:.4f}" for loss in ends)]


STUDIES = {"knobs": knobs, "robust": robust, "adapters": adapters}


def main() -> None:
    """Run the studies and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="*", default=[*STUDIES], choices=[*STUDIES])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data"))
    given = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)  # more only wait for each other on models this small
    for study in given.studies:
        for number, row in enumerate(STUDIES[study](given.seeds, given.data_dir)):
            print(f"| {' | '.join(row)} |", flush=True)
            if number == 0:
                print("|" + " --- |" * len(row))


if __name__ == "__main__":
    main()
