"""Forward passes to reach a loss: zo_peft's defaults against published methods at their best.

A published method gets a grid of learning rates and eps. All learning rates are tried at the first
eps, then the other eps at the best learning rate; with `--whole_grid` every pair is tried. The best
point, by the train loss at the end, is run on all seeds. zo_peft runs with its defaults, with no
setting tuned, on several budgets. Every run is a line of `results.jsonl`, and a run that is there
is not made again. The losses over forward passes are drawn beside it, in `learning.png`.

    python scripts/bench_learning.py --data_dir ../shared/data
    python scripts/bench_learning.py --learning_rates 1e-3 --eps 1e-2 --forward_passes 200
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from datasets import disable_progress_bars
from measuring import print_header, print_row
from workloads import Workload, workloads

from zo_peft import NonFiniteLossError, ZOTrainer

#: Learning rates, and eps of which the first is tried with every learning rate.
Grid = tuple[Sequence[float], Sequence[float]]
LORA_GRID: Grid = ([1e-3, 3e-3, 1e-2, 3e-2, 1e-1], [1e-2, 1e-3, 3e-2])
GRIDS: dict[str, Grid] = {
    "embedded LoRA float32": LORA_GRID,
    "embedded LoRA int8": LORA_GRID,
    "embedded prefix float32": ([0.1, 0.3, 1.0, 3.0, 10.0], [1e-1, 1e-2, 3e-1]),
    "encoder SST-2": ([3e-4, 7e-4, 1.4e-3, 2.8e-3, 5.6e-3], [1e-2, 1e-3, 3e-2]),
    "encoder RTE": ([3e-4, 1e-3, 3e-3, 1e-2, 3e-2], [1e-2, 1e-3, 3e-2]),
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "MeZO": {"preset": "mezo"},
    "GV, M=8": {"preset": "paper-gv", "num_candidates": 8},
    "Greedy, M=4": {"preset": "paper-greedy", "num_candidates": 4},
}
OURS = "defaults"
#: Shares of a workload's budget, which the defaults are given one after the other.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
ADAM_RATES = (1e-3, 3e-3, 1e-2)


def train_loss(trainer: ZOTrainer) -> float:
    """The loss on the workload's training rows."""
    return trainer.evaluate(trainer.eval_dataset["train"])["eval_loss"]


def zo_run(trainer: ZOTrainer) -> dict[str, Any]:
    """Train with forward passes; the loss is infinite if the run breaks off."""
    start = time.perf_counter()
    try:
        trainer.train()
    except NonFiniteLossError:
        return {"train_loss": float("inf"), "forward_passes": trainer.forward_passes}
    seconds = time.perf_counter() - start
    return {
        "train_loss": train_loss(trainer),
        "dev_accuracy": trainer.evaluate(trainer.eval_dataset["dev"])["eval_accuracy"],
        "forward_passes": trainer.forward_passes,
        "seconds": seconds,
    }


def adam_run(trainer: ZOTrainer, learning_rate: float, steps: int) -> dict[str, Any]:
    """Train with Adam by back-propagation on the same adapter, batches and loss."""
    parameters = list(trainer.space.parameters.values())
    optimizer = torch.optim.Adam(parameters, learning_rate)
    start, done = time.perf_counter(), 0
    trainer.model.eval()
    while done < steps:
        for batch in trainer.get_train_dataloader():
            trainer.objective.losses(trainer.model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break
    seconds = time.perf_counter() - start
    loss = train_loss(trainer)
    accuracy = trainer.evaluate(trainer.eval_dataset["dev"])["eval_accuracy"]
    return {"train_loss": loss, "dev_accuracy": accuracy, "steps": steps, "seconds": seconds}


class Bench:
    """Runs that are remembered in a file of JSON lines.

    Args:
        path: the file.
        workloads: what is learned, by name.
        grids: what the published methods try, by workload.
        shares: the shares of a workload's budget that the defaults are given, in rising order.
    """

    def __init__(
        self,
        path: Path,
        workloads: dict[str, Workload],
        grids: dict[str, Grid],
        shares: Sequence[float],
    ) -> None:
        self.path, self.workloads, self.grids, self.shares = path, workloads, grids, shares
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {self.key(record): record for record in map(json.loads, lines)}

    @staticmethod
    def key(record: dict[str, Any]) -> str:
        """What two records of the same run have in common."""
        return json.dumps([record[k] for k in ("workload", "method", "settings", "seed")])

    def run(self, workload: str, method: str, settings: dict[str, Any], seed: int) -> float:
        """The train loss at the end of a run."""
        record = {"workload": workload, "method": method, "settings": settings, "seed": seed}
        key = self.key(record)
        if key not in self.done:
            work = self.workloads[workload]
            with contextlib.redirect_stdout(sys.stderr):
                if method == "Adam":
                    found = adam_run(work.build(seed=seed), **settings)
                else:
                    found = zo_run(work.build(seed=seed, **settings))
            self.done[key] = record | found
            with self.path.open("a") as file:
                file.write(json.dumps(self.done[key]) + "\n")
            print(f"{workload}, {method}, {settings}, seed {seed}: {found['train_loss']:.4f}")
            sys.stdout.flush()
        return self.done[key]["train_loss"]

    def best(self, workload: str, method: str, whole_grid: bool) -> dict[str, Any]:
        """The settings of the method's best grid point, on seed 0."""
        rates, all_eps = self.grids[workload]
        tried: dict[tuple[float, float], float] = {}

        def point(rate: float, eps: float) -> dict[str, Any]:
            budget = {"max_forward_passes": self.workloads[workload].forward_passes}
            return PUBLISHED[method] | {"learning_rate": rate, "zo_eps": eps} | budget

        def attempt(rate: float, eps: float) -> None:
            tried[rate, eps] = self.run(workload, method, point(rate, eps), 0)

        for rate in rates:
            attempt(rate, all_eps[0])
        best_rate = min(tried, key=tried.__getitem__)[0]
        for eps in all_eps[1:]:
            for rate in rates if whole_grid else [best_rate]:
                attempt(rate, eps)
        return point(*min(tried, key=tried.__getitem__))

    def mean_loss(
        self, workload: str, method: str, settings: dict[str, Any], seeds: Sequence[int]
    ) -> float:
        """The mean over seeds of the train loss at the end."""
        return mean(self.run(workload, method, settings, seed) for seed in seeds)

    def passes_to(self, workload: str, target: float, seeds: Sequence[int]) -> float:
        """Forward passes that the defaults need for a mean loss of `target`.

        It is the smallest budget whose runs end there, between two budgets by log-linear
        interpolation, and infinite where the largest budget is not enough.
        """
        before: tuple[float, float] | None = None
        for share in self.shares:
            passes = share * self.workloads[workload].forward_passes
            settings = {"max_forward_passes": int(passes)}
            loss = self.mean_loss(workload, OURS, settings, seeds)
            if loss <= target:
                if before is None:
                    return passes
                part = (before[1] - target) / (before[1] - loss)
                return before[0] * (passes / before[0]) ** part
            before = passes, loss
        return float("inf")

    def plot(self, names: Sequence[str], seeds: Sequence[int]) -> None:
        """Draw each workload's losses at the end of runs over forward passes, means over seeds."""
        figure, all_axes = plt.subplots(1, len(names), figsize=(4 * len(names), 4), squeeze=False)
        for axes, name in zip(all_axes[0], names):
            for method in (*PUBLISHED, OURS):
                if points := self._means(name, method, seeds):
                    axes.plot(*zip(*points), "o-" if method == OURS else "s", label=method)
            adam = min((self.done[k]["train_loss"] for k in self._keys(name, "Adam")), default=None)
            if adam is not None:
                axes.axhline(adam, color="grey", linestyle=":", label="Adam, a tenth of the steps")
            axes.set(title=name, xlabel="forward passes", ylabel="train loss", yscale="log")
            axes.legend()
        figure.tight_layout()
        figure.savefig(self.path.with_name("learning.png"), dpi=120)

    def _keys(self, workload: str, method: str) -> list[str]:
        return [k for k in self.done if json.loads(k)[:2] == [workload, method]]

    def _means(self, workload: str, method: str, seeds: Sequence[int]) -> list[tuple[float, float]]:
        """Forward passes and mean loss of the settings that all seeds were run with.

        A published method has one such point, as all seeds are run at its best grid point alone.
        """
        runs: dict[str, list[dict[str, Any]]] = {}
        for key in self._keys(workload, method):
            runs.setdefault(json.dumps(json.loads(key)[2]), []).append(self.done[key])
        return sorted(
            (group[0]["forward_passes"], mean(record["train_loss"] for record in group))
            for group in runs.values()
            if len(group) >= len(seeds)
        )


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--results", type=Path, default=Path("out/learning/results.jsonl"))
    parser.add_argument("--workloads", nargs="*", default=[*GRIDS], choices=[*GRIDS])
    methods = [*PUBLISHED, OURS, "Adam"]
    parser.add_argument("--methods", nargs="*", default=methods, choices=methods)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--whole_grid", action="store_true", help="try every pair of the grid")
    parser.add_argument("--learning_rates", nargs="*", type=float, help="in place of all grids'")
    parser.add_argument("--eps", nargs="*", type=float, help="in place of all grids'")
    parser.add_argument("--forward_passes", type=int, help="in place of a workload's budget")
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES, help="of the budget")
    given = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)  # more only wait for each other on models this small
    works = {
        name: replace(work, forward_passes=given.forward_passes or work.forward_passes)
        for name, work in workloads(given.data_dir).items()
    }
    grids = {
        name: (given.learning_rates or rates, given.eps or all_eps)
        for name, (rates, all_eps) in GRIDS.items()
    }
    bench = Bench(given.results, works, grids, given.shares)
    ratios: dict[str, list[float]] = {}
    rows = []
    for workload in given.workloads:
        budget = works[workload].forward_passes
        for method in (name for name in PUBLISHED if name in given.methods):
            settings = bench.best(workload, method, given.whole_grid)
            loss = bench.mean_loss(workload, method, settings, given.seeds)
            rows.append([workload, method, f"{loss:.4f}", "", ""])
            if OURS in given.methods:
                passes = bench.passes_to(workload, loss, given.seeds)
                ratios.setdefault(method, []).append(passes / budget)
                rows[-1][3:] = f"{passes:,.0f}", f"{passes / budget:.2f}"
        if "Adam" in given.methods:
            for rate in given.learning_rates or ADAM_RATES:
                bench.run(workload, "Adam", {"learning_rate": rate, "steps": budget // 10}, 0)
    bench.plot(given.workloads, given.seeds)
    print_header("workload", "method", "train loss", "defaults reach it after", "share")
    for row in rows:
        print_row(*row)
    for method, values in ratios.items():
        print(f"{method}: geometric mean {geometric_mean(values):.2f}")


if __name__ == "__main__":
    main()
