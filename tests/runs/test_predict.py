"""Predictions against plain PEFT, one row at a time; what is read of a run; what is refused."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from peft import PeftModel
from tiny import MODEL, command_line
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from zo_peft import ZOConfig
from zo_peft.cli import main
from zo_peft.data.forms import question_of
from zo_peft.errors import UserError
from zo_peft.runs.earlier import options_of_run
from zo_peft.tools.demo import EMBEDDED
from zo_peft.train.base import BaseTrainer

ROWS = 12
TEXTS = [json.loads(line) for line in (EMBEDDED / "test.jsonl").open()][:ROWS]

#: A turn of the assistant ends with a full stop, which the embedded model writes.
CHAT = """\
{% for m in messages %}{{ m.role }}: {{ m.content }}.
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""

#: Options of each run, beside those of the embedded data.
WORDS = {"one": "terrible,great", "several": '"not at all good","very good, in fact",fine'}
RUNS: dict[str, dict[str, Any]] = {
    "one": {"label_words": WORDS["one"]},
    "several": {"label_words": WORDS["several"], "prompt_template": "{text}\\nIt was "},
    "classes": {"task_type": "SEQ_CLS", "prompt_template": None, "label_words": "bad,good"},
    "chat": {"prompt_template": None, "label_words": None},
    "completions": {"label_words": None, "prompt_template": "{text} The", "label_column": "text"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that chats, rows to train on, to evaluate on and to answer, and runs."""
    made = tmp_path_factory.mktemp("predict")
    shutil.copytree(MODEL, made / "tiny")
    (made / "tiny" / "chat_template.jinja").write_text(CHAT)
    for name in RUNS:
        rows = TEXTS
        if name == "chat":
            turns = [[asked(row), turn("assistant", row["text"][:-1])] for row in TEXTS]
            rows = [{"messages": own} for own in turns]
        write(made / f"{name}.jsonl", rows)
        bare = [
            {k: v for k, v in row.items() if k != "label"} | {"id": n} for n, row in enumerate(rows)
        ]
        write(made / f"{name}.new.jsonl", bare)
    return made


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def asked(row: dict[str, Any]) -> dict[str, str]:
    return turn("user", " ".join(row["text"].split()[:5]))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def run_of(folder: Path) -> Callable[[str], Path]:
    """The output folder of a run by name, which is made once."""

    def made(name: str) -> Path:
        out = folder / f"{name}-run"
        if not out.exists():
            file = folder / f"{name}.jsonl"
            given = {"model_name_or_path": folder / "tiny", "train_file": file, "eval_file": file}
            steps = {"max_steps": 2, "learning_rate": 0.05, "save_strategy": "no"}
            argv = command_line(out, **{**given, **steps, "strategy": "gv", **RUNS[name]})
            assert main(["train", *argv]) == 0
        return out

    return made


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def predicted(run: Path, rows: Path, *further: str) -> list[dict[str, Any]]:
    out = rows.with_suffix(".out.jsonl")
    assert (
        main(["predict", str(run), str(rows), "--output_file", str(out), "--use_cpu", *further])
        == 0
    )
    return lines(out.read_text())


# ---- Plain PEFT, one example at a time -----------------------------------------------------------


class Plain:
    """What plain transformers and PEFT answer."""

    def __init__(self, name: str, base: Path, run: Path) -> None:
        kind: Any = AutoModelForCausalLM
        settings: dict[str, Any] = {}
        if name == "classes":
            kind, settings = AutoModelForSequenceClassification, {"num_labels": 2}
        self.model = PeftModel.from_pretrained(kind.from_pretrained(base, **settings), run).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.cut = 0

    @torch.no_grad()
    def words(self, prompt: str, words: list[str]) -> list[float]:
        """A softmax over the words' mean log-probabilities. They stand behind a space."""
        before = self.tokenizer(prompt.rstrip(" ")).input_ids
        scores = []
        for word in words:
            ids = self.tokenizer(f" {word}", add_special_tokens=False).input_ids
            logits = self.model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
            found = [logits[len(before) - 1 + n, id_] for n, id_ in enumerate(ids)]
            scores.append(torch.stack(found).mean())
        return torch.stack(scores).softmax(0).tolist()

    @torch.no_grad()
    def classes(self, text: str) -> list[float]:
        return self.model(**self.tokens(text)).logits[0].softmax(-1).tolist()

    def turn(self, question: dict[str, str]) -> str:
        """The assistant's turn."""
        settings = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        return self.text(self.tokenizer.apply_chat_template([question], **settings), ".")

    def text(self, inputs: Any, end: str = "") -> str:
        """The greedy completion, up to `end`; `cut` counts those that did not come to an end."""
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        [ids] = self.model.generate(**given, do_sample=False, max_new_tokens=64)
        ids = ids[given["input_ids"].shape[1] :]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        ended = self.tokenizer.eos_token_id in ids or (end and end in text)
        self.cut += not ended
        return (text.partition(end)[0] if end else text).strip()

    def tokens(self, text: str) -> Any:
        return self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)


def answers(name: str, plain: Plain) -> list[Any]:
    """The probabilities by label, or the text, of each row."""
    if name == "chat":
        return [plain.turn(asked(row)) for row in TEXTS]
    if name == "completions":
        return [plain.text(plain.tokens(f"{row['text']} The")) for row in TEXTS]
    if name == "classes":
        return [dict(zip(("bad", "good"), plain.classes(row["text"]))) for row in TEXTS]
    words = next(csv.reader([WORDS[name]]))
    prompt = "{}\nIt was " if name == "several" else "{} It was"
    found = (plain.words(prompt.format(row["text"]), words) for row in TEXTS)
    return [dict(zip(words, shares)) for shares in found]


@pytest.mark.parametrize("name", RUNS)
def test_predictions_are_those_of_plain_peft(
    name: str, folder: Path, run_of: Callable[[str], Path]
) -> None:
    run, new = run_of(name), folder / f"{name}.new.jsonl"
    found = predicted(run, new)
    plain = Plain(name, folder / "tiny", run)
    given, expected = lines(new.read_text()), answers(name, plain)
    assert [{k: row[k] for k in old} for row, old in zip(found, given)] == given
    assert len(found) == len(expected) == ROWS
    for row, answer in zip(found, expected):
        if isinstance(answer, str):
            assert row["prediction"] == answer
            continue
        assert row["probabilities"] == pytest.approx(answer, abs=2e-5)
        assert row["prediction"] == max(answer, key=answer.__getitem__)
        assert row["probability"] == row["probabilities"][row["prediction"]]

    # A trainer answers the same rows in the same way.
    rows: list[dict[str, Any]] = [{"text": row["text"]} for row in TEXTS]
    if name == "chat":
        rows = [{"messages": [row["messages"][0]]} for row in given]
    elif name != "classes":
        template = RUNS[name].get("prompt_template", "{text} It was").replace("\\n", "\n")
        words = next(csv.reader([RUNS[name].get("label_words") or ""]))
        rows = [{"prompt": template.format(**row)} for row in rows]
        rows = [row | ({"options": words} if words else {}) for row in rows]
    args = ZOConfig(str(folder / "unused"), use_cpu=True, disable_tqdm=True)
    trainer = BaseTrainer(plain.model, args, processing_class=plain.tokenizer)
    output = trainer.predict(rows)
    assert output.label_ids is None
    if output.predictions.dtype == object:
        assert [row["prediction"] for row in found] == output.predictions.tolist()
        assert output.metrics["test_cut"] == plain.cut
    else:
        shares = [[*row["probabilities"].values()] for row in found]
        np.testing.assert_allclose(output.predictions, shares, atol=1e-6)


# ---- Files ---------------------------------------------------------------------------------------


def test_csv_and_stdout_hold_the_same(
    folder: Path, run_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, rows, out = run_of("several"), folder / "several.new.jsonl", folder / "out.CSV"
    written = predicted(run, rows)
    argv = ["predict", str(run), str(rows), "--use_cpu"]
    assert main([*argv, "--output_file", str(out)]) == 0
    capsys.readouterr()
    assert main(argv) == 0
    assert lines(capsys.readouterr().out) == written
    assert main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"output_file": None, "examples": ROWS, "rows": written}
    with out.open(newline="") as file:
        found = [*csv.DictReader(file)]
    for row, expected in zip(found, written, strict=True):
        shares = expected.pop("probabilities")
        expected |= {f"probability_{label}": share for label, share in shares.items()}
        assert [*row.items()] == [(name, str(value)) for name, value in expected.items()]


REFUSED: dict[str, tuple[list[str], str]] = {
    "kind": (["--output_file", "a.xlsx"], r"a\.xlsx: give a name that ends in \.jsonl or \.csv"),
    "folder": (["--output_file", "made.csv"], r"made\.csv: give a name that ends in"),
    "no question": (["--eval_file", "bare.jsonl"], r"row 1: it has no column 'text'; it has id"),
    "taken": (
        ["--eval_file", "taken.jsonl"],
        r"taken\.jsonl has a column 'prediction' already; re",
    ),
    "column": (["--eval_file", "lacking.jsonl"], r"lacking\.jsonl, row 2: it has no column 'text'"),
    "one word": (["--label_words", "great"], r"give two or more different words"),
    "auto": (["--label_words", "auto"], r"auto reads labels, which rows to answer lack"),
    "context": (
        ["--eval_file", "long.jsonl"],
        r"row 1: it has \d+ tokens, but the model's context",
    ),
    "no rows": (["--eval_file", "nowhere.csv"], r"nowhere\.csv cannot be read"),
    "task": (["--task_type", "SEQ_CLS"], r"the adapter is of task_type CAUSAL_LM, not SEQ_CLS"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused_in_one_line_and_nothing_is_written(
    name: str,
    folder: Path,
    run_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    write(folder / "taken.jsonl", [{"text": "a", "prediction": 1}])
    write(folder / "lacking.jsonl", [{"text": "a"}, {"title": "b"}])
    write(folder / "bare.jsonl", [{"id": 1}])
    (folder / "made.csv").mkdir(exist_ok=True)
    write(folder / "long.jsonl", [{"text": "good " * 500}])
    run = run_of("several")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    further, message = REFUSED[name]
    argv = ["predict", run.name, "several.new.jsonl", "--output_file", "new.csv"]
    capsys.readouterr()
    assert main([*argv, *further]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(f"zo-peft: error: .*{message}", printed.err.splitlines()[-1])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("words", ["good,bad", "bad,so so,good"])
def test_a_head_keeps_its_classes(
    words: str, run_of: Callable[[str], Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words in another order would swap all answers; with more words, some would have none."""
    argv = [str(run_of("classes")), str(folder / "classes.jsonl"), "--label_words", words]
    for command in ("predict", "evaluate"):
        assert main([command, *argv, "--use_cpu"]) == 2
        assert "has 2 classes; give a label word for each" in capsys.readouterr().err


def test_dates_of_a_parquet_file_are_written_as_text(
    run_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": row["text"], "day": pandas.Timestamp(2024, 2, 3)} for row in TEXTS[:2]]
    pandas.DataFrame(rows).to_parquet(tmp_path / "new.parquet")
    argv = ["predict", str(run_of("one")), str(tmp_path / "new.parquet"), "--use_cpu"]
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    assert [row["day"] for row in found] == ["2024-02-03 00:00:00"] * 2
    assert main(argv) == 0
    assert lines(capsys.readouterr().out) == found
    assert predicted(run_of("one"), tmp_path / "new.parquet") == found


# ---- What is read of a run -----------------------------------------------------------------------


def test_evaluate_reads_the_run_and_says_where_it_is_told_otherwise(
    folder: Path, run_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("one")
    metrics = json.loads((run / "zo_metrics.json").read_text())
    argv = ["evaluate", str(run), str(folder / "one.jsonl"), "--use_cpu", "--json"]
    capsys.readouterr()
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["metric"] == metrics["metric_after"]
    assert json.loads(printed.out)["eval_loss"] == pytest.approx(metrics["eval_loss_after"])
    assert "unlike the run" not in printed.err
    shared = "lora_r: 4\nlabel_words: bad,good\nlearning_rate: 0.1\nmodel_name_or_path: "
    (folder / "c.yaml").write_text(shared + MODEL)
    assert main([*argv, "--config", str(folder / "c.yaml"), "--max_length", "40"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["eval_loss"] != pytest.approx(metrics["eval_loss_after"])
    # A configuration may be that of `train`, too.
    idle = f"zo-peft evaluate uses none of these in {folder / 'c.yaml'}: lora_r, learning_rate"
    assert idle in printed.err.splitlines()
    [line] = [line for line in printed.err.splitlines() if "unlike the run" in line]
    assert line == (
        "unlike the run: max_length is 40 (was None); label_words is ['bad', 'good'] (was "
        f"['terrible', 'great']); model_name_or_path is '{MODEL}' (was '{folder / 'tiny'}')"
    )


def test_options_of_a_run_are_those_that_its_adapter_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {
        "model_name_or_path": "facebook/opt-1.3b",
        "model_revision": "abc",
        "load_in_8bit": True,
        "trust_remote_code": True,
        "task": "sst2",
        "num_eval": 7,
        "max_length": 9,
        "learning_rate": 1.0,
        "reward_funcs": ["os:system"],
    }
    (tmp_path / "zo_metrics.json").write_text(json.dumps({"settings": told}))
    given = ["--adapter_name_or_path", str(tmp_path)]
    base = {name: told[name] for name in ("model_name_or_path", "model_revision", "load_in_8bit")}
    rows, task = {"max_length": 9}, {"task": "sst2", "num_eval": 7}

    def found(*words: str) -> dict[str, Any]:
        return {n: value for n, value in options_of_run(words).items() if value is not None}

    assert found(*given) == base | rows | task
    assert found(*given, "--eval_file=new.csv") == base | rows
    # Rows of one's own have no prompts of the task by themselves.
    line = "the run was of sst2, with prompts such as '{sentence} It was'\n"
    assert capsys.readouterr().err == line
    assert found(*given, "--task", "rte") == base | rows
    # A tuned model is its own base, and another base is told apart.
    assert found("--model_name_or_path", str(tmp_path)) == rows | task
    other = found(*given, "--model-name-or-path", "mine")
    assert other == base | rows | task
    assert "model_name_or_path" not in found(*given, "--model_name_or_path", "facebook/opt-1.3b")
    assert found() == {}
    (tmp_path / "zo_metrics.json").write_text('{"settings": 1}')
    with pytest.raises(UserError, match=r"zo_metrics\.json of .* is not what a run writes"):
        options_of_run(given)


def test_a_bare_base_answers_and_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--prompt_template", "{text} It was", "--label_words", "terrible,great", "--use_cpu"]
    base = ["--model_name_or_path", str(folder / "tiny"), "--eval_file", str(folder / "one.jsonl")]
    capsys.readouterr()
    assert main(["predict", *base, *asked]) == 0
    found = lines(capsys.readouterr().out)
    assert main(["evaluate", *base, *asked, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    plain = Plain.__new__(Plain)
    plain.model = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    plain.tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    words = ["terrible", "great"]
    shares = torch.tensor([plain.words(f"{row['text']} It was", words) for row in TEXTS])
    labels = torch.tensor([row["label"] for row in TEXTS])
    right = shares.argmax(1) == labels
    assert [row["prediction"] for row in found] == [words[index] for index in shares.argmax(1)]
    assert measured["metric"] == pytest.approx(right.float().mean().item())
    loss = -shares[range(ROWS), labels].log().mean().item()
    assert measured["eval_loss"] == pytest.approx(loss, rel=1e-4)
    # A new head would answer at random.
    assert main(["evaluate", *base, "--task_type", "SEQ_CLS", "--label_words", "a,b"]) == 2
    assert "tiny has no head for classes" in capsys.readouterr().err.splitlines()[-1]


# ---- The end of a run, its card, and a merged model ----------------------------------------------

#: Runs the code of cards, all in one process, and prints what each prints.
SNIPPETS = """\
import json, re, sys
for name in sys.argv[1:]:
    text = open(f"{name}/README.md", encoding="utf-8").read()
    exec(re.search("```python\\n(.*?)```", text, re.DOTALL)[1], {})
assert "zo_peft" not in sys.modules
"""


def test_the_code_of_a_card_prints_what_predict_predicts(
    folder: Path, run_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    merged = folder / "merged"
    argv = ["merge", "--model_name_or_path", str(folder / "tiny"), "--output_dir", str(merged)]
    assert main([*argv, "--adapter_name_or_path", str(run_of("several"))]) == 0
    expected = []
    for name in RUNS:
        row: dict[str, Any] = {"text": "Write the text here."}
        if name == "chat":
            row = {"messages": [turn("user", "Write the question here.")]}
        write(folder / "asked.jsonl", [row])
        # The code knows no end of a turn but that of a sequence.
        expected += predicted(run_of(name), folder / "asked.jsonl")
    write(folder / "asked.jsonl", [{"text": "Write the text here."}])
    capsys.readouterr()
    argv = ["--model_name_or_path", str(merged), "--eval_file", str(folder / "asked.jsonl")]
    assert main(["predict", *argv, "--use_cpu"]) == 0
    expected += lines(capsys.readouterr().out)
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS, *(f"{name}-run" for name in RUNS), "merged"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    for line, row in zip(printed, expected, strict=True):
        if "probability" not in row:
            assert line.strip().startswith(row["prediction"])
            continue
        label, _, share = line.rpartition(" ")
        assert label == row["prediction"]
        assert float(share) == pytest.approx(row["probability"], abs=2e-5)

    card = (merged / "README.md").read_text()
    metrics = json.loads((run_of("several") / "zo_metrics.json").read_text())
    assert f"| accuracy | {metrics['metric_before']:.4f} | {metrics['metric_after']:.4f} |" in card
    assert f"before merging, on {ROWS} examples." in card
    assert "The file `several.jsonl`, trained on." in card
    assert "license: unknown" in card
    assert "model-index" not in card


def test_the_commands_at_the_end_of_a_run_can_be_copied(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    given = {"model_name_or_path": "tiny", "train_file": "one.jsonl", "eval_file": "one.jsonl"}
    argv = command_line(Path("a run"), **given, max_steps=2, save_strategy="no", strategy="gv")
    capsys.readouterr()
    assert main(["train", *argv]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"accuracy +0\.\d+ -> 0\.\d+ on {ROWS} examples", printed)
    assert re.search(r"adapter +a run\n", printed)
    answer, report, push = map(shlex.split, printed.splitlines()[-3:])
    assert main([*answer[1:], "--use_cpu"]) == 0
    assert len((folder / "predictions.csv").read_text().splitlines()) == ROWS + 1
    assert main(report[1:]) == 0
    assert push == ["zo-peft", "push", "a run", "you/a-run"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {"conversations": [{"from": "human", "value": "Hi"}], "id": 7},
            [{"role": "user", "content": "Hi"}],
        ),
        ({"instruction": "Add.", "input": "1 2"}, "### Instruction:\nAdd.\n\n### Input:\n1 2"),
        ({"instruction": "Add.", "output": "3"}, "### Instruction:\nAdd.\n\n### Response:"),
    ],
)
def test_rows_of_other_programs_are_asked_without_their_answers(row: Any, prompt: Any) -> None:
    assert question_of(row).keys() == {"prompt"}
    assert prompt == question_of(row)["prompt"][-1:] or prompt in question_of(row)["prompt"]


def test_a_file_in_the_place_of_the_run_is_recognised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.csv").write_text("text\nGood.\n")
    assert main(["predict", str(tmp_path / "new.csv")]) == 2
    assert "new.csv is a file; give the folder of a run first" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "required: --model_name_or_path; see" in capsys.readouterr().err
