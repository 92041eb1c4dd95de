"""Runs and their journals: resumed at its end, replayed, stopped, and what is not finite."""

import errno
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig
from safetensors.torch import load_file
from tiny import LORA, MODEL, assert_same, command_line, make_trainer, theta
from transformers import TrainerCallback

from zo_peft import Direction, NonFiniteLossError, UserError, ZOTrainer
from zo_peft.cli import main
from zo_peft.core.journal import INITIAL_NAME, JOURNAL_NAME, Journal, Record, read
from zo_peft.core.low_rank import BASIS_STEPS
from zo_peft.tools.demo import EMBEDDED

ADAPTERS: dict[str, PeftConfig] = {
    "lora": LORA,
    "saved head": LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "ia3": IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
}


make = partial(make_trainer, max_steps=6, seed=3, logging_steps=1)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("step", [0, 2, 5])
@pytest.mark.parametrize("where", ["before the record", "behind the record"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zo_eps": None, "update_rule": "adam", "max_steps": 8},
        {"save_strategy": "steps", "save_steps": 2},
        {"strategy": "greedy", "per_example_noise": False, "carry_best": True},
        {"low_rank_noise": "lozo", "noise_rank": 2},
    ],
    ids=["default", "automatic", "checkpoints", "carry_best", "lozo"],
)
def test_a_run_goes_on_at_the_end_of_its_journal(
    step: int, where: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BASIS_STEPS, "lozo", 2)
    whole = make(tmp_path / "whole", **changes)
    whole.train()
    append = Journal.append

    def dies(journal: Journal, made: Record) -> None:
        if made.step == step and where == "before the record":
            raise Killed
        append(journal, made)
        if made.step == step:
            raise Killed

    monkeypatch.setattr(Journal, "append", dies)
    with pytest.raises(Killed):
        make(tmp_path / "run", **changes).train()
    monkeypatch.setattr(Journal, "append", append)

    resumed = make(tmp_path / "run", **changes)
    evaluate, steps = resumed.evaluator.evaluate, set()

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.add(resumed.state.global_step)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(resumed.evaluator, "evaluate", counted)
    resumed.train(resume_from_checkpoint=True)
    assert_same(theta(whole), theta(resumed))
    assert min(steps, default=6) == step + (where == "behind the record")
    assert resumed.forward_passes == whole.forward_passes
    assert (tmp_path / "run" / JOURNAL_NAME).read_bytes() == (
        tmp_path / "whole" / JOURNAL_NAME
    ).read_bytes()
    logs = [
        [log["loss"] for log in run.state.log_history if "loss" in log] for run in (whole, resumed)
    ]
    assert logs[0] == logs[1]


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    whole = make(tmp_path / "run", save_strategy="steps", save_steps=2)
    whole.train()
    (tmp_path / "run/checkpoint-6/trainer_state.json").write_text('{"global_step": 6, "epo')
    resumed = make(tmp_path / "run", save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert_same(theta(whole), theta(resumed))


def test_a_run_goes_on_in_another_folder_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tmp_path / "run", save_strategy="steps", save_steps=2)
    whole.train()
    before = (tmp_path / "run" / JOURNAL_NAME).read_bytes()
    other = make(tmp_path / "other")
    other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert_same(theta(whole), theta(other))
    assert (tmp_path / "other" / JOURNAL_NAME).read_bytes() == before
    assert (tmp_path / "run" / JOURNAL_NAME).read_bytes() == before
    assert (tmp_path / "other" / INITIAL_NAME).is_file()
    # The same folder by another path.
    monkeypatch.chdir(tmp_path)
    again = make(tmp_path / "other")
    again.train(resume_from_checkpoint="run/checkpoint-2")
    same = make(Path("run"), save_strategy="no")
    same.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert_same(theta(whole), theta(same))


def test_nothing_to_resume_is_a_new_run(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert len(list(read(tmp_path / "run" / JOURNAL_NAME)[1])) == 1


def test_other_settings_are_noticed(tmp_path: Path) -> None:
    make(tmp_path / "run").train()
    with pytest.raises(UserError, match="is of another base, adapter or noise"):
        make(tmp_path / "run", seed=4).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="step 1 of the journal was made with other settings"):
        make(tmp_path / "run", max_steps=7).train(resume_from_checkpoint=True)


def replayed(tmp_path: Path, *further: str) -> Path:
    out = tmp_path / "again"
    argv = ["replay", str(tmp_path / "run" / JOURNAL_NAME), "--model_name_or_path", MODEL]
    assert main([*argv, "--output_dir", str(out), *further]) == 0
    return out


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_replay_rebuilds_the_adapter_bit_for_bit(adapter: str, tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", ADAPTERS[adapter], save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    name = "adapter_model.safetensors"
    out = replayed(tmp_path)
    assert_same(load_file(tmp_path / "run" / name), load_file(out / name))
    out = replayed(tmp_path, "--until-step", "3")
    assert_same(load_file(tmp_path / "run/checkpoint-3" / name), load_file(out / name))


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"tune": "weights"}, []),
        (
            {"tune": "weights", "noise_rank": 0, "update_rule": "normalized"},
            ["--dtype", "bfloat16"],
        ),
        ({"tune": "weights", "learning_rate": 1e-3}, ["--load_in_8bit"]),
        ({"tune": "scales"}, ["--load_in_8bit"]),
    ],
    ids=["float32", "bfloat16", "int8 codes", "int8 scales"],
)
def test_replay_rebuilds_a_base(changes: dict[str, Any], base: list[str], tmp_path: Path) -> None:
    options = {"lora_target_modules": None, "eval_file": None, "max_steps": 4, **changes}
    argv = command_line(tmp_path / "run", save_strategy="no", **options)
    assert main(["train", *argv, *base]) == 0
    out = replayed(tmp_path, *base)
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", out))
    assert_same(first, second)
    start = load_file(EMBEDDED / "model/model.safetensors")
    assert any(not torch.equal(first[name].float(), start[name].float()) for name in start)


def test_replay_refuses_what_does_not_belong_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run").train()
    path = tmp_path / "run" / JOURNAL_NAME

    def message(model: str = MODEL, *further: str) -> str:
        out = str(tmp_path / "again")
        argv = ["replay", str(path), "--model_name_or_path", model, "--output_dir", out, *further]
        assert main(argv) == 2
        assert not (tmp_path / "again").exists()
        return capsys.readouterr().err

    other = tmp_path / "other"
    trainer = make(tmp_path / "weights", None, tune="weights", max_steps=3)
    trainer.train()
    trainer.save_model(str(other))
    assert "is of another base than" in message(str(other))
    # The same files, loaded in another way.
    assert "is of another base than" in message(MODEL, "--load_in_8bit")

    initial = path.with_name(INITIAL_NAME)
    kept = initial.read_bytes()
    initial.write_bytes(kept[:100])
    assert f"run/{INITIAL_NAME} cannot be read" in message()
    initial.write_bytes(kept)

    header, found = read(path)
    strange = Journal(path, {**header, "rule": {**header["rule"], "update_rule": "newton"}})
    for made in found:
        strange.append(made)
    assert "is not of this version of zo_peft" in message()
    path.write_bytes(path.read_bytes()[:-30].replace(b"lora", b"Lora"))
    assert "header of zo_journal is damaged" in message()


def test_a_journal_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make(tmp_path / "run", zo_eps=None)
    trainer.train()
    path = str(tmp_path / "run" / JOURNAL_NAME)
    capsys.readouterr()
    assert main(["journal", "show", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6
    assert f"{trainer.calibrations[0].zo_eps:.1e}" in lines[2]
    assert main(["journal", "show", path, "--json"]) == 0
    header, *steps = map(json.loads, capsys.readouterr().out.splitlines())
    assert header["space"]["tune"] == "adapter"
    assert [step["step"] for step in steps] == list(range(6))
    assert steps[-1]["forward_passes"] == trainer.forward_passes


def poisoned(trainer: ZOTrainer, when: Any, value: float) -> None:
    """Give the losses [candidates, rows] that `when(step)` names (a mask, or True) that value."""
    losses = trainer.objective.losses

    def changed(model: Any, batch: Any) -> torch.Tensor:
        found = losses(model, batch)
        mask = when(trainer.state.global_step)
        if mask is not None:
            found.view(trainer.args.num_candidates, -1)[mask] = value
        return found

    trainer.objective.losses = changed  # type: ignore[method-assign]


WAVE = {"candidates_per_forward": 4, "num_candidates": 4}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_candidate_that_is_not_finite_is_dropped_and_counted(
    value: float, tmp_path: Path
) -> None:
    trainer = make(tmp_path / "run", per_example_noise=False, **WAVE)
    poisoned(trainer, lambda step: [2] if step == 3 else None, value)
    trainer.train()
    trainer.save_model()
    found = list(read(tmp_path / "run" / JOURNAL_NAME)[1])
    assert [len(made.direction.terms) for made in found] == [4, 4, 4, 3, 4, 4]
    assert [made.chosen for made in found] == [{}] * 3 + [{"non_finite": 1}] + [{}] * 2
    assert (trainer.faults.non_finite, trainer.faults.skipped) == (1, 0)
    assert all(torch.isfinite(tensor).all() for tensor in theta(trainer).values())
    # The kept ones alone make the contrast: their weights sum to zero.
    assert sum(weight for _, weight in found[3].direction.terms) == pytest.approx(0, abs=1e-12)
    replayed(tmp_path)


def test_all_losses_bad_skip_the_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make(tmp_path / "run", save_strategy="steps", save_steps=1, **WAVE)
    poisoned(trainer, lambda step: slice(None) if step == 3 else None, float("nan"))
    trainer.train()
    assert "step 3: skipped: 32 of 32 losses are not finite" in capsys.readouterr().err
    before, after = (
        load_file(tmp_path / f"run/checkpoint-{step}/zo_state.safetensors") for step in (3, 4)
    )
    assert_same(before, after)
    made = list(read(tmp_path / "run" / JOURNAL_NAME)[1])[3]
    assert (made.loss, made.direction) == (float("inf"), Direction())
    assert trainer.faults.skipped == 1
    # The run goes on from its journal, skipped step and all.
    resumed = make(tmp_path / "run", save_strategy="no", **WAVE)
    (tmp_path / "run/checkpoint-6/trainer_state.json").unlink()
    resumed.train(resume_from_checkpoint=True)
    assert_same(theta(trainer), theta(resumed))
    assert (resumed.faults.non_finite, resumed.faults.skipped) == (32, 1)


def test_an_exploding_slope_skips_the_update(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(tmp_path / "run", max_steps=24, per_example_noise=False, **WAVE)
    poisoned(trainer, lambda step: [1] if step == 22 else None, 1e6)
    trainer.train()
    message = capsys.readouterr().err
    assert "step 22: skipped: the slope" in message
    assert "is more than 1e+06 times the median" in message
    assert trainer.faults.skipped == 1


@pytest.mark.parametrize(
    ("dtype", "everywhere", "advice"),
    [
        ("float32", False, r"undisturbed the loss is [0-9.]+: lower zo_eps"),
        ("float32", True, "the loss has diverged: lower learning_rate"),
        ("float16", True, "float16 overflows: load the model in bfloat16 or float32"),
    ],
)
def test_ten_skipped_updates_end_the_run_with_the_last_good_state(
    dtype: str, everywhere: bool, advice: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"max_steps": 20, "model_init_kwargs": {"dtype": dtype}, **WAVE}
    trainer = make(tmp_path / "run", **changes)
    losses = trainer.objective.losses

    def bad(model: Any, batch: Any) -> torch.Tensor:
        found = losses(model, batch)
        alone = len(batch["labels"]) == 8
        return (
            found
            if trainer.state.global_step < 3 or (alone and not everywhere)
            else found * torch.nan
        )

    trainer.objective.losses = bad  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLossError, match=advice) as raised:
        trainer.train()
    assert "10 updates in a row were skipped, the last one at step 12" in str(raised.value)
    assert "The last good state is in checkpoint-12" in str(raised.value)
    good = make(tmp_path / "good", **changes)
    good.add_callback(_StopAfter(3))
    good.train()
    kept = load_file(tmp_path / "run/checkpoint-12/zo_state.safetensors")
    for name, tensor in theta(good).items():
        assert torch.equal(kept[name], tensor)


def test_a_resumed_run_goes_on_counting_skipped_updates(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 20, "save_strategy": "steps", "save_steps": 6, **WAVE}

    def trainer() -> Any:
        made = make(tmp_path, **changes)
        losses = made.objective.losses
        good = [1.0] * 3 + [torch.nan] * 17
        made.objective.losses = lambda model, batch: (
            losses(model, batch) * good[made.state.global_step]
        )
        return made

    stopped = trainer()
    stopped.add_callback(_StopAfter(6))
    stopped.train()
    with pytest.raises(NonFiniteLossError, match=r"10 updates .* the last one at step 12"):
        trainer().train(resume_from_checkpoint=True)


class _StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def command(folder: Path) -> list[str]:
    return ["train", *command_line(folder, eval_file=None, max_steps=6, save_strategy="no")]


def test_sigterm_ends_as_ctrl_c_does_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Journal.append

    def terminated(journal: Journal, made: Record) -> None:
        append(journal, made)
        if made.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Journal, "append", terminated)
    assert main(command(tmp_path / "run")) == 130
    message = "stopped; to go on, give the same command with --resume_from_checkpoint True"
    assert f"zo-peft: {message}" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*command(tmp_path / "run"), "--resume_from_checkpoint", "True"]) == 0
    assert main(command(tmp_path / "whole")) == 0
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "whole")
    )
    assert_same(first, second)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_a_line(
    code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code), "somewhere/trainer_state.json")

    monkeypatch.setattr("transformers.TrainerState.save_to_json", full)
    assert main(command(tmp_path / "run")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"trainer_state.json cannot be written: {os.strerror(code)}; to go on" in last
