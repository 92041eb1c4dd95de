"""Rewards with `strategy="guided"`: what is drawn and read, learning, checkpoints, refusals."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same, theta

from scripts import reward_tuning
from zo_peft import UserError, ZOTrainer
from zo_peft.core.batch import Batch
from zo_peft.core.lanes import replaced
from zo_peft.core.noise import derive_seed
from zo_peft.errors import Notice
from zo_peft.objectives.scoring import CompletionObjective
from zo_peft.train.policy import COMPLETIONS, PolicyGuide

#: Queries cannot be read where rows have many scored positions, so candidates tune them.
make = partial(reward_tuning.make, "LoRA", strategy="guided", seed=3)
writers = partial(reward_tuning.make, "LoRA on writers", strategy="guided", seed=3)


def alike(completions: Sequence[str], **_: Any) -> list[float]:
    return [0.3] * len(completions)


def vowels(completions: Sequence[str], **_: Any) -> list[float]:
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def guide_of(trainer: ZOTrainer) -> PolicyGuide:
    assert trainer.tuner.guided is not None
    assert isinstance(trainer.tuner.guided.guide, PolicyGuide)
    return trainer.tuner.guided.guide


def test_completions_of_a_prompt_are_compared_with_each_other(tmp_path: Path) -> None:
    trainer = make(tmp_path, reward=vowels, per_device_train_batch_size=5)
    prompts = trainer.data_collator([trainer.train_dataset[index] for index in range(5)])
    guide = guide_of(trainer)
    drawn = guide.drawn([prompts])
    assert len(drawn) == COMPLETIONS
    assert len({tuple(batch["labels"].flatten().tolist()) for batch in drawn}) == COMPLETIONS
    for index, batch in enumerate(drawn):
        alone = replace(guide.rewards, seed=derive_seed(guide.rewards.seed, index))
        expected = alone.losses(trainer.model, prompts)
        assert torch.equal(batch["losses"], expected)
        assert torch.equal(guide.read(batch)[0], expected)
    losses = torch.stack([batch["losses"] for batch in drawn])
    advantages = torch.stack([batch["advantages"] for batch in drawn])
    torch.testing.assert_close(advantages, losses.mean(dim=0) - losses)


def test_a_step_makes_the_better_completions_likelier(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    settings["warmup_steps"] = 0
    trainer = writers(tmp_path, reward=vowels, **settings)
    guide = guide_of(trainer)
    drawn: list[Batch] = []
    seen: list[float] = []

    @torch.no_grad()
    def better() -> float:
        losses = [CompletionObjective().losses(trainer.model, batch) for batch in drawn]
        return -sum(float((n * batch["advantages"]).sum()) for n, batch in zip(losses, drawn))

    def kept(batches: Sequence[Batch]) -> Sequence[Batch]:
        drawn.extend(PolicyGuide.drawn(guide, batches))
        seen.append(better())
        return drawn

    with replaced([(guide, "drawn", kept)]):
        trainer.train()
    assert better() > seen[0]


def test_learns_in_few_passes(tmp_path: Path) -> None:
    reward = reward_tuning.Counted()
    trainer = writers(tmp_path, reward=reward, max_forward_passes=100)
    before = trainer.evaluate()["eval_praises"]
    trainer.train()
    assert before < 0.4
    assert trainer.evaluate()["eval_praises"] > 0.8
    assert trainer.forward_passes <= 100
    # Half of the passes of a reading draw, and none of a check does.
    assert reward.tokens < 16 * reward_tuning.COMPLETION_TOKENS * 50


@pytest.mark.parametrize(
    ("adapter", "settings", "strategy"),
    [
        ("LoRA", {}, "guided"),
        ("IA3", {}, "gv"),
        ("LoRA", {"temperature": 0.0}, "gv"),
        # The first guided step may take 72 forward passes.
        ("LoRA", {"max_forward_passes": 72}, "guided"),
        ("LoRA", {"max_forward_passes": 71}, "gv"),
        ("LoRA", {"num_candidates": 6}, "gv"),
    ],
    ids=str,
)
def test_the_default_is_a_guide_that_reads(
    adapter: str, settings: dict[str, Any], strategy: str, tmp_path: Path
) -> None:
    trainer = reward_tuning.make(adapter, tmp_path, strategy=None, **settings)
    assert trainer.args.strategy == strategy
    assert (trainer.guide is not None) == (strategy == "guided")


def test_rewards_that_are_all_alike_move_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path, reward=alike, max_steps=3)
    before = theta(trainer)
    trainer.train()
    assert_same(before, theta(trainer))
    assert trainer.tuner.estimate is not None
    assert trainer.tuner.estimate.loss == pytest.approx(-0.3)


@pytest.mark.parametrize("lost", [True, False])
def test_a_run_that_has_lost_its_reward_says_so_once(
    lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zo_peft.train.policy.LOST", 2)
    earned = iter([0.9 if lost else 0.3] * 2 * COMPLETIONS + [0.3] * 4 * COMPLETIONS)

    def reward(completions: Sequence[str], **_: Any) -> list[float]:
        return [next(earned)] * len(completions)

    trainer = make(tmp_path, reward=reward, per_device_train_batch_size=3)
    prompts = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", Notice)
        for _ in range(6):
            guide_of(trainer).drawn([prompts])
    told = [str(warning.message) for warning in told if warning.category is Notice]
    assert len(told) == lost
    assert all("0.3 in the mean after 0.9" in message for message in told)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resuming_is_not_stopping_bit_for_bit(stop: int, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    settings["per_device_train_batch_size"] = 8
    whole = make(tmp_path / "whole", reward=vowels, **settings)
    whole.train()
    resumed = make(tmp_path / "resumed", reward=vowels, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert_same(theta(whole), theta(resumed))
    assert whole.forward_passes == resumed.forward_passes


def test_candidates_tune_the_queries_at_a_distance_that_the_likelihood_told(tmp_path: Path) -> None:
    trainer = make(tmp_path, reward=vowels, max_steps=3)
    before = theta(trainer)
    trainer.train()
    queries = [name for name in before if "q_proj.lora_B" in name]
    assert all(not torch.equal(theta(trainer)[name], before[name]) for name in queries)
    guided = trainer.tuner.guided
    assert guided is not None
    assert trainer.tuner.eps.eps == guided.eps
    assert trainer.calibrations == []
    # Lengths of steps are in nats of a likelihood, whatever the rewards are.
    assert trainer.tuner.rule.sensitivity == pytest.approx(guided.sensitivity)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0"),
        ({"max_forward_passes": 60}, "72"),
    ],
)
def test_runs_that_cannot_be_guided_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path, **settings)
