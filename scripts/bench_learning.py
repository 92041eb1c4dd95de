"""Forward passes to reach a loss: zo_peft's defaults against published methods at their best.

A published method gets a grid of learning rates and eps. All learning rates are tried at the first
eps, then the other eps at the best learning rate; with `--whole_grid` every pair is. The best
point, by train loss at the end, is run on all seeds. zo_peft runs with its defaults, nothing
tuned, with several budgets. Every run is a line of `results.jsonl`; a run that is there is not
made again. The losses over forward passes are drawn beside it, in `learning.png`.

    python scripts/bench_learning.py --data_dir ../shared/data
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from datasets import disable_progress_bars
from workloads import workloads

from zo_peft import NonFiniteLossError, ZOTrainer

#: Learning rates, then eps (the first is tried with every learning rate).
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
#: Shares of a workload's budget that the defaults are given.
SHARES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
ADAM_RATES = (1e-3, 3e-3, 1e-2)


def train_loss(trainer: ZOTrainer) -> float:
    """On the workload's training rows."""
    return trainer.evaluate(trainer.eval_dataset["train"])["eval_loss"]


def zo_run(trainer: ZOTrainer) -> dict[str, Any]:
    """Train with forward passes; the loss is infinite where the run broke off."""
    start = time.perf_counter()
    try:
        trainer.train()
    except NonFiniteLossError:
        return {"train_loss": float("inf")}
    seconds = time.perf_counter() - start
    return {
        "train_loss": train_loss(trainer),
        "dev_accuracy": trainer.evaluate(trainer.eval_dataset["dev"])["eval_accuracy"],
        "forward_passes": trainer.evaluator.forward_passes,
        "seconds": seconds,
    }


def adam_run(trainer: ZOTrainer, learning_rate: float, steps: int) -> dict[str, Any]:
    """Adam by back-propagation on the same adapter, batches and loss."""
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
    """Runs that are remembered in a file of JSON lines."""

    def __init__(self, path: Path, data_dir: Path) -> None:
        self.path, self.workloads = path, workloads(data_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {self.key(record): record for record in map(json.loads, lines)}

    @staticmethod
    def key(record: dict[str, Any]) -> str:
        """What makes two records the same run."""
        return json.dumps([record[k] for k in ("workload", "method", "settings", "seed")])

    def run(self, workload: str, method: str, settings: dict[str, Any], seed: int) -> float:
        """The train loss at the end of a run."""
        record = {"workload": workload, "method": method, "settings": settings, "seed": seed}
        key = self.key(record)
        if key not in self.done:
            work = self.workloads[workload]
            with contextlib.redirect_stdout(sys.stderr):
                if method == "Adam":
                    trainer = work.build(seed=seed, strategy="gv")
                    found = adam_run(trainer, **settings)
                else:
                    budget = {"max_forward_passes": work.forward_passes}
                    found = zo_run(work.build(seed=seed, **(budget | settings)))
            self.done[key] = record | found
            with self.path.open("a") as file:
                file.write(json.dumps(self.done[key]) + "\n")
            print(f"{workload}, {method}, {settings}, seed {seed}: {found['train_loss']:.4f}")
            sys.stdout.flush()
        return self.done[key]["train_loss"]

    def best(self, workload: str, method: str, whole_grid: bool) -> dict[str, Any]:
        """The settings of the method's best grid point, on seed 0."""
        rates, all_eps = GRIDS[workload]
        tried: dict[tuple[float, float], float] = {}

        def attempt(rate: float, eps: float) -> None:
            settings = PUBLISHED[method] | {"learning_rate": rate, "zo_eps": eps}
            tried[rate, eps] = self.run(workload, method, settings, 0)

        for rate in rates:
            attempt(rate, all_eps[0])
        best_rate = min(tried, key=tried.__getitem__)[0]
        for eps in all_eps[1:]:
            for rate in rates if whole_grid else [best_rate]:
                attempt(rate, eps)
        rate, eps = min(tried, key=tried.__getitem__)
        return PUBLISHED[method] | {"learning_rate": rate, "zo_eps": eps}

    def mean_loss(
        self, workload: str, method: str, settings: dict[str, Any], seeds: Sequence[int]
    ) -> float:
        """The mean over seeds of the train loss at the end."""
        return mean(self.run(workload, method, settings, seed) for seed in seeds)

    def passes_to(self, workload: str, target: float, seeds: Sequence[int]) -> float:
        """Forward passes that the defaults need for a mean loss of `target`; inf: more than all.

        The smallest budget whose runs end there; between two budgets by log-linear interpolation.
        """
        before: tuple[float, float] | None = None
        for share in SHARES:
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
        """Each workload's losses at the end of a run over its forward passes, means over seeds."""
        figure, all_axes = plt.subplots(1, len(names), figsize=(4 * len(names), 4), squeeze=False)
        for axes, name in zip(all_axes[0], names):
            for method in (*PUBLISHED, OURS):
                points = self._means(name, method, seeds)
                line = "o-" if method == OURS else "s"
                axes.plot(*zip(*points), line, label=method)
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
        """(forward passes, mean loss) of the settings that all seeds were run with.

        Of a published method, which has its seeds at the best grid point alone, that is one.
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
    parser.add_argument("--methods", nargs="*", default=[*PUBLISHED, OURS, "Adam"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--whole_grid", action="store_true", help="every pair of the grid")
    given = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)  # more only wait for each other on models this small
    bench = Bench(given.results, given.data_dir)
    ratios: dict[str, list[float]] = {}
    rows = []
    for workload in given.workloads:
        for method in (name for name in PUBLISHED if name in given.methods):
            settings = bench.best(workload, method, given.whole_grid)
            loss = bench.mean_loss(workload, method, settings, given.seeds)
            rows.append([workload, method, f"{loss:.4f}"])
            if OURS in given.methods:
                passes = bench.passes_to(workload, loss, given.seeds)
                ratio = passes / bench.workloads[workload].forward_passes
                ratios.setdefault(method, []).append(ratio)
                rows[-1] += [f"{passes:,.0f}", f"{ratio:.2f}"]
        if "Adam" in given.methods:
            steps = bench.workloads[workload].forward_passes // 10
            for rate in ADAM_RATES:
                bench.run(workload, "Adam", {"learning_rate": rate, "steps": steps}, 0)
    bench.plot(given.workloads, given.seeds)
    for row in rows:
        print(" | ".join(row))
    for method, values in ratios.items():
        print(f"{method}: geometric mean {geometric_mean(values):.2f}")


if __name__ == "__main__":
    main()
