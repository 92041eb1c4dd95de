"""The check before the first step: what shares a forward, what goes one by one, what is refused."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import CPTConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from tiny import (
    BASES,
    LORA,
    MODEL,
    PAD,
    WIDTH,
    assert_same,
    bert,
    llama,
    make_trainer,
    opt,
    theta,
)
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    BertForTokenClassification,
    BertLMHeadModel,
    Gemma3Config,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    TorchAoConfig,
)

from zo_peft import Direction, UserError
from zo_peft.core.batch import Batch
from zo_peft.core.evaluator import Evaluator
from zo_peft.core.flat_space import FlatSpace
from zo_peft.data import Collator, collator_for
from zo_peft.models.adapters import prepare, tuned_parameters
from zo_peft.models.agreement import check, rounding
from zo_peft.models.loading import base_hash, identity, load_base
from zo_peft.models.recipe import evaluator_of
from zo_peft.objectives.scoring import (
    ClassificationObjective,
    CompletionObjective,
    OptionObjective,
)

SHORT = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
LONG = {"input_ids": [9, 10, 11, 12, 13, 14, 15, 16], "labels": [-100] * 5 + [14, 15, 16]}
INSIDE = LoraConfig(task_type="CAUSAL_LM", target_modules=["mlp.inner"], r=4)


class Swapped(nn.Module):
    """A module that puts the tokens before the rows, as the attention of Longformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Pooled(Swapped):
    """A module that puts the first tokens of all rows into one, as Longformer does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x[:, :1].transpose(0, 1)).transpose(0, 1)


class Mixed(Swapped):
    """A module in which the rows of a batch see each other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + x.mean(dim=0))


class Parent(nn.Module):
    """A module that reads the weight of another, which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.read.weight


class Squares:
    repeatable = True

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"]).square().mean(dim=1)

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return self.losses(model, batch), batch["labels"], batch["labels"]


def with_modules(kind: type[nn.Module]) -> PeftModel:
    torch.manual_seed(0)
    base = llama(initializer_range=0.2)
    for layer in base.model.layers:
        layer.mlp = kind()
    return get_peft_model(base, INSIDE).eval()


def evaluator_on(model: PeftModel) -> Evaluator:
    return evaluator_of(model, FlatSpace(tuned_parameters(model)), CompletionObjective())


def checked(evaluator: Evaluator, *features: dict[str, Any]) -> int:
    plain = Collator(PAD, is_causal=True)
    return check(evaluator, plain(features), [plain([one]) for one in features])


def true_losses(evaluator: Evaluator, points: list[Direction], batch: Batch) -> list[float]:
    losses = []
    for point in points:
        with evaluator.space.displaced(point), torch.no_grad():
            losses.append(evaluator.objective.losses(evaluator.model, batch).mean().item())
    return losses


def test_what_agrees_shares_a_forward_and_nothing_is_left_behind() -> None:
    model = get_peft_model(llama(), LORA).eval()
    evaluator = evaluator_on(model)
    before, state = evaluator.space.tensors(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in before.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < checked(evaluator, SHORT, LONG) < 10
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(evaluator.space.tensors(), before)
    assert (evaluator.forward_passes, evaluator.examples_forwarded) == (0, 0)
    assert evaluator.parts([Collator(PAD)([SHORT, LONG])]) == 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Swapped, r"LlamaForCausalLM with LORA \(a loss would"),
        (Pooled, r".*\[1, .* is not the batch"),
    ],
)
def test_a_module_that_lanes_split_along_tokens_goes_one_by_one(
    kind: type[nn.Module], reason: str
) -> None:
    evaluator = evaluator_on(with_modules(kind))
    with pytest.warns(UserWarning, match=f"one by one: {reason}"):
        checked(evaluator, SHORT, LONG)
    points, batch = [0.1 * Direction.of(n) for n in range(4)], Collator(PAD)([SHORT, LONG])
    assert evaluator(points, [batch]) == pytest.approx(true_losses(evaluator, points, batch))


def test_rows_that_see_each_other_are_refused_but_for_batches_of_one() -> None:
    model = with_modules(Mixed)
    with pytest.warns(UserWarning, match="one by one"):
        checked(evaluator_on(model), LONG)
    with (
        pytest.warns(UserWarning, match="one by one"),
        pytest.raises(UserError, match=r"LlamaForCausalLM.*per_device_train_batch_size=1"),
    ):
        checked(evaluator_on(model), SHORT, LONG)


@pytest.mark.skipif(not hasattr(peft, "LilyConfig"), reason="this PEFT has no LILY")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_mixes_rows_is_found_out_in_every_dtype(dtype: torch.dtype) -> None:
    config = peft.LilyConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llama(initializer_range=0.05).to(dtype), config).eval()
    prepare(model, SimpleNamespace(pad_token_id=PAD))
    with pytest.warns(UserWarning, match="one by one"):
        checked(evaluator_on(model), LONG)
    what = "a loss would be off" if dtype == torch.float32 else "lily.layer mixes the rows"
    with (
        pytest.warns(UserWarning, match="one by one"),
        pytest.raises(UserError, match=f"LILY .*{what}.*per_device_train_batch_size=1"),
    ):
        checked(evaluator_on(model), SHORT, LONG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tuned_weight_that_no_lane_reads_is_found_out(dtype: torch.dtype) -> None:
    model = Parent().to(dtype).float()
    model.read.weight.data *= 1e-4  # its share of the loss is less than rounding allows
    evaluator = Evaluator(model, FlatSpace(dict(model.named_parameters())), Squares())
    x = torch.randn(2, 8)
    batch = Batch({"labels": torch.zeros(2), "x": x})
    alone = [Batch({"labels": torch.zeros(1), "x": x[n : n + 1]}) for n in range(2)]
    with pytest.warns(UserWarning, match="one by one: Parent"):
        check(evaluator, batch, alone)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_are_perturbed(bias: str) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], bias=bias)
    model = get_peft_model(llama(attention_bias=True, initializer_range=0.2), config).eval()
    space = FlatSpace(tuned_parameters(model, "bias"))
    evaluator = evaluator_of(model, space, CompletionObjective())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked(evaluator, SHORT, LONG)
    points, batch = [0.3 * Direction.of(n) for n in range(4)], Collator(PAD)([SHORT, LONG])
    found = evaluator(points, [batch])
    assert found == pytest.approx(true_losses(evaluator, points, batch), rel=1e-5)
    assert max(found) - min(found) > 1e-3


def test_what_is_tuned_without_effect_is_refused(tmp_path: Path) -> None:
    """PEFT's CPT assigns its parameter anew in each forward, so nobody can displace it."""
    config = CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]
    )
    trainer = make_trainer(tmp_path, config)
    with pytest.raises(UserError, match=r"nothing that is tuned changes a loss.* CPT"):
        trainer.train()


def test_the_check_is_reported_but_not_paid_for(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert trainer.facts["check_passes"] == trainer.check_passes > 0
    assert trainer.forward_passes == 4 * trainer.args.forward_passes_per_step


# ---- What is no model for this ------------------------------------------------------------------


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: bert(BertLMHeadModel), "BertLMHeadModel predicts no next tokens"),
        (lambda: bert(BertForMaskedLM), "BertForMaskedLM predicts no next tokens"),
        (t5, "T5ForConditionalGeneration"),
    ],
)
def test_other_models_than_decoders_are_refused_by_name(model: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        collator_for(model().eval(), PAD, CompletionObjective())


def test_classes_of_tokens_are_refused_by_name() -> None:
    model = bert(BertForTokenClassification).eval()
    with pytest.raises(UserError, match="BertForTokenClassification has no head"):
        collator_for(model, PAD, ClassificationObjective())


@pytest.mark.parametrize("build", [llama, opt])
def test_longer_examples_than_the_probe_get_prompts_of_their_own(build: Any) -> None:
    short = {"prompt_ids": [5, 6, 7], "option_ids": [[8, 9], [10]], "label": 0}
    longer = {"prompt_ids": [5] * 9, "option_ids": [[8, 9], [10]], "label": 0}
    collator = collator_for(build().eval(), PAD, OptionObjective(), examples=[short])
    assert collator.shares_up_to == 5
    assert "segments" in collator([short])
    assert "segments" not in collator([short, longer])


# ---- What is tuned is what is saved -------------------------------------------------------------


def test_a_base_with_layers_of_another_adapter_is_refused(tmp_path: Path) -> None:
    base = llama()
    get_peft_model(base, LORA)
    with pytest.raises(UserError, match="already has layers of an adapter"):
        make_trainer(tmp_path, model=base)


def test_trainable_tokens_that_are_no_list_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=1)
    with pytest.raises(UserError, match=r"LlamaForCausalLM with LORA does not run on text alone: "):
        make_trainer(tmp_path, config)


def test_tuned_parameters_that_share_memory_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True
    )
    with pytest.raises(UserError, match="share their memory"):
        make_trainer(tmp_path, config, model=llama(vocab_size=1024, tie_word_embeddings=True))


def test_what_would_be_tuned_but_not_saved_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(llama(vocab_size=1024), LORA)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"embed_tokens.* not saved with the adapter 'default'"):
        make_trainer(tmp_path, None, model=model)


def test_weights_that_change_after_the_trainer_was_built_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    parameters = list(tuned_parameters(trainer.model).values())
    parameters[0].data.fill_(0.5)
    with pytest.raises(UserError, match="was changed after the trainer was built"):
        trainer.train()


def test_a_parameter_that_its_module_replaces_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    module = trainer.model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"]

    def replaces(module: nn.Module, args: object) -> None:
        module.weight.data = module.weight.data.clone()

    module.register_forward_pre_hook(replaces)
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj.lora_B.* was changed"):
        trainer.train()


@pytest.mark.parametrize("base", ["bfloat16", "int8", "nf4"])
def test_biases_beside_half_precision_are_refused(base: str, tmp_path: Path) -> None:
    opt(vocab_size=1024).save_pretrained(tmp_path)
    settings = {**BASES[base], "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias="lora_only")
    with pytest.raises(UserError, match=r"bias='lora_only' .* base is in torch.bfloat16; load it"):
        make_trainer(tmp_path, config, model=model)


@pytest.mark.parametrize("resized", [False, True])
def test_the_active_adapter_is_saved_under_whatever_name(resized: bool, tmp_path: Path) -> None:
    base = llama(vocab_size=1024)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    if resized:
        base.resize_token_embeddings(1030)
    model = get_peft_model(base, LORA, adapter_name="mine")
    model.add_adapter("other", LORA)
    model.set_adapter("mine")
    trainer = make_trainer(tmp_path / "out", None, model=model)
    trainer.train()
    trainer.save_model()
    again = type(base).from_pretrained(tmp_path / "base")
    if resized:
        again.resize_token_embeddings(1030)
    loaded = PeftModel.from_pretrained(again, tmp_path / "out").eval()
    ids = torch.tensor([[5, 6, 7, 1024 if resized else 8]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_a_base_of_packed_tensors_is_hashed_by_what_they_hold() -> None:
    """As torchao's, whose weights are tensors of several tensors."""

    def packed(codes: float) -> nn.Module:
        layer = nn.Linear(4, 4, bias=False)
        halves = TwoTensor(torch.ones(4, 4), torch.full((4, 4), codes))
        layer.weight = nn.Parameter(halves, requires_grad=False)
        return layer

    assert base_hash(packed(1.0)) == base_hash(packed(1.0)) != base_hash(packed(2.0))


def with_packed_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """As torchao leaves a layer: its weight is float32 by its own word, and has parts of 8 bits."""
    codes = torch.ones(4, 4).to(dtype)
    model.packed = nn.Linear(4, 4, bias=False)
    model.packed.weight = nn.Parameter(TwoTensor(codes, codes), requires_grad=False)
    return model


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_packed_weights_are_told_from_those_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    llama(vocab_size=1024).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert set(identity(model)) == {"files", "loaded"}
    assert rounding(model) == torch.finfo(torch.float32).eps
    model = with_packed_weights(model, dtype)
    assert set(identity(model)) == {"tensors", "loaded"}
    assert rounding(model) == 2**-7
    for tune in ("weights", "scales"):
        with pytest.raises(
            UserError, match=f"tune='{tune}' is for .* base is quantized in another"
        ):
            make_trainer(tmp_path, None, model=model, tune=tune)


def test_lora_on_layers_that_others_quantized_shares_a_forward() -> None:
    """PEFT's layer for GPTQ, which asks nothing of what it wraps but a forward."""
    model = get_peft_model(llama(initializer_range=0.2), LORA)
    for layer in model.base_model.model.model.layers:
        for name in ("q_proj", "v_proj"):
            base = getattr(layer.self_attn, name).base_layer
            setattr(layer.self_attn, name, GPTQLoraLinear(base, "default", LORA, r=4))
    evaluator = evaluator_on(model.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked(evaluator, SHORT, LONG)
    points, batch = [0.3 * Direction.of(n) for n in range(4)], Collator(PAD)([SHORT, LONG])
    assert evaluator(points, [batch]) == pytest.approx(true_losses(evaluator, points, batch))


def test_a_base_that_torchao_quantizes_is_tuned_and_resumed(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())

    def trainer() -> Any:
        base = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
        return make_trainer(tmp_path, model=base, save_strategy="steps", save_steps=2)

    first, second = trainer(), trainer()
    before = base_hash(first.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "candidates are evaluated one by one")
        first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(theta(first), theta(second))
    assert base_hash(first.model) == before


def test_a_base_of_compressed_tensors_is_unpacked_before_it_gets_an_adapter(tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    original = AutoModelForCausalLM.from_pretrained(MODEL)
    scheme = quantization.preset_name_to_scheme("W8A16", ["Linear"])
    scheme.weights.group_size = 64
    quantization.apply_quantization_config(
        original,
        quantization.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]),
    )
    rounded = {}
    for name, layer in original.named_modules():
        if hasattr(layer, "weight_scale"):
            grouped = layer.weight.detach().unflatten(1, (-1, 64))
            layer.weight_scale.data = grouped.abs().amax(-1) / 127
            scales = layer.weight_scale.detach()[..., None]
            rounded[f"{name}.weight"] = ((grouped / scales).round() * scales).flatten(1)
    compressor = compressors.ModelCompressor.from_pretrained_model(original)
    compressor.compress_model(original)
    original.save_pretrained(tmp_path / "base")
    compressor.update_config(tmp_path / "base")
    base = load_base(str(tmp_path / "base"))
    for name, weight in rounded.items():
        assert torch.allclose(base.get_parameter(name), weight, atol=1e-6)
    trainer = make_trainer(tmp_path / "out", model=base, max_steps=2)
    before = base_hash(trainer.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "candidates are evaluated one by one")
        trainer.train()
    assert base_hash(trainer.model) == before
    assert rounding(trainer.model) == 2**-7


def test_weights_of_another_shape_than_the_configuration_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    llama(intermediate_size=2 * WIDTH).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"weights have other shapes than its config\.json says"):
        load_base(str(tmp_path))


def mamba() -> PreTrainedModel:
    """It has no attention, so its configuration knows no heads."""
    sizes = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def nested() -> PreTrainedModel:
    """What its configuration says of text stands in another one inside of it."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"vocab_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("build", "modules"),
    [(mamba, ["in_proj"]), (nested, r".*language_model.*(q_proj|v_proj)")],
)
def test_models_without_heads_or_with_nested_configurations_train(
    build: Any, modules: Any, tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=modules)
    trainer = make_trainer(tmp_path, config, model=build(), max_steps=2)
    assert trainer.train().global_step == 2
    assert trainer.model.config.get_text_config().pad_token_id is not None


def test_a_prefix_of_an_encoder_starts_at_random(tmp_path: Path) -> None:
    rows = [{"text": f"film {n}", "label": n % 2} for n in range(8)]
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    with pytest.warns(UserWarning, match="BertForSequenceClassification.* random prefix"):
        trainer = make_trainer(
            tmp_path, config, model=bert(vocab_size=1024), train=rows, test=rows, max_steps=1
        )
    assert trainer.train().global_step == 1


def test_weights_that_another_module_reads_are_refused_where_the_base_is_tuned(
    tmp_path: Path,
) -> None:
    """Mamba's mixer takes the weights of its convolution, which it does not call."""
    trainer = make_trainer(tmp_path, None, model=mamba(), tune="weights", max_steps=1)
    with pytest.raises(UserError, match=r"mixer\.conv1d\.weight is also read by another") as error:
        trainer.train()
    tunable = str(error.value).partition("tunable='")[2].rstrip("'")
    trainer = make_trainer(
        tmp_path, None, model=mamba(), tune="weights", tunable=tunable, max_steps=1
    )
    assert trainer.train().global_step == 1
