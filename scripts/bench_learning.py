"""Forward passes to a loss: gv and guided, not tuned, against published methods at their best.

A published method gets a grid of learning rates and eps. All learning rates are tried at the first
eps, then the other eps at the best learning rate; with `--whole_grid` every pair is tried. The best
point, by the train loss at the end, is run on all seeds. zo_peft runs with strategy="gv" and with
strategy="guided", with no setting tuned, on several budgets. Beside them stand Adam with gradients,
and the readout: the best linear head on the states of the frozen model (`readout_run`).

Every run is a line of `results.jsonl`, and a run that is there is not made again. The losses over
forward passes are drawn beside it, in `learning.png`. Peaks are those of the resident set with all
that the process has loaded before, so the first run of a process tells the most.

    python scripts/bench_learning.py --data_dir ../shared/data
    python scripts/bench_learning.py --learning_rates 1e-3 --eps 1e-2 --forward_passes 200
"""

import argparse
import contextlib
import json
import math
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
from measuring import peak_mib, print_header, print_row, reset_peak
from workloads import Workload, workloads

from zo_peft import NonFiniteLossError, ZOTrainer
from zo_peft.tools.readout import fit, readout_loss, seen

#: Learning rates, and eps of which the first is tried with every learning rate.
Grid = tuple[Sequence[float], Sequence[float]]
LORA_GRID: Grid = ([1e-3, 3e-3, 1e-2, 3e-2, 1e-1], [1e-2, 1e-3, 3e-2])
GRIDS: dict[str, Grid] = {
    "embedded LoRA float32": LORA_GRID,
    "embedded LoRA int8": LORA_GRID,
    "embedded prefix float32": ([0.1, 0.3, 1.0, 3.0, 10.0], [1e-1, 1e-2, 3e-1]),
    "encoder SST-2": ([3e-4, 7e-4, 1.4e-3, 2.8e-3, 5.6e-3], [1e-2, 1e-3, 3e-2]),
    "encoder RTE": ([3e-4, 1e-3, 3e-3, 1e-2, 3e-2], [1e-2, 1e-3, 3e-2]),
    "encoder BoolQ": ([3e-4, 1e-3, 3e-3, 1e-2, 3e-2], [1e-2, 1e-3, 3e-2]),
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "MeZO": {"preset": "mezo"},
    "GV, M=8": {"preset": "paper-gv", "num_candidates": 8},
    "Greedy, M=4": {"preset": "paper-greedy", "num_candidates": 4},
}
#: What is run with no setting tuned.
OURS: dict[str, dict[str, Any]] = {name: {"strategy": name} for name in ("gv", "guided")}
#: Shares of a workload's budget, which each of them is given one after the other.
SHARES = {
    "gv": (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0),
    "guided": (0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 1.0),
}
#: The forward passes of one more run of each of them, whatever the budget.
PASSES = 400
ADAM_RATES, ADAM_STEPS = (1e-3, 3e-3, 1e-2), 150


def train_loss(trainer: ZOTrainer) -> float:
    """The loss on the workload's training rows."""
    return trainer.evaluate(trainer.eval_dataset["train"])["eval_loss"]


def zo_run(trainer: ZOTrainer) -> dict[str, Any]:
    """Train with forward passes; the loss is infinite if the run breaks off."""
    reset_peak()
    start = time.perf_counter()
    try:
        trainer.train()
    except NonFiniteLossError:
        return {"train_loss": float("inf"), "forward_passes": trainer.forward_passes}
    seconds, peak = time.perf_counter() - start, peak_mib()
    return {
        "train_loss": train_loss(trainer),
        "dev_accuracy": trainer.evaluate(trainer.eval_dataset["dev"])["eval_accuracy"],
        "forward_passes": trainer.forward_passes,
        "seconds": seconds,
        "peak_mib": peak,
        "guide": trainer.guide,
    }


def take_adam_steps(trainer: ZOTrainer, learning_rate: float, steps: int) -> None:
    """Train with Adam by back-propagation on the same adapter, batches and loss."""
    parameters = list(trainer.space.parameters.values())
    optimizer = torch.optim.Adam(parameters, learning_rate)
    done = 0
    trainer.model.eval()
    while done < steps:
        for batch in trainer.get_train_dataloader():
            trainer.objective.losses(trainer.model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break


def adam_run(trainer: ZOTrainer, learning_rate: float, steps: int) -> dict[str, Any]:
    """Take steps of Adam, and evaluate."""
    reset_peak()
    start = time.perf_counter()
    take_adam_steps(trainer, learning_rate, steps)
    seconds, peak = time.perf_counter() - start, peak_mib()
    return {
        "train_loss": train_loss(trainer),
        "dev_accuracy": trainer.evaluate(trainer.eval_dataset["dev"])["eval_accuracy"],
        "steps": steps,
        "seconds": seconds,
        "peak_mib": peak,
    }


def readout_run(trainer: ZOTrainer, rows: int) -> dict[str, Any]:
    """Fit the best linear head on the states that the frozen model has of the training batches.

    It needs a forward pass for each batch and nothing else, so it tells what a method has to beat
    that changes more than the head. The penalty is the best on rows that are held out.
    """
    reset_peak()
    start = time.perf_counter()
    with trainer.model.disable_adapter():
        v, passes = fit(trainer, math.ceil(rows / trainer.args.train_batch_size))
        seconds, peak = time.perf_counter() - start, peak_mib()
        train, dev = (
            seen(trainer, trainer.get_eval_dataloader(trainer.eval_dataset[part]))
            for part in ("train", "dev")
        )
    right = (dev[1] + dev[0] @ v.T).argmax(dim=1) == dev[2]
    return {
        "train_loss": readout_loss(train, v).item(),
        "dev_accuracy": right.double().mean().item(),
        "forward_passes": passes,
        "seconds": seconds,
        "peak_mib": peak,
    }


class Bench:
    """Runs that are remembered in a file of JSON lines.

    Args:
        path: the file.
        workloads: what is learned, by name.
        grids: what the published methods try, by workload.
        shares: the shares of a workload's budget that each of `OURS` is given, in rising order.
    """

    def __init__(
        self,
        path: Path,
        workloads: dict[str, Workload],
        grids: dict[str, Grid],
        shares: dict[str, Sequence[float]],
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
                elif method == "readout":
                    found = readout_run(work.build(seed=seed), **settings)
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

    def passes_to(self, workload: str, method: str, target: float, seeds: Sequence[int]) -> float:
        """Forward passes that one of `OURS` needs for a mean loss of `target`.

        It is the smallest budget whose runs end there, between two budgets by log-linear
        interpolation, and infinite where the largest budget is not enough.
        """
        before: tuple[float, float] | None = None
        for share in self.shares[method]:
            passes = int(share * self.workloads[workload].forward_passes)
            settings = OURS[method] | {"max_forward_passes": passes}
            loss = self.mean_loss(workload, method, settings, seeds)
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
            for method in (*PUBLISHED, *OURS):
                if points := self._means(name, method, seeds):
                    axes.plot(*zip(*points), "o-" if method in OURS else "s", label=method)
            for method, style in (("Adam", ":"), ("readout", "--")):
                losses = [self.done[key]["train_loss"] for key in self._keys(name, method)]
                if losses:
                    axes.axhline(min(losses), color="grey", linestyle=style, label=method)
            axes.set(title=name, xlabel="forward passes", ylabel="train loss", yscale="log")
            axes.legend()
        figure.tight_layout()
        figure.savefig(self.path.with_name("learning.png"), dpi=120)

    def groups(self, workload: str, method: str) -> list[list[dict[str, Any]]]:
        """The records of the method's runs, those with the same settings together."""
        found: dict[str, list[dict[str, Any]]] = {}
        for key in self._keys(workload, method):
            found.setdefault(json.dumps(json.loads(key)[2]), []).append(self.done[key])
        return list(found.values())

    def _keys(self, workload: str, method: str) -> list[str]:
        return [k for k in self.done if json.loads(k)[:2] == [workload, method]]

    def _means(self, workload: str, method: str, seeds: Sequence[int]) -> list[tuple[float, float]]:
        """Forward passes and mean loss of the settings that all seeds were run with.

        A published method has one such point, as all seeds are run at its best grid point alone.
        """
        return sorted(
            (group[0]["forward_passes"], mean(record["train_loss"] for record in group))
            for group in self.groups(workload, method)
            if len(group) >= len(seeds)
        )


def print_runs(bench: Bench, workload: str, method: str) -> None:
    """Print the runs of a method, a row for each of its settings, with means over seeds."""
    for group in bench.groups(workload, method):
        hidden = {"max_forward_passes", "preset", "strategy", "num_candidates"}
        settings = {k: v for k, v in group[0]["settings"].items() if k not in hidden}
        losses = [record["train_loss"] for record in group]
        print_row(
            workload,
            ", ".join([method, *(f"{name} {value:g}" for name, value in settings.items())]),
            f"{group[0]['forward_passes']:,}" if method != "Adam" else "",
            f"{mean(losses):.4f} ({', '.join(f'{loss:.4f}' for loss in losses)})",
            f"{mean(record.get('dev_accuracy', 0.0) for record in group):.3f}",
            f"{mean(record.get('seconds', 0.0) for record in group):.1f}",
            f"{group[0].get('peak_mib', 0.0):,.0f}",
        )


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--results", type=Path, default=Path("out/learning/results.jsonl"))
    parser.add_argument("--workloads", nargs="*", default=[*GRIDS], choices=[*GRIDS])
    methods = [*PUBLISHED, *OURS, "readout", "Adam"]
    parser.add_argument("--methods", nargs="*", default=methods, choices=methods)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--whole_grid", action="store_true", help="try every pair of the grid")
    parser.add_argument("--learning_rates", nargs="*", type=float, help="in place of all grids'")
    parser.add_argument("--eps", nargs="*", type=float, help="in place of all grids'")
    parser.add_argument("--forward_passes", type=int, help="in place of a workload's budget")
    parser.add_argument("--shares", nargs="*", type=float, help="of the budget, in place of all")
    parser.add_argument("--readout_rows", nargs="*", type=int, default=[1000])
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
    shares = {method: given.shares or own for method, own in SHARES.items()}
    bench = Bench(given.results, works, grids, shares)
    ours = [method for method in OURS if method in given.methods]
    ratios: dict[tuple[str, str], list[float]] = {}
    rows = []
    for workload in given.workloads:
        budget = works[workload].forward_passes
        for method in (name for name in PUBLISHED if name in given.methods):
            settings = bench.best(workload, method, given.whole_grid)
            loss = bench.mean_loss(workload, method, settings, given.seeds)
            for own in ours:
                passes = bench.passes_to(workload, own, loss, given.seeds)
                ratios.setdefault((own, method), []).append(passes / budget)
                share = f"{passes / budget:.3f}"
                rows.append([workload, method, f"{loss:.4f}", own, f"{passes:,.0f}", share])
        for own in ours:
            settings = OURS[own] | {"max_forward_passes": min(PASSES, budget)}
            bench.mean_loss(workload, own, settings, given.seeds)
        if "readout" in given.methods:
            for count in given.readout_rows:
                bench.run(workload, "readout", {"rows": count}, 0)
        if "Adam" in given.methods:
            for rate in given.learning_rates or ADAM_RATES:
                settings = {"learning_rate": rate, "steps": min(ADAM_STEPS, budget)}
                bench.run(workload, "Adam", settings, 0)
    bench.plot(given.workloads, given.seeds)
    print_header("workload", "run", "forward passes", "train loss", "dev", "s", "peak MiB")
    for workload in given.workloads:
        for method in methods:
            print_runs(bench, workload, method)
    print_header("workload", "method", "train loss", "of zo_peft", "reaches it after", "share")
    for row in rows:
        print_row(*row)
    for (own, method), values in ratios.items():
        print(f"{own} against {method}: geometric mean {geometric_mean(values):.3f}")


if __name__ == "__main__":
    main()
