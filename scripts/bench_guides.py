"""What a guide that is wrong costs: strategy="guided" is to end no worse than strategy="gv".

The guide's gradients are replaced by noise of the same norms, by their negatives, or by those of
the batch before with its labels shuffled. What the last of these costs in forward passes is not
counted. Each row has the train losses at the end of a run for each seed, and the ratio of their
mean to that of gv with its defaults.

    python scripts/bench_guides.py --data_dir ../shared/data
    python scripts/bench_guides.py --works "encoder SST-2" --seeds 0
"""

import argparse
import contextlib
import sys
from pathlib import Path
from statistics import mean

import torch
from datasets import disable_progress_bars
from measuring import print_header, print_row
from torch import Tensor
from workloads import Workload, workloads

from zo_peft import NonFiniteLossError
from zo_peft.core.batch import Batch
from zo_peft.core.guide import Gradients
from zo_peft.models.guide import ResidualGuide

WORKS = ("embedded LoRA float32", "encoder SST-2")


class Noise(ResidualGuide):
    """Noise with the norms of the gradients."""

    def read(self, batch: Batch, parts: int = 1) -> tuple[Tensor, list[Gradients]]:
        """As of `ResidualGuide`."""
        losses, found = super().read(batch, parts)
        return losses, [{name: _noise_like(g) for name, g in part.items()} for part in found]


def _noise_like(gradient: Tensor) -> Tensor:
    noise = torch.randn_like(gradient)
    return noise * gradient.norm() / noise.norm()


class Negative(ResidualGuide):
    """The gradients with the other sign."""

    def read(self, batch: Batch, parts: int = 1) -> tuple[Tensor, list[Gradients]]:
        """As of `ResidualGuide`."""
        losses, found = super().read(batch, parts)
        return losses, [{name: -g for name, g in part.items()} for part in found]


class Shuffled(ResidualGuide):
    """The gradients of the batch before (at first: of the batch) with its labels shuffled."""

    before: Batch | None = None

    def read(self, batch: Batch, parts: int = 1) -> tuple[Tensor, list[Gradients]]:
        """As of `ResidualGuide`."""
        before, self.before = self.before or batch, batch
        order = torch.randperm(len(before["labels"]))
        found = super().read(Batch(before.data | {"labels": before["labels"][order]}), parts)[1]
        with torch.no_grad():
            return self.objective.losses(self.model, batch), found


KINDS: dict[str, type[ResidualGuide] | None] = {
    "gv": None,
    "guided": ResidualGuide,
    "guided, noise": Noise,
    "guided, negative": Negative,
    "guided, shuffled": Shuffled,
}


def final_loss(work: Workload, kind: str, passes: int, seed: int) -> tuple[float, str]:
    """The train loss at the end of a run, infinite if it breaks off, and what is followed there."""
    made = KINDS[kind]
    strategy = "gv" if made is None else "guided"
    trainer = work.build(strategy=strategy, max_forward_passes=passes, seed=seed)
    followed = ""
    if made is not None:
        assert trainer.tuner.guided is not None
        trainer.tuner.guided.guide = made(
            trainer.model, trainer.space.parameters, trainer.objective
        )
    try:
        trainer.train()
    except NonFiniteLossError:
        return float("inf"), followed
    if trainer.tuner.guided is not None:
        followed = f"{len(trainer.tuner.guided.followed)}"
    return trainer.evaluate(trainer.eval_dataset["train"])["eval_loss"], followed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--works", nargs="*", default=WORKS, choices=WORKS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--forward_passes", type=int, default=400)
    given = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)  # more only wait for each other on models this small
    works = workloads(given.data_dir)
    print_header(
        "work", "strategy", "train losses", "ratio to gv's mean", "parts followed at the end"
    )
    for name in given.works:
        usual = 0.0
        for kind in KINDS:
            with contextlib.redirect_stdout(sys.stderr):
                runs = [
                    final_loss(works[name], kind, given.forward_passes, seed)
                    for seed in given.seeds
                ]
            losses, followed = zip(*runs)
            usual = usual or mean(losses)
            print_row(
                name,
                kind,
                ", ".join(f"{loss:.4f}" for loss in losses),
                f"{mean(losses) / usual:.3f}",
                ", ".join(followed),
            )


if __name__ == "__main__":
    main()
