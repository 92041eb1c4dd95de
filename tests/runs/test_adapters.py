"""Adapters, heads and folders on the command line: what is taken, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import MODEL, command_line, evaluate_line
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from zo_peft.cli import main
from zo_peft.errors import UserError
from zo_peft.models.adapters import load_adapter
from zo_peft.models.loading import load_base
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE

WEIGHTS = "adapter_model.safetensors"
HEAD = {"task_type": "SEQ_CLS", "prompt_template": None, "label_words": None}
Lines = Callable[..., str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of the embedded data: with words, and with classes 0 to 2, 0 and 1, and 0."""
    folder = tmp_path_factory.mktemp("files")
    lines = (EMBEDDED / "test.jsonl").read_text().splitlines()[:12]
    (folder / "words.jsonl").write_text("\n".join(lines))
    for classes in (1, 2, 3):
        rows = [{**json.loads(line), "label": i % classes} for i, line in enumerate(lines)]
        (folder / f"{classes}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def zo(files: Path, capsys: pytest.CaptureFixture[str]) -> Lines:
    """Runs a command, expects an exit code, and returns stdout, or the last line of stderr."""

    def run(command: str, folder: Path, code: int = 0, **changes: Any) -> str:
        data = {"train_file": files / "words.jsonl", "eval_file": files / "words.jsonl"}
        short = {"max_steps": 2, "learning_rate": 0.1, "save_strategy": "no"}
        given = {**data, **short, **changes}
        argv = evaluate_line(**given) if command == "evaluate" else command_line(folder, **given)
        capsys.readouterr()
        assert main([command, *argv]) == code
        printed = capsys.readouterr()
        return printed.err.strip().splitlines()[-1] if code else printed.out

    return run


def evaluated(zo: Lines, folder: Path, **changes: Any) -> str:
    return zo("evaluate", folder / "unused", adapter_name_or_path=folder, **changes)


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "zo_metrics.json").read_text())


@pytest.mark.parametrize(
    ("kind", "then"),
    [
        ("PREFIX_TUNING", "PREFIX_TUNING"),
        ("PROMPT_TUNING", "PROMPT_TUNING"),
        ("P_TUNING", "PROMPT_TUNING"),
    ],
)
def test_prompts_are_evaluated_and_tuned_further(
    kind: str, then: str, zo: Lines, tmp_path: Path
) -> None:
    zo("train", tmp_path / "first", peft_type=kind, lora_target_modules=None)
    first = metrics(tmp_path / "first")
    loss = f"loss {first['eval_loss_after']:.4f}"
    assert loss in evaluated(zo, tmp_path / "first")
    zo("train", tmp_path / "second", adapter_name_or_path=tmp_path / "first")
    second = metrics(tmp_path / "second")
    assert second["eval_loss_before"] == pytest.approx(first["eval_loss_after"], rel=1e-6)
    assert second["eval_loss_after"] != second["eval_loss_before"]
    saved = [load_file(tmp_path / name / WEIGHTS) for name in ("first", "second")]
    assert saved[0].keys() == saved[1].keys() == {"prompt_embeddings"}
    assert not torch.equal(saved[0]["prompt_embeddings"], saved[1]["prompt_embeddings"])
    # Plain PEFT reads what goes on as what it is now.
    loaded = PeftModel.from_pretrained(load_base(MODEL), str(tmp_path / "second"))
    assert loaded.active_peft_config.peft_type == then
    assert "peft_type" not in second["settings"]


def test_an_adapter_that_does_not_fit_is_never_taken(zo: Lines, tmp_path: Path) -> None:
    zo("train", tmp_path / "run")
    whole = load_file(tmp_path / "run" / WEIGHTS)
    first = min(whole)
    spoilt = {
        "it lacks": {name: t for name, t in whole.items() if "layers.0" in name},
        "lacks base_model.model.model.layers.0": {
            name.replace("model.layers", "model._orig_mod.layers"): t for name, t in whole.items()
        },
        "for which this base has no place": {
            **whole,
            first.replace("layers.0", "layers.70"): whole[first].clone(),
        },
        "size mismatch": {name: t[:2].contiguous() for name, t in whole.items()},
    }
    for message, tensors in spoilt.items():
        folder = tmp_path / "spoilt"
        shutil.copytree(tmp_path / "run", folder, dirs_exist_ok=True)
        save_file(tensors, folder / WEIGHTS)
        for command in ("evaluate", "train"):
            out = tmp_path / "out"
            assert message in zo(command, out, code=2, adapter_name_or_path=folder)
            assert not out.exists()
        argv = ["merge", "--model_name_or_path", MODEL, "--adapter_name_or_path", str(folder)]
        assert main([*argv, "--output_dir", str(tmp_path / "merged")]) == 2
        assert not (tmp_path / "merged").exists()
        with pytest.raises(UserError, match="cannot be loaded"):
            load_adapter(load_base(MODEL), str(folder))
    (tmp_path / "run/adapter_config.json").write_text('{"peft_type": "LATER"}')
    assert "cannot be loaded: 'LATER'" in evaluated(zo, tmp_path / "run", code=2)


def test_classes_are_those_of_the_head_or_the_words(zo: Lines, files: Path, tmp_path: Path) -> None:
    def head(command: str, name: str, classes: int, **changes: Any) -> str:
        file = files / f"{classes}.jsonl"
        data = {**HEAD, "train_file": file, "eval_file": file, **changes}
        if command == "train":
            return zo(command, tmp_path / name, **data)
        return evaluated(zo, tmp_path / name, **data)

    head("train", "counted", 3)
    for classes in (3, 2, 1):
        assert "on 12 examples" in head("evaluate", "counted", classes)
    # A label that the head has no class for.
    head("train", "two", 2)
    assert "label 2 is no index into its classes" in head("evaluate", "two", 3, code=2)
    # One class alone says nothing, words do.
    assert "the labels name 1 of them" in head("train", "one", 1, code=2)
    head("train", "words", 1, label_words="bad,fine,good")
    assert "on 12 examples" in head("evaluate", "words", 3)
    card = (tmp_path / "words/README.md").read_text()
    assert "num_labels=3, id2label={0: 'bad', 1: 'fine', 2: 'good'}" in card
    argv = ["merge", "--model_name_or_path", MODEL, "--output_dir", str(tmp_path / "merged")]
    argv += ["--adapter_name_or_path", str(tmp_path / "words")]
    assert main(argv) == 0
    names = {0: "bad", 1: "fine", 2: "good"}
    assert AutoConfig.from_pretrained(tmp_path / "merged").id2label == names
    # An adapter of another task is not scored with a head of random numbers.
    zo("train", tmp_path / "causal")
    assert "of task_type CAUSAL_LM, not SEQ_CLS" in head("evaluate", "causal", 2, code=2)
    assert "of task_type SEQ_CLS, not CAUSAL_LM" in evaluated(
        zo, tmp_path / "two", code=2, task_type="CAUSAL_LM"
    )


@pytest.mark.parametrize("tune", ["adapter", "weights"])
def test_a_new_head_depends_on_the_seed_alone(
    tune: str, zo: Lines, files: Path, tmp_path: Path
) -> None:
    data = {**HEAD, "train_file": files / "2.jsonl", "eval_file": None, "tune": tune}
    data["lora_target_modules"] = ["q_proj"] if tune == "adapter" else None
    data["strategy"] = "gv"  # of which a replay can be made
    for name in ("first", "second"):
        zo("train", tmp_path / name, **data)
    argv = ["replay", str(tmp_path / "first/zo_journal"), "--model_name_or_path", MODEL]
    argv += ["--output_dir", str(tmp_path / "replayed")]
    assert main(argv) == 0
    file = WEIGHTS if tune == "adapter" else "model.safetensors"
    first, *others = (load_file(tmp_path / n / file) for n in ("first", "second", "replayed"))
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_a_base_with_a_head_keeps_it(zo: Lines, files: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=3)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "base")
    own = load_base(str(tmp_path / "base"), num_labels=2)
    assert own.config.num_labels == 3
    assert torch.equal(own.score.weight, base.score.weight)
    data = {**HEAD, "model_name_or_path": tmp_path / "base", "train_file": files / "2.jsonl"}
    data["eval_file"] = files / "2.jsonl"
    zo("train", tmp_path / "run", **data)
    assert "on 12 examples" in evaluated(zo, tmp_path / "run", **data)
    message = zo("train", tmp_path / "more", code=2, **{**data, "label_words": "a,b,c,d"})
    assert "the head of base has 3 classes, and there are 4" in message


@pytest.mark.parametrize(
    ("modules", "options", "adapted"),
    [
        (["all-linear"], {}, 7),
        ([".*(q|v)_proj"], {}, 2),
        (["q_proj"], {}, 1),
        (["k_proj", "v_proj"], {"peft_type": "IA3"}, 2),
        (["k_proj", "down_proj"], {"peft_type": "IA3"}, 2),
        (None, {"peft_type": "IA3"}, 3),
    ],
)
def test_modules_are_those_that_were_named_and_the_adapter_loads(
    modules: list[str] | None, options: dict[str, Any], adapted: int, zo: Lines, tmp_path: Path
) -> None:
    zo("train", tmp_path / "run", lora_target_modules=modules, **options)
    saved = load_file(tmp_path / "run" / WEIGHTS)
    layer = {name.split("layers.0.")[1].split(".")[1] for name in saved if "layers.0." in name}
    assert len(layer) == adapted
    loss = metrics(tmp_path / "run")["eval_loss_after"]
    assert f"loss {loss:.4f}" in evaluated(zo, tmp_path / "run")
    PeftModel.from_pretrained(load_base(MODEL), str(tmp_path / "run"))


def test_a_folder_in_which_something_would_be_lost_is_refused(zo: Lines, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(MODEL, base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    assert "would be overwritten" in zo("train", base, code=2, model_name_or_path=base)
    zo("train", run, model_name_or_path=base)
    kept = (run / WEIGHTS).read_bytes()
    own = {"model_name_or_path": base}
    assert "holds a run; go on with it" in zo("train", run, code=2, **own)
    adam = {"strategy": "adam", "resume_from_checkpoint": True, **own}
    assert "nothing that this strategy can go on from" in zo("train", run, code=2, **adam)
    further = {"adapter_name_or_path": run, "resume_from_checkpoint": True, **own}
    assert "would be overwritten" in zo("train", run, code=2, **further)
    zo("train", run, resume_from_checkpoint=True, **own)
    told = metrics(run)
    for changed in ({"learning_rate": 0.2}, {"eval_file": None}):
        line = zo("train", run, code=2, resume_from_checkpoint=True, **{**own, **changed})
        assert f"holds a run that is over, with {next(iter(changed))}=" in line
        assert metrics(run) == told
    assert (run / WEIGHTS).read_bytes() == kept
    for argv in (
        ["merge", "--adapter_name_or_path", str(run), "--output_dir", str(base)],
        ["merge", "--adapter_name_or_path", str(run), "--output_dir", str(run)],
        ["replay", str(run / "zo_journal"), "--output_dir", str(base)],
        ["replay", str(run / "zo_journal"), "--output_dir", str(run)],
    ):
        assert main([*argv, "--model_name_or_path", str(base)]) == 2
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_strategy": "steps", "eval_file": None}, "you didn't pass an `eval_dataset`"),
        ({"eval_strategy": "steps", "save_strategy": "best"}, "`args.metric_for_best_model` must"),
        (
            {"eval_strategy": "steps", "save_strategy": "best", "metric_for_best_model": "f1"},
            "metric_for_best_model='f1' is not measured; use one of loss",
        ),
        ({"report_to": "wandb"}, "wandb"),
        ({"report_to": "nothing"}, "nothing is not supported, only"),
        ({"max_steps": 0}, "max_steps=0; it must be positive"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0.0; it must be positive"),
    ],
)
def test_mistakes_that_transformers_finds_are_one_line(
    changes: dict[str, Any], message: str, zo: Lines, tmp_path: Path
) -> None:
    line = zo("train", tmp_path / "run", code=2, **changes)
    assert line.startswith("zo-peft: error: ")
    assert message in line
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_an_error_of_a_library_is_one_line_and_debug_shows_it(
    zo: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("a matrix\n  does not fit")

    monkeypatch.setattr("zo_peft.runs.sources.read_rows", fails)
    line = zo("train", tmp_path, code=2)
    assert line.startswith("zo-peft: error: RuntimeError: a matrix does not fit (--debug")
    # With a value it is the option of transformers.
    zo("train", tmp_path, code=2, debug="underflow_overflow")
    with pytest.raises(RuntimeError, match="a matrix\n"):
        main(["train", "--debug", *command_line(tmp_path)])


def test_metrics_and_card_say_what_was_done(zo: Lines, files: Path, tmp_path: Path) -> None:
    printed = zo("train", tmp_path / "run", learning_rate=None)
    assert "trained on          12 examples" in printed
    assert " on 12 examples\nevaluation loss" in printed
    found, card = metrics(tmp_path / "run"), (tmp_path / "run/README.md").read_text()
    assert (found["train_examples"], found["eval_examples"]) == (12, 12)
    assert found["learning_rate"] > 0
    assert "| examples to train on | 12 |" in card
    idle = "num_train num_eval num_train_epochs shots dataset_train_split num_virtual_tokens"
    for name in idle.split():
        assert name not in found["settings"]
        assert f"{name}:" not in card
    assert found["settings"]["lora_r"] == 8
    assert found["settings"]["prompt_template"] == TEMPLATE
    assert found["settings"]["label_words"] == LABEL_WORDS.split(",")
    # A short run with gradients has no training log, and is shown all the same.
    zo("train", tmp_path / "adam", strategy="adam", learning_rate=None)
    settings = metrics(tmp_path / "adam")["settings"]
    assert settings["learning_rate"] == 1e-3
    assert not {"num_candidates", "update_rule", "noise"} & settings.keys()
    argv = ["report", str(tmp_path / "adam"), "--output_dir", str(tmp_path / "page"), "--json"]
    assert main(argv) == 0
