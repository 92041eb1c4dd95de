"""The guide of a transformer against back-propagation, on models whose upper layers do nothing."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tiny import BASES, LAYERS, MODEL, PAD, SIZES, VOCABULARY, WIDTH, bert, llama, opt
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoTokenizer, BitNetConfig, BitNetForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zo_peft import UserError
from zo_peft.core.batch import Batch
from zo_peft.data import Collator
from zo_peft.models.adapters import prepare, tuned_parameters
from zo_peft.models.guide import ResidualGuide, may_read
from zo_peft.models.loading import load_base
from zo_peft.objectives.scoring import (
    ClassificationObjective,
    CompletionObjective,
    OptionObjective,
    PolicyObjective,
)

#: The modules of each family that write into the residual stream, from the attention and the MLP.
WRITERS = {"llama": ("o_proj", "down_proj"), "opt": ("out_proj", "fc2")}
QUERY_VALUE = ["q_proj", "v_proj"]


def batch(rows: int = 5, scored: int = 1, uneven: bool = False, before: int = 8) -> Batch:
    """Prompts of several lengths, padded in front; the last `scored` positions have labels.

    Args:
        uneven: the first of them has no label in the first row.
        before: the tokens in front of them.
    """
    torch.manual_seed(3)
    length = before + scored
    ids = torch.randint(1, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        ids[row, :row], mask[row, :row] = PAD, 0
    where = torch.arange(length - scored, length)
    first = int(uneven)
    return Batch(
        {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.randint(2, (rows,)) if scored == 1 else ids,
            "rows": torch.arange(rows).repeat_interleave(scored)[first:],
            "positions": where.repeat(rows)[first:],
            "option_tokens": torch.tensor([[5, 6]] * rows),
            "tokens": torch.randint(1, VOCABULARY, (rows * scored - first,)),
        }
    )


def silenced(model: PreTrainedModel, writers: tuple[str, str]) -> PreTrainedModel:
    """Only the attention of the lowest layer still writes into the residual stream."""
    for name, module in model.named_modules():
        attention, mlp = (name.endswith(writer) for writer in writers)
        if mlp or (attention and ".0." not in name):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return model


def adapted(model: PreTrainedModel, targets: Any, **settings: Any) -> PeftModel:
    settings = {"task_type": "CAUSAL_LM", **settings}
    config = LoraConfig(r=3, target_modules=targets, **settings)
    torch.manual_seed(4)
    adapter = get_peft_model(model, config).eval()
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapter


def gradients(model: PeftModel, objective: Any, given: Batch) -> dict[str, Tensor]:
    tuned = tuned_parameters(model)
    objective.losses(model, given).mean().backward()
    found = {name: p.grad.clone() for name, p in tuned.items() if p.grad is not None}
    model.zero_grad()
    return found


def read(model: PeftModel, objective: Any, given: Batch, **settings: Any) -> dict[str, Tensor]:
    """What a guide reads, which must not depend on what its first pass finds out."""
    guide = ResidualGuide(model, tuned_parameters(model), objective, **settings)
    losses, (first,) = guide.read(given)
    assert torch.equal(losses, objective.losses(model, given))
    (second,) = guide.read(given)[1]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    return second


def assert_near(mine: dict[str, Tensor], true: dict[str, Tensor], part: str, error: float) -> None:
    names = [name for name in mine if part in name]
    assert names
    for name in names:
        assert (mine[name] - true[name]).norm() <= error * true[name].norm(), name


@pytest.mark.parametrize("before", [4, 48])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_reads_the_gradient_where_upper_layers_do_nothing(family: str, before: int) -> None:
    """Of short rows keys and values are kept, of long ones sums over them."""
    model = {"llama": llama, "opt": opt}[family]()
    writers = WRITERS[family]
    model = adapted(silenced(model, writers), [*QUERY_VALUE, writers[0]])
    for name, parameter in model.named_parameters():
        if writers[0] in name and ".0." not in name and "lora_B" in name:
            nn.init.zeros_(parameter)
    given = batch(before=before)
    found = read(model, OptionObjective(), given)
    assert len(found) == LAYERS * 6
    assert_near(found, gradients(model, OptionObjective(), given), ".0.", 1e-5)


def test_a_module_that_is_called_twice_gets_the_sum_of_its_gradients() -> None:
    targets = [*QUERY_VALUE, "o_proj"]
    torch.manual_seed(0)
    apart, base = llama(), llama()
    base.model.layers[1].self_attn = base.model.layers[0].self_attn
    apart, shared = adapted(apart, targets), adapted(base, targets)
    own = shared.state_dict(keep_vars=True)
    own |= {name.replace("layers.0.self", "layers.1.self"): x for name, x in own.items()}
    apart.load_state_dict(own)
    both, found = (read(model, OptionObjective(), batch()) for model in (apart, shared))
    assert len(found) == (LAYERS - 1) * 6
    for name in (name for name in found if "layers.0" in name):
        first, second = both[name], both[name.replace("layers.0", "layers.1")]
        assert second.norm() > 0.1 * first.norm()
        torch.testing.assert_close(found[name], first + second)


def test_readings_do_not_depend_on_the_first_batch() -> None:
    """A run that was resumed has another one; scales of 32**-0.5 are measured there."""
    model = adapted(opt(num_attention_heads=2), QUERY_VALUE)
    found = []
    for rows, before in ((1, 3), (1, 4), (2, 4), (5, 8)):
        guide = ResidualGuide(model, tuned_parameters(model), OptionObjective())
        guide.read(batch(rows, before=before))
        found.append(guide.read(batch())[1][0])
    assert len(found[0]) == 4 * LAYERS
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], found[0][name]) for name in other)


def test_heads_with_a_norm_behind_them_are_not_looked_at_again() -> None:
    sizes = {**SIZES, "intermediate_size": WIDTH, "num_key_value_heads": 2}
    base = BitNetForCausalLM(BitNetConfig(**sizes, bos_token_id=1, eos_token_id=2))
    model = adapted(base, [*QUERY_VALUE, "down_proj"])
    guide = ResidualGuide(model, tuned_parameters(model), OptionObjective())
    ((found,), (again,)) = (guide.read(batch())[1] for _ in range(2))
    assert found.keys() == again.keys()
    assert all(".down_proj." in name for name in found)
    assert [*guide.watched] == [layer.mlp.down_proj for layer in base.model.layers]


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **settings: Any) -> Any:
    """Gets what flash attention gets: which tokens are no padding, [B, S]."""
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    seen = (seen.tril() if module.is_causal else seen) & mask.bool()[:, None, None]
    return sdpa_attention_forward(module, q, k, v, seen, **settings)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_mask_of_flash_attention_tells_the_same(family: str) -> None:
    ALL_ATTENTION_FUNCTIONS.register("of_tokens", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("of_tokens", flash_attention_mask)
    causal = family == "llama"
    base, targets = (llama(), QUERY_VALUE) if causal else (bert(), ["query", "value"])
    model = adapted(base, targets, task_type="CAUSAL_LM" if causal else "SEQ_CLS")
    objective = OptionObjective() if causal else ClassificationObjective()
    expected = read(model, objective, batch())
    model.get_base_model().set_attn_implementation("of_tokens")
    found = read(model, objective, batch())
    assert found.keys() == expected.keys()
    assert len(found) >= 4 * LAYERS
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


class LossOfOne(OptionObjective):
    """The loss of one example of a batch."""

    def __init__(self, index: int) -> None:
        self.index = index

    def losses(self, model: nn.Module, given: Batch) -> Tensor:
        return super().losses(model, given)[self.index, None]


def test_reads_the_gradients_of_examples_by_themselves() -> None:
    model = adapted(silenced(llama(), WRITERS["llama"]), QUERY_VALUE)
    guide = ResidualGuide(model, tuned_parameters(model), OptionObjective())
    _, found = guide.read(batch(rows=3), parts=3)
    for index, mine in enumerate(found):
        assert_near(mine, gradients(model, LossOfOne(index), batch(rows=3)), ".0.", 1e-5)


@pytest.mark.parametrize(
    ("family", "mlp"), [("llama", ("up_proj", "down_proj")), ("opt", ("fc1", "fc2"))]
)
def test_reads_the_gradient_of_a_writer_in_the_last_layer(
    family: str, mlp: tuple[str, str]
) -> None:
    """OPT's MLP sees all tokens of a batch as if they were one row."""
    model = adapted({"llama": llama, "opt": opt}[family](), [*mlp])
    found = read(model, OptionObjective(), batch())
    assert {name for name in found if mlp[0] in name} == set()
    true = gradients(model, OptionObjective(), batch())
    last = {name: g for name, g in found.items() if f".{LAYERS - 1}." in name}
    assert_near(last, true, mlp[1], 1e-5)


@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8", "nf4"])
def test_reads_the_gradient_on_every_base(base: str, tmp_path: Any) -> None:
    torch.manual_seed(5)
    silenced(llama(), WRITERS["llama"]).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), **BASES[base])
    prepare(model, AutoTokenizer.from_pretrained(MODEL))
    found = read(adapted(model, QUERY_VALUE), OptionObjective(), batch())
    same = load_base(str(tmp_path), **BASES[base])
    same = same.dequantize(torch.float32) if base in ("int8", "nf4") else same.float()
    true = gradients(adapted(same, QUERY_VALUE), OptionObjective(), batch())
    # An int8 layer rounds its input, and bfloat16 everything.
    assert_near(found, true, ".0.", {"float32": 1e-5, "nf4": 1e-5}.get(base, 3e-2))


def test_reads_the_gradient_of_a_prefix() -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(silenced(llama(), WRITERS["llama"]), config).eval()
    (name,) = tuned_parameters(model)
    found = read(model, OptionObjective(), batch())[name].view(3, LAYERS, -1)
    true = gradients(model, OptionObjective(), batch())[name].view(3, LAYERS, -1)
    assert (found[:, 0] - true[:, 0]).norm() <= 1e-5 * true[:, 0].norm()


@pytest.mark.parametrize("objective", [CompletionObjective(), PolicyObjective(0.7)])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_reads_the_gradient_where_rows_have_several_scored_positions(
    family: str, uneven: bool, objective: CompletionObjective
) -> None:
    """As of completions. A value head of this llama serves two heads."""
    model = {"llama": llama, "opt": opt}[family]()
    model = adapted(silenced(model, WRITERS[family]), QUERY_VALUE)
    given = batch(scored=3, uneven=uneven)
    given = given | {"advantages": torch.tensor([1.0, -0.5, 0.0, 2.0, -1.5])}
    found = read(model, objective, given)
    assert len(found) == LAYERS * 4
    assert_near(found, gradients(model, objective, given), ".0.", 1e-5)


def test_a_first_pass_of_single_tokens_tells_nothing_of_rotations() -> None:
    model = adapted(silenced(llama(), WRITERS["llama"]), QUERY_VALUE)
    given = batch()
    alone = {
        "input_ids": given["input_ids"][:, -1:],
        "attention_mask": given["attention_mask"][:, -1:],
        "positions": torch.zeros_like(given["positions"]),
    }
    guide = ResidualGuide(model, tuned_parameters(model), OptionObjective())
    guide.read(Batch({**given, **alone}))
    (found,) = guide.read(given)[1]
    assert_near(found, gradients(model, OptionObjective(), given), ".0.", 1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_at_a_time_have_the_same_gradient(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(silenced(llama(), WRITERS["llama"]), QUERY_VALUE)
    given = batch(scored=3, uneven=True)
    true = gradients(model, CompletionObjective(), given)
    monkeypatch.setattr("zo_peft.models.guide.TOKENS", rows * 11)
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    guide = ResidualGuide(model, tuned_parameters(model), CompletionObjective())
    losses, (found,) = guide.read(given)
    assert seen == {1: [1] * 5, 2: [2, 2, 1]}[rows]
    torch.testing.assert_close(losses, CompletionObjective().losses(model, given))
    assert_near(found, true, ".0.", 1e-5)
    own = guide.read(given, parts=5)[1]
    assert len(own) == 5
    assert_near({n: sum(g[n] for g in own) / 5 for n in own[0]}, true, ".0.", 1e-5)


@pytest.mark.parametrize(("tokens", "seen"), [(11, [1] * 6), (35, [2] * 3), (44, [4, 2])])
def test_reads_the_gradients_of_pairs(
    tokens: int, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three rows that fit together, two are read, so that no pair is torn."""
    model = adapted(silenced(llama(), WRITERS["llama"]), QUERY_VALUE)
    given = batch(rows=6, scored=3)
    monkeypatch.setattr("zo_peft.models.guide.TOKENS", tokens)
    guide, rows = ResidualGuide(model, tuned_parameters(model), CompletionObjective()), list[int]()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    _, found = guide.read(given, parts=3)
    assert rows == seen
    for index, mine in enumerate(found):
        pair = given.of_rows(2 * index, 2 * index + 2)
        assert_near(mine, gradients(model, CompletionObjective(), pair), ".0.", 1e-5)


def test_rows_of_options_are_scored_by_themselves() -> None:
    features = [
        {"prompt_ids": [5, 6, 7], "option_ids": [[8, 9], [10]], "label": 1},
        {"prompt_ids": [9, 8], "option_ids": [[5], [6, 7, 8], [9]], "label": 2},
        {"prompt_ids": [4], "option_ids": [[11, 12], [6]], "label": 0},
    ]
    whole = Collator(PAD, is_causal=True, shares_prompts=True)(features)
    model, objective = llama(), OptionObjective()
    expected = objective.losses(model, whole)
    parts = [whole.of_rows(0, 1), whole.of_rows(1, 3)]
    found = torch.cat([objective.losses(model, part) for part in parts])
    torch.testing.assert_close(found, expected)


def test_reads_the_gradient_where_options_share_a_prompt() -> None:
    """The first tokens of all options are predicted at the same position."""
    features = [
        {"prompt_ids": [5, 6, 7], "option_ids": [[8, 9], [10]], "label": 1},
        {"prompt_ids": [9, 8], "option_ids": [[5], [6, 7, 8], [9]], "label": 2},
    ]
    given = Collator(PAD, is_causal=True, shares_prompts=True)(features)
    model = adapted(silenced(llama(), WRITERS["llama"]), QUERY_VALUE)
    found = read(model, OptionObjective(), given)
    assert_near(found, gradients(model, OptionObjective(), given), ".0.", 1e-5)


def test_layers_that_are_stacked_a_few_at_a_time_have_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted(llama(), "all-linear")
    for given, objective in (
        (batch(), OptionObjective()),
        (batch(scored=3), CompletionObjective()),
    ):
        whole = read(model, objective, given)
        monkeypatch.setattr("zo_peft.models.heads.FEW", 0)
        found = read(model, objective, given)
        monkeypatch.undo()
        assert found.keys() == whole.keys()
        assert_near(found, whole, "", 1e-5)


def test_a_head_gets_its_exact_policy_gradient() -> None:
    model = adapted(llama(), ["v_proj"], modules_to_save=["lm_head"])
    given = batch(scored=3) | {"advantages": torch.tensor([1.0, -0.5, 0.0, 2.0, -1.5])}
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    logs = (logits[given["rows"], given["positions"]] / 0.7).log_softmax(dim=1)
    likelihoods = logs[torch.arange(15), given["tokens"]].view(5, 3).mean(dim=1)
    (-given["advantages"] * likelihoods).mean().backward()
    (name,) = (name for name in tuned_parameters(model) if "lm_head" in name)
    true = {name: tuned_parameters(model)[name].grad.clone()}
    found = read(model, PolicyObjective(0.7), given)
    assert_near({name: found[name]}, true, "lm_head", 1e-5)


def test_a_new_head_gets_its_exact_gradient() -> None:
    config = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"])
    model = get_peft_model(bert(num_labels=3), config).eval()
    given = batch()
    found = read(model, ClassificationObjective(), given)
    assert_near(found, gradients(model, ClassificationObjective(), given), "classifier", 1e-6)
    assert [name for name in found if "value" in name]


@pytest.mark.parametrize("exact_layers", [0, 1, LAYERS])
def test_the_dial_differentiates_so_many_layers_and_no_more(exact_layers: int) -> None:
    model = adapted(llama(), [*QUERY_VALUE, "up_proj"])
    layers = model.get_base_model().model.layers
    seen: list[bool] = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    guide = ResidualGuide(model, tuned_parameters(model), OptionObjective(), exact_layers)
    guide.read(batch())
    seen.clear()
    (found,) = guide.read(batch())[1]
    below = LAYERS - exact_layers
    assert seen == [False] * below + [True] * exact_layers
    true = gradients(model, OptionObjective(), batch())
    exact = {name: g for name, g in found.items() if guide.part(name) >= below}
    assert len(exact) == 6 * exact_layers
    for name, gradient in exact.items():
        assert (gradient - true[name]).norm() <= 1e-5 * true[name].norm()
    assert guide.passes == {0: 1, 1: 2, LAYERS: 3}[exact_layers]


def test_nothing_that_is_tuned_is_written() -> None:
    model = adapted(llama(), QUERY_VALUE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    read(model, OptionObjective(), batch())
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_without_such_layers_are_refused() -> None:
    model = adapted(llama(), QUERY_VALUE)
    with pytest.raises(UserError, match="exact_layers=4"):
        ResidualGuide(model, tuned_parameters(model), OptionObjective(), 4)


def test_layers_on_several_devices_are_left_to_candidates() -> None:
    model = adapted(llama(), QUERY_VALUE)
    tuned = tuned_parameters(model)
    assert may_read(model, tuned)
    with FakeTensorMode():
        tuned |= {max(tuned): nn.Parameter(torch.zeros(1, device="cuda:1"))}
    assert not may_read(model, tuned)
    with pytest.raises(UserError, match="one device"):
        ResidualGuide(model, tuned, OptionObjective())
