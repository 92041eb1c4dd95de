"""ZOTrainer on the embedded model: training, saving, resuming, all bases and adapters."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from datasets import Dataset
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from tiny import (
    BASES,
    LORA,
    MODEL,
    assert_same,
    examples,
    llama,
    make_trainer,
    noise_block,
    theta,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from zo_peft import UserError, ZOConfig, ZOTrainer
from zo_peft.core.batch import Batch
from zo_peft.core.noise import derive_seed
from zo_peft.data.sampler import EpochSampler
from zo_peft.models.adapters import start_prefix_from_tokens
from zo_peft.models.loading import check_4bit_widths
from zo_peft.objectives.scoring import OptionObjective
from zo_peft.tools.demo import EMBEDDED

QUANTIZATION = {
    "int8": '{"load_in_8bit": true}',
    "nf4": '{"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}',
}
# Without the flag, bitsandbytes repacks NF4 weights on CPUs with AVX512-BF16 and multiplies them in
# bfloat16.
PLAIN_PEFT = """
import json, sys
import bitsandbytes, peft, torch, transformers
name, quantization, adapter, ids = sys.argv[1:]
base = transformers.AutoModelForCausalLM.from_pretrained(
    name, quantization_config=transformers.BitsAndBytesConfig(**json.loads(quantization))
)
for module in base.modules():
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        module.support_avx512bf16_for_cpu = False
model = peft.PeftModel.from_pretrained(base, adapter).eval()
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor(json.loads(ids))).logits[0, -1].tolist()))
"""
ADAPTERS: dict[str, PeftConfig] = {
    "lora": LORA,
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "ia3": IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "layer norms": LNTuningConfig(task_type="CAUSAL_LM"),
    "saved head": LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
}


def make(tmp_path: Path, peft_config: PeftConfig | None = LORA, **settings: Any) -> ZOTrainer:
    defaults = {"num_candidates": 4, "seed": 3}
    return make_trainer(tmp_path / "run", peft_config, **{**defaults, **settings})


def test_a_loaded_model_takes_no_arguments_of_loading(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_init_kwargs is for a model that is given by name"):
        make(tmp_path, model=llama(), model_init_kwargs={"dtype": "bfloat16"})


def base_hash(model: PeftModel) -> str:
    """Of every tensor of the base, parameters and buffers and quantization state alike."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.get_base_model().state_dict().items()):
        if isinstance(tensor, torch.Tensor) and not any(
            part in name for part in ("lora_", "modules_to_save", "ia3_", "ln_tuning_layers")
        ):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def raises(*_: Any, **__: Any) -> Any:
    raise AssertionError("a backward pass")


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_trains_without_autograd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd, "backward", raises)
    monkeypatch.setattr(torch.autograd, "grad", raises)
    monkeypatch.setattr(torch.Tensor, "backward", raises)
    trainer = make(tmp_path)
    before = theta(trainer)
    trainer.train()
    assert not torch.equal(flat(before), flat(theta(trainer)))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("base", BASES)
def test_tunes_the_adapter_and_never_the_base(base: str, kind: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, ADAPTERS[kind], model_init_kwargs=BASES[base])
    start, hashed = theta(trainer), base_hash(trainer.model)
    trainer.train()
    trained = theta(trainer)
    assert not any(torch.equal(start[name], trained[name]) for name in start)
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    assert base_hash(trainer.model) == hashed
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    assert base_hash(trainer.model) == hashed
    assert trainer.evaluate()["eval_loss"] == loss


@pytest.mark.parametrize("kind", ADAPTERS)
def test_plain_peft_loads_what_was_trained(kind: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, ADAPTERS[kind], learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    loaded = PeftModel.from_pretrained(base, trainer.args.output_dir).eval()
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(8)])
    with torch.no_grad():
        ours = OptionObjective().scores(trainer.model, batch)
        plain = OptionObjective().scores(loaded, batch)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_new_process_with_plain_peft_predicts_the_same(base: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, model_init_kwargs=BASES[base], learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    prompt = examples("test")[0]["prompt"]
    ids = trainer.processing_class(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = trainer.model(input_ids=ids, use_cache=False).logits[0, -1]
    arguments = [MODEL, QUANTIZATION[base], trainer.args.output_dir, json.dumps(ids.tolist())]
    output = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, *arguments], capture_output=True, text=True, check=True
    )
    plain = torch.tensor(json.loads(output.stdout.splitlines()[-1]))
    assert ours.argmax() == plain.argmax()
    torch.testing.assert_close(plain, ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strategy": "greedy", "carry_best": True, "per_example_noise": False},
        {"zo_eps": None, "learning_rate": None},
        {"update_rule": "adam"},
        {"preset": "mezo"},
        {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"tunable": "lora_B", "weight_decay": 0.1, "strategy": "mezo"},
    ],
    ids=["default", "carry_best", "automatic", "adam", "mezo", "accumulation", "tunable"],
)
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_resuming_is_not_stopping_bit_for_bit(
    settings: dict[str, Any], stop: int, tmp_path: Path
) -> None:
    settings = {"learning_rate": 1e-2, "max_steps": 9, **settings}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    first = make(tmp_path / "parts", save_strategy="steps", save_steps=stop, **settings)
    first.train()
    # A different seed for torch shows that nothing is left to a fresh adapter's values.
    second = make(tmp_path / "parts", **settings)
    for parameter in second.model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(0.5)
    second.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-{stop}")
    assert_same(theta(whole), theta(first))
    assert_same(theta(whole), theta(second))
    assert second.evaluator.forward_passes == whole.evaluator.forward_passes
    trainable = [dict(t.model.named_parameters()) for t in (whole, second)]
    assert all(
        torch.equal(trainable[0][name], trainable[1][name])
        for name, parameter in trainable[0].items()
        if parameter.requires_grad
    )


def test_writes_safetensors_and_json_and_no_pickle(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    files = {path.name for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "zo_state.safetensors", "trainer_state.json"} <= files
    suffixes = {Path(name).suffix for name in files - {"zo_journal"}}
    assert suffixes <= {".safetensors", ".json", ".md", ".jinja"}
    texts = [
        path.read_text()
        for path in Path(trainer.args.output_dir).rglob("*")
        if path.suffix in (".md", ".json")
    ]
    assert not any(str(EMBEDDED) in text for text in texts)


@pytest.mark.parametrize("name", ["zo_state.safetensors", "zo_state.json", "zo_rng_state.json"])
def test_a_damaged_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-2"
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(UserError, match=name):
        make(tmp_path).train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    other = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    with pytest.raises(UserError, match="is of another base, adapter or noise"):
        make(tmp_path, other).train(
            resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2"
        )


def test_accumulated_micro_batches_are_one_larger_batch(tmp_path: Path) -> None:
    order: dict[str, Any] = {"train_sampling_strategy": "sequential"}
    order["per_example_noise"] = False
    one = make(tmp_path, per_device_train_batch_size=8, learning_rate=1e-3, **order)
    two = make(
        tmp_path,
        **order,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
    )
    one.train()
    two.train()
    for name, tensor in theta(one).items():
        torch.testing.assert_close(theta(two)[name], tensor, rtol=1e-3, atol=1e-6)
    assert two.evaluator.forward_passes == 2 * one.evaluator.forward_passes
    assert two.evaluator.examples_forwarded == one.evaluator.examples_forwarded


def test_the_update_is_the_formula_with_the_noise_that_was_measured(tmp_path: Path) -> None:
    trainer = make(tmp_path, preset="mezo", max_steps=1, learning_rate=1e-2)
    start = theta(trainer)
    batches: list[Batch] = []
    losses = trainer.objective.losses
    trainer.objective.losses = lambda model, batch: batches.append(batch) or losses(model, batch)
    trainer.train()
    seed, eps = derive_seed(3, 0, 0), trainer.args.zo_eps
    noise = {
        name: noise_block(seed, name, 0, tensor.numel()).view(tensor.shape)
        for name, tensor in start.items()
    }
    parameters = dict(trainer.model.named_parameters())

    def loss_at(scale: float) -> float:
        for name, tensor in start.items():
            parameters[name].data.copy_(tensor + scale * noise[name])
        with torch.no_grad():
            return losses(trainer.model, batches[-1]).double().mean().item()

    slope = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
    for name, tensor in theta(trainer).items():
        expected = start[name] - 1e-2 * slope * noise[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)


def test_each_example_moves_theta_by_its_own_slope_along_its_own_noise(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        strategy="mezo",
        update_rule="sgd",
        max_steps=1,
        learning_rate=1e-2,
        warmup_steps=0,
    )
    start = theta(trainer)
    batches: list[Batch] = []
    objective_losses = trainer.objective.losses
    trainer.objective.losses = lambda model, batch: (  # type: ignore[method-assign]
        batches.append(batch) or objective_losses(model, batch)
    )
    trainer.train()
    after, expected = theta(trainer), dict(start)
    parameters = dict(trainer.model.named_parameters())
    for example in range(8):
        noise = {
            name: noise_block(derive_seed(3, 0, 0, example), name, 0, t.numel(), "rademacher")
            for name, t in start.items()
        }
        losses = []
        for scale in (1e-2, -1e-2):
            for name, tensor in start.items():
                parameters[name].data.copy_(tensor + scale * noise[name].view(tensor.shape))
            with torch.no_grad():
                # Two candidates share the batch; their rows are alike.
                losses.append(objective_losses(trainer.model, batches[-1])[example].item())
        slope = (losses[0] - losses[1]) / 2e-2
        for name, tensor in expected.items():
            expected[name] = tensor - 1e-2 * slope * noise[name].view(tensor.shape) / 8
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "layer norms"])
@pytest.mark.parametrize("budget", [200, 700])
def test_the_choice_of_eps_is_printed_kept_and_within_the_budget(
    kind: str, budget: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(
        tmp_path,
        ADAPTERS[kind],
        max_steps=-1,
        max_forward_passes=budget,
        zo_eps=None,
        logging_steps=1,
    )
    trainer.train()
    assert trainer.evaluator.forward_passes <= budget
    if kind == "lora":
        assert trainer.evaluator.forward_passes > budget - 4
        assert trainer.calibrations[0].forward_passes == 19
        assert len(trainer.calibrations) == (4 if budget == 700 else 1)
    printed = [line for line in capsys.readouterr().err.splitlines() if "zo_eps=" in line]
    assert len(printed) == len(trainer.calibrations)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["zo_eps"] == trainer.calibrations[-1].zo_eps
    assert all(log["step_size"] > 0 for log in logs[1:])


def test_a_given_learning_rate_and_eps_are_used_as_they_are(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        max_steps=1,
        learning_rate=3e-3,
        zo_eps=2e-2,
        lr_scheduler_type="constant",
    )
    before = theta(trainer)
    trainer.train()
    assert trainer.calibrations == []
    for name, tensor in trainer.space.tensors().items():
        moved = (tensor - before[name]).square().mean().sqrt().item()
        assert moved == pytest.approx(3e-3, rel=1e-4)


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_an_adapter_that_would_do_nothing_is_refused(base: str, tmp_path: Path) -> None:
    method = pytest.importorskip("peft.tuners.unilora", exc_type=ImportError)
    unilora = method.UniLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(UserError, match="UNILORA does nothing on a quantized base"):
        make(tmp_path, unilora, model_init_kwargs=BASES[base])
    options = pytest.importorskip("peft.tuners.lora.config").KasaConfig()
    kasa = LoraConfig(task_type="CAUSAL_LM", kasa_config=options, target_modules=["q_proj"])
    with pytest.raises(UserError, match="kasa_config does nothing on a quantized base"):
        make(tmp_path, kasa, model_init_kwargs=BASES[base])


def test_a_rising_loss_shortens_the_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(tmp_path, max_steps=64, per_device_train_batch_size=2)
    losses = trainer.objective.losses
    trainer.objective.losses = lambda model, batch: (  # type: ignore[method-assign]
        losses(model, batch) + 0.1 * trainer.state.global_step
    )
    trainer.train()
    assert trainer.tuner.rule.backoff == 0.5
    assert "step 63: the loss rises" in capsys.readouterr().err


def test_a_prefix_starts_from_the_activations_of_real_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[torch.Tensor] = []

    def record(model: PeftModel, token_ids: torch.Tensor) -> None:
        chosen.append(token_ids)
        start_prefix_from_tokens(model, token_ids)

    monkeypatch.setattr("zo_peft.models.adapters.start_prefix_from_tokens", record)
    trainer = make(tmp_path, ADAPTERS["prefix"])
    assert set(chosen[0].tolist()) <= set(trainer.train_dataset[0]["prompt_ids"])
    rest = torch.tensor([trainer.train_dataset[1]["prompt_ids"]])
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        prefixed = trainer.model(input_ids=rest, use_cache=False).logits
        behind_tokens = base(input_ids=torch.cat([chosen[0][None], rest], dim=1)).logits
    torch.testing.assert_close(prefixed, behind_tokens[:, len(chosen[0]) :], rtol=1e-4, atol=1e-4)


def test_loads_the_best_model_at_the_end(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        max_steps=6,
        learning_rate=3e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    losses = {
        log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log
    }
    assert len(losses) == 3
    assert trainer.evaluate()["eval_loss"] == min(losses.values())


def test_logs_what_was_spent(tmp_path: Path) -> None:
    trainer = make(tmp_path, logging_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["forward_passes"] for log in logs] == [8, 16]
    assert [log["examples_forwarded"] for log in logs] == [64, 128]
    assert all("slope" in log and "grad_norm" not in log for log in logs)


def test_a_saved_head_on_a_bfloat16_encoder_is_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForSequenceClassification(config).to(torch.bfloat16)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    rows = [{"text": row["prompt"], "label": row["label"]} for row in examples()]
    args = ZOConfig(str(tmp_path), max_steps=4, use_cpu=True, save_strategy="no", disable_tqdm=True)
    trainer = ZOTrainer(model, args, None, rows, rows, tokenizer, peft_config=lora)
    start = theta(trainer)
    trainer.train()
    heads = [name for name in start if "classifier" in name]
    assert heads
    assert all(tensor.dtype == torch.float32 for tensor in theta(trainer).values())
    assert not any(torch.equal(start[name], theta(trainer)[name]) for name in start)
    assert (
        trainer.objective.predict(trainer.model, trainer.data_collator([trainer.train_dataset[0]]))[
            0
        ].dtype
        == torch.float32
    )


@pytest.mark.parametrize(
    ("hidden", "intermediate", "named"),
    [(64, 96, "mlp.down_proj"), (96, 64, "self_attn.q_proj")],
)
def test_a_4bit_width_that_some_cpus_decode_wrongly_is_refused(
    hidden: int, intermediate: int, named: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate}
    llama(vocab_size=1024, **sizes).save_pretrained(tmp_path)
    told = rf"layers\.0\.{named}(\.base_layer)? has 96 input .* block size, 64,"
    with pytest.raises(UserError, match=told):
        make(tmp_path, model=str(tmp_path), model_init_kwargs=BASES["nf4"])
    with pytest.raises(UserError, match=told):
        make(tmp_path, model=AutoModelForCausalLM.from_pretrained(tmp_path, **BASES["nf4"]))
    # The same base loads in 8 bit.
    make(tmp_path, model=str(tmp_path), model_init_kwargs=BASES["int8"])


def test_the_block_size_is_that_of_the_layer() -> None:
    weight = bitsandbytes.nn.Params4bit(torch.randn(64, 192), blocksize=128, quant_type="nf4")
    layer = bitsandbytes.nn.Linear4bit(192, 64)
    layer.weight = weight.to("cpu")
    assert layer.weight.quant_state.absmax.numel() == 64 * 192 // 128
    with pytest.raises(UserError, match=r"has 192 input .* block size, 128,"):
        check_4bit_widths(torch.nn.Sequential(layer))


def test_gradient_options_and_double_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="peft_config"):
        make(tmp_path, None)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LORA)
    with pytest.raises(UserError, match="peft_config"):
        make(tmp_path, LORA, model=model)
    with pytest.raises(UserError, match="q_proj"):
        make(tmp_path, LoraConfig(task_type="CAUSAL_LM", target_modules=["nothing"]))
    with pytest.raises(UserError, match="tunable"):
        make(tmp_path, tunable="nothing")


def test_every_strategy_and_preset_trains(tmp_path: Path) -> None:
    for settings in (
        {"strategy": "mezo"},
        {"strategy": "n-spsa"},
        {"strategy": "greedy"},
        {"strategy": "greedy", "probe": "central"},
        {"strategy": "gv", "weighting": "split", "elite_fraction": 0.25},
        {"preset": "paper-gv"},
        {"preset": "paper-greedy"},
        {"preset": "mezo"},
    ):
        trainer = make(tmp_path, max_steps=2, **settings)
        trainer.train()
        assert trainer.evaluator.forward_passes == 2 * trainer.args.forward_passes_per_step


def test_learns_the_gradient_direction(tmp_path: Path) -> None:
    """On average a step follows the back-propagated gradient: cos(v, g) well above chance."""
    trainer = make(
        tmp_path,
        tunable="lora_B",
        num_candidates=16,
        zo_eps=1e-3,
        per_example_noise=False,
        update_rule="sgd",
        learning_rate=1e-3,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.objective.losses(trainer.model, batch).mean().backward()
    parameters = dict(trainer.model.named_parameters())
    gradient = torch.cat([parameters[n].grad.flatten() for n in trainer.space.tensors()])
    trainer.model.zero_grad()
    cosines = []
    for step in range(20):
        before = flat(theta(trainer))
        trainer.tuner.step([batch], step)
        after = flat(theta(trainer))
        cosines.append(torch.cosine_similarity(before - after, gradient, dim=0))
        trainer.space.load({n: torch.zeros_like(t) for n, t in theta(trainer).items()})
    alignment = torch.stack(cosines).square().mean() * len(gradient)
    # Weighting by the loss: c = M - 1 = 15 for small eps; 20 draws leave it within a third.
    assert 10 < alignment < 20
    assert min(cosines) > 0


def test_questions_may_come_from_an_iterator_and_are_all_of_one_kind(tmp_path: Path) -> None:
    run = make_trainer(tmp_path)
    asked = [{"prompt": row["prompt"], "options": row["options"]} for row in examples("test", 3)]
    found = run.predict(iter(asked), metric_key_prefix="new")
    assert (found.predictions == run.predict(asked).predictions).all()
    assert "new_runtime" in found.metrics
    for rows in ([*asked, {"prompt": "It was"}], [{"prompt": "It was"}, *asked]):
        with pytest.raises(UserError, match=r"row \d: it has an answer or options, or has none"):
            run.predict(rows)
    for rows, part in ((None, "one list of examples"), ([{"messages": 1}], "a list of messages")):
        with pytest.raises(UserError, match=part):
            run.predict(rows)
    with pytest.raises(UserError, match="a list of messages"):
        run.predict(Dataset.from_list([{"messages": 1}]).with_format("torch"))


def test_predictions_come_back_in_the_order_of_the_rows(tmp_path: Path) -> None:
    """Also with batches of like length, which is the default of training."""
    trainer = make(tmp_path, per_device_eval_batch_size=4)
    rows = trainer.train_dataset.select(range(12))
    assert rows["length"] != sorted(rows["length"], reverse=True)
    assert trainer.predict(rows).label_ids.tolist() == list(rows["label"])


def test_batches_hold_examples_of_like_length_in_another_order_each_epoch(tmp_path: Path) -> None:
    trainer = make(tmp_path, per_device_train_batch_size=4)
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append([batch["input_ids"] for batch in loader])
    first, second, again = epochs
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second))
    tokens = sum(len(batch) * batch.shape[1] for batch in first)
    lengths = trainer.train_dataset["length"]
    in_order = [
        max(lengths[i : i + 4]) * len(lengths[i : i + 4]) for i in range(0, len(lengths), 4)
    ]
    assert tokens < sum(in_order)


def test_compiled_frozen_parts_train_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers sets it, and nothing unsets it for the tests behind this one.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    plain = make(tmp_path / "plain", learning_rate=1e-3)
    compiled = make(
        tmp_path / "compiled",
        learning_rate=1e-3,
        torch_compile=True,
        torch_compile_backend="eager",
    )
    plain.train()
    compiled.train()
    for name, tensor in theta(plain).items():
        torch.testing.assert_close(theta(compiled)[name], tensor, rtol=1e-3, atol=1e-5)


def test_batches_of_like_length_come_in_an_order_of_seed_and_epoch_alone() -> None:
    lengths = [5 + (37 * i) % 61 for i in range(1003)]

    def order(epoch: int, seed: int = 3) -> list[int]:
        sampler = EpochSampler(LengthGroupedSampler(8, lengths=lengths), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    found = order(0)
    assert sorted(found) == list(range(1003))
    assert found == order(0)
    assert found != order(1)
    assert found != order(0, seed=4)
    batches = [[lengths[i] for i in found[start : start + 8]] for start in range(0, 1000, 8)]
    within = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    assert within < 10
    means = torch.tensor([sum(batch) / 8 for batch in batches])
    successive = torch.corrcoef(torch.stack([means[1:], means[:-1]]))[0, 1]
    assert abs(successive) < 0.3
