"""What the command line finds out by itself of a user's own files."""

import json
import shlex
from pathlib import Path
from typing import Any

import pandas
import pytest
from tiny import MODEL, bert, command_line, evaluate_line
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_peft import UserError
from zo_peft.cli import main
from zo_peft.models.loading import load_base
from zo_peft.runs.arguments import DataArguments
from zo_peft.runs.sources import evaluation_examples, training_examples

TICKETS = {"prompt_template": "{Ticket Description}", "label_column": "Ticket Type"}
ROWS = [
    {"Ticket ID": str(number), "Ticket Description": f"{thing} {number}", "Ticket Type": kind}
    for number in range(2)
    for thing, kind in (("paper", "printer"), ("refund", "billing"), ("login", "access"))
]
PAIRS = [{"text": row["Ticket Description"], "label": row["Ticket Type"]} for row in ROWS]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "train.csv") -> str:
    pandas.DataFrame(rows).to_csv(folder / name, index=False)
    return str(folder / name)


def told(folder: Path, rows: Any, classifies: bool = False, **given: Any) -> tuple[Any, Any]:
    """The examples, and the arguments after they were made."""
    data = DataArguments(train_file=write(folder, rows), **given)
    return training_examples(data, classifies, False, 0)[0], data


def test_labels_of_tickets_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["access", "billing", "printer"]
    made, data = told(tmp_path, ROWS, **TICKETS)
    assert made[0] == {"prompt": "paper 0", "options": words, "label": 2}
    assert data.label_words == data.words() == words
    line = "train.csv: 6 rows, label words of column 'Ticket Type': 'access', 'billing', 'printer'"
    assert capsys.readouterr().err == f"{line}\n"
    made, data = told(tmp_path, ROWS, True, **TICKETS)
    assert made[1] == {"text": "refund 0", "label": 1}
    assert data.words() == words
    # Few rows, and so no word twice, but a head for classes and a column `label` need classes.
    assert told(tmp_path, ROWS[:3], True, **TICKETS)[1].words() == words
    assert told(tmp_path, PAIRS[:3])[1].words() == words
    assert told(tmp_path, PAIRS[:3])[1].prompt_template == "{text}"
    named = {"prompt_template": "{text}", "label_column": "label"}
    assert told(tmp_path, PAIRS[:3], **named)[1].words() == words


def test_truth_values_are_labels_whose_words_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text("".join(f'{{"q": "{q}", "answer": {q}}}\n' for q in ("true", "false")))
    given = {"prompt_template": "{q}?", "label_column": "answer", "train_file": str(path)}
    with pytest.raises(UserError, match=r"^b\.jsonl: column 'answer' has truth .*--label_words"):
        training_examples(DataArguments(**given), False, False, 0)
    for classifies, words in ((False, ["no", "yes"]), (True, None)):
        data = DataArguments(**given, label_words=words)
        made = training_examples(data, classifies, False, 0)[0]
        assert [example["label"] for example in made] == [1, 0]


@pytest.mark.parametrize(
    ("rows", "given", "completion"),
    [
        (ROWS[:3], TICKETS, "printer"),
        (ROWS, {**TICKETS, "label_words": ["none"]}, "printer"),
        (ROWS, {**TICKETS, "label_column": "Ticket ID"}, "0"),
        (PAIRS, {"label_words": ["none"], "prompt_template": "{text}"}, "printer"),
    ],
)
def test_a_column_that_is_no_label_is_completed(
    rows: Any, given: Any, completion: str, tmp_path: Path
) -> None:
    made, data = told(tmp_path, rows, **given)
    assert made[0] == {"prompt": "paper 0", "completion": completion}
    # What was decided holds for the rows to evaluate on, in which labels may repeat.
    data.eval_file = write(tmp_path, ROWS + ROWS if "Ticket ID" in rows[0] else PAIRS, "e.csv")
    assert evaluation_examples(data, False, False)[0].keys() == {"prompt", "completion"}


def test_rows_to_evaluate_on_have_the_labels_of_training(tmp_path: Path) -> None:
    other = [{**ROWS[1]}, {**ROWS[0], "Ticket Type": "network"}]
    _, data = told(tmp_path, ROWS, **TICKETS, eval_file=write(tmp_path, other, "dev.csv"))
    with pytest.raises(UserError, match=r"dev\.csv, row 2: .*'network' is not among .*'access'"):
        evaluation_examples(data, False, False)


def test_labels_in_two_cases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^train\.csv: column 'label' has 'Access' and 'access'"):
        told(tmp_path, [*PAIRS, {"text": "a", "label": "Access"}])


@pytest.mark.parametrize("given", ["a,b", ["a", "b"], ['["a", "b"]'], [" a , b"]])
def test_label_words_are_kept_in_one_way(given: Any) -> None:
    assert DataArguments(label_words=given).label_words == ["a", "b"]


def test_a_head_that_is_there_has_classes_in_its_own_order(tmp_path: Path) -> None:
    bert(id2label={0: "POSITIVE", 1: "NEGATIVE"}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"another order; give --label_words positive,negative"):
        load_base(str(tmp_path), 2, words=["negative", "positive"])
    load_base(str(tmp_path), 2, words=["positive", "negative"])
    load_base(str(tmp_path), 2, words=["bad", "good"])


def test_tickets_from_the_file_to_the_adapter_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, ROWS)
    given = {**TICKETS, "task_type": "SEQ_CLS", "train_file": file, "eval_file": file}
    given |= {"label_words": None, "max_forward_passes": 8, "strategy": "mezo"}
    assert main(["train", *command_line(tmp_path / "out", **given), "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert settings["label_words"] == ["access", "billing", "printer"]
    # An adapter has its classes in an order that other data do not tell.
    more = {**given, "adapter_name_or_path": tmp_path / "out", "label_words": "auto"}
    assert main(["train", *command_line(tmp_path / "more", **more)]) == 2
    assert "no class index; name the classes as label words" in capsys.readouterr().err


def test_a_chat_file_to_a_merged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    (tmp_path / "chat.json").write_text(json.dumps([{"conversations": turns}] * 4))
    file = {"train_file": tmp_path / "chat.json", "eval_file": tmp_path / "chat.json"}
    file |= {"prompt_template": None, "label_words": None, "max_forward_passes": 8}
    assert main(["train", *command_line(tmp_path / "bare", **file)]) == 2
    assert "--chat_template chatml" in capsys.readouterr().err
    chat = {**file, "strategy": "mezo", "chat_template": "chatml"}
    assert main(["train", *command_line(tmp_path / "out", **chat), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["settings"]["chat_template"] == "chatml"
    model = {"model_name_or_path": MODEL, "adapter_name_or_path": tmp_path / "out"}
    assert main(["evaluate", *evaluate_line(**file, **model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval_loss"] == trained["eval_loss_after"]
    # The last of the commands that the run names.
    _, command, *merge = shlex.split(trained["next"][-1])
    assert main([command, *merge]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out-merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out-merged")
    # A whole model is not given in the place of an adapter.
    assert main(["predict", str(tmp_path / "out-merged"), "new.csv"]) == 2
    assert "give it by --model_name_or_path, and rows by" in capsys.readouterr().err
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<bos><|im_start|>user\nhi<|im_end|>\n"
