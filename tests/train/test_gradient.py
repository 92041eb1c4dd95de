"""The baseline with gradients: steps of back-propagation, on every base, counted as forwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PrefixTuningConfig
from tiny import BASES, LORA, MODEL, examples, make_trainer
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from zo_peft import BlackBoxObjective, GradientTrainer, UserError, ZOConfig
from zo_peft.models.adapters import tuned_parameters
from zo_peft.objectives.scoring import OptionObjective

PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def trainer(
    tmp_path: Path, peft_config: PeftConfig = LORA, base: str = "float32", **settings: Any
) -> GradientTrainer:
    defaults = {"strategy": "adam", "logging_steps": 1, "model_init_kwargs": BASES[base]}
    data = {"train": examples(count=64), "test": examples("test", 100)}
    return make_trainer(tmp_path, peft_config, GradientTrainer, **data, **{**defaults, **settings})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_of_sgd_follows_the_mean_gradient(accumulation: int, tmp_path: Path) -> None:
    tuned = trainer(
        tmp_path,
        strategy="sgd",
        learning_rate=0.5,
        max_steps=1,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=0.0,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=64 // accumulation,
    )
    parameters = tuned_parameters(tuned.model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    everything = tuned.data_collator(list(tuned.train_dataset))
    OptionObjective().losses(tuned.model, everything).mean().backward()
    expected = {name: before[name] - 0.5 * p.grad for name, p in parameters.items()}
    tuned.model.zero_grad()

    tuned.train()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=1e-6)
    assert tuned.forward_passes == 3 * accumulation
    assert tuned.examples_forwarded == 3 * 64


@pytest.mark.parametrize("base", ["float32", "int8", "nf4"])
@pytest.mark.parametrize("adapter", [LORA, PREFIX], ids=["lora", "prefix"])
def test_learns_on_every_base_and_leaves_it_alone(
    base: str, adapter: PeftConfig, tmp_path: Path
) -> None:
    tuned = trainer(
        tmp_path, adapter, base, max_steps=40, learning_rate=1e-2 if adapter is LORA else 3e-2
    )
    frozen = {
        n: p.detach().clone() for n, p in tuned.model.named_parameters() if not p.requires_grad
    }
    before = tuned.evaluate()
    tuned.train()
    after = tuned.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.3
    for name, parameter in tuned.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert tuned.forward_passes == 120
    layers = [m for m in tuned.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert {layer.gradient_checkpointing for layer in layers} == {adapter is LORA}


@pytest.mark.parametrize("base", ["float32", "int8", "nf4"])
def test_checkpointing_changes_no_gradient(base: str, tmp_path: Path) -> None:
    adapters = []
    for checkpointed in (True, False):
        tuned = trainer(tmp_path / str(checkpointed), LORA, base, max_steps=3)
        tuned.args.activation_checkpointing = checkpointed
        tuned.args.gradient_checkpointing = checkpointed
        tuned.train()
        adapters.append(tuned_parameters(tuned.model))
    first, second = adapters
    for name, parameter in first.items():
        assert torch.allclose(parameter, second[name], atol=1e-6), name


def test_spends_are_logged_and_plain_peft_loads_the_adapter(tmp_path: Path) -> None:
    tuned = trainer(tmp_path, max_steps=2)
    tuned.train()
    logged = [log for log in tuned.state.log_history if "loss" in log]
    assert [log["forward_passes"] for log in logged] == [3, 6]
    assert [log["examples_forwarded"] for log in logged] == [24, 48]
    tuned.save_model()
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    base.load_adapter(str(tmp_path))
    batch = tuned.data_collator(list(tuned.eval_dataset)[:4])
    ids = batch["input_ids"]
    with torch.no_grad():
        ours = tuned.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(base.eval()(input_ids=ids).logits, ours)


@pytest.mark.parametrize("objective", ["accuracy", "black box", "reward"])
def test_goals_without_a_gradient_are_refused(objective: str, tmp_path: Path) -> None:
    settings = {"objective": "accuracy"} if objective == "accuracy" else {}
    further: dict[str, Any] = {}
    if objective == "black box":
        further["objective"] = BlackBoxObjective(lambda state: 0.0)
    if objective == "reward":
        further["reward_funcs"] = [lambda completions, **_: [0.0] * len(completions)]
    args = ZOConfig(str(tmp_path), strategy="adam", use_cpu=True, **settings)
    with pytest.raises(UserError, match="needs a gradient"):
        GradientTrainer(MODEL, args, train_dataset=examples(), peft_config=LORA, **further)


def test_only_adapters_are_tuned_with_gradients(tmp_path: Path) -> None:
    args = ZOConfig(str(tmp_path), strategy="sgd", tune="weights", use_cpu=True)
    with pytest.raises(UserError, match="tunes adapters only"):
        GradientTrainer(MODEL, args, train_dataset=examples())


def test_only_what_is_tunable_moves(tmp_path: Path) -> None:
    tuned = trainer(tmp_path, tunable="lora_B", learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
    tuned.train()
    moved = {n for n, p in tuned.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in before if "lora_B" in name}
    assert tuned.tuned_numel == sum(before[name].numel() for name in moved)
