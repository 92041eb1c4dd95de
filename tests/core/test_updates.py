"""Update rules against torch's optimizers, the formulas in numpy, and each other's limits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import noise_block
from torch import Tensor, nn

from zo_peft import Direction
from zo_peft.core.backoff import Backoff
from zo_peft.core.flat_space import FlatSpace
from zo_peft.core.orthogonal import orthogonalized
from zo_peft.core.strategies import Estimate
from zo_peft.core.updates import AUTOMATIC, RULES, UpdateRule

SHAPES = {"wide": (4, 300), "tall": (200, 3), "bias": (7,), "scalar": ()}
STEPS = 6


def make(name: str, **settings: Any) -> tuple[FlatSpace, UpdateRule]:
    torch.manual_seed(0)
    space = FlatSpace({n: nn.Parameter(torch.randn(shape)) for n, shape in SHAPES.items()})
    return space, RULES[name](space, settings.pop("lr", 0.1), **settings)


def estimate(step: int, slope: float = 1.5, sensitivity: float = 2.0) -> Estimate:
    direction = Direction.combine([step, 100 + step], [0.8, -0.6])
    return Estimate(direction, slope * (-1) ** step, (1.0, 2.0), None, 0.7, sensitivity)


def gradient(name: str, found: Estimate) -> Tensor:
    """`slope * direction` of one parameter."""
    numel = math.prod(SHAPES[name])
    noises = [w * noise_block(seed, name, 0, numel) for seed, w in found.direction.terms]
    return (found.slope * sum(noises)).view(SHAPES[name])  # type: ignore[union-attr]


def run(space: FlatSpace, rule: UpdateRule, first: int = 0, last: int = STEPS) -> None:
    for step in range(first, last):
        rule.estimate = estimate(step)
        rule.step()


def theta(space: FlatSpace) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in space.tensors().items()}


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, 0.1)),
        ("momentum", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        ("adam", lambda p: torch.optim.Adam(p, 0.1, (0.9, 0.999), eps=1e-30)),
    ],
)
def test_follows_torch_on_the_estimated_gradient(name: str, optimizer: Any) -> None:
    space, rule = make(name)
    reference = {n: nn.Parameter(t.clone()) for n, t in space.tensors().items()}
    torch_rule = optimizer(list(reference.values()))
    for step in range(STEPS):
        for parameter_name, parameter in reference.items():
            parameter.grad = gradient(parameter_name, estimate(step))
        torch_rule.step()
    run(space, rule)
    for parameter_name, tensor in space.tensors().items():
        torch.testing.assert_close(tensor, reference[parameter_name].data, rtol=2e-5, atol=2e-5)
        assert torch.equal(space.parameters[parameter_name].data, tensor)


def test_fzoo_divides_by_the_spread() -> None:
    space, rule = make("fzoo")
    expected = theta(space)
    run(space, rule)
    for name in expected:
        for step in range(STEPS):
            expected[name] = expected[name] - 0.1 * gradient(name, estimate(step)) / 0.7
        torch.testing.assert_close(space.tensors()[name], expected[name], rtol=1e-5, atol=1e-5)


def test_normalized_moves_each_tensor_by_the_learning_rate() -> None:
    space, rule = make("normalized")
    momentum = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(STEPS):
        before = theta(space)
        run(space, rule, step, step + 1)
        for name, tensor in space.tensors().items():
            momentum[name] = 0.9 * momentum[name] + gradient(name, estimate(step))
            moved = before[name] - tensor
            assert moved.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-4)
            cosine = torch.cosine_similarity(moved.flatten(), momentum[name].flatten(), dim=0)
            assert cosine.item() == pytest.approx(1.0, abs=1e-5)


def test_spectral_makes_a_matrix_orthogonal_and_leaves_vectors() -> None:
    space, rule = make("spectral")
    before = theta(space)
    run(space, rule, 0, 1)
    for name, tensor in space.tensors().items():
        moved = (before[name] - tensor) / 0.1
        assert moved.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-4)
        if moved.dim() == 2:
            values = torch.linalg.svdvals(moved)
            assert values.max() / values.min() < 1.2 / 0.7
    torch.testing.assert_close(
        (before["bias"] - space.tensors()["bias"]) / 0.1,
        gradient("bias", estimate(0)) / gradient("bias", estimate(0)).square().mean().sqrt(),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("shape", [(4, 300), (200, 3), (5, 5), (1, 9)])
def test_orthogonalized_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-4
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalized(matrix) @ v.T
    assert found.diagonal().min() > 0.65
    assert found.diagonal().max() < 1.25
    assert (found - found.diagonal().diag()).abs().max() < 1e-3


@pytest.mark.parametrize("name", RULES)
def test_an_estimate_of_zero_moves_nothing_and_stays_finite(name: str) -> None:
    space, rule = make(name)
    before = theta(space)
    for _ in range(3):
        rule.estimate = Estimate(Direction.of(1), 0.0, (1.0, 1.0))
        rule.step()
    for parameter, tensor in space.tensors().items():
        assert torch.equal(tensor, before[parameter])


@pytest.mark.parametrize("name", sorted(AUTOMATIC - {"fzoo", "adam", "guided"}))
def test_an_automatic_step_moves_the_loss_of_an_example_by_its_nats(name: str) -> None:
    space, rule = make(name, lr=0.01, automatic=True)
    for step, sensitivity in enumerate((4.0, 8.0, 2.0)):
        before = theta(space)
        rule.estimate = estimate(step, sensitivity=sensitivity)
        rule.step()
        squares = [16.0, (16 + 64) / 2, (16 + 64 + 4) / 3][step]
        moved = (before["wide"] - space.tensors()["wide"]).square().mean().sqrt().item()
        assert moved == pytest.approx(0.01 / math.sqrt(squares), rel=1e-4)
        assert rule.step_size == pytest.approx(moved, rel=1e-4)


def test_an_automatic_step_of_fzoo_is_as_long_as_one_noise() -> None:
    space, rule = make("fzoo", lr=0.01, automatic=True)
    before, found = theta(space), estimate(0)
    rule.estimate = found
    rule.step()
    length = math.sqrt(sum(weight**2 for _, weight in found.direction.terms))
    for name, tensor in space.tensors().items():
        unit = gradient(name, found) / (found.slope * length)
        expected = before[name] - 0.01 / 2.0 * math.copysign(1, found.slope) * unit
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_weight_decay_shrinks_what_it_names(name: str) -> None:
    space, rule = make(name, weight_decay=0.5, decayed=("wide",))
    before = theta(space)
    rule.estimate = Estimate(Direction.of(1), 0.0, (1.0, 1.0))
    rule.step()
    torch.testing.assert_close(space.tensors()["wide"], before["wide"] * 0.95)
    assert torch.equal(space.tensors()["tall"], before["tall"])


def test_backoff_halves_when_the_loss_rises_and_not_for_noise() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.2, 4000)
    backoff = Backoff()
    assert all(backoff(1.0 + x) == 1.0 for x in noise)
    backoff = Backoff()
    factors = [backoff(1.0 + 0.001 * i + x) for i, x in enumerate(noise[:640])]
    assert 0.5 in factors
    assert set(factors[: 2 * Backoff.WINDOW]) == {1.0}
    backoff = Backoff()
    assert all(backoff(5.0 * 0.999**i + x) == 1.0 for i, x in enumerate(noise))
