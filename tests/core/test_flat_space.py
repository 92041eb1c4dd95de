"""FlatSpace, its evaluator and its update: exact arithmetic, and no drift whatever happens."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import llama, noise_block
from torch import Tensor, nn

from zo_peft import Direction, UserError
from zo_peft.core import noise
from zo_peft.core.batch import Batch
from zo_peft.core.evaluator import Evaluator
from zo_peft.core.flat_space import FlatSpace
from zo_peft.core.noise import Distribution, Layout
from zo_peft.core.strategies import Estimate, mezo, run_step
from zo_peft.core.updates import SGD
from zo_peft.models.adapters import tuned_parameters
from zo_peft.train.checkpoint import TENSORS_NAME, load_state, load_tensors, save_state

DISTRIBUTIONS: tuple[Distribution, ...] = ("gaussian", "rademacher")
Arrays = dict[str, NDArray[np.float32]]


class Tiny(nn.Module):
    """Two parameters of one shape, others of other shapes, one as long as is asked, a scalar."""

    def __init__(self, long: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(3, 5))
        self.second = nn.Parameter(torch.randn(3, 5))
        self.bias = nn.Parameter(torch.randn(7))
        self.long = nn.Parameter(torch.randn(long, 1))
        self.scalar = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first.T * (x @ self.second.T)).sum(1) * self.scalar + self.bias.sum()


class PerExample:
    """The model's output on `batch["x"]` [B, 5] as the losses; records what it is run with."""

    def __init__(self) -> None:
        self.seen: list[Arrays] = []

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        assert not torch.is_grad_enabled()
        self.seen.append(arrays(dict(model.named_parameters())))
        return model(batch["x"])

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


def arrays(tensors: dict[str, Tensor] | dict[str, nn.Parameter]) -> Arrays:
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def make(long: int = 3, distribution: Distribution = "gaussian") -> tuple[Tiny, FlatSpace]:
    model = Tiny(long)
    return model, FlatSpace(dict(model.named_parameters()), distribution)


def displacement(
    name: str, shape: tuple[int, ...], direction: Direction, kind: Distribution
) -> list:
    """The terms w * z(seed) in float32, to be added one after the other."""
    size = int(np.prod(shape))
    return [
        np.float32(weight) * noise_block(seed, name, 0, size, kind).numpy().reshape(shape)
        for seed, weight in direction.terms
    ]


def moved(start: Arrays, direction: Direction, kind: Distribution) -> Arrays:
    result = {}
    for name, value in start.items():
        result[name] = value
        seeds = [seed for seed, _ in direction.terms]
        together = Direction(tuple(sorted(direction.terms, key=lambda t: seeds.index(t[0]))))
        for term in displacement(name, value.shape, together, kind):
            result[name] = result[name] + term
    return result


def equal(first: Arrays, second: Arrays) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and first[name].tobytes() == second[name].tobytes()
        for name in first
    )


def is_at(model: nn.Module, space: FlatSpace, expected: Arrays) -> bool:
    """Parameters, theta and whole buffers are where they should be."""
    parameters = arrays(dict(model.named_parameters()))
    return equal(parameters, expected) and equal(arrays(space.tensors()), expected)


DIRECTIONS = st.lists(
    st.tuples(st.integers(0, 2**63 - 1), st.floats(-10, 10, width=32)), max_size=4
).map(lambda terms: Direction(tuple(terms)))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@settings(max_examples=25)
@given(direction=DIRECTIONS)
def test_displaced_is_theta_plus_the_displacement(
    distribution: Distribution, direction: Direction
) -> None:
    model, space = make(distribution=distribution)
    start = arrays(space.tensors())
    with space.displaced(direction):
        inside = arrays(dict(model.named_parameters()))
        assert equal(arrays(space.tensors()), start)
    assert equal(inside, moved(start, direction, distribution))
    assert is_at(model, space, start)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_moves_add_up_over_all_chunks_of_a_long_parameter(distribution: Distribution) -> None:
    model, space = make(long=300_001, distribution=distribution)
    expected = arrays(space.tensors())
    direction = Direction.combine([1, 2**63 - 1], [-0.3, 1e-3])
    space.move(direction)
    expected = moved(expected, direction, distribution)
    assert is_at(model, space, expected)


def test_ten_thousand_evaluations_do_not_drift() -> None:
    model, space = make()
    start, buffers = arrays(space.tensors()), [buffer.clone() for buffer in space.buffers]
    evaluator = Evaluator(model, space, PerExample())
    batches = [Batch(x=torch.ones(2, 5))]
    for seed in range(1000):
        evaluator([s * Direction.of(seed + i) for i in range(5) for s in (0.1, -0.1)], batches)
    assert evaluator.forward_passes == 10_000
    assert is_at(model, space, start)
    assert all(torch.equal(a, b) for a, b in zip(buffers, space.buffers))
    assert all(parameter.grad is None for parameter in model.parameters())


class Interrupted(PerExample):
    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = after, error

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().losses(model, batch)


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), torch.OutOfMemoryError()])
@pytest.mark.parametrize("after", range(6))
def test_an_evaluation_that_raises_leaves_theta_alone(after: int, error: BaseException) -> None:
    model, space = make()
    start = arrays(space.tensors())
    evaluator = Evaluator(model, space, Interrupted(after, error))
    with pytest.raises(type(error)):
        evaluator([0.5 * Direction.of(s) for s in range(3)], [Batch(x=torch.ones(2, 5))] * 2)
    assert is_at(model, space, start)


@pytest.fixture
def noise_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with n: the noise of the n-th block from now on cannot be made any more."""
    noises, left = Layout.noises, [10**9]

    def raising(
        self: Layout, seeds: Sequence[int], start: int, stop: int, kind: Distribution
    ) -> Iterator[Tensor]:
        for numbers in noises(self, seeds, start, stop, kind):
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError
            yield numbers

    monkeypatch.setattr(Layout, "noises", raising)
    monkeypatch.setattr(noise, "CHUNK", 256)
    return lambda n: left.__setitem__(0, n)


@pytest.mark.parametrize("block", range(6))
@pytest.mark.parametrize("how", ["displaced", "move", "move and shrink"])
def test_running_out_of_memory_for_noise_leaves_theta_alone(
    how: str, block: int, noise_raises: Callable[[int], None]
) -> None:
    model, space = make(long=601)
    start, direction = arrays(space.tensors()), Direction.combine([1, 2], [1.0, 2.0])
    noise_raises(block)
    with pytest.raises(torch.OutOfMemoryError):  # noqa: PT012
        if how == "displaced":
            with space.displaced(direction):
                pass
        else:
            space.move(direction, {} if how == "move" else {"first": 0.5})
    assert is_at(model, space, start)


def test_the_update_uses_the_noise_whose_loss_was_measured() -> None:
    """The published memory-saving code reseeds its generator for every tensor; see design.md."""
    model, space = make()
    start, objective = arrays(space.tensors()), PerExample()
    evaluator, batches = Evaluator(model, space, objective), [Batch(x=torch.randn(4, 5))]
    eps, rate = 0.125, 0.01
    estimate = run_step(mezo(5, eps), lambda points: evaluator(points, batches))
    plus, minus = objective.seen
    slope = estimate.slope
    rule = SGD(space, rate)
    rule.estimate = estimate
    rule.step()
    for name, after in arrays(space.tensors()).items():
        measured = (plus[name].astype(float) - minus[name]) / (2 * eps)
        np.testing.assert_allclose(after, start[name] - rate * slope * measured, atol=1e-5)
        assert np.abs(measured).min() > 0
    noise = {name: plus[name] - start[name] for name in start}
    assert not np.isclose(noise["first"], noise["second"]).any()
    assert not np.isclose(noise["first"].ravel()[:7], noise["bias"]).any()


def test_sgd_shrinks_the_decayed_and_moves_all_once() -> None:
    model, space = make()
    start = arrays(space.tensors())
    direction = Direction.combine([3, 4], [0.5, -0.25])
    rule = SGD(space, 0.1, weight_decay=0.5, decayed=("first", "long"))
    rule.step()
    assert is_at(model, space, start)
    rule.estimate = Estimate(direction, 2.0, (1.0,))
    rule.step()
    for name in ("first", "long"):
        start[name] = start[name] * np.float32(1 - 0.1 * 0.5)
    expected = moved(start, -(0.1 * 2.0) * direction, "gaussian")
    assert is_at(model, space, expected)
    rule.step()
    assert is_at(model, space, expected)


def test_sgd_follows_the_learning_rate_of_a_scheduler() -> None:
    model, space = make()
    start = arrays(space.tensors())
    rule = SGD(space, 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 0.5**step)
    for seed, rate in enumerate((1.0, 0.5, 0.25)):
        rule.estimate = Estimate(Direction.of(seed), 3.0, (1.0,))
        rule.step()
        scheduler.step()
        start = moved(start, Direction(((seed, -(rate * 3.0)),)), "gaussian")
    assert is_at(model, space, start)


def test_moves_only_the_parameters_it_was_given() -> None:
    model = Tiny()
    start = arrays(dict(model.named_parameters()))
    space = FlatSpace({"second": model.second})
    whole = FlatSpace(dict(Tiny().named_parameters()))
    space.move(Direction.of(9))
    whole.move(Direction.of(9))
    after = arrays(dict(model.named_parameters()))
    assert not np.isclose(after.pop("second"), start.pop("second")).any()
    assert equal(after, start)
    # A parameter's noise does not depend on which others are tuned beside it.
    assert torch.equal(model.second, whole.tensors()["second"])
    assert space.numel == 15
    assert whole.numel == 41


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_theta_is_float32_whatever_the_parameter_was(dtype: torch.dtype) -> None:
    model = Tiny().to(dtype)
    start = {name: p.detach().float().numpy() for name, p in model.named_parameters()}
    space = FlatSpace(dict(model.named_parameters()))
    assert is_at(model, space, start)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_load_sets_theta_and_the_model() -> None:
    model, space = make()
    wanted = {name: torch.randn(tensor.shape) for name, tensor in space.tensors().items()}
    space.load(wanted)
    assert is_at(model, space, arrays(wanted))
    wanted["first"].zero_()
    assert model.first.abs().min() > 0


def test_load_refuses_another_adapters_state_and_changes_nothing() -> None:
    model, space = make()
    start = arrays(space.tensors())
    good = {name: torch.zeros(tensor.shape) for name, tensor in space.tensors().items()}
    wrong = [
        {name: tensor for name, tensor in good.items() if name != "scalar"},
        {**good, "third": torch.zeros(3)},
        {**good, "first": torch.zeros(5, 3)},
        {**good, "long": torch.zeros(4, 1)},
        {**good, "bias": torch.zeros(1)},
        {},
    ]
    for tensors in wrong:
        with pytest.raises(UserError, match="does not fit what is tuned"):
            space.load(tensors)
        assert is_at(model, space, start)


def test_there_must_be_floating_point_numbers_to_tune() -> None:
    with pytest.raises(UserError, match="nothing to tune"):
        FlatSpace({})
    integers = nn.Parameter(torch.arange(3), requires_grad=False)
    with pytest.raises(UserError, match=r"codes is torch\.int64"):
        FlatSpace({"first": Tiny().first, "codes": integers})


def test_the_state_dict_is_theta_and_can_be_saved(tmp_path: Path) -> None:
    model, space = make()
    space.move(Direction.of(1))
    expected = arrays(space.tensors())
    assert equal(arrays(model.state_dict()), expected)
    save_file(model.state_dict(), tmp_path / "views.safetensors")
    assert equal(arrays(load_file(tmp_path / "views.safetensors")), expected)
    save_state(str(tmp_path), space.tensors(), {"step": 3})
    assert equal(arrays(load_tensors(tmp_path / TENSORS_NAME)), expected)
    assert load_state(str(tmp_path)) == {"step": 3}
    other, fresh = make()
    fresh.load(load_tensors(tmp_path / TENSORS_NAME))
    assert is_at(other, fresh, expected)


def test_peft_saves_the_views_as_its_own_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(num_hidden_layers=1), LoraConfig(target_modules=["q_proj"]))
    space = FlatSpace(tuned_parameters(model))
    space.move(0.1 * Direction.of(1))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    ours = {name.replace(".default", ""): t for name, t in space.tensors().items()}
    assert len(saved) == 2
    assert equal(arrays(saved), arrays(ours))


def test_the_evaluator_means_over_examples_and_counts() -> None:
    model, space = make()
    start, objective = arrays(space.tensors()), PerExample()
    evaluator = Evaluator(model, space, objective)
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(rows, 5)).astype(np.float32) for rows in (1, 4, 2)]
    points = [0.1 * Direction.of(1), -0.2 * Direction.of(2)]
    losses = evaluator(points, [Batch(x=torch.from_numpy(x)) for x in batches])
    expected = []
    for point in points:
        p = {n: v.astype(float) for n, v in moved(start, point, "gaussian").items()}
        x = np.concatenate(batches).astype(float)
        outputs = ((x @ p["first"].T) * (x @ p["second"].T)).sum(1) * p["scalar"] + p["bias"].sum()
        expected.append(outputs.mean())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert evaluator.forward_passes == len(objective.seen) == 2 * 3
    assert evaluator.examples_forwarded == 2 * 7
    evaluator(points[:1], [Batch(x=torch.zeros(3, 5))])
    assert (evaluator.forward_passes, evaluator.examples_forwarded) == (7, 17)
