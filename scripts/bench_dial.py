"""The dial from forward passes to full gradients: `exact_layers`, from none to all layers.

Losses are those of `strategy="guided"` with its defaults after equally many steps, means over
seeds, and of Adam with full gradients and the best of three constant learning rates. The time of a
step (the median, the first left out) and the peak of memory above the weights are those of training
runs on OPT-125M's shape with random weights, each in a process of its own, in which glibc hands
back what is freed; there Adam checkpoints its activations. A plot is written beside.

    python scripts/bench_dial.py --data_dir ../shared/data --plot docs/dial.png
    python scripts/bench_dial.py --workloads "embedded LoRA float32" --seeds 0 --steps 20
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from bench_cost import BATCH_SIZE, LENGTH, make_trainer
from bench_learning import ADAM_RATES, take_adam_steps, train_loss
from bench_plan import MALLOC
from measuring import (
    SHAPES,
    StepClock,
    add_shape_option,
    in_a_process,
    peak_above,
    print_header,
    print_row,
    quiet,
)
from workloads import Workload, workloads

from zo_peft.models.trunk import layers_of

#: What is learned, and the seeds.
WORKS = {"embedded LoRA float32": (0, 1, 2), "encoder SST-2": (0,)}
#: At most so many numbers of exact layers are tried beside none.
POINTS = 4
#: Steps of which the time and the peak are taken; the first has the check of a guide.
TIMED = 4

#: Exact layers, or None for Adam; losses of all seeds.
Losses = dict[int | None, list[float]]
#: The same; seconds and MiB.
Costs = dict[int | None, tuple[float, float]]


def dial(layers: int) -> range:
    """The numbers of exact layers that are tried, evenly spaced."""
    return range(0, layers + 1, math.ceil(layers / POINTS))


def losses_of(work: Workload, steps: int, seeds: Sequence[int]) -> Losses:
    """The train losses after so many steps, at every number of exact layers and of Adam."""
    found: Losses = {}
    with contextlib.redirect_stdout(sys.stderr):
        layers = len(layers_of(work.build().model))
        for exact in dial(layers):
            settings = {"strategy": "guided", "exact_layers": exact, "max_steps": steps}
            found[exact] = []
            for seed in seeds:
                trainer = work.build(seed=seed, **settings)
                trainer.train()
                found[exact].append(train_loss(trainer))
        adam: list[list[float]] = []
        for rate in ADAM_RATES:
            adam.append([])
            for seed in seeds:
                trainer = work.build(seed=seed)
                take_adam_steps(trainer, rate, steps)
                adam[-1].append(train_loss(trainer))
    found[None] = min(adam, key=statistics.mean)
    return found


def measure(shape: str, exact: int | None) -> tuple[float, float]:
    """Median seconds of a step, and the peak above the weights in MiB."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"strategy": "guided", "exact_layers": exact}
        if exact is None:
            settings = {"strategy": "adam"}
        trainer = make_trainer(shape, steps=TIMED, folder=folder, **settings)
        clock = StepClock(trainer.model)
        trainer.add_callback(clock)
        peak = peak_above(trainer.train)
    return statistics.median(clock.steps[1:]), peak


def named(exact: int | None) -> str:
    """A row of a table."""
    return "Adam, full gradients" if exact is None else str(exact)


def draw(path: Path, shape: str, losses: dict[str, Losses], costs: Costs) -> None:
    """Draw losses, and memory and time, over the share of the layers that are exact."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4))
    for color, (name, found) in zip(("tab:blue", "tab:orange"), losses.items()):
        exact = [k for k in found if k is not None]
        means = [statistics.mean(found[k]) for k in exact]
        left.plot([k / exact[-1] for k in exact], means, "o-", color=color, label=name)
        left.axhline(statistics.mean(found[None]), color=color, linestyle=":")
    left.plot([], [], ":", color="grey", label="Adam, full gradients")
    left.set(xlabel="share of the layers that are exact", ylabel="train loss", yscale="log")
    left.legend(fontsize="small")
    exact = [k for k in costs if k is not None]
    times = right.twinx()
    for axes, index, color, label in (
        (right, 1, "tab:green", "peak above the weights, MiB"),
        (times, 0, "tab:red", "seconds a step"),
    ):
        axes.plot(exact, [costs[k][index] for k in exact], "o-", color=color)
        axes.axhline(costs[None][index], color=color, linestyle=":")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label, color=color)
    right.set(
        xlabel=f"exact layers of {exact[-1]}", title=f"{shape}, batch {BATCH_SIZE} x {LENGTH}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Print a table of losses and one of costs, and draw both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--workloads", nargs="*", default=[*WORKS], choices=[*WORKS])
    parser.add_argument("--seeds", nargs="*", type=int, help="in place of those of a workload")
    parser.add_argument("--steps", type=int, default=50)
    add_shape_option(parser, "OPT-125M", "of the model whose steps are timed")
    parser.add_argument("--plot", type=Path, default=Path("out/dial.png"))
    given = parser.parse_args()
    quiet()
    os.environ |= MALLOC  # for the processes that measure
    torch.set_num_threads(1)
    works = workloads(given.data_dir)
    losses: dict[str, Losses] = {}
    print_header("workload", "exact layers", f"train loss after {given.steps} steps")
    for name in given.workloads:
        losses[name] = losses_of(works[name], given.steps, given.seeds or WORKS[name])
        for exact, found in losses[name].items():
            each = ", ".join(f"{loss:.4f}" for loss in found)
            print_row(name, named(exact), f"{statistics.mean(found):.4f} ({each})")
    print()
    print_header("exact layers", "seconds a step", "peak memory above the weights, MiB")
    costs: Costs = {}
    for exact in (*dial(SHAPES[given.shape]().num_hidden_layers), None):
        costs[exact] = in_a_process(measure, given.shape, exact)
        print_row(named(exact), f"{costs[exact][0]:.2f}", f"{costs[exact][1]:.0f}")
    given.plot.parent.mkdir(parents=True, exist_ok=True)
    draw(given.plot, given.shape, losses, costs)


if __name__ == "__main__":
    main()
