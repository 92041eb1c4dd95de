"""Scales and weights of a base: against formulas, and never written by an evaluation."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import MODEL, examples, llama, make_trainer, noise_block
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from zo_peft import Direction, UserError, ZOTrainer
from zo_peft.core.batch import Batch
from zo_peft.core.lanes import NotInLanes
from zo_peft.core.low_rank import BASIS_STEPS, LowRank, Structure
from zo_peft.core.noise import noise_rows
from zo_peft.models.in_place_space import InPlaceSpace
from zo_peft.models.loading import base_hash
from zo_peft.models.numbers import Int8Codes, choose, find_scales, find_weights
from zo_peft.models.recipe import evaluator_of, space_of
from zo_peft.models.rounding import round_float, row_words, uniform_rows
from zo_peft.objectives.scoring import ClassificationObjective, OptionObjective
from zo_peft.scales import load_scales, save_scales

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTIZED: dict[str, BitsAndBytesConfig | None] = {
    "float32": None,
    "bfloat16": None,
    "float16": None,
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "int8 exact": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "nf4": BitsAndBytesConfig(**NF4),
    "nf4 nested": BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True),
}
IDS = torch.tensor([[5, 9, 12, 3, 40, 5], [7, 7, 31, 22, 5, 60]])

#: Base, what is tuned, noise, whether float tensors are tuned beside the quantized ones.
Case = tuple[str, str, Any, bool]


def case_name(case: Case) -> str:
    base, tune, noise, unquantized = case
    kind = noise if isinstance(noise, str) else f"{noise.structure} {noise.rank}"
    return f"{base} {tune} {kind}{' and unquantized' if unquantized else ''}"


CASES: list[Case] = [
    ("int8", "scales", "rademacher", False),
    ("int8", "scales", LowRank(2), True),
    ("nf4", "scales", "gaussian", False),
    ("nf4 nested", "scales", "gaussian", True),
    ("int8", "weights", "rademacher", False),
    ("int8", "weights", "gaussian", True),
    ("int8", "weights", LowRank(1), False),
    ("int8", "weights", LowRank(2, "lozo"), True),
    ("float32", "weights", "gaussian", False),
    ("float32", "weights", LowRank(2), False),
    ("float32", "weights", LowRank(4, "subzero"), False),
    ("bfloat16", "weights", "gaussian", False),
    ("float16", "weights", LowRank(1), False),
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with tied embeddings, on disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"intermediate_size": 128, "num_hidden_layers": 1}
    llama(**sizes, tie_word_embeddings=True).save_pretrained(folder)
    return folder


def load(folder: str | Path, base: str) -> PreTrainedModel:
    kwargs: dict[str, Any] = {"dtype": base if base in ("bfloat16", "float16") else "float32"}
    if QUANTIZED[base] is not None:
        kwargs["quantization_config"] = copy.deepcopy(QUANTIZED[base])
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def make(folder: Path, case: Case) -> tuple[PreTrainedModel, InPlaceSpace]:
    base, tune, noise, unquantized = case
    model = load(folder, base)
    find = find_scales if tune == "scales" else find_weights
    return model, InPlaceSpace(find(model, unquantized), copy.deepcopy(noise))


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_thousand_evaluations_and_an_exception_leave_every_bit(tiny: Path, case: Case) -> None:
    model, space = make(tiny, case)
    before, start = bits(model), logits(model)
    changed = 0
    for seed in range(1000):
        with space.displaced(0.05 * Direction.of(seed)):
            changed += not torch.equal(logits(model, IDS[:1, :3]), start[:1, :3])

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    last = [module for module, _ in space.owners.values()][-1]
    handle = last.register_forward_hook(fails)
    with pytest.raises(KeyboardInterrupt), space.displaced(Direction.of(3)):
        logits(model)
    handle.remove()
    assert changed == 1000
    assert bits(model) == before
    assert torch.equal(logits(model), start)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("base", ["float32", "int8 exact", "nf4", "nf4 nested"])
def test_displaced_is_the_model_with_the_formula_written_in(
    tiny: Path, base: str, noise: Any
) -> None:
    tune = "scales" if base.startswith("nf4") else "weights"
    model, space = make(tiny, (base, tune, noise, False))
    direction = Direction(((3, 0.02), (8, -0.01)))
    with space.displaced(direction):
        found = logits(model)
    for numbers in space.numbers.values():
        step = noise_sum(direction, numbers, noise)
        if tune == "scales":
            numbers.stored.mul_(step.exp())
        elif base == "float32":
            numbers.stored.add_(step)
        else:
            codes = numbers.stored + step * 127 / numbers.scales[:, None]  # type: ignore[attr-defined]
            assert (with_copy(space, numbers, direction, noise) - codes).abs().max() < 1
            numbers.stored.copy_(space.lanes([direction]).copy(numbers))
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


def with_copy(space: InPlaceSpace, numbers: Any, direction: Direction, noise: Any) -> Tensor:
    """The scratch copy that a layer reads, clamped codes taken back to where they were headed."""
    made = space.lanes([direction]).copy(numbers)
    free = made.abs() < 127
    step = noise_sum(direction, numbers, noise) * 127 / numbers.scales[:, None]
    return torch.where(free, made.float(), numbers.stored + step)


def noise_sum(direction: Direction, numbers: Any, noise: Any = "gaussian") -> Tensor:
    count = numbers.stored.numel()
    parts = [w * noise_block(s, numbers.name, 0, count, noise) for s, w in direction.terms]
    return torch.stack(parts).sum(0).view(numbers.stored.shape)


def test_int8_scales_scale_the_rows_of_the_weight(tiny: Path) -> None:
    model, space = make(tiny, ("int8", "scales", "gaussian", False))
    with space.displaced(0.3 * Direction.of(4)):
        found = logits(model)
    for numbers in space.numbers.values():
        noise = noise_block(4, numbers.name, 0, numbers.stored.numel())
        numbers.stored.mul_((0.3 * noise).exp())
        assert (numbers.stored > 0).all()
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


def test_tied_weights_see_one_noise_and_an_embedding_only_the_rows_it_reads(tiny: Path) -> None:
    model, space = make(tiny, ("float32", "weights", "gaussian", False))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is head.weight
    assert "lm_head.weight" not in space.numbers
    noise = noise_block(5, "model.embed_tokens.weight", 0, 64 * 64).view(64, 64)
    expected = embedding.weight + 0.1 * noise
    with space.displaced(0.1 * Direction.of(5)), torch.no_grad():
        seen = [embedding(IDS), head(torch.eye(64)).T]
    torch.testing.assert_close(seen[0], expected[IDS])
    torch.testing.assert_close(seen[1], expected)


@given(
    seed=st.integers(0, 2**40),
    rows=st.lists(st.integers(0, 999), min_size=1, max_size=5),
    width=st.integers(1, 300),
    kind=st.sampled_from(["gaussian", "rademacher"]),
)
@settings(max_examples=50)
def test_noise_of_rows_is_that_of_the_matrix(
    seed: int, rows: list[int], width: int, kind: Any
) -> None:
    found = noise_rows(seed, "w", torch.tensor(rows), width, kind)
    for row, numbers in zip(rows, found):
        assert torch.equal(numbers, noise_block(seed, "w", row * width, (row + 1) * width, kind))


def test_uniform_numbers_are_uniform_and_independent_of_rows_asked_for() -> None:
    def uniforms(seed: int, rows: Tensor) -> Tensor:
        return uniform_rows(row_words(seed, "w", rows), 257)

    whole = uniforms(3, torch.arange(300))
    assert torch.equal(uniforms(3, torch.tensor([7, 299])), whole[[7, 299]])
    assert stats.kstest(whole.flatten().numpy(), "uniform").pvalue > 1e-4
    for other in (whole[1:, :], whole[:, 1:], uniforms(4, torch.arange(300))):
        here = whole[: other.shape[0], : other.shape[1]]
        assert abs(np.corrcoef(here.flatten(), other.flatten())[0, 1]) < 0.02


def test_moves_of_codes_are_unbiased_over_ten_thousand_seeds() -> None:
    torch.manual_seed(1)
    layer = nn.Sequential(Linear8bitLt(48, 16, bias=False, has_fp16_weights=False))
    layer[0].weight.data = torch.randn(16, 48)
    layer[0].weight._quantize("cpu")
    space = InPlaceSpace(find_weights(layer), "gaussian")  # type: ignore[arg-type]
    (numbers,) = space.numbers.values()
    start = numbers.stored.clone()
    direction = 0.004 * Direction.of(11)
    step = noise_sum(direction, numbers) * 127 / layer[0].state.SCB[:, None]
    total, square = torch.zeros(16, 48), torch.zeros(16, 48)
    count = 10_000
    for _ in range(count):
        numbers.stored.copy_(start)
        space.move(direction)
        change = (numbers.stored - start).float()
        total += change
        square += change**2
    inner = (start.float() + step).abs() < 126
    assert (~inner).sum() < 0.05 * inner.numel()
    share = step.abs() - step.abs().floor()
    deviation = (share * (1 - share) / count).sqrt()
    z = ((total / count - step) / deviation)[inner & (deviation > 0)]
    assert z.abs().max() < 5
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3


@given(
    value=st.floats(-60000, 60000) | st.floats(-1e-6, 1e-6) | st.floats(-1, 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
@settings(max_examples=200)
def test_rounding_gives_the_neighbours_in_proportion(value: float, dtype: torch.dtype) -> None:
    values = torch.full((4001,), value)
    uniforms = torch.linspace(0, 1, 4002)[:-1]
    found = round_float(values, dtype, uniforms).float()
    ends = found.unique()
    assert len(ends) <= 2
    assert ends.min() <= values[0] <= ends.max()
    gap = float(ends.max() - ends.min())
    assert abs(float(found.double().mean()) - float(values[0])) <= gap / 1000
    assert gap <= max(abs(value) * 2**-7, 2.0**-24)


def test_small_steps_survive_in_bfloat16_where_plain_rounding_loses_them(tiny: Path) -> None:
    _, space = make(tiny, ("bfloat16", "weights", "rademacher", False))
    name = "model.layers.0.mlp.up_proj.weight"
    numbers = space.numbers[name]
    numbers.stored.fill_(1.0)
    direction, noise = 1e-4 * Direction.of(3), noise_block(3, name, 0, 64 * 128, "rademacher")
    plain = numbers.stored.clone()
    for _ in range(400):
        space.move(direction)
        plain = (plain.float() + 1e-4 * noise.view(plain.shape)).to(torch.bfloat16)
    assert (plain == 1.0).all()
    moved = (numbers.stored.float() - 1.0).flatten() * noise
    assert float(moved.mean()) == pytest.approx(0.04, rel=0.05)


def test_codes_saturate_at_the_ends_and_are_counted() -> None:
    codes = torch.tensor([[127, -127, 100, 0, 5]], dtype=torch.int8)
    weight = nn.Parameter(codes, requires_grad=False)
    layer: Any = SimpleNamespace(weight=weight, state=SimpleNamespace(SCB=torch.tensor([127.0])))
    numbers = Int8Codes("weight", layer)
    steps = torch.tensor([[3.0, -2.0, 500.0, 1.5, 0.0]])
    stepped = numbers.stepped(slice(0, 1), steps, torch.zeros(1, 5))
    assert int(numbers.saturated) == 0
    numbers.write(slice(0, 1), steps, torch.zeros(1, 5))
    assert numbers.stored.tolist() == stepped.tolist() == [[127, -127, 127, 1, 5]]
    assert (int(numbers.saturated), int(numbers.moved)) == (3, 2)


def numpy_noise(seed: int, name: str, *shape: int) -> np.ndarray:
    return noise_block(seed, name, 0, int(np.prod(shape))).double().numpy().reshape(shape)


@pytest.mark.parametrize("structure", ["lozo", "subzero", "eggroll"])
def test_low_rank_steps_are_those_of_the_papers(structure: Structure) -> None:
    """LOZO eq. 5, 6: eps U V^T and its slope over r; SubZero Alg. 2: eps U Z V^T."""
    torch.manual_seed(2)
    layer = nn.Linear(7, 5, bias=False)
    rank, eps, lr = 3, 1e-3, 0.1
    noise = LowRank(rank, structure)
    noise.basis_seed = 99
    space = InPlaceSpace(find_weights(layer), noise)  # type: ignore[arg-type]
    weight, target = layer.weight.detach().double().numpy().copy(), np.ones(5)
    x = np.linspace(-1, 1, 7)

    def loss(w: np.ndarray) -> float:
        return float(((w @ x - target) ** 2).sum())

    def measured(sign: float, scale: float) -> float:
        with space.displaced(sign * scale * Direction.of(4)), torch.no_grad():
            y = layer(torch.tensor(x, dtype=torch.float32)[None])[0]
        return float(((y.double() - 1) ** 2).sum())

    if structure == "subzero":
        u = np.linalg.qr(numpy_noise(99, "weight, left", 5, rank))[0]
        v = np.linalg.qr(numpy_noise(99, "weight, right", 7, rank))[0]
        z = u @ numpy_noise(4, "weight", rank, rank) @ v.T
        shrink = 1.0
    else:
        basis = 99 if structure == "lozo" else 4
        z = numpy_noise(4, "weight, left", 5, rank) @ numpy_noise(basis, "weight, right", 7, rank).T
        shrink = rank**0.5
    ours = eps * shrink  # the published eps, with z = U V^T / sqrt(r)
    slope = (measured(1, ours) - measured(-1, ours)) / (2 * ours)
    published = (loss(weight + eps * z) - loss(weight - eps * z)) / (2 * eps)
    assert slope * shrink == pytest.approx(published, rel=1e-3)
    space.move(-lr * slope * Direction.of(4))
    expected = weight - lr * published * z / shrink**2
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-3, atol=1e-4)


def test_a_basis_is_kept_until_it_is_drawn_anew() -> None:
    noise, cpu = LowRank(2, "lozo"), torch.device("cpu")
    shape = torch.Size([6, 4])
    first = noise.factors([Direction.of(1)], "w", shape, cpu)[1]
    assert torch.equal(noise.factors([Direction.of(2)], "w", shape, cpu)[1], first)
    noise.basis_seed = 5
    assert not torch.equal(noise.factors([Direction.of(2)], "w", shape, cpu)[1], first)


BATCHED = [case for case in CASES if isinstance(case[2], LowRank) or case[:2] == ("int8", "scales")]


@pytest.mark.parametrize("case", BATCHED, ids=case_name)
def test_candidates_in_one_forward_are_those_one_by_one(tiny: Path, case: Case) -> None:
    model, space = make(tiny, case)
    points = [0.02 * Direction.of(1), Direction(), Direction(((2, 0.03), (5, -0.02)))]
    one: list[Tensor] = []
    for point in points:
        with space.displaced(point):
            one.append(logits(model))
    with space.lanes(points).active(space.replacements(), 2, 2, 3):
        together = logits(model, IDS.repeat(3, 1)).view(3, 2, 6, -1)
    loose = {"rtol": 5e-2, "atol": 3e-2} if case[0] == "float16" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(together, torch.stack(one), **loose)
    assert float((one[0] - one[1]).abs().max()) > 1e-4


def test_full_noise_of_weights_is_one_by_one(tiny: Path) -> None:
    model, space = make(tiny, ("int8", "weights", "gaussian", False))
    with pytest.raises(NotInLanes, match="q_proj"):
        space.replacements()
    with pytest.warns(UserWarning, match="one by one"):
        evaluator = evaluator_of(model, space, OptionObjective())
    assert evaluator.candidates_per_forward == 1


class GatedNorm(nn.LayerNorm):
    """As the norms of Mamba 2 and Qwen 3 Next, which take a gate beside their input."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate.sigmoid()


class TwoLayers(nn.Module):
    """A classifier whose norm, bias and weights are all tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.norm, self.gated = nn.LayerNorm(8), GatedNorm(8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        embedded = self.embedding(input_ids)

        class Output:
            logits = self.head(self.gated(self.norm(embedded.mean(dim=1)), gate=embedded[:, 0]))

        return Output


def test_norms_and_biases_have_values_of_each_candidate() -> None:
    torch.manual_seed(0)
    model = TwoLayers()
    space = InPlaceSpace(find_weights(model), LowRank(2))  # type: ignore[arg-type]
    assert space.numbers.keys() == dict(model.named_parameters()).keys()
    batch = Batch(input_ids=torch.arange(12).view(4, 3), attention_mask=torch.ones(4, 3))
    batch["labels"] = torch.tensor([0, 1, 2, 0])
    objective = ClassificationObjective()
    points = [0.1 * Direction.of(seed) for seed in range(3)]
    one = []
    for point in points:
        with space.displaced(point):
            one.append(objective.losses(model, batch))
    with space.lanes(points).active(space.replacements(), 4, 4):
        many = objective.losses(model, batch.repeated(3)).view(3, 4)
    torch.testing.assert_close(many, torch.stack(one), rtol=1e-5, atol=1e-5)


def test_a_move_of_low_rank_noise_is_where_its_evaluation_was(tiny: Path) -> None:
    for structure in ("eggroll", "lozo", "subzero"):
        model, space = make(tiny, ("float32", "weights", LowRank(2, structure), False))
        direction = Direction(((1, 0.02), (2, 0.03)))
        with space.displaced(direction):
            seen = logits(model)
        space.move(direction)
        torch.testing.assert_close(logits(model), seen, rtol=1e-4, atol=1e-4)


def test_weight_decay_shrinks_codes_in_their_own_unit(tiny: Path) -> None:
    _, space = make(tiny, ("int8", "weights", "gaussian", False))
    name = next(iter(space.numbers))
    before = space.numbers[name].stored.float()
    space.move(Direction(), {name: 0.5})
    torch.testing.assert_close(space.numbers[name].stored.float(), before / 2, atol=1.0, rtol=0)


# ---- Whole runs ---------------------------------------------------------------------------------


def trainer(tmp_path: Path, base: str, tune: str, **changes: Any) -> ZOTrainer:
    kwargs: dict[str, Any] = {}
    if QUANTIZED[base] is not None:
        kwargs["quantization_config"] = copy.deepcopy(QUANTIZED[base])
    given = {
        "max_steps": -1,
        "zo_eps": None,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 100,
        "logging_strategy": "no",
        "model_init_kwargs": kwargs,
        **changes,
    }
    data = {"train": examples(count=1000), "test": examples("test", 200)}
    return make_trainer(tmp_path / "out", None, tune=tune, **data, **given)


@pytest.mark.parametrize(
    ("base", "tune"), [("int8", "scales"), ("int8", "weights"), ("nf4 nested", "scales")]
)
def test_defaults_learn_save_and_load(tmp_path: Path, base: str, tune: str) -> None:
    run = trainer(tmp_path, base, tune, max_forward_passes=500)
    assert run.evaluate()["eval_accuracy"] <= 0.65
    run.train()
    after = run.evaluate()
    assert after["eval_accuracy"] >= 0.85
    run.save_model()
    text = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in text + (tmp_path / "out" / "config.json").read_text()
    ids = torch.tensor([[5, 9, 80, 3]])
    expected = logits(run.model, ids)
    assert torch.equal(logits(load_tuned(tmp_path / "out"), ids), expected)
    if tune == "scales":
        fresh = load(MODEL, base)
        load_scales(fresh, str(tmp_path / "out"))
        assert torch.equal(logits(fresh, ids), expected)


def load_tuned(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize(
    ("base", "tune", "changes"),
    [
        ("int8", "scales", {}),
        ("int8", "weights", {"noise_rank": 0, "per_example_noise": False}),
        ("float32", "weights", {"preset": "lozo", "learning_rate": 1e-4}),
        ("nf4", "scales", {"update_rule": "adam"}),
    ],
)
def test_resuming_gives_the_tensors_of_not_stopping(
    tmp_path: Path,
    base: str,
    tune: str,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BASIS_STEPS, "lozo", 3)
    short = {"zo_eps": 1e-2, "max_steps": 8, "per_device_train_batch_size": 4, **changes}
    whole = trainer(tmp_path / "a", base, tune, **short)
    whole.train()
    first = trainer(tmp_path / "b", base, tune, **short, save_strategy="steps", save_steps=5)
    first.train()
    second = trainer(tmp_path / "b", base, tune, **short)
    second.train(resume_from_checkpoint=str(tmp_path / "b/out/checkpoint-5"))
    for name, tensor in whole.space.tensors().items():
        assert torch.equal(second.space.tensors()[name], tensor), name


def test_a_checkpoint_or_scales_of_another_base_are_refused(tmp_path: Path, tiny: Path) -> None:
    short = {"zo_eps": 1e-2, "max_steps": 1, "per_device_train_batch_size": 4}
    run = trainer(tmp_path, "int8", "scales", **short, save_strategy="steps", save_steps=1)
    run.train()
    checkpoint = str(tmp_path / "out/checkpoint-1")
    other = trainer(tmp_path, "int8", "weights", **short)
    before = bits(other.model)
    with pytest.raises(UserError, match="is of another base, adapter or noise"):
        other.train(resume_from_checkpoint=checkpoint)
    nf4 = trainer(tmp_path, "nf4", "scales", **short)
    with pytest.raises(UserError, match="is of another base, adapter or noise"):
        nf4.train(resume_from_checkpoint=checkpoint)
    assert bits(other.model) == before
    save_scales(str(tmp_path), run.space, base_hash(load(MODEL, "int8")))  # type: ignore[arg-type]
    model = load(tiny, "int8")
    before = bits(model)
    with pytest.raises(UserError, match="another base"):
        load_scales(model, str(tmp_path))
    assert bits(model) == before
    with pytest.raises(UserError, match="cannot be read"):
        load_scales(model, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("base", "tune", "message"),
    [
        ("float32", "scales", "needs a quantized base"),
        ("nf4", "weights", "4-bit"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_loading(
    tmp_path: Path, base: str, tune: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, base, tune, max_steps=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tune", "base", "message"),
    [("scales", "float32", "is not"), ("weights", "nf4", "4-bit")],
)
def test_loaded_models_are_refused_too(tiny: Path, tune: str, base: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        space_of(load(tiny, base), tune, False, None, "gaussian", 0, None)


def test_tunable_narrows_the_names(tiny: Path) -> None:
    owners = find_scales(load(tiny, "int8"))
    space = InPlaceSpace(choose(owners, "q_proj|down"), "gaussian")
    assert [name.split(".")[-2] for name in space.numbers] == ["q_proj", "down_proj"]
    with pytest.raises(UserError, match="matches none"):
        choose(owners, "nothing")


def test_shares_say_how_many_codes_moved(tiny: Path) -> None:
    _, space = make(tiny, ("int8", "weights", "rademacher", False))
    space.move(10.0 * Direction.of(1))
    assert space.shares()["saturated"] > 0.9
    space.move(Direction())
    assert space.shares() == {"moved": 0.0, "saturated": 0.0}


def test_rounding_differs_from_move_to_move(tiny: Path) -> None:
    _, space = make(tiny, ("int8", "weights", "rademacher", False))
    numbers = next(iter(space.numbers.values()))
    start, ends = numbers.stored.clone(), []
    for _ in range(2):
        numbers.stored.copy_(start)
        space.move(1e-4 * Direction.of(1))
        ends.append(numbers.stored.clone())
    assert not torch.equal(*ends)
