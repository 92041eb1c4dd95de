"""Runs that are started again, and what a run says that it did."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from peft import PromptEncoderConfig
from tiny import MODEL, assert_same, examples, make_trainer
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from zo_peft import GradientTrainer, UserError, ZOTrainer
from zo_peft.core.journal import JOURNAL_NAME, read

KINDS = {"gv": ZOTrainer, "guided": ZOTrainer, "adam": GradientTrainer}
EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
}


class Killed(BaseException):
    """Stands for the end of the process."""


class _Counted(TrainerCallback):
    steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


class _KillAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps:
            raise Killed


def make(folder: Path, strategy: str = "gv", **settings: Any) -> Any:
    defaults = {"max_steps": 6, "seed": 3, "logging_steps": 4, "save_steps": 2}
    kind = KINDS[strategy]
    return make_trainer(folder, kind=kind, strategy=strategy, **{**defaults, **settings})


def trained(trainer: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("gv", {"save_strategy": "steps", "save_steps": 4}),
        ("gv", {"max_forward_passes": 16}),
        ("gv", {"max_forward_passes": 16, "save_strategy": "steps"}),
        ("guided", {"max_forward_passes": 60, "save_strategy": "steps", "max_steps": -1}),
        ("adam", {"save_strategy": "steps"}),
        ("gv", {"save_strategy": "steps", "save_steps": 1, **EVALUATED}),
        ("adam", {"save_strategy": "steps", "save_steps": 1, **EVALUATED}),
    ],
    ids=["steps", "journal", "budget", "guided", "gradients", "stopped", "stopped with gradients"],
)
def test_a_run_that_is_over_makes_no_further_step(
    strategy: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    early = "eval_steps" in settings
    # Steps so short improve nothing, so that early stopping ends the run.
    changes = settings | {"learning_rate": 1e-7 if early else 0.01}
    runs = []
    for _ in range(3):
        callbacks = [EarlyStoppingCallback(2)] if early else None
        run = make(tmp_path, strategy, callbacks=callbacks, **changes)
        before = trained(run)
        counted = _Counted()
        run.add_callback(counted)
        result = run.train(resume_from_checkpoint=True)
        spent = run.forward_passes, run.examples_forwarded, run.state.global_step
        runs.append((spent, result.training_loss, trained(run), counted.steps))
        assert before.keys() == runs[-1][2].keys()
    assert runs[0][0][2] == (3 if early else runs[0][3])
    for again in runs[1:]:
        assert again[:2] == runs[0][:2]
        assert_same(again[2], runs[0][2])
        # Without checkpoints steps are made again from the journal, which costs nothing.
        assert again[3] == 0 or settings.keys() == {"max_forward_passes"}


def test_early_stopping_counts_on_where_the_run_was_killed(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-7, **EVALUATED}
    killed = make(tmp_path, callbacks=[EarlyStoppingCallback(3), _KillAfter(3)], **changes)
    with pytest.raises(Killed):
        killed.train()
    resumed = make(tmp_path, callbacks=[EarlyStoppingCallback(3)], **changes)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4


@pytest.mark.parametrize("strategy", ["gv", "adam"])
def test_the_training_loss_is_the_mean_over_the_whole_run(strategy: str, tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "logging_steps": 1}
    whole = make(tmp_path / "whole", strategy, **changes)
    expected = whole.train().training_loss
    logged = [log["loss"] for log in whole.state.log_history if "loss" in log]
    assert expected == pytest.approx(mean(logged), rel=1e-6)
    if strategy == "gv":
        records = read(tmp_path / "whole" / JOURNAL_NAME)[1]
        assert expected == pytest.approx(mean(record.loss for record in records), rel=1e-12)
    with pytest.raises(Killed):
        make(tmp_path / "run", strategy, callbacks=[_KillAfter(3)], **changes).train()
    resumed = make(tmp_path / "run", strategy, **changes)
    assert resumed.train(resume_from_checkpoint=True).training_loss == expected
    assert resumed.state.log_history[-1]["train_loss"] == expected
    assert resumed.forward_passes == whole.forward_passes
    assert resumed.facts["train_loss"] == expected
    assert_same(trained(whole), trained(resumed))


def test_a_prompt_made_by_a_network_goes_on_with_gradients(tmp_path: Path) -> None:
    prompt = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)
    changes = {"peft_config": prompt, "save_strategy": "steps"}
    whole = make(tmp_path / "whole", "adam", **changes)
    whole.train()
    with pytest.raises(Killed):
        make(tmp_path / "run", "adam", callbacks=[_KillAfter(3)], **changes).train()
    resumed = make(tmp_path / "run", "adam", **changes)
    resumed.train(resume_from_checkpoint=True)
    assert_same(trained(whole), trained(resumed))
    with pytest.raises(UserError, match="does not fit what is tuned here"):
        make(tmp_path / "run", "adam").train(str(tmp_path / "run/checkpoint-2"))


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps"}
    make(tmp_path / "run", train=examples()[::-1], **changes).train()
    # The same settings with other data: only the records tell the runs apart.
    with pytest.raises(Killed):
        make(tmp_path / "run", callbacks=[_KillAfter(1)], **changes).train()
    resumed = make(tmp_path / "run", save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    whole = make(tmp_path / "whole", save_strategy="no")
    whole.train()
    assert_same(trained(whole), trained(resumed))
    with pytest.raises(UserError, match="checkpoint-2 belongs to another run than the journal"):
        make(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))


def test_checkpoints_of_the_model_alone_are_passed_over(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_only_model": True}
    with pytest.raises(Killed):
        make(tmp_path / "run", callbacks=[_KillAfter(3)], **changes).train()
    resumed = make(tmp_path / "run", **changes)
    resumed.train(resume_from_checkpoint=True)
    whole = make(tmp_path / "whole")
    whole.train()
    assert_same(trained(whole), trained(resumed))


@pytest.mark.parametrize("strategy", ["gv", "adam"])
def test_a_run_without_a_full_batch_is_refused(strategy: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, strategy, dataloader_drop_last=True, per_device_train_batch_size=64)
    with pytest.raises(UserError, match=r"no step was made: .* none that is full"):
        trainer.train()


def test_mistakes_in_python_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="args is a TrainingArguments; give a ZOConfig"):
        ZOTrainer(MODEL, TrainingArguments(str(tmp_path), use_cpu=True))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="strategy='guided' has no gradients"):
        make_trainer(tmp_path, kind=GradientTrainer)
    with pytest.raises(UserError, match="strategy='adam' needs gradients"):
        make_trainer(tmp_path, strategy="adam")
    trainer = make(tmp_path, save_strategy="steps", **{**EVALUATED, "eval_steps": 2})
    trainer.args.metric_for_best_model = "f1"
    with pytest.raises(UserError, match=r"'f1' is not measured; use one of loss, .*accuracy"):
        trainer.train()


def test_only_what_is_tunable_is_trained_with_gradients(tmp_path: Path) -> None:
    trainer = make(tmp_path, "adam", tunable="lora_B")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in before if "lora_B" in name}


def test_what_is_written_says_what_was_done(tmp_path: Path) -> None:
    for strategy in ("gv", "adam"):
        run = make(tmp_path / strategy, strategy, test=examples("test", 12), max_steps=3)
        run.train()
        run.evaluate()
        facts = json.loads(json.dumps(run.facts))
        assert (facts["train_examples"], facts["eval_examples"]) == (40, 12)
        assert facts["learning_rate"] == (run.args.learning_rate or run.lr_scheduler.base_lrs[0])
        assert ("num_candidates" in facts["settings"]) == (strategy == "gv")
        assert "temperature" not in facts["settings"]
