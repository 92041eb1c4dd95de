"""Many candidates in one forward, frozen layers once a batch: the losses of one by one."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import PAD, SIZES, VOCABULARY, WIDTH, bert, gpt2, llama, opt
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from zo_peft import Direction
from zo_peft.core import flat_space
from zo_peft.core.batch import Batch, Objective
from zo_peft.core.flat_space import FlatSpace
from zo_peft.data import Collator, collator_for
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.memory import CPU_TOKENS, Fit
from zo_peft.models.recipe import evaluator_of
from zo_peft.models.trunk import compile_frozen_parts, find_trunk
from zo_peft.objectives.scoring import ClassificationObjective, CompletionObjective, OptionObjective


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4))


def windowed(**settings: Any) -> PreTrainedModel:
    """Every second layer sees 8 tokens back; with options the longest example has 10."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    sizes = {**SIZES, "intermediate_size": WIDTH, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"layer_types": kinds, "sliding_window": 8, "initializer_range": 0.2, **settings}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes))


LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 4}
ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(**LORA),
    "lora on all": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "saved head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "saved embeddings": LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix projection": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "ia3": IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "vera": VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=8),
}
# The lowest version of PEFT does not have these.
for name in ("UNILORA", "TINYLORA"):
    if name in PEFT_TYPE_TO_CONFIG_MAPPING:
        ADAPTERS[name.lower()] = PEFT_TYPE_TO_CONFIG_MAPPING[name](
            task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]
        )
#: Adapters that go one by one, and the module that the warning names.
NOT_IN_LANES: dict[str, tuple[PeftConfig, str]] = {
    "dora": (LoraConfig(**LORA, use_dora=True), "layers.0.self_attn.q_proj"),
    "layer norms": (
        LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
        "layers.0.input_layernorm",
    ),
    "p-tuning": (
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        "prompt_encoder.default",
    ),
}

OPTIONS = [
    {"prompt_ids": [5, 6, 7, 8, 9], "option_ids": [[11, 12], [13]], "label": 0},
    {"prompt_ids": [15, 6, 7, 8, 9, 3, 4], "option_ids": [[11, 14, 15], [13, 16]], "label": 1},
    {"prompt_ids": [2, 3], "option_ids": [[11, 12], [13], [20, 21]], "label": 2},
]
WORDS = [{**example, "option_ids": [[11], [13]], "label": 0} for example in OPTIONS]
COMPLETIONS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [9, 10, 11, 12, 13, 14], "labels": [-100, 10, -100, -100, -100, 14]},
]
CLASSES = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [9, 10, 11, 12], "labels": 0}]
DATA: dict[str, tuple[Objective, list[dict[str, Any]]]] = {
    "options": (OptionObjective(), OPTIONS),
    "label words": (OptionObjective(), WORDS),
    "completions": (CompletionObjective(), COMPLETIONS),
}
POINTS = [0.1 * Direction.of(seed) for seed in range(5)]
POINTS += [-0.1 * Direction.of(3), 0.2 * Direction.combine([0, 4], [1.0, -1.0]), Direction()]


def tune(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """A model with an adapter away from its start, where many losses do not depend on it."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, config).eval()
    for parameter in tuned_parameters(adapted).values():
        parameter.data = parameter.data.float() + 0.1 * torch.randn(parameter.shape)
    return adapted


def plain_losses(
    model: PeftModel, space: FlatSpace, objective: Objective, batch: Batch
) -> list[float]:
    """Each point alone, through PEFT's own modules: nothing shared, nothing reused."""
    losses = []
    for point in POINTS:
        with space.displaced(point), torch.no_grad():
            losses.append(objective.losses(model, batch).double().mean().item())
    return losses


def counted(module: nn.Module) -> list[int]:
    """The rows of each call of a module, as they come."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize("size", [2, 3, 8, 100])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_many_in_one_forward_give_the_losses_of_one_by_one(
    adapter: str, data: str, size: int
) -> None:
    objective, features = DATA[data]
    model = tune(llama(), ADAPTERS[adapter])
    space = FlatSpace(tuned_parameters(model))
    start = {name: tensor.clone() for name, tensor in space.tensors().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluator = evaluator_of(model, space, objective, size)
        batch = collator_for(model, PAD, objective, examples=features)(features)
        calls = counted(model.get_base_model().model.norm)
        losses = evaluator(POINTS, [batch])
    waves = -(-len(POINTS) // size)
    assert len(calls) == waves
    assert max(calls) == len(batch["input_ids"]) * -(-len(POINTS) // waves)
    expected = plain_losses(model, space, objective, Collator(PAD)(features))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert len(set(expected)) > 5
    assert evaluator.forward_passes == len(POINTS)
    assert evaluator.examples_forwarded == len(POINTS) * len(features)
    for name, parameter in tuned_parameters(model).items():
        assert torch.equal(parameter, start[name]), name


def test_values_are_made_a_buffer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, features = DATA["options"]
    made: list[int] = []
    add = flat_space.add_directions

    def counted_add(into: Tensor, *args: Any) -> None:
        made.append(into.numel())
        add(into, *args)

    def found(block: int) -> tuple[list[float], dict[str, Tensor], int]:
        monkeypatch.setattr(flat_space, "BLOCK", block)
        torch.manual_seed(0)
        model = tune(llama(), LoraConfig(task_type="CAUSAL_LM", r=2))
        space = FlatSpace(tuned_parameters(model))
        batch = collator_for(model, PAD, objective, examples=features)(features)
        losses = evaluator_of(model, space, objective, len(POINTS))(POINTS, [batch])
        space.move(POINTS[0])
        return losses, space.tensors(), space.lane_numel

    losses, one, whole = found(1 << 19)
    monkeypatch.setattr(flat_space, "add_directions", counted_add)
    others, several, held = found(100)
    assert others == losses
    assert all(torch.equal(one[name], several[name]) for name in one)
    assert held < whole / 2
    space = FlatSpace(tuned_parameters(tune(llama(), LoraConfig(task_type="CAUSAL_LM", r=2))))
    # Each token that is generated reads all values again, so none is made twice.
    space.keep_values()
    assert space.lane_numel == sum(buffer.numel() for buffer in space.buffers) > held
    assert max(made) < len(POINTS) * whole / 2


@pytest.mark.parametrize("adapter", NOT_IN_LANES)
def test_what_cannot_share_a_forward_goes_one_by_one_with_a_warning(adapter: str) -> None:
    config, module = NOT_IN_LANES[adapter]
    model = tune(llama(), config)
    space, batch = FlatSpace(tuned_parameters(model)), Collator(PAD)(COMPLETIONS)
    with pytest.warns(UserWarning, match=rf"one by one: .*{module}") as caught:  # noqa: PT031
        evaluator = evaluator_of(model, space, CompletionObjective(), 4)
        first = evaluator(POINTS, [batch])
        second = evaluator(POINTS, [batch])
    assert sum("one by one" in str(warning.message) for warning in caught) == 1
    assert first == second == plain_losses(model, space, CompletionObjective(), batch)


class Mixture(nn.Module):
    """A router that sends its expert a part of the tokens."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        chosen = torch.arange(len(tokens)) < 0.7 * len(tokens)
        output = self.mlp(x).reshape(-1, x.shape[-1])
        output[chosen] += self.q_proj(tokens[chosen])
        return output.view(x.shape)


def test_a_module_that_sees_a_part_of_the_rows_is_noticed() -> None:
    base = llama()
    base.model.layers[0].mlp = Mixture(base.model.layers[0].mlp)
    model = tune(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["mlp.q_proj"], r=4))
    space, batch = FlatSpace(tuned_parameters(model)), Collator(PAD)(COMPLETIONS)
    with pytest.warns(UserWarning, match=r"one by one: .*mlp\.q_proj"):
        losses = evaluator_of(model, space, CompletionObjective(), 8)(POINTS, [batch])
    assert losses == plain_losses(model, space, CompletionObjective(), batch)


def test_an_objective_of_the_users_goes_one_by_one() -> None:
    class Own:
        def losses(self, model: nn.Module, batch: Batch) -> Tensor:
            return CompletionObjective().losses(model, batch)

    model = tune(llama(), ADAPTERS["lora"])
    space, batch = FlatSpace(tuned_parameters(model)), Collator(PAD)(COMPLETIONS)
    with pytest.warns(UserWarning, match=r"one by one: objective Own .*`repeatable`"):
        evaluator = evaluator_of(model, space, Own())  # type: ignore[arg-type]
    assert evaluator(POINTS, [batch]) == plain_losses(model, space, CompletionObjective(), batch)


@pytest.mark.parametrize("build", [llama, opt, gpt2, bloom, windowed])
def test_every_architecture_gives_the_losses_of_one_by_one(
    build: Callable[[], PreTrainedModel],
) -> None:
    names = {gpt2: "c_attn", bloom: "query_key_value"}
    target = names.get(build, "v_proj")
    layers = LoraConfig(task_type="CAUSAL_LM", target_modules=[target], layers_to_transform=[2])
    for config in (LoraConfig(task_type="CAUSAL_LM", target_modules=[target]), layers):
        model = tune(build(), config)
        space = FlatSpace(tuned_parameters(model))
        for objective, features in DATA.values():
            batch = collator_for(model, PAD, objective, examples=features)(features)
            losses = evaluator_of(model, space, objective, 8)(POINTS, [batch])
            expected = plain_losses(model, space, objective, Collator(PAD)(features))
            np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "shares_up_to"), [(llama, 10), (opt, 10), (gpt2, 10), (bloom, 0), (windowed, 7)]
)
def test_whether_options_may_share_their_prompt_is_found_out(
    build: Callable[[], PreTrainedModel], shares_up_to: int
) -> None:
    model = tune(build(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    found = collator_for(model, PAD, OptionObjective(), examples=OPTIONS)
    sharing = {"shares_prompts": True, "shares_up_to": shares_up_to} if shares_up_to else {}
    assert found == Collator(PAD, is_causal=True, **sharing)


@pytest.mark.parametrize("quantization", ["int8", "int8 with outliers", "nf4"])
def test_a_quantized_base_gives_the_losses_of_one_by_one(quantization: str, tmp_path: Path) -> None:
    base = llama()
    if quantization == "int8 with outliers":
        for layer in base.model.layers:
            layer.input_layernorm.weight.data[:3] *= 3  # near the threshold, so candidates differ
    base.save_pretrained(tmp_path)
    config = {
        "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
        "int8 with outliers": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }[quantization]
    for name in ("lora", "ia3", "vera", *({"unilora"} & ADAPTERS.keys()), "prefix"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        model = tune(base, ADAPTERS[name])
        space, batch = FlatSpace(tuned_parameters(model)), Collator(PAD)(OPTIONS)
        losses = evaluator_of(model, space, OptionObjective(), 4)(POINTS, [batch])
        expected = plain_losses(model, space, OptionObjective(), batch)
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_about_the_losses_of_one_by_one(dtype: torch.dtype) -> None:
    model = tune(llama().to(dtype), ADAPTERS["lora"])
    space, batch = FlatSpace(tuned_parameters(model)), Collator(PAD)(OPTIONS)
    losses = evaluator_of(model, space, OptionObjective(), 8)(POINTS, [batch])
    expected = plain_losses(model, space, OptionObjective(), batch)
    np.testing.assert_allclose(losses, expected, rtol=2e-2)


CLASSIFIERS: dict[str, tuple[Callable[[], PreTrainedModel], list[str], str]] = {
    "bert": (bert, ["query"], "classifier"),
    "llama": (lambda: llama(LlamaForSequenceClassification), ["q_proj"], "score"),
}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_saved_head_shares_a_forward(family: str) -> None:
    build, targets, head = CLASSIFIERS[family]
    config = LoraConfig(task_type="SEQ_CLS", target_modules=targets, modules_to_save=[head])
    model, objective = tune(build(), config), ClassificationObjective()
    space, batch = FlatSpace(tuned_parameters(model)), Collator(PAD)(CLASSES)
    assert any(head in name for name in space.parameters)
    losses = evaluator_of(model, space, objective, 8)(POINTS, [batch])
    np.testing.assert_allclose(losses, plain_losses(model, space, objective, batch), rtol=1e-5)


# ---- Frozen layers ------------------------------------------------------------------------------


def top(*layers: int, **settings: Any) -> LoraConfig:
    return LoraConfig(**LORA, layers_to_transform=list(layers), **settings)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("config", "frozen"),
    [
        (top(2), 2),
        (top(1, 2), 1),
        (top(0), 0),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]), 3),
        (top(2, modules_to_save=["embed_tokens"]), 0),
        (ADAPTERS["prefix"], 0),
        (ADAPTERS["prompt"], 0),
    ],
)
def test_frozen_layers_run_once_a_batch(config: PeftConfig, frozen: int, size: int) -> None:
    model = tune(llama(), config)
    space, objective = FlatSpace(tuned_parameters(model)), OptionObjective()
    batches = [Collator(PAD)(OPTIONS[:2]), Collator(PAD)(OPTIONS[1:])]
    expected = [plain_losses(model, space, objective, batch) for batch in batches]
    evaluator = evaluator_of(model, space, objective, size)
    losses = evaluator(POINTS, batches)
    np.testing.assert_allclose(losses, np.mean(expected, axis=0), rtol=1e-5)
    base = model.get_base_model()
    seen = [counted(layer.self_attn.o_proj) for layer in base.model.layers]
    assert evaluator(POINTS, batches) == losses
    waves = len(batches) * -(-len(POINTS) // size)
    assert [len(rows) for rows in seen] == [2] * frozen + [waves] * (3 - frozen)
    # Nothing stays replaced.
    assert plain_losses(model, space, objective, batches[0]) == expected[0]


def test_layers_that_do_not_hand_on_to_the_next_are_not_frozen() -> None:
    base = llama()
    model = tune(base, top(2))
    batch = Collator(PAD)(COMPLETIONS)
    run = partial(CompletionObjective().losses, model, batch)
    assert len(find_trunk(model, tuned_parameters(model).values(), run)) == 2
    base.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] * 2, *args[1:]), kwargs), with_kwargs=True
    )
    assert find_trunk(model, tuned_parameters(model).values(), run) == []


def test_compiled_parts_give_the_same_losses() -> None:
    """Compiled by the backend that only traces: what is compiled, and that lanes go on working."""
    model = tune(llama(), ADAPTERS["lora"])
    space, objective = FlatSpace(tuned_parameters(model)), CompletionObjective()
    batch = Collator(PAD)(COMPLETIONS)
    expected = plain_losses(model, space, objective, batch)
    parts = compile_frozen_parts(model, space.parameters.values(), backend="eager")
    assert [type(part).__name__ for part in parts] == ["LlamaMLP", *["LlamaRMSNorm"] * 2] * 3
    losses = evaluator_of(model, space, objective, 4)(POINTS, [batch])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_an_error_in_a_wave_leaves_model_and_theta_as_they_were() -> None:
    model = tune(llama(), top(2))
    space, objective = FlatSpace(tuned_parameters(model)), CompletionObjective()
    batch = Collator(PAD)(COMPLETIONS)
    expected = plain_losses(model, space, objective, batch)
    evaluator = evaluator_of(model, space, objective, 4)
    evaluator(POINTS, [batch])
    handle = model.get_base_model().model.norm.register_forward_hook(_raise)
    with pytest.raises(KeyboardInterrupt):
        evaluator(POINTS, [batch])
    handle.remove()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert plain_losses(model, space, objective, batch) == expected


def _raise(*_: Any) -> None:
    raise KeyboardInterrupt


# ---- How many in one forward --------------------------------------------------------------------


class Bounded(CompletionObjective):
    """Runs out of memory above so many rows."""

    def __init__(self, rows: int) -> None:
        self.rows, self.calls = rows, list[int]()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        rows = len(batch["input_ids"])
        if rows > self.rows:
            raise torch.OutOfMemoryError
        self.calls.append(rows)
        return super().losses(model, batch)


@pytest.mark.parametrize(("rows", "left"), [(8, 4), (4, 2), (2, 1)])
def test_running_out_of_memory_halves_and_goes_on(rows: int, left: int) -> None:
    model = tune(llama(), ADAPTERS["lora"])
    space, batch = FlatSpace(tuned_parameters(model)), Collator(PAD)(COMPLETIONS)
    objective = Bounded(rows)
    evaluator = evaluator_of(model, space, objective, 8)
    with pytest.warns(UserWarning, match=f"candidates_per_forward={left}"):
        losses = evaluator(POINTS, [batch])
    assert evaluator.candidates_per_forward == left
    assert evaluator.forward_passes == len(POINTS)
    np.testing.assert_allclose(losses, plain_losses(model, space, objective, batch), rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluator(POINTS, [batch]) == losses


def test_one_candidate_that_does_not_fit_is_an_error() -> None:
    model = tune(llama(), ADAPTERS["lora"])
    space, batch = FlatSpace(tuned_parameters(model)), Collator(PAD)(COMPLETIONS)
    with pytest.raises(torch.OutOfMemoryError):
        evaluator_of(model, space, Bounded(1), 1)(POINTS, [batch])


def sizes(model: PeftModel, rows: int, length: int, numel: int = 1000) -> int:
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = Batch(input_ids=ids, rows=torch.arange(rows))
    return Fit(model, numel)(batch)


def test_the_default_follows_the_shapes() -> None:
    """The weights leave room, wide logits leave more, and an adapter of its own takes some."""
    with torch.device("meta"):
        narrow = OPTForCausalLM(OPTConfig(vocab_size=1000))
        wide = OPTForCausalLM(OPTConfig(vocab_size=128_000))
    one = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    narrow, wide = (get_peft_model(model, one) for model in (narrow, wide))
    assert sizes(narrow, 64, 512) == 1
    assert sizes(narrow, 1, 16) > 8
    assert sizes(wide, 64, 512) > 8
    assert sizes(wide, 64, 512, numel=2**30) < sizes(wide, 64, 512)
    by_rows = [sizes(narrow, rows, 64) for rows in (1, 2, 4, 8, 16, 32)]
    assert by_rows == sorted(by_rows, reverse=True)
    assert by_rows[0] > by_rows[-1]


def test_a_float_base_on_a_cpu_takes_no_more_tokens_than_help() -> None:
    model = tune(llama(), ADAPTERS["lora"])
    assert sizes(model, 4, 64) == CPU_TOKENS // 256
    assert sizes(model, 64, 64) == 1


def example_losses(
    model: PeftModel, space: FlatSpace, objective: Objective, batch: Batch, point: Direction
) -> Tensor:
    with space.displaced(point), torch.no_grad():
        return objective.losses(model, batch).double()


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_each_part_of_a_batch_sees_its_own_displacements(
    adapter: str, data: str, size: int
) -> None:
    objective, features = DATA[data]
    model = tune(llama(), ADAPTERS[adapter])
    space = FlatSpace(tuned_parameters(model))
    evaluator = evaluator_of(model, space, objective, size)
    batch = collator_for(model, PAD, objective, examples=features)(features)
    parts = evaluator.parts([batch])
    sees_positions = adapter == "saved head" and data != "label words"
    own_rows = len(batch["input_ids"]) == len(features)
    assert own_rows or (data == "options" and adapter.startswith(("prefix", "prompt")))
    assert parts == (len(features) if own_rows and not sees_positions else 1)
    points = [[0.1 * Direction.of(10 * g + m) for m in range(4)] for g in range(parts)]
    found = evaluator.evaluate(points, [batch])
    whole = Collator(PAD)(features)
    expected = np.array(
        [
            [
                example_losses(model, space, objective, whole, point).view(parts, -1)[g].numpy()
                for point in own
            ]
            for g, own in enumerate(points)
        ]
    )
    np.testing.assert_allclose(found.losses, expected.mean(axis=2), rtol=1e-5)
    variances = expected.mean(axis=2).var(axis=1, ddof=1)
    assert found.spread == pytest.approx(np.sqrt(variances.mean()), rel=1e-2)
    assert found.example_spread == pytest.approx(
        np.sqrt(expected.var(axis=1, ddof=1).mean()), rel=1e-2
    )
    assert evaluator.forward_passes == 4
    assert evaluator.examples_forwarded == 4 * len(features)


def test_micro_batches_are_cut_alike() -> None:
    model = tune(llama(), ADAPTERS["lora"])
    space, objective = FlatSpace(tuned_parameters(model)), OptionObjective()
    evaluator = evaluator_of(model, space, objective)
    two = [Collator(PAD)(WORDS[:2]), Collator(PAD)(WORDS[1:])]
    assert evaluator.parts(two) == 2
    assert evaluator.parts([Collator(PAD)(WORDS), two[0]]) == 1
    points = [[0.1 * Direction.of(1)], [0.2 * Direction.of(2)]]
    found = evaluator.evaluate(points, two)
    expected = [
        np.mean([example_losses(model, space, objective, b, own[0])[part] for b in two])
        for part, own in enumerate(points)
    ]
    np.testing.assert_allclose(np.ravel(found.losses), expected, rtol=1e-5)
    assert (found.spread, evaluator.forward_passes) == (0.0, 2)


def test_what_goes_one_by_one_has_one_part() -> None:
    model = tune(llama(), NOT_IN_LANES["dora"][0])
    space, batch = FlatSpace(tuned_parameters(model)), Collator(PAD)(COMPLETIONS)
    with pytest.warns(UserWarning, match="one by one"):
        evaluator = evaluator_of(model, space, CompletionObjective())
    assert evaluator.parts([batch]) == 1


def test_parts_are_right_in_the_step_that_finds_a_module_out() -> None:
    base = llama()
    base.model.layers[0].mlp = Mixture(base.model.layers[0].mlp)
    model = tune(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["mlp.q_proj"], r=4))
    space, objective = FlatSpace(tuned_parameters(model)), CompletionObjective()
    batch = Collator(PAD)(COMPLETIONS)
    evaluator = evaluator_of(model, space, objective, 8)
    points = [[0.1 * Direction.of(10 * g + m) for m in range(3)] for g in range(2)]
    assert evaluator.parts([batch]) == 2
    with pytest.warns(UserWarning, match="one by one"):
        found = evaluator.evaluate(points, [batch])
    expected = [
        [example_losses(model, space, objective, batch, point)[g].item() for point in own]
        for g, own in enumerate(points)
    ]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-6)
    assert evaluator.parts([batch]) == 1
