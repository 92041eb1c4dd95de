"""A program that trains with `zo_peft.core` while the libraries around PyTorch are refused.

It compares the first step with the formula of the paper, in float64 and without the package.
"""

import copy
import importlib
import math
import pkgutil
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

REFUSED = {"transformers", "peft", "bitsandbytes", "accelerate", "datasets"}
SEED, EPS, LEARNING_RATE, CANDIDATES, STEPS = 7, 1e-2, 3e-3, 8, 300


class Refuse(MetaPathFinder):
    """Finds none of the libraries that the core must not need."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in REFUSED:
            raise ImportError(f"{name} must not be imported")


class SquaredError:
    """The squared error of each row of `x` [B, 4], whose target is in `labels` [B]."""

    repeatable = True

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["x"])[:, 0] - batch["labels"]).square()

    def predict(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


def one_step(
    model: nn.Module, x: Tensor, y: Tensor, seeds: Sequence[int], noise_blocks: Any
) -> dict[str, Tensor]:
    """MeZO-GV with loss weights: v = sum_i w_i z_i, slope = sum_i w_i l_i / eps, then plain SGD."""
    start = dict(model.named_parameters())
    noise = [
        {n: noise_blocks([seed], n, 0, p.numel())[0].view(p.shape) for n, p in start.items()}
        for seed in seeds
    ]
    losses = []
    for z in noise:
        there = {name: p + EPS * z[name] for name, p in start.items()}
        losses.append((functional_call(model, there, (x,))[:, 0] - y).square().mean().item())
    gains = [sum(losses) / len(losses) - loss for loss in losses]
    weights = [gain / math.hypot(*gains) for gain in gains]
    slope = -sum(weight * gain for weight, gain in zip(weights, gains)) / EPS
    return {
        name: p - LEARNING_RATE * slope * sum(w * z[name] for w, z in zip(weights, noise))
        for name, p in start.items()
    }


def run() -> None:
    import zo_peft.core

    for module in pkgutil.iter_modules(zo_peft.core.__path__, "zo_peft.core."):
        importlib.import_module(module.name)
    from zo_peft.core.batch import Batch
    from zo_peft.core.eps import EpsChoice
    from zo_peft.core.evaluator import Evaluator
    from zo_peft.core.flat_space import FlatSpace
    from zo_peft.core.noise import derive_seed, noise_blocks
    from zo_peft.core.strategies import Options
    from zo_peft.core.tuner import Tuner
    from zo_peft.core.updates import SGD

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(32, 4)
    y = x[:, 0] * x[:, 1] + x[:, 2]
    exact = copy.deepcopy(model).double()
    space, batch = FlatSpace(dict(model.named_parameters())), Batch(x=x, labels=y)
    evaluator, eps = Evaluator(model, space, SquaredError()), EpsChoice(EPS)
    options, rule = Options(num_candidates=CANDIDATES), SGD(space, LEARNING_RATE)
    tuner = Tuner(evaluator, rule, "gv", options, SEED, eps, per_example_noise=False)

    def loss() -> float:
        with torch.no_grad():
            return float((model(x)[:, 0] - y).square().mean())

    before, start = loss(), {name: tensor.clone() for name, tensor in space.tensors().items()}
    tuner.step([batch], 0)
    seeds = [derive_seed(SEED, 0, index) for index in range(CANDIDATES)]
    for name, tensor in one_step(exact, x.double(), y.double(), seeds, noise_blocks).items():
        torch.testing.assert_close(space.tensors()[name].double(), tensor, rtol=0, atol=1e-5)
        assert (start[name] - tensor).abs().max() > 1e-3
    for number in range(1, STEPS):
        tuner.step([batch], number)
    assert evaluator.forward_passes == CANDIDATES * STEPS
    assert loss() < before / 2, (before, loss())
    assert not REFUSED & sys.modules.keys()


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuse())
    run()
