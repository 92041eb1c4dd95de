"""Closed forms against back-propagation, and which guides are followed."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zo_peft.core.batch import Batch
from zo_peft.core.direction import Direction
from zo_peft.core.evaluator import Evaluator
from zo_peft.core.flat_space import FlatSpace
from zo_peft.core.guide import (
    CHECK_PASSES,
    FIRST_PASSES,
    FIRST_WAIT,
    Gradients,
    Guided,
    at_queries,
    covariance,
    low_rank,
    unrotated,
)
from zo_peft.core.strategies import Estimate
from zo_peft.core.updates import RULES


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(mine: Tensor, theirs: Tensor) -> bool:
    return bool((mine - theirs).norm() <= 1e-5 * theirs.norm())


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_low_rank_is_the_gradient_of_a_lora(layers: int, rank: int, width: int) -> None:
    """All layers have the same errors; of two parts with two rows each."""
    torch.manual_seed(layers)
    a = noise(layers, rank, width).requires_grad_()
    b = noise(layers, 3, rank).requires_grad_()
    x, errors = noise(layers, 2, 2, 5, width), noise(1, 2, 2, 5, 3)
    found = low_rank(errors.unsqueeze(3), x, a.detach(), b.detach())
    for part in range(2):
        lora = torch.einsum("lrni,lki,lok->lrno", x[:, part], a, b)
        true = torch.autograd.grad((lora * errors[:, part]).sum(), (a, b))
        assert close(found[0][:, part], true[0])
        assert close(found[1][:, part], true[1])


@given(st.integers(1, 3), st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]))
def test_low_rank_with_weights_is_that_on_values(count: int, heads: tuple[int, int]) -> None:
    torch.manual_seed(count)
    (query_heads, value_heads), width, rank, length = heads, 2, 3, 5
    a = noise(rank, 4).requires_grad_()
    b = noise(value_heads * width, rank).requires_grad_()
    x = noise(count, length, 4)
    weights = noise(count, query_heads, length).softmax(dim=-1)
    errors = noise(count, query_heads, width)
    values = (x @ a.T @ b.T).view(count, length, value_heads, width)
    values = values.repeat_interleave(query_heads // value_heads, dim=2)
    (torch.einsum("nhs,nshw->nhw", weights, values) * errors).sum().backward()
    # One layer and one part.
    own = errors.view(1, 1, count, value_heads, -1, width)
    sums = torch.einsum("nhs,nsi->nhi", weights, x)
    for inputs, given_weights in ((x, weights[None, None]), (sums, None)):
        factors = a.detach()[None], b.detach()[None]
        found = low_rank(own, inputs[None, None], *factors, given_weights)
        assert close(found[0][0, 0], a.grad)
        assert close(found[1][0, 0], b.grad)


def test_covariance_carries_errors_through_a_softmax() -> None:
    torch.manual_seed(0)
    query, keys, values = noise(2, 3, 6, 4).requires_grad_(), noise(2, 3, 5, 4), noise(2, 3, 5, 4)
    weights = (query @ keys.mT).softmax(dim=-1)
    errors = noise(2, 3, 6, 4)
    (weights @ values * errors).sum().backward()
    carried = covariance(weights.detach(), keys, values)
    assert close((carried @ errors[..., None])[..., 0], query.grad)
    assert close(at_queries(errors, weights.detach(), keys, values), query.grad)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_unrotated_turns_errors_back(scale: float) -> None:
    torch.manual_seed(0)
    before, errors = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)
    angles = torch.randn(2, 1, 4)
    first, second = before.chunk(2, dim=-1)
    cos, sin = scale * angles.cos(), scale * angles.sin()
    after = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    (after * errors).sum().backward()
    assert close(unrotated(errors, before.detach(), after.detach()), before.grad)


@pytest.mark.parametrize(("heads", "expected"), [(1, "exact"), (3, "zero")])
def test_unrotated_takes_a_pair_of_zeros_from_other_heads(heads: int, expected: str) -> None:
    torch.manual_seed(0)
    before, errors, angles = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 1, 4)
    before[:, :heads, [1, 5]] = 0.0
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = [torch.complex(*x.chunk(2, dim=-1)) for x in (before, errors)]
    after, true = (
        torch.cat([x.real, x.imag], dim=-1) for x in (turn * pairs[0], turn.conj() * pairs[1])
    )
    if expected == "zero":
        true[..., [1, 5]] = 0.0
    assert close(unrotated(errors, before, after), true)


EXAMPLES = 64


class Squares:
    """The losses of a small regression, one for each example."""

    repeatable = True

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch["input_ids"]) - batch["labels"]).square().mean(dim=1)


class Told:
    """A guide that knows the gradients of a model, each changed in some way."""

    passes, looked, draws = 1, 0, 1

    def __init__(self, model: nn.Module, changes: Mapping[str, float | None]) -> None:
        self.model, self.changes = model, changes
        self.objective = self.in_nats = Squares()

    def drawn(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return batches

    def part(self, name: str) -> int:
        return int(name.split(".")[0])

    def read(self, batch: Batch, parts: int = 1) -> tuple[Tensor, list[Gradients]]:
        losses = Squares().losses(self.model, batch)
        names = dict(self.model.named_parameters())
        tensors = list(names.values())
        torch.manual_seed(0)
        found = []
        for part in losses.chunk(parts):
            own = dict(zip(names, torch.autograd.grad(part.mean(), tensors, retain_graph=True)))
            found.append({name: self.changed(own[name], by) for name, by in self.changes.items()})
        return losses.detach(), found

    def changed(self, gradient: Tensor, by: float | None) -> Tensor:
        if by is None:
            noise = torch.randn_like(gradient)
            return noise * gradient.norm() / noise.norm()
        return by * gradient


def guided(changes: Mapping[str, float | None]) -> tuple[Guided, list[Batch]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False))
    batch = Batch({"input_ids": torch.randn(EXAMPLES, 24), "labels": torch.randn(EXAMPLES, 24)})
    space = FlatSpace(dict(model.named_parameters()))
    evaluator = Evaluator(model, space, Squares())
    return Guided(Told(model, changes), evaluator, 0), [batch]


@pytest.mark.parametrize(
    ("changes", "followed"),
    [
        ({"0.weight": 1.0, "1.weight": 1.0}, [0, 1]),
        ({"0.weight": 1.0}, [0]),
        ({"0.weight": -1.0, "1.weight": -1.0}, []),
        ({"0.weight": None, "1.weight": None}, []),
        ({"0.weight": -0.3, "1.weight": 1.0}, [1]),
        ({}, []),
    ],
    ids=["true", "one part", "uphill", "noise", "one part uphill", "nothing"],
)
def test_parts_are_followed_if_the_loss_agrees(
    changes: Mapping[str, float | None], followed: list[int]
) -> None:
    run, batches = guided(changes)
    before = {name: tensor.clone() for name, tensor in run.evaluator.space.tensors().items()}
    estimate, chosen = run.estimate(batches, 0, EXAMPLES)
    assert run.followed == followed
    assert "guide" in chosen
    assert estimate.gradients is not None
    assert estimate.gradients.keys() == {n for n in changes if run.guide.part(n) in followed}
    assert run.rest == before.keys() - changes.keys()
    for name, tensor in run.evaluator.space.tensors().items():
        assert torch.equal(tensor, before[name])


def test_a_guide_that_knows_the_batch_but_not_its_examples_is_not_followed() -> None:
    run, (batch,) = guided({"0.weight": 1.0, "1.weight": 1.0})
    common = Batch({"input_ids": batch["input_ids"] + 0.5, "labels": batch["labels"]})
    others = Batch(common.data | {"labels": common["labels"].roll(1, dims=0)})
    read, parameters = run.guide.read, dict(run.guide.model.named_parameters())
    run.guide.read = lambda batch, parts=1: read(others, parts)
    _, (told,) = read(others)
    _, (true,) = read(common)
    # Of the whole batch it points downhill, and promises about what it keeps.
    share = sum((told[n] * true[n]).sum() for n in parameters)
    assert share > 0.7 * sum(told[n].square().sum() for n in parameters)
    run.estimate([common], 0, EXAMPLES)
    assert run.followed == []


@pytest.mark.parametrize(
    ("wrong", "checks", "followed"),
    [
        ([0], 1, [0, 1]),
        ([2, 0], 2, [0, 1]),
        ([2, 8], 2, []),
        ([2, 2, 2], 3, [0, 1]),
    ],
    ids=["sure", "true after all", "uphill after all", "never sure"],
)
def test_a_first_check_that_is_not_sure_is_made_again(
    wrong: list[int], checks: int, followed: list[int]
) -> None:
    """Of so many of eight examples the gradient has the other sign."""
    run, (batch,) = guided({"0.weight": 1.0, "1.weight": 1.0})
    batch, read, found = batch.of_rows(0, 8), run.guide.read, list[float]()

    def partly_wrong(given: Batch, parts: int = 1) -> tuple[Tensor, list[Gradients]]:
        losses, own = read(given, parts)
        signs = [-1.0] * wrong[len(found)] + [1.0] * (8 - wrong[len(found)])
        return losses, [{n: s * g for n, g in part.items()} for s, part in zip(signs, own)]

    run.guide.read = partly_wrong
    for number in range(checks):
        assert (run.followed, run.due) == ([], number)
        chosen = run.estimate([batch], number, 8)[1]["guide"]
        found.append(chosen["slope"] / chosen["promised"])
        # What checks in a row have found counts together; what points uphill is left out.
        usual = sum(max(0, 1 - count / 4) for count in wrong[: len(found)])
        assert found[-1] == pytest.approx(
            usual / sum(count < 4 for count in wrong[: len(found)]), abs=0.15
        )
    assert run.followed == followed
    assert run.due > checks


@pytest.mark.parametrize(
    ("large", "examples", "allowed", "held"),
    [(256 << 20, 64, 64, 64), (0, 64, 64, 32), (0, 63, 63, 63), (0, 64, 1, 1)],
    ids=["small", "large", "an odd number", "one for all"],
)
def test_two_examples_share_a_gradient_where_they_are_large(
    large: int, examples: int, allowed: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, (batch,) = guided({"0.weight": 1.0, "1.weight": 1.0})
    batch = Batch({name: tensor[:examples] for name, tensor in batch.items()})
    monkeypatch.setattr("zo_peft.core.guide.LARGE", large)
    read, asked = run.guide.read, list[int]()
    run.guide.read = lambda batch, parts=1: (asked.append(parts), read(batch, parts))[1]
    _, chosen = run.estimate([batch], 0, allowed)
    assert asked == [held]
    assert run.followed == [0, 1]
    assert abs(chosen["guide"]["slope"] / chosen["guide"]["promised"] - 1) < 0.02


def test_the_measured_slope_is_that_of_the_losses() -> None:
    run, batches = guided({"0.weight": 1.0, "1.weight": 1.0})
    _, chosen = run.estimate(batches, 0, EXAMPLES)
    found = chosen["guide"]
    # The true gradient keeps what it promises, as far as the distance lets one see.
    assert abs(found["slope"] - found["promised"]) < 0.02 * found["promised"]


@pytest.mark.parametrize("lost", [math.nan, math.inf])
@pytest.mark.parametrize(("count", "followed"), [(1, [0, 1]), (EXAMPLES, [])])
def test_losses_that_are_not_finite_confirm_nothing(
    lost: float, count: int, followed: list[int]
) -> None:
    guide, batches = guided({"0.weight": 1.0, "1.weight": 1.0})
    start = Squares().losses(guide.evaluator.model, batches[0]).detach()

    class Cliffs(Squares):
        def losses(self, model: nn.Module, batch: Batch) -> Tensor:
            found = super().losses(model, batch).view(-1, EXAMPLES)
            moved = (found != start) & (torch.arange(EXAMPLES) < count)
            return found.masked_fill(moved, lost).flatten()

    guide.guide.objective = guide.evaluator.objective = Cliffs()
    _, chosen = guide.estimate(batches, 0, EXAMPLES)
    assert guide.followed == chosen["guide"]["followed"] == followed
    assert math.isfinite(chosen["guide"]["slope"])


def test_checks_become_rare_and_cost_what_is_said() -> None:
    run, batches = guided({"0.weight": 1.0, "1.weight": 1.0})
    checked = []
    for step in range(120):
        allowed, before = run.passes(step), run.evaluator.forward_passes
        if run.asks(step):
            _, chosen = run.estimate(batches, step, EXAMPLES)
            checked += [step] if "guide" in chosen else []
        assert run.evaluator.forward_passes - before <= allowed
    assert checked == [0, FIRST_WAIT, 3 * FIRST_WAIT, 7 * FIRST_WAIT]
    first = run.evaluator.forward_passes - 120 - 3 * CHECK_PASSES
    assert first <= FIRST_PASSES + CHECK_PASSES


def test_a_guide_that_says_nothing_moves_nothing_and_its_check_waits() -> None:
    run, batches = guided({"0.weight": 0.0, "1.weight": 0.0})
    estimate, chosen = run.estimate(batches, 0, EXAMPLES)
    assert (estimate.gradients, estimate.slope, chosen) == ({}, 0.0, {})
    assert run.asks(1)
    assert estimate.sensitivity > 0
    run.guide.changes = {"0.weight": 1.0, "1.weight": 1.0}
    assert "guide" in run.estimate(batches, 1, EXAMPLES)[1]
    assert run.followed == [0, 1]


@pytest.mark.parametrize(
    ("too_much", "parts", "shorter"),
    [(2.0, EXAMPLES, 4.0), (0.5, EXAMPLES, 1.0), (2.0, 1, 1.0)],
    ids=["half is kept", "twice", "half, but how sure is not known"],
)
def test_steps_get_shorter_where_the_loss_keeps_less_than_at_first(
    too_much: float, parts: int, shorter: float
) -> None:
    run, batches = guided({"0.weight": 1.0, "1.weight": 1.0})
    start = run.estimate(batches, 0, parts)[0].sensitivity
    for by in (too_much, 1.0):
        run.guide.changes = {"0.weight": by, "1.weight": by}
        found = run.estimate(batches, run.due, parts)[0]
        assert found.sensitivity == pytest.approx(shorter * start, rel=0.05)
    assert run.followed == [0, 1]


def test_state_carries_a_guide_on() -> None:
    run, batches = guided({"0.weight": 1.0})
    run.estimate(batches, 0, EXAMPLES)
    other, _ = guided({"0.weight": 1.0})
    other.state = run.state
    assert (other.followed, other.due, other.rest) == (run.followed, run.due, run.rest)
    assert other.told == run.told


def test_the_rule_forgets_what_candidates_left() -> None:
    theta = nn.Parameter(torch.zeros(6))
    space = FlatSpace({"theta": theta})
    rule = RULES["guided"](space, learning_rate=0.1)

    def step(estimate: Estimate) -> Tensor:
        before = theta.detach().clone()
        rule.estimate = estimate
        rule.step()
        return theta.detach() - before

    found = Estimate(Direction.of(3), 1e6, (1.0,) * 4)
    # As `Normalized`: a root mean square of the learning rate, twice as long for four passes.
    assert step(found).square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-4)
    gradient = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0])
    read = Estimate(Direction(), 1.0, (1.0,), gradients={"theta": gradient})
    # As the first step of Adam: the learning rate, against the sign of the gradient.
    torch.testing.assert_close(step(read), -0.1 * gradient.sign())
