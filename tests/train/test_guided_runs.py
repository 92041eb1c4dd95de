"""Runs with `strategy="guided"`: learning, budgets, checkpoints, refusals."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from tiny import LORA, MODEL, assert_same, command_line, examples, make_trainer, theta
from torch import Tensor

from zo_peft import UserError, ZOConfig, ZOTrainer
from zo_peft.cli import main
from zo_peft.core.batch import Batch
from zo_peft.core.guide import Gradients
from zo_peft.models.guide import ResidualGuide

make = partial(make_trainer, strategy="guided", zo_eps=None, seed=3, logging_steps=1)
PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


def loss(trainer: ZOTrainer) -> float:
    return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("adapter", [LORA, PREFIX], ids=["lora", "prefix"])
def test_learns_in_a_few_passes(adapter: Any, tmp_path: Path) -> None:
    settings = {"max_steps": -1, "max_forward_passes": 40, "per_device_train_batch_size": 16}
    trainer = make(tmp_path, adapter, train=examples(count=200), **settings)
    before = loss(trainer)
    trainer.train()
    assert loss(trainer) < 0.3 * before
    assert trainer.forward_passes <= 40
    # The last steps have the smallest learning rates of the schedule, which follows the passes.
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates[-1] < 0.2 * max(rates)


@pytest.mark.parametrize(
    ("adapter", "strategy"),
    [
        (LORA, "guided"),
        (PREFIX, "guided"),
        (LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]), "guided"),
        (PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True), "gv"),
        (PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2), "gv"),
        (IA3Config(task_type="CAUSAL_LM"), "gv"),
        (LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens"]), "gv"),
    ],
    ids=["lora", "prefix", "head", "projected prefix", "prompt", "ia3", "embeddings"],
)
def test_is_the_default_where_it_reads_something(
    adapter: Any, strategy: str, tmp_path: Path
) -> None:
    args = ZOConfig(str(tmp_path), max_forward_passes=100, use_cpu=True)
    trainer = ZOTrainer(MODEL, args, train_dataset=examples(), peft_config=adapter)
    assert trainer.args.strategy == strategy
    assert (trainer.guide is None) == (strategy == "gv")
    assert (trainer.args.max_steps == 100) == (strategy == "guided")
    # The same settings may serve a trainer of another adapter.
    assert args.strategy == "guided"


def test_base_is_never_written_and_no_layer_has_a_graph(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    layers = trainer.model.get_base_model().model.layers
    graphs: list[bool] = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    trainer.train()
    assert graphs
    assert not any(graphs)
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resuming_is_not_stopping_bit_for_bit(stop: int, tmp_path: Path) -> None:
    targets = ["v_proj", "up_proj", "o_proj"]  # of which the guide knows two, and looks for one
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = make(tmp_path / "whole", lora, **settings)
    whole.train()
    resumed = make(tmp_path / "resumed", lora, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert_same(theta(whole), theta(resumed))
    assert whole.forward_passes == resumed.forward_passes


def test_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    killed = make(tmp_path / "killed", **settings)
    step, made = killed.training_step, []

    def training_step(*args: Any) -> Tensor:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(step(*args))
        return made[-1]

    killed.training_step = training_step
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(theta(whole), theta(resumed))


def test_replay_says_why_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path).train()
    words = ["--model_name_or_path", MODEL, "--output_dir", str(tmp_path / "again")]
    assert main(["replay", "--journal", str(tmp_path / "zo_journal"), *words]) == 2
    assert "the training data" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_candidates_tune_what_the_guide_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj", "up_proj"])
    trainer = make(tmp_path, lora, max_steps=4)
    before = theta(trainer)
    trainer.train()
    moved = {
        name for name, tensor in theta(trainer).items() if not torch.equal(tensor, before[name])
    }
    assert {name for name in before if "lora_B" in name} <= moved
    assert trainer.tuner.guided.rest == {name for name in before if "up_proj" in name}
    assert "reads 8 of 16 tensors" in capsys.readouterr().err


def test_without_anything_to_read_candidates_make_the_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ia3 = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=[]
    )
    trainer = make(tmp_path, ia3)
    before = theta(trainer)
    trainer.train()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in theta(trainer).items())
    assert "candidates make the steps" in capsys.readouterr().err


class Uphill(ResidualGuide):
    """A guide that points the wrong way."""

    def read(self, batch: Batch, parts: int = 1) -> tuple[Tensor, list[Gradients]]:
        losses, found = super().read(batch, parts)
        return losses, [{name: -g for name, g in gradients.items()} for gradients in found]


def test_a_guide_that_points_uphill_is_dropped(tmp_path: Path) -> None:
    settings = {"max_forward_passes": 400, "max_steps": -1, "per_device_train_batch_size": 16}
    alone = make(tmp_path / "a", train=examples(count=200), **settings | {"strategy": "gv"})
    before = loss(alone)
    alone.train()
    misled = make(tmp_path / "b", train=examples(count=200), **settings)
    guided = misled.tuner.guided
    guided.guide = Uphill(misled.model, misled.space.parameters, misled.objective)
    misled.train()
    assert guided.followed == []
    assert before - loss(misled) > 0.95 * (before - loss(alone))


@pytest.mark.parametrize("own", [True, False])
def test_examples_have_noise_of_their_own_if_the_run_says_so(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = ResidualGuide.read, list[int]()

    def counted(guide: Any, batch: Batch, parts: int = 1) -> Any:
        asked.append(parts)
        return read(guide, batch, parts)

    monkeypatch.setattr(ResidualGuide, "read", counted)
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "per_example_noise": own}
    make(tmp_path, **settings).train()
    assert asked == [4 if own else 1]


def test_metrics_say_what_was_read(tmp_path: Path) -> None:
    words = command_line(tmp_path / "run", strategy="guided", zo_eps=None, max_forward_passes=60)
    assert main(["train", *words]) == 0
    metrics = json.loads((tmp_path / "run" / "zo_metrics.json").read_text())
    assert metrics["strategy"] == "guided"
    assert metrics["guide"].startswith("the guide reads 16 of 16 tensors")
    assert metrics["forward_passes"] <= 60


def test_accumulated_micro_batches_are_one_larger_batch(tmp_path: Path) -> None:
    sizes = [(8, 1), (4, 2)]
    found = []
    for size, steps in sizes:
        trainer = make(
            tmp_path / str(size),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            train_sampling_strategy="sequential",
            update_rule="momentum",
            learning_rate=1.0,
        )
        before = theta(trainer)
        trainer.train()
        found.append({n: tensor - before[n] for n, tensor in theta(trainer).items()})
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "guided", "update_rule": "sgd"}, "adam"),
        ({"strategy": "guided", "update_rule": "fzoo"}, "adam"),
        ({"strategy": "gv", "exact_layers": 1}, "guided"),
        ({"strategy": "guided", "exact_layers": -1}, "exact_layers=-1"),
        ({"strategy": "guided", "max_forward_passes": 10}, "first step of guided"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ZOConfig("unused", **settings)


@pytest.mark.parametrize(
    "settings",
    [{"exact_layers": 5}, {"objective": "accuracy"}],
    ids=["more layers than there are", "no gradient"],
)
def test_runs_that_cannot_be_guided_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="guided"):
        make(tmp_path, **settings)
