"""The command line on the embedded model: what it writes, prints and refuses."""

import ast
import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import command_line, evaluate_line

import zo_peft
from zo_peft import __version__
from zo_peft.cli import COMMANDS, RUN, main, named
from zo_peft.objectives.scoring import OptionObjective
from zo_peft.runs.help import read_by
from zo_peft.runs.options import parse
from zo_peft.runs.texts import ENVIRONMENT
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE
from zo_peft.train.checks import REFUSED

METRICS = {
    "strategy",
    "steps",
    "forward_passes",
    "examples_forwarded",
    "wall_seconds",
    "peak_memory_bytes",
    "metric_name",
    "metric_before",
    "metric_after",
    "train_loss",
    "eval_loss_before",
    "eval_loss_after",
    "settings",
}


def options(tmp_path: Path, **changes: Any) -> list[str]:
    return command_line(tmp_path / "out", **{"max_forward_passes": 32, "strategy": "gv", **changes})


def test_train_writes_adapter_card_and_metrics_and_evaluate_agrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options(tmp_path, save_strategy="no"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    out = tmp_path / "out"
    assert {n: v for n, v in printed.items() if n not in ("output_dir", "next")} == json.loads(
        (out / "zo_metrics.json").read_text()
    )
    assert printed.keys() >= METRICS
    assert (printed["steps"], printed["forward_passes"]) == (8, 32)
    assert printed["examples_forwarded"] == 32 * 4
    assert printed["settings"]["train_file"] == "train.jsonl"
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= {
        path.name for path in out.iterdir()
    }
    files = [p.read_text() for p in out.iterdir() if p.suffix in (".md", ".json")]
    assert not any(str(tmp_path) in text or str(EMBEDDED) in text for text in files)

    assert main(["evaluate", *evaluate_line(adapter_name_or_path=out), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["metric"] == printed["metric_after"]
    assert measured["eval_loss"] == pytest.approx(printed["eval_loss_after"], rel=1e-6)


def test_a_config_file_gives_options_and_the_command_line_overrides_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": str(EMBEDDED / "model"),
                "lora_target_modules": ["q_proj"],
                "train_file": str(EMBEDDED / "train.jsonl"),
                "prompt_template": TEMPLATE,
                "label_words": LABEL_WORDS,
                "learning_rate": 1e-4,
                "strategy": "mezo",
                "max_steps": 5,
                "use_cpu": True,
                "disable_tqdm": True,
                "output_dir": str(tmp_path / "out"),
            }
        )
    )
    assert main(["train", "--config", str(config), "--max_steps", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["strategy"] == "mezo"
    assert printed["steps"] == 3
    assert printed["settings"]["learning_rate"] == 1e-4
    assert printed["metric_before"] is None


def test_csv_and_tsv_train_like_json_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (EMBEDDED / "train.jsonl").open()]
    results = []
    for name, separator in (("a.tsv", "\t"), ("a.csv", ",")):
        lines = [f"text{separator}label"]
        for row in rows[:40]:
            text = f'"{row["text"]}"' if separator == "," else row["text"]
            lines.append(f"{text}{separator}{row['label']}")
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        argv = options(tmp_path / name[2:], train_file=tmp_path / name, eval_file=None)
        assert main(["train", *argv, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out)["train_loss"])
    assert results[0] == results[1]


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n" if lines else "")
    return path


LONG = json.dumps({"text": "good " * 500, "label": 1})


@pytest.mark.parametrize(
    ("changes", "lines", "message"),
    [
        ({"train_file": "nowhere.jsonl"}, None, r"nowhere\.jsonl cannot be read.*check the path"),
        ({}, [], "has no rows; it must hold"),
        ({}, ['{"text": "a", "label": 1}', "{"], "line 2 is not JSON"),
        ({}, ['{"sentence": "a", "label": 1}'], "row 1: it has no column 'text'; it has sentence"),
        ({"label_column": "sentiment"}, ['{"text": "a", "label": 1}'], "no column 'sentiment'"),
        ({}, ['{"text": "a", "label": "fine"}'], "label 'fine' is not among the label words"),
        ({}, ['{"text": "a", "label": 2}'], "nor an index from 0 to 1"),
        ({}, [LONG], "context holds 256; shorten it, or set max_length"),
        ({"strategy": "spsa"}, None, "strategy='spsa' is not known; use one of mezo, n-spsa"),
        ({"lora_target_modules": "nothing"}, None, "linear layers are: .*q_proj"),
        ({"lora_target_modules": ["q_proj", "v_projj"]}, None, "no module is named v_projj"),
        ({"model_name_or_path": "no/such-model"}, None, "no/such-model"),
        ({"peft_type": "LAURA"}, None, "PEFT has .*LORA"),
        ({"fp16": True}, None, "fp16 is not for forward-only tuning: .*dtype"),
        ({"max_forward_passes": 3}, None, "less than one step of gv, which takes 4"),
        ({"load_in_8bit": True, "load_in_4bit": True}, None, "exclude each other"),
        ({"bnb_4bit_compute_dtype": "bfloat16"}, None, "is for load_in_4bit; give both, or auto"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, None, "invalid choice: 'int8'"),
        ({"load_in_4bit": True, "tune": "weights"}, None, "codes of a 4-bit base"),
        ({"tune": "scales"}, None, "needs a quantized base, and model is not"),
        ({"train_file": None}, None, "give --train_file"),
        ({"prompt_template": None, "label_words": None}, None, "--prompt_template"),
        ({"no_such_option": 1}, None, r"unknown argument --no_such_option; see"),
        ({"strategie": 1}, None, r"--strategie \(did you mean --strategy\?\)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_nothing_is_written(
    changes: dict[str, Any],
    lines: list[str] | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_model.safetensors").write_text("an earlier adapter")
    if lines is not None:
        changes = {"train_file": write(tmp_path / "rows.jsonl", *lines), **changes}
    assert main(["train", *options(tmp_path, **changes)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    errors = [line for line in printed.err.splitlines() if line.startswith("zo-peft: error: ")]
    assert len(errors) == 1
    assert printed.err.splitlines()[-1] == errors[0]
    assert "Traceback" not in printed.err

    assert re.search(message, errors[0])
    assert [path.name for path in out.iterdir()] == ["adapter_model.safetensors"]
    assert (out / "adapter_model.safetensors").read_text() == "an earlier adapter"


def test_losses_of_no_use_end_the_run_with_the_last_good_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    losses = OptionObjective.losses

    def poisoned(self: OptionObjective, model: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return losses(self, model, batch) * (torch.nan if calls > 2 else 1)

    monkeypatch.setattr(OptionObjective, "losses", poisoned)
    run = {"save_strategy": "no", "candidates_per_forward": 4, "max_forward_passes": 80}
    assert main(["train", *options(tmp_path, **run)]) == 2
    error = capsys.readouterr().err
    found = re.search(r"error: 10 updates in a row were skipped, the last one at step (\d+)", error)
    assert found is not None
    assert "Traceback" not in error
    kept = tmp_path / "out" / f"checkpoint-{found[1]}"
    assert (kept / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    resume = options(tmp_path, **run, resume_from_checkpoint=kept)
    monkeypatch.undo()
    assert main(["train", *resume]) == 0


def test_a_classification_head_trains_and_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = {"task_type": "SEQ_CLS", "prompt_template": None, "label_words": "negative,positive"}
    assert main(["train", *options(tmp_path, num_candidates=2, **head), "--json"]) == 0
    printed = capsys.readouterr()
    trained = json.loads(printed.out)
    # transformers reports a new head, and shows bars while it loads.
    said = {line.split(":")[0].split("  ")[0] for line in printed.err.splitlines()}
    own = {"note", "train.jsonl", "test.jsonl"}
    assert {line for line in said if not re.fullmatch(r"step \d+", line)} == own
    argv = evaluate_line(adapter_name_or_path=tmp_path / "out", **head)
    assert main(["evaluate", *argv]) == 0
    assert f"accuracy {trained['metric_after']:.4f}" in capsys.readouterr().out


def test_a_quantized_base_with_a_new_head_is_tuned_and_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = {"task_type": "SEQ_CLS", "prompt_template": None, "label_words": "negative,positive"}
    scales = {"load_in_8bit": True, "tune": "scales", "tune_unquantized": True}
    assert main(["train", *options(tmp_path, **head, **scales), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    given = {"model_name_or_path": tmp_path / "out", "tune": "scales", **head}
    assert main(["evaluate", *evaluate_line(**given), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["metric"] == trained["metric_after"]
    assert evaluated["eval_loss"] == pytest.approx(trained["eval_loss_after"], rel=1e-5)


def test_a_run_without_output_dir_is_in_a_folder_named_after_base_and_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = {"output_dir": None, "eval_file": None, "max_forward_passes": 4}
    idle = ["--num_virtual_tokens", "4"]  # of prefixes, and the run has a LoRA
    assert main(["train", *options(tmp_path, **short), *idle, "--json"]) == 0
    printed = capsys.readouterr()
    assert "because of the other options: --num_virtual_tokens" in printed.err
    assert "--output_dir model-train" in json.loads(printed.out)["command"]
    assert (tmp_path / "model-train" / "adapter_model.safetensors").is_file()
    assert main(["train", *options(tmp_path, **short)]) == 2
    assert "model-train holds a run" in capsys.readouterr().err


def test_all_warnings_of_ours_are_shown() -> None:
    for path in Path(zo_peft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                assert ast.unparse(node.args[1]) == "Notice", f"{path.name}, line {node.lineno}"


def test_usage_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    for words in (["--version"], ["train", "--version"], ["push", "somewhere", "--version"]):
        assert main(words) == 0
        assert capsys.readouterr().out == f"zo-peft {__version__}\n"
    for given, message in {
        "trian": "there is no command 'trian' (did you mean train?); ",
        "Evaluate": "there is no command 'Evaluate' (did you mean evaluate?); ",
        "xyz": "there is no command 'xyz'; zo-peft --help",
    }.items():
        assert main([given]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in printed.err
        assert len(printed.err.splitlines()) == 1


def test_a_short_demo_saves_base_and_adapter_and_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["demo", "--output_dir", str(tmp_path / "demo"), "--max_forward_passes", "80"]
    assert main([*argv, "--strategy", "gv"]) == 0
    capsys.readouterr()
    assert main([*argv, "--strategy", "mezo"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    code = "\n".join(lines[-3:])
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert namespace["model"].get_base_model().is_loaded_in_8bit
    metrics = json.loads((tmp_path / "demo" / "adapter" / "zo_metrics.json").read_text())
    assert metrics["strategy"] == "mezo"
    assert f"{metrics['metric_after']:.4f}" in printed


REFUSED_LINES = {
    "per_device_train_batch_size: null": "per_device_train_batch_size",
    "momentum: [0.5, 0.9]": "momentum",
    "zo_eps: {a: 1}": "zo_eps",
    "seed: &a [*a]": "seed",
    "num_candidates: !!set {a}": "num_candidates",
    "lora_r: eight": "lora_r",
    "lr_scheduler_type: hello": "lr_scheduler_type",
    "use_cpu: 2020-01-01": "use_cpu",
    "per_device_eval_batch_size: 0": "per_device_eval_batch_size",
    "seed: -1": "seed=-1",
    "save_steps: 1.5": "save_steps",
    "accelerator_config: {surely: unknown}": "surely",
    "model_init_kwargs: word": "model_init_kwargs",
    "metric_for_best_model: [a, b]": "metric_for_best_model",
    "model_name_or_path: null": "model_name_or_path",
    "lora_target_modules: [--help]": "lora_target_modules",
    f"seed: {'[' * 5_000}": "cannot be read as YAML: maximum recursion depth",
    "log_level_replica: great": "log_level_replica",
    "no_such_option: 1": "unknown option 'no_such_option'$",
    "batch_size: 1": r"unknown option 'batch_size' \(did you mean per_device_train_batch_size\?\)",
    "config: other.yaml": "unknown option 'config'",
}


@pytest.mark.parametrize("line", REFUSED_LINES)
def test_values_of_a_config_that_are_none_are_refused_by_name(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["model_name_or_path: none", "train_file: t.tsv", "max_forward_passes: 2000", line]
    write(tmp_path / "c.yaml", *lines)
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    printed = capsys.readouterr()
    assert re.search(REFUSED_LINES[line], printed.err)
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1


def test_a_config_holds_lists_objects_and_defaults(tmp_path: Path) -> None:
    lines = ["model_name_or_path: m", "lora_target_modules: [q_proj, v_proj]", "zo_eps: null"]
    lines += ["model_init_kwargs: {attn_implementation: eager}", "report_to: [none]"]
    lines += ["reward_weights: [-1, 0.5]", "task: SST2", "peft_type: ia3", "task_type: seq_cls"]
    write(tmp_path / "c.yaml", *lines, "use_cpu: true", "model_revision: 2020-01-01")
    _, (model, data, args) = parse(
        "train", [*map(named, RUN)], ["--config", str(tmp_path / "c.yaml")]
    )
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert model.model_revision == "2020-01-01"
    assert args.zo_eps is None
    assert args.model_init_kwargs == {"attn_implementation": "eager"}
    assert args.report_to == []
    assert args.reward_weights == [-1.0, 0.5]
    assert (data.task, model.peft_type, model.task_type) == ("sst2", "IA3", "SEQ_CLS")


def test_a_text_may_begin_with_dashes() -> None:
    argv = ["--model_name_or_path", "m", "--prompt_template", "-- {text} --lr"]
    _, (_, data, _) = parse("train", [*map(named, RUN)], argv)
    assert data.prompt_template == argv[-1]
    _, (_, data, _) = parse("train", [*map(named, RUN)], [*argv, "--label_words", "-1=a", "1=b"])
    assert data.given_words() == {"-1": "a", "1": "b"}


#: What the help does not show: options that are refused, and those that only belong to them.
HIDDEN = REFUSED.keys() | {"activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"}
HIDDEN |= {"fsdp_config", "optim_args", "optim_target_modules"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_what_it_names(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS[name]
    assert all(is_dataclass(named(argument)) for argument in command.arguments)
    functions = [command.job, *filter(None, [command.json])]
    assert all(callable(named(function)) for function in functions)
    assert ENVIRONMENT.get_template(f"{name}.jinja")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help-all"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    known = {f.name for argument in command.arguments for f in fields(named(argument))}
    read = read_by(command.reads) or known
    assert read <= known
    hidden = {name for name in known if not re.search(rf"--{name}(?![\w-])", printed)}
    assert hidden == (known - read) | (known & HIDDEN)
    assert main([name, "--help"]) == 0
    screen = capsys.readouterr().out.splitlines()
    assert len(screen) <= 60
    assert max(map(len, screen)) <= 80
    shown = {line.split()[0][2:] for line in screen if line.startswith("  --")}
    assert shown <= read - REFUSED.keys()
    assert command.groups or shown == read
    assert command.meanings.keys() <= shown
    # What a run tells is not asked for.
    base = [line for line in screen if line.startswith("  --model_name_or_path ")]
    assert not (command.defaults and base[0].endswith("(required)"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("predict out new.csv --lora_r 8", "--lora_r; see zo-peft predict --help"),
        ("predict out new.csv --task sst2", "--task (did you mean --task_type?); see zo-peft"),
        ("evaluate out --train_file a.csv", "--train_file (did you mean --eval_file?); see"),
        ("merge --learning-rate=1", "--learning-rate=1; see zo-peft merge --help"),
        ("replay zo_journal --task_type SEQ_CLS", "--task_type; see zo-peft replay --help"),
    ],
)
def test_options_that_a_command_does_not_use_are_refused(
    given: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"zo-peft: error: unknown argument {message}")
