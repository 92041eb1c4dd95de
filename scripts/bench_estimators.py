"""How well each strategy's direction follows the gradient, against what theory expects.

The alignment is `c = d * E[cos^2(v, gradient)]`, with the gradient of the same batch by
back-propagation; one random direction has 1. All strategies see the same noise and losses. The
expectation beside it is that of a linear loss in many dimensions, by formula or by simulation of
the candidates' slopes. In the last rows each example has candidates of its own; there the
expectation also depends on how far the gradients of the batch's examples agree.

With `--guide` the table has in its place the cosine of what strategy="guided" reads off a forward
pass with the gradient, by layer over all tensors that are read there (-1: outside of the layers).
`stacked` has 12 layers: those of the embedded model three times over, and all that each of them
writes into the residual stream divided by sqrt(3). It was not trained as such.

    python scripts/bench_estimators.py
    python scripts/bench_estimators.py --work encoder --draws 300 --data_dir ../shared/data
    python scripts/bench_estimators.py --work stacked --guide --batch_size 16
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from measuring import print_header, print_row
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from workloads import COMMON, embedded, encoder, lora, texts

from zo_peft import Direction, ZOConfig, ZOTrainer
from zo_peft.core.batch import Batch
from zo_peft.core.noise import derive_seed
from zo_peft.core.strategies import (
    Asking,
    combine,
    greedy,
    gv,
    loss_weights,
    mezo,
    n_spsa,
    run_step,
    run_steps,
    split_weights,
)
from zo_peft.models.loading import load_tokenizer
from zo_peft.tools.demo import EMBEDDED

EPS = 1e-3
SIMULATED = 200_000
#: How often the embedded model's layers are stacked.
TIMES = 3


def split(m: int) -> Callable[[Sequence[int]], Asking]:
    """A step of GV as it was published."""
    return lambda seeds: gv(seeds[:m], EPS, 0.5, "split", "central")


def weighted(m: int) -> Callable[[Sequence[int]], Asking]:
    """A step of GV with loss weights and the slope from the same losses."""
    return lambda seeds: gv(seeds[:m], EPS, 0.5, "loss", "reuse")


def lowest(m: int, probe: str) -> Callable[[Sequence[int]], Asking]:
    """A step of Greedy."""
    return lambda seeds: greedy(seeds[:m], EPS, probe)  # type: ignore[arg-type]


def of_weights(weights: Callable[[Sequence[float]], list[float]], m: int) -> float:
    """`E[(w . a)^2 / |w|^2]` over the slopes a of m candidates."""
    slopes = np.random.default_rng(0).normal(size=(SIMULATED // m, m))
    found = []
    for a in slopes:
        w = np.asarray(weights(a.tolist()))
        found.append((w @ a) ** 2 / (w @ w))
    return float(np.mean(found))


def of_lowest(m: int) -> float:
    """`E[(min a)^2]`."""
    return float(np.mean(np.random.default_rng(0).normal(size=(SIMULATED, m)).min(1) ** 2))


#: Of each strategy: what makes a step from seeds, and the expected alignment.
STRATEGIES: dict[str, tuple[Callable[[Sequence[int]], Asking], float]] = {
    "mezo": (lambda seeds: mezo(seeds[0], EPS), 1.0),
    "n-spsa, q=4": (lambda seeds: n_spsa(seeds[:4], EPS), 4.0),
    **{f"greedy, M={m}, central": (lowest(m, "central"), of_lowest(m)) for m in (2, 4, 8)},
    **{f"greedy, M={m}, reuse": (lowest(m, "reuse"), of_lowest(m)) for m in (4,)},
    **{
        f"gv, M={m}, split, central": (split(m), of_weights(lambda a: split_weights(a, 0.5), m))
        for m in (2, 4, 16)
    },
    **{f"gv, M={m}, loss, reuse": (weighted(m), of_weights(loss_weights, m)) for m in (4, 8, 16)},
}


def example_gradients(trainer: ZOTrainer, batch: Batch) -> Tensor:
    """The gradient of each example's loss by back-propagation, float64 [examples, d]."""
    parameters = list(trainer.space.parameters.values())
    losses = trainer.objective.losses(trainer.model, batch)
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows).double()


class Alignment:
    """Has every strategy find directions on one batch, and compares them with its gradient."""

    def __init__(self, trainer: ZOTrainer, batch: Batch) -> None:
        trainer.model.eval()
        self.trainer, self.batch = trainer, batch
        self.gradients = example_gradients(trainer, batch)
        self.gradient = self.gradients.mean(0)
        self.known: dict[Direction, float] = {}

    def losses(self, points: Sequence[Direction]) -> list[float]:
        """The losses at points; a point that two strategies ask for is evaluated once."""
        new = [point for point in dict.fromkeys(points) if point not in self.known]
        if new:
            self.known.update(zip(new, self.trainer.evaluator(new, [self.batch])))
        return [self.known[point] for point in points]

    def alignment(self, direction: Direction) -> float:
        """`d * cos^2` of the direction with the gradient."""
        space = self.trainer.space
        views = space.views(0, space.dense(0, direction)).values()
        v = torch.cat([view.flatten() for view in views]).double()
        return len(v) * float((v @ self.gradient) ** 2 / (v @ v) / (self.gradient @ self.gradient))

    def draw(self, number: int) -> dict[str, tuple[float, int]]:
        """The alignment and the forward passes of every strategy on the same noise."""
        self.known = {}
        seeds = [derive_seed(number, index) for index in range(16)]
        found = {}
        for name, (step, _) in STRATEGIES.items():
            estimate = run_step(step(seeds), self.losses)
            found[name] = self.alignment(estimate.direction), len(estimate.losses)
        return found

    def draw_by_example(self, number: int, m: int) -> float:
        """The alignment of GV with loss weights where each example has m candidates of its own."""
        parts = range(len(self.gradients))
        steps = [weighted(m)([derive_seed(number, part, i) for i in range(m)]) for part in parts]
        evaluate = self.trainer.evaluator.evaluate
        estimates = run_steps(steps, lambda points: evaluate(points, [self.batch]).losses)
        return self.alignment(combine(estimates).direction)

    def agreement(self) -> float:
        """`B |mean gradient|^2 / mean |gradient of an example|^2`: 1 if orthogonal, B if equal."""
        own = self.gradients.square().sum(1).mean()
        return float(len(self.gradients) * self.gradient.square().sum() / own)


def stacked(**settings: Any) -> ZOTrainer:
    """A trainer of the embedded model with its layers three times over, and a LoRA."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "model")
    layers = [deepcopy(layer) for _ in range(TIMES) for layer in model.model.layers]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.data /= TIMES**0.5
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    return ZOTrainer(
        model,
        ZOConfig(**(COMMON | settings)),
        train_dataset=texts("train"),
        processing_class=load_tokenizer(str(EMBEDDED / "model")),
        peft_config=lora(),
    )


def cosines(trainer: ZOTrainer, batch: Batch) -> dict[str, str]:
    """The cosine of the guide with the gradient of a batch, by layer, and the batch's loss."""
    assert trainer.tuner.guided is not None
    guide, parameters = trainer.tuner.guided.guide, trainer.space.parameters
    trainer.model.eval()
    losses, (read,) = guide.read(batch)
    loss = trainer.objective.losses(trainer.model, batch).mean()
    found = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    true = dict(zip(parameters, found))
    parts = sorted({guide.part(name) for name in read})

    def cosine(names: Sequence[str]) -> str:
        one, other = (torch.cat([g[n].flatten() for n in names]).double() for g in (read, true))
        return f"{float(one @ other / (one.norm() * other.norm())):.3f}"

    by_layer = {str(part): cosine([n for n in read if guide.part(n) == part]) for part in parts}
    return by_layer | {"all": cosine(list(read)), "loss": f"{losses.mean():.4f}"}


def print_guide(trainer: ZOTrainer, batch: Batch) -> None:
    """Print the table of the guide, at the start and after the trainer's steps."""
    before = cosines(trainer, batch)
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    after = cosines(trainer, batch)
    print_header("layer", "start", f"after {trainer.state.global_step} guided steps")
    for name in before:
        print_row(name, before[name], after[name])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", choices=["embedded", "encoder", "stacked"], default="embedded")
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--guide", action="store_true", help="the table of the guide")
    parser.add_argument("--steps", type=int, default=50, help="guided steps before its end")
    given = parser.parse_args()
    disable_progress_bars()
    settings: dict[str, Any] = {
        "strategy": "gv",
        "noise": "gaussian",
        "train_sampling_strategy": "sequential",
    }
    if given.guide:
        settings = {"strategy": "guided", "max_steps": given.steps}
    with contextlib.redirect_stdout(sys.stderr):
        if given.work == "embedded":
            trainer = embedded(lora(), **settings)
        elif given.work == "stacked":
            trainer = stacked(**settings)
        else:
            files = (given.data_dir / "sst2/train.tsv", given.data_dir / "sst2/dev.tsv")
            trainer = encoder(files, "{sentence}", **settings)
    rows = [trainer.train_dataset[index] for index in range(given.batch_size)]
    batch = trainer.data_collator(rows)
    if given.guide:
        print_guide(trainer, batch)
        return
    bench = Alignment(trainer, batch)
    draws = [bench.draw(number) for number in range(given.draws)]
    print(f"{given.work}, {trainer.space.numel:,} numbers, {given.draws:,} draws, eps {EPS:g}")
    print_header("strategy", "forward passes", "alignment", "expected", "ratio", "per forward pass")

    def report(name: str, passes: int, values: Sequence[float], expected: float) -> None:
        c, error = float(np.mean(values)), float(np.std(values) / len(values) ** 0.5)
        print_row(
            name,
            f"{passes}",
            f"{c:.2f} +- {error:.2f}",
            f"{expected:.2f}",
            f"{c / expected:.2f}",
            f"{c / passes:.2f}",
        )

    for name, (_, expected) in STRATEGIES.items():
        values = [draw[name][0] for draw in draws]
        report(name, draws[0][name][1], values, expected)
    for m in (4, 16):
        values = [bench.draw_by_example(number, m) for number in range(given.draws)]
        name = f"gv, M={m}, loss, reuse, by example"
        report(name, m, values, (m - 1) * bench.agreement())


if __name__ == "__main__":
    main()
