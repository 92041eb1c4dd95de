"""The progress bar, the lines in its place, and the series that callbacks get."""

import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tiny import examples, make_trainer
from transformers import TrainerCallback

from zo_peft import GradientTrainer, ZOTrainer
from zo_peft.core.journal import JOURNAL_NAME, read
from zo_peft.train.progress import Progress

SERIES = {"loss", "slope", "spread", "zo_eps", "step_size", "learning_rate", "seconds"}
SERIES |= {"non_finite", "skipped", "forward_passes", "examples_forwarded"}


def make(folder: Path, kind: type = ZOTrainer, **settings: Any) -> Any:
    defaults = {
        "max_steps": -1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "num_candidates": 4,
        "logging_steps": 2,
        "disable_tqdm": None,
    }
    data = {"train": examples(count=24), "test": examples("test", 8)}
    return make_trainer(folder / "run", kind=kind, **data, **{**defaults, **settings})


def test_the_bar_counts_forward_passes_towards_the_budget(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trainer = make(tmp_path, max_forward_passes=26, eval_strategy="steps", eval_steps=3)
    trainer.train()
    out, err = capfd.readouterr()
    assert out == ""
    last = re.findall(r"(\d+)/26 \[\d\d:\d\d<(\S+), +([^\]\r\n]*)\]", err)[-1]
    assert (last[0], trainer.forward_passes) == ("24", 24)
    logged = [log for log in trainer.state.log_history if "loss" in log][-1]
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log][-1]
    assert f"loss={logged['loss']:.4f}" in last[2]
    assert f"accuracy={evaluated['eval_accuracy']:.4f}" in last[2]


def test_the_bar_shows_nothing_that_was_measured_before_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trainer = make(tmp_path, max_forward_passes=16)
    trainer.evaluate()
    trainer.train()
    err = capfd.readouterr().err
    assert "loss=" in err
    assert "accuracy=" not in err


def test_without_a_budget_it_counts_steps_and_shows_forward_passes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    make(tmp_path, GradientTrainer, strategy="sgd", max_steps=4).train()
    out, err = capfd.readouterr()
    assert out == ""
    done, shown = re.findall(r"(\d+)/4 \[[^,]*, +([^\]\r\n]*)\]", err)[-1]
    assert done == "4"
    assert "passes=12" in shown


def test_without_tqdm_there_is_no_bar(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trainer = make(tmp_path, max_steps=2, disable_tqdm=True)
    capfd.readouterr()
    trainer.train()
    trainer.evaluate()
    out, err = capfd.readouterr()
    assert out == ""
    loss = trainer.state.log_history[0]["loss"]
    assert err == f"step 2/2  passes 8  loss {loss:.4f}  00:00 left\n"


def test_without_a_terminal_there_is_a_line_for_each_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = make(tmp_path, max_forward_passes=26, eval_strategy="steps", eval_steps=4)
    capfd.readouterr()
    trainer.evaluate()
    trainer.train()
    out, err = capfd.readouterr()
    assert out == ""
    logs = trainer.state.log_history
    losses = [log["loss"] for log in logs if "loss" in log]
    (measured,) = [log["eval_accuracy"] for log in logs if "eval_loss" in log and log["step"] == 4]
    expected = [
        rf"step 2  passes 8/26  loss {losses[0]:.4f}  \d\d:\d\d left",
        rf"step 4  passes 16/26  loss {losses[1]:.4f}  \d\d:\d\d left",
        rf"step 6  passes 24/26  loss {losses[2]:.4f}  accuracy {measured:.4f}  \d\d:\d\d left",
    ]
    assert [bool(re.fullmatch(*pair)) for pair in zip(expected, err.splitlines(), strict=True)]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_a_run_that_is_given_no_budget_says_which_it_has_and_how_long_it_takes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {"strategy": "guided", "zo_eps": None, "logging_steps": 0.025}
    trainer = make(tmp_path, callbacks=[StopAt(7)], **given)
    assert (trainer.args.max_forward_passes, trainer.args.max_steps) == (100, 100)
    trainer.train()
    assert trainer.facts["settings"]["max_forward_passes"] == 100
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "budget" in line]
    assert re.search(r"no budget .* 100 forward passes: \d\d:\d\d left", said)

    make(tmp_path / "other", callbacks=[StopAt(3)], max_forward_passes=100).train()
    assert "budget" not in capfd.readouterr().err


def test_a_resumed_run_goes_on_counting_passes_and_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    settings = {"max_forward_passes": 32, "save_strategy": "steps", "save_steps": 4}
    stopped = make(tmp_path, callbacks=[StopAt(4)], **settings)
    stopped.train()
    before = stopped.state.log_history[-2]["seconds"]

    class Opened(TrainerCallback):
        bar: tuple[int, int] | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.bar is None:
                bar = next(c for c in resumed.callback_handler.callbacks if type(c) is Progress)
                self.bar = bar.training_bar.initial, bar.training_bar.total

    opened = Opened()
    resumed = make(tmp_path, callbacks=[opened], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert opened.bar == (16, 32)
    seconds = [log["seconds"] for log in resumed.state.log_history]
    assert seconds == sorted(seconds)
    assert seconds[1] == before < seconds[2]


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs, step=state.global_step))


def events(folder: Path) -> dict[tuple[str, int], float]:
    """The scalars of TensorBoard's files, by tag and step; of several, the first."""
    found: dict[tuple[str, int], float] = {}
    for path in folder.rglob("events.out.tfevents.*"):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack_from("<Q", content)
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault((value.tag, event.step), value.simple_value)
    return found


def test_tensorboard_and_other_callbacks_get_every_series(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make(
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=3,
        report_to="tensorboard",
        disable_tqdm=True,
        callbacks=[recorder],
    )
    trainer.train()
    found = events(tmp_path / "run")
    training = [log for log in recorder.logs if "loss" in log]
    assert [log["step"] for log in training] == [2, 4, 6]
    for log in training:
        assert log.keys() >= SERIES
        for name in SERIES:
            assert found[f"train/{name}", log["step"]] == pytest.approx(log[name], rel=1e-6)
    assert {step for tag, step in found if tag == "eval/accuracy"} == {3, 6}
    records = list(read(tmp_path / "run" / JOURNAL_NAME)[1])
    for log in training:
        record = records[log["step"] - 1]
        of_record = (record.slope, record.spread, record.eps, record.forward_passes)
        names = ("slope", "spread", "zo_eps", "forward_passes")
        assert tuple(log[name] for name in names) == of_record
