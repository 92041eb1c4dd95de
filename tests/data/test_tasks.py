"""The benchmark tasks: prompts, labels, sources, splits and truncation, on hand-worked rows."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from zo_peft import UserError
from zo_peft.cli import main
from zo_peft.data import Tokenization, tokenize_dataset
from zo_peft.data.examples import converted
from zo_peft.data.tasks import TASKS, sample, task_rows, train_parts, with_demonstrations
from zo_peft.runs.arguments import DataArguments
from zo_peft.runs.sources import evaluation_examples, training_examples
from zo_peft.tools.demo import EMBEDDED

Row = dict[str, Any]

TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED / "model")
DATA = Path(__file__).parents[3] / "shared" / "data"

# ---- Prompts, on rows of the Hub's columns ----------------------------------------------------

#: By task: a row, and the prompt, passage, options, label and answers that it becomes.
HUB: list[tuple[str, Row, Row]] = [
    (
        "sst2",
        {"sentence": "a gripping , funny film ", "label": 1, "idx": 7},
        {
            "prompt": "a gripping , funny film It was",
            "passage": "a gripping , funny film",
            "options": ["terrible", "great"],
            "label": 1,
        },
    ),
    (
        "rte",
        {"premise": "Dana ate the pear.", "hypothesis": "A pear was eaten.", "label": 0, "idx": 0},
        {
            "prompt": "Dana ate the pear.\n"
            'Does this mean that "A pear was eaten." is true? Yes or No?\n',
            "passage": "Dana ate the pear.",
            "options": ["Yes", "No"],
            "label": 0,
        },
    ),
    (
        "cb",
        {"premise": "It may rain. Will it?", "hypothesis": "it will rain", "label": 2, "idx": 3},
        {
            "prompt": "Suppose It may rain. Will it? "
            'Can we infer that "it will rain"? Yes, No, or Maybe?\n',
            "passage": "It may rain. Will it?",
            "options": ["Yes", "No", "Maybe"],
            "label": 2,
        },
    ),
    (
        "boolq",
        {"question": "is ice a solid", "passage": "Ice is frozen water.", "answer": True},
        {
            "prompt": "Ice is frozen water. Is ice a solid?\n",
            "passage": "Ice is frozen water.",
            "options": ["Yes", "No"],
            "label": 0,
        },
    ),
    (
        "wsc",
        {
            "text": "The dog chased the Cat because It was fast.",
            "span1_index": 3,
            "span2_index": 6,
            "span1_text": "the Cat",
            "span2_text": "It",
            "idx": 1,
            "label": 1,
        },
        {
            "prompt": "The dog chased the Cat because It was fast.\nIn the previous sentence, "
            'does the pronoun "it" refer to the Cat? Yes or No?\n',
            "passage": "The dog chased the Cat because It was fast.",
            "options": ["No", "Yes"],
            "label": 1,
        },
    ),
    (
        "wic",
        {
            "word": "bank",
            "sentence1": "He sat on the bank.",
            "sentence2": "The bank is closed.",
            "start1": 14,
            "start2": 4,
            "end1": 18,
            "end2": 8,
            "idx": 0,
            "label": 0,
        },
        {
            "prompt": 'Does the word "bank" have the same meaning in these two sentences? '
            "Yes, No?\nHe sat on the bank.\nThe bank is closed.\n",
            "options": ["No", "Yes"],
            "label": 0,
        },
    ),
    (
        "multirc",
        {
            "paragraph": "Ann met Bob. They ate.",
            "question": "Whom did Ann meet?",
            "answer": "Bob",
            "idx": {"paragraph": 0, "question": 0, "answer": 1},
            "label": 1,
        },
        {
            "prompt": "Ann met Bob. They ate.\nQuestion: Whom did Ann meet?\n"
            'I found this answer "Bob". Is that correct? Yes or No?\n',
            "passage": "Ann met Bob. They ate.",
            "options": ["No", "Yes"],
            "label": 1,
        },
    ),
    (
        "copa",
        {
            "premise": "The man turned on the faucet.",
            "choice1": "The toilet filled with water.",
            "choice2": "Water flowed from the spout.",
            "question": "effect",
            "idx": 0,
            "label": 1,
        },
        {
            "prompt": "The man turned on the faucet so",
            "options": ["the toilet filled with water.", "water flowed from the spout."],
            "label": 1,
        },
    ),
    (
        "record",
        {
            "passage": "Ann Lee won in Oslo.\n@highlight\nA win for Lee\n@highlight\nOslo cheered",
            "query": "@placeholder said that she loves Oslo, and @placeholder smiled",
            "entities": ["Oslo", "Ann Lee", "Lee", "Oslo"],
            "answers": ["Ann Lee", "Lee"],
            "idx": {"passage": 0, "query": 0},
        },
        {
            "prompt": "Ann Lee won in Oslo.\n- A win for Lee\n- Oslo cheered\n-",
            "passage": "Ann Lee won in Oslo.\n- A win for Lee\n- Oslo cheered",
            "options": [
                " Oslo said that she loves Oslo, and Oslo smiled",
                " Ann Lee said that she loves Oslo, and Ann Lee smiled",
                " Lee said that she loves Oslo, and Lee smiled",
            ],
            "label": 1,
            "also_right": [2],
        },
    ),
    (
        "squad",
        {
            "id": "5",
            "title": "Super_Bowl_50",
            "context": "The Denver Broncos won in 2016.",
            "question": "Which team won?",
            "answers": {"text": ["Denver Broncos", "Broncos", "Broncos"], "answer_start": [4, 11]},
        },
        {
            "prompt": "Title: Super_Bowl_50\nContext: The Denver Broncos won in 2016.\n"
            "Question: Which team won?\nAnswer:",
            "passage": "The Denver Broncos won in 2016.",
            "answers": ["Denver Broncos", "Broncos"],
        },
    ),
    (
        "drop",
        {
            "section_id": "nfl_1",
            "query_id": "x",
            "passage": "The Bears scored 7, the Lions 10.",
            "question": "How many points did the Lions score?",
            "answers_spans": {"spans": ["10", "10 points"], "types": ["number", "span"]},
        },
        {
            "prompt": "Passage: The Bears scored 7, the Lions 10.\n"
            "Question: How many points did the Lions score?\nAnswer:",
            "passage": "The Bears scored 7, the Lions 10.",
            "answers": [["10"], ["10 points"]],
        },
    ),
]
NAMES = [name for name, _, _ in HUB]
ROWS = {name: row for name, row, _ in HUB}

#: What is trained on as the completion of the prompt; the other tasks are trained as evaluated.
COMPLETIONS = {
    "copa": "water flowed from the spout.",
    "record": " Ann Lee said that she loves Oslo, and Ann Lee smiled",
    "squad": "Denver Broncos",
    "drop": "10",
}


@pytest.mark.parametrize(("name", "row", "example"), HUB, ids=NAMES)
def test_a_row_becomes_the_papers_prompt(name: str, row: Row, example: Row) -> None:
    assert TASKS[name].example(row) == example
    assert list(TASKS) == NAMES


@pytest.mark.parametrize(("name", "row", "example"), HUB, ids=NAMES)
def test_answers_are_trained_on_as_completions(name: str, row: Row, example: Row) -> None:
    if name in COMPLETIONS:
        passage = {} if name == "copa" else {"passage": example["passage"]}
        example = {"prompt": example["prompt"], **passage, "completion": COMPLETIONS[name]}
    assert TASKS[name].training_example(row) == example


@pytest.mark.parametrize(("name", "row", "example"), HUB, ids=NAMES)
def test_a_head_classifies_the_prompt(name: str, row: Row, example: Row) -> None:
    if name in ("record", "squad", "drop"):
        with pytest.raises(UserError, match="this task has no classes"):
            TASKS[name].classified(row)
        return
    text = example["prompt"]
    if name == "copa":
        text += " the toilet filled with water, or water flowed from the spout?"
    passage = {} if name in ("copa", "wic") else {"passage": example["passage"]}
    expected = {"text": text, **passage, "label": example["label"]}
    assert TASKS[name].classified(row) == expected


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("sst2", {"label": 0}, "terrible"),
        ("sst2", {"label": "0"}, "terrible"),
        ("sst2", {"label": "1"}, "great"),
        ("rte", {"label": 0}, "Yes"),
        ("rte", {"label": 1}, "No"),
        ("rte", {"label": "entailment"}, "Yes"),
        ("rte", {"label": "not_entailment"}, "No"),
        ("cb", {"label": 0}, "Yes"),
        ("cb", {"label": 1}, "No"),
        ("cb", {"label": 2}, "Maybe"),
        ("cb", {"label": "entailment"}, "Yes"),
        ("cb", {"label": "contradiction"}, "No"),
        ("cb", {"label": "neutral"}, "Maybe"),
        ("boolq", {"answer": True}, "Yes"),
        ("boolq", {"answer": False}, "No"),
        ("boolq", {"answer": 1}, "Yes"),
        ("boolq", {"answer": 0}, "No"),
        *(
            (name, {"label": label}, word)
            for name in ("wsc", "wic", "multirc")
            for label, word in ((0, "No"), (1, "Yes"), (False, "No"), (True, "Yes"))
        ),
        ("copa", {"label": 0}, "the toilet filled with water."),
        ("copa", {"label": "1"}, "water flowed from the spout."),
        ("record", {"answers": ["Oslo"]}, " Oslo said that she loves Oslo, and Oslo smiled"),
    ],
)
def test_a_label_is_its_word(name: str, changes: Row, words: str) -> None:
    example = TASKS[name].example({**ROWS[name], **changes})
    assert example["options"][example["label"]] == words
    assert type(example["label"]) is int
    assert example.get("also_right", []) == []


@pytest.mark.parametrize(("label", "index"), [(1, 0), (0, 1), (True, 0), (False, 1)])
def test_boolq_may_have_its_answer_as_a_label(label: object, index: int) -> None:
    """As in SuperGLUE, where 1 is true."""
    row = {"question": "is ice a solid?", "passage": "Ice is frozen water.", "label": label}
    example = TASKS["boolq"].example(row)
    assert example["prompt"] == "Ice is frozen water. Is ice a solid?\n"
    assert (example["options"], example["label"]) == (["Yes", "No"], index)


@pytest.mark.parametrize(
    ("changes", "prompt", "options"),
    [
        (
            {"question": "cause"},
            "The man turned on the faucet because",
            ["the toilet filled with water.", "water flowed from the spout."],
        ),
        (
            {"premise": "I slept", "choice1": "I was tired.", "choice2": "In May I was ill."},
            "I slept so",
            ["I was tired.", "in May I was ill."],
        ),
        (
            # Spaces at either end, as the training set has them, and more than a full stop.
            {"premise": "He paused... ", "choice1": " The end.", "choice2": "It\u00e9.\n"},
            "He paused.. so",
            ["the end.", "it\u00e9."],
        ),
    ],
)
def test_copa_reads_on_as_a_sentence(changes: Row, prompt: str, options: list[str]) -> None:
    example = TASKS["copa"].example({**ROWS["copa"], **changes})
    assert (example["prompt"], example["options"]) == (prompt, options)


def test_drop_joins_the_spans_of_its_first_answer() -> None:
    spans = {"spans": [["Bears", "Lions"], ["both"]]}
    row = {**ROWS["drop"], "answers_spans": spans}
    assert TASKS["drop"].example(row)["answers"] == [["Bears", "Lions"], ["both"]]
    assert TASKS["drop"].training_example(row)["completion"] == "Bears, Lions"


def test_the_papers_settings() -> None:
    assert {name: task.num_dev for name, task in TASKS.items()} == {
        **dict.fromkeys(("sst2", "rte", "boolq", "wsc", "wic", "multirc"), 500),
        **dict.fromkeys(("record", "squad", "drop"), 500),
        "cb": 100,
        "copa": 100,
    }
    data = DataArguments()
    assert (data.num_train, data.num_dev, data.num_eval, data.shots) == (1000, None, 1000, 0)


# ---- Sources: the original releases, rows of the Hub in files, the Hub -------------------------

#: By task: names of the training and evaluation file, content of one of them, examples.
RELEASED: list[tuple[str, tuple[str, str], object, list[Row]]] = [
    (
        "sst2",
        ("train.tsv", "dev.tsv"),
        "sentence\tlabel\nit 's \" fun \t1\nno\t0\n",
        [
            {
                "prompt": "it 's \" fun It was",
                "passage": "it 's \" fun",
                "options": ["terrible", "great"],
                "label": 1,
            },
            {
                "prompt": "no It was",
                "passage": "no",
                "options": ["terrible", "great"],
                "label": 0,
            },
        ],
    ),
    (
        "rte",
        ("train.jsonl", "val.jsonl"),
        [{"premise": "P.", "hypothesis": "H.", "label": "not_entailment", "idx": 0}],
        [
            {
                "prompt": 'P.\nDoes this mean that "H." is true? Yes or No?\n',
                "passage": "P.",
                "options": ["Yes", "No"],
                "label": 1,
            }
        ],
    ),
    (
        "cb",
        ("train.jsonl", "val.jsonl"),
        [{"premise": "P.", "hypothesis": "h", "label": "contradiction", "idx": 0}],
        [
            {
                "prompt": 'Suppose P. Can we infer that "h"? Yes, No, or Maybe?\n',
                "passage": "P.",
                "options": ["Yes", "No", "Maybe"],
                "label": 1,
            }
        ],
    ),
    (
        "boolq",
        ("train.jsonl", "val.jsonl"),
        [{"question": "is it so", "passage": "No.", "idx": 0, "label": False}],
        [
            {
                "prompt": "No. Is it so?\n",
                "passage": "No.",
                "options": ["Yes", "No"],
                "label": 1,
            }
        ],
    ),
    (
        "wsc",
        ("train.jsonl", "val.jsonl"),
        [
            {
                "text": "Mark told Pete that He won.",
                "idx": 0,
                "label": False,
                "target": {
                    "span1_text": "Mark",
                    "span1_index": 0,
                    "span2_text": "He",
                    "span2_index": 4,
                },
            }
        ],
        [
            {
                "prompt": "Mark told Pete that He won.\nIn the previous sentence, does the "
                'pronoun "he" refer to Mark? Yes or No?\n',
                "passage": "Mark told Pete that He won.",
                "options": ["No", "Yes"],
                "label": 0,
            }
        ],
    ),
    (
        "wic",
        ("train.jsonl", "val.jsonl"),
        [{"word": "go", "sentence1": "Go!", "sentence2": "I go.", "label": True, "version": 1.1}],
        [
            {
                "prompt": 'Does the word "go" have the same meaning in these two sentences? '
                "Yes, No?\nGo!\nI go.\n",
                "options": ["No", "Yes"],
                "label": 1,
            }
        ],
    ),
    (
        "multirc",
        ("train.jsonl", "val.jsonl"),
        [
            {
                "idx": 0,
                "version": 1.1,
                "passage": {
                    "text": "Ann met Bob.",
                    "questions": [
                        {
                            "question": "Who?",
                            "answers": [
                                {"text": "Ann", "idx": 0, "label": 1},
                                {"text": "Eve", "idx": 1, "label": 0},
                            ],
                            "idx": 0,
                        },
                        {"question": "When?", "answers": [{"text": "today", "label": 0}]},
                    ],
                },
            }
        ],
        [
            {
                "prompt": "Ann met Bob.\nQuestion: Who?\n"
                'I found this answer "Ann". Is that correct? Yes or No?\n',
                "passage": "Ann met Bob.",
                "options": ["No", "Yes"],
                "label": 1,
            },
            {
                "prompt": "Ann met Bob.\nQuestion: Who?\n"
                'I found this answer "Eve". Is that correct? Yes or No?\n',
                "passage": "Ann met Bob.",
                "options": ["No", "Yes"],
                "label": 0,
            },
            {
                "prompt": "Ann met Bob.\nQuestion: When?\n"
                'I found this answer "today". Is that correct? Yes or No?\n',
                "passage": "Ann met Bob.",
                "options": ["No", "Yes"],
                "label": 0,
            },
        ],
    ),
    (
        "copa",
        ("train.jsonl", "val.jsonl"),
        [
            {
                "premise": "It fell.",
                "choice1": "It broke.",
                "choice2": "I saw it.",
                "question": "cause",
                "label": 1,
                "idx": 0,
            }
        ],
        [{"prompt": "It fell because", "options": ["it broke.", "I saw it."], "label": 1}],
    ),
    (
        "record",
        ("train.jsonl", "val.jsonl"),
        [
            {
                "source": "Daily mail",
                "passage": {
                    "text": "Ann won in Oslo.\n@highlight\nOslo cheered",
                    # The last letter's place, not the one behind it.
                    "entities": [
                        {"start": 0, "end": 2},
                        {"start": 11, "end": 14},
                        {"start": 28, "end": 31},
                    ],
                },
                "qas": [
                    {
                        "query": "She lives in @placeholder",
                        "answers": [{"start": 11, "end": 14, "text": "Oslo"}],
                        "idx": 0,
                    },
                    {
                        "query": "@placeholder won",
                        "answers": [{"start": 0, "end": 2, "text": "Ann"}],
                        "idx": 1,
                    },
                ],
                "idx": 0,
            }
        ],
        [
            {
                "prompt": "Ann won in Oslo.\n- Oslo cheered\n-",
                "passage": "Ann won in Oslo.\n- Oslo cheered",
                "options": [" She lives in Ann", " She lives in Oslo"],
                "label": 1,
                "also_right": [],
            },
            {
                "prompt": "Ann won in Oslo.\n- Oslo cheered\n-",
                "passage": "Ann won in Oslo.\n- Oslo cheered",
                "options": [" Ann won", " Oslo won"],
                "label": 0,
                "also_right": [],
            },
        ],
    ),
    (
        "squad",
        ("train-v1.1.json", "dev-v1.1.json"),
        {
            "version": "1.1",
            "data": [
                {
                    "title": "Oslo",
                    "paragraphs": [
                        {
                            "context": "Oslo is old.",
                            "qas": [
                                {
                                    "id": "1",
                                    "question": "How is it?",
                                    "answers": [
                                        {"text": "old", "answer_start": 8},
                                        {"text": "is old", "answer_start": 5},
                                        {"text": "old", "answer_start": 8},
                                    ],
                                }
                            ],
                        },
                        {
                            "context": "It snows.",
                            "qas": [
                                {
                                    "id": "2",
                                    "question": "What?",
                                    "answers": [{"text": "snows", "answer_start": 3}],
                                }
                            ],
                        },
                    ],
                }
            ],
        },
        [
            {
                "prompt": "Title: Oslo\nContext: Oslo is old.\nQuestion: How is it?\nAnswer:",
                "passage": "Oslo is old.",
                "answers": ["old", "is old"],
            },
            {
                "prompt": "Title: Oslo\nContext: It snows.\nQuestion: What?\nAnswer:",
                "passage": "It snows.",
                "answers": ["snows"],
            },
        ],
    ),
    (
        "drop",
        ("drop_dataset_train.json", "drop_dataset_dev.json"),
        {
            "nfl_1": {
                "passage": "The Bears scored 7.",
                "qa_pairs": [
                    {
                        "question": "How many?",
                        "answer": {
                            "number": "7",
                            "date": {"day": "", "month": "", "year": ""},
                            "spans": [],
                        },
                        "query_id": "a",
                        "validated_answers": [
                            {"number": "", "date": {}, "spans": ["7 points"]},
                            {"number": "", "date": {"day": "", "month": ""}, "spans": []},
                        ],
                    },
                    {
                        "question": "Who?",
                        "answer": {"number": "", "date": {}, "spans": ["Bears", "Lions"]},
                    },
                ],
            },
            "history_2": {
                "passage": "On 3 May 1810 he died.",
                "qa_pairs": [
                    {
                        "question": "When?",
                        "answer": {
                            "number": "",
                            "date": {"day": "3", "month": "May", "year": "1810"},
                            "spans": [],
                        },
                        "validated_answers": [
                            {"number": "", "date": {"day": "", "month": "May", "year": "1810"}}
                        ],
                    }
                ],
            },
        },
        [
            {
                "prompt": "Passage: The Bears scored 7.\nQuestion: How many?\nAnswer:",
                "passage": "The Bears scored 7.",
                "answers": [["7"], ["7 points"]],
            },
            {
                "prompt": "Passage: The Bears scored 7.\nQuestion: Who?\nAnswer:",
                "passage": "The Bears scored 7.",
                "answers": [["Bears", "Lions"]],
            },
            {
                "prompt": "Passage: On 3 May 1810 he died.\nQuestion: When?\nAnswer:",
                "passage": "On 3 May 1810 he died.",
                "answers": [["3 May 1810"], ["May 1810"]],
            },
        ],
    ),
]


def write(path: Path, content: object) -> None:
    """Text as it is, a list as JSON lines, another object as one."""
    if not isinstance(content, str):
        lines = content if isinstance(content, list) else [content]
        content = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(("name", "files", "content", "expected"), RELEASED, ids=NAMES)
def test_a_release_is_read_as_it_was_published(
    name: str,
    files: tuple[str, str],
    content: object,
    expected: list[Row],
    part: int,
    tmp_path: Path,
) -> None:
    write(tmp_path / files[part], content)
    write(tmp_path / files[1 - part], "this file is of the other part")
    rows = task_rows(name, str(tmp_path), part)
    assert converted(name, rows, TASKS[name].example) == expected


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(("name", "row", "example"), HUB, ids=NAMES)
def test_the_hubs_rows_may_lie_in_a_folder(
    name: str, row: Row, example: Row, part: int, tmp_path: Path
) -> None:
    write(tmp_path / ("train.jsonl", "validation.jsonl")[part], [row, row])
    rows = task_rows(name, str(tmp_path), part)
    assert rows == [row, row]
    assert converted(name, rows, TASKS[name].example) == [example, example]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("sst2", ("nyu-mll/glue", "sst2")),
        ("rte", ("aps/super_glue", "rte")),
        ("cb", ("aps/super_glue", "cb")),
        ("boolq", ("google/boolq", None)),
        ("wsc", ("aps/super_glue", "wsc.fixed")),
        ("wic", ("aps/super_glue", "wic")),
        ("multirc", ("aps/super_glue", "multirc")),
        ("copa", ("aps/super_glue", "copa")),
        ("record", ("aps/super_glue", "record")),
        ("squad", ("rajpurkar/squad", None)),
        ("drop", ("ucinlp/drop", None)),
    ],
)
def test_without_a_folder_rows_come_from_the_hub(
    name: str, source: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(path: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        return datasets.Dataset.from_list([{"split": split}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert task_rows(name, None, 0) == [{"split": "train"}]
    assert task_rows(name, None, 1) == [{"split": "validation"}]
    assert asked == [(*source, "train"), (*source, "validation")]


def test_a_hub_out_of_reach_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host\nand more of it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        task_rows("squad", None, 1)
    message = str(caught.value)
    assert message.startswith("data set 'rajpurkar/squad', split 'validation' cannot be loaded: ")
    assert len(message.splitlines()) == 1


# ---- Splits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "asked", "sizes", "said"),
    [
        ("sst2", 2000, (1000, None), (1000, 500), ""),
        ("sst2", 1500, (1000, None), (1000, 500), ""),
        (
            "rte",
            1000,
            (1000, None),
            (667, 333),
            "rte has 1,000 training rows: 667 to train on, 333",
        ),
        (
            "rte",
            1400,
            (1000, None),
            (900, 500),
            "rte has 1,400 training rows: 900 to train on, 500",
        ),
        ("cb", 250, (1000, None), (150, 100), "cb has 250 training rows: 150 to train on, 100"),
        ("copa", 400, (1000, None), (300, 100), "copa has 400 training rows: 300 to train on, 100"),
        ("copa", 1100, (1000, None), (1000, 100), ""),
        ("wic", 10, (100, 3), (7, 3), "wic has 10 training rows: 7 to train on, 3"),
        ("wic", 10, (4, 9), (4, 3), "wic has 10 training rows: 4 to train on, 3"),
        ("wic", 100, (10, 50), (10, 50), ""),
        ("wic", 100, (60, 0), (60, 0), ""),
    ],
)
def test_parts_are_random_disjoint_and_scaled_down_aloud(
    name: str,
    count: int,
    asked: tuple[int, int | None],
    sizes: tuple[int, int],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"number": number} for number in range(count)]
    train, dev = train_parts(name, rows, *asked, seed=3)
    assert (len(train), len(dev)) == sizes
    printed = capsys.readouterr()
    assert printed.err == (f"{said} to validate on\n" if said else "")
    assert printed.out == ""
    numbers = [row["number"] for row in train + dev]
    assert len(set(numbers)) == sum(sizes)
    assert set(numbers) <= set(range(count))
    assert numbers != sorted(numbers)
    assert train_parts(name, rows, *asked, seed=3) == (train, dev)
    assert train_parts(name, rows, *asked, seed=4) != (train, dev)


def test_a_sample_is_the_same_for_every_run() -> None:
    rows = [{"number": number} for number in range(100)]
    drawn = sample(rows, 10)
    random.seed(7)
    assert sample(rows, 10) == drawn
    numbers = {row["number"] for row in drawn}
    assert len(numbers) == 10
    assert numbers < set(range(100))
    assert numbers != set(range(10))
    assert sample(rows, 100) == rows
    assert sample(rows, 1000) == rows


# ---- In-context -------------------------------------------------------------------------------

#: By task: how its row of `HUB` reads as a demonstration.
ANSWERED = {
    "sst2": "a gripping , funny film It was great",
    "rte": 'Dana ate the pear.\nDoes this mean that "A pear was eaten." is true? Yes or No?\nYes',
    "cb": "Suppose It may rain. Will it? "
    'Can we infer that "it will rain"? Yes, No, or Maybe?\nMaybe',
    "boolq": "Ice is frozen water. Is ice a solid?\nYes",
    "wsc": "The dog chased the Cat because It was fast.\nIn the previous sentence, "
    'does the pronoun "it" refer to the Cat? Yes or No?\nYes',
    "wic": 'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
    "He sat on the bank.\nThe bank is closed.\nNo",
    "multirc": "Ann met Bob. They ate.\nQuestion: Whom did Ann meet?\n"
    'I found this answer "Bob". Is that correct? Yes or No?\nYes',
    "copa": "The man turned on the faucet so water flowed from the spout.",
    "record": "Ann Lee won in Oslo.\n- A win for Lee\n- Oslo cheered\n"
    "- Ann Lee said that she loves Oslo, and Ann Lee smiled",
    "squad": "Title: Super_Bowl_50\nContext: The Denver Broncos won in 2016.\n"
    "Question: Which team won?\nAnswer: Denver Broncos",
    "drop": "Passage: The Bears scored 7, the Lions 10.\n"
    "Question: How many points did the Lions score?\nAnswer: 10",
}


@pytest.mark.parametrize(("name", "row", "example"), HUB, ids=NAMES)
def test_a_demonstration_is_the_prompt_with_its_answer(name: str, row: Row, example: Row) -> None:
    found = with_demonstrations(TASKS[name], example, [row, row])
    prompt, start = found.pop("prompt"), found.pop("passage_start", None)
    shots = f"{ANSWERED[name]}\n\n" * 2
    assert prompt == shots + example["prompt"]
    assert found == {key: value for key, value in example.items() if key != "prompt"}
    if "passage" in example:
        assert start >= len(shots)
        assert prompt[start:].startswith(example["passage"])


def sst2_folder(folder: Path) -> str:
    rows = [(f"film {n} ", n % 2) for n in range(40)]
    for name in ("train.tsv", "dev.tsv"):
        lines = "".join(f"{name[:3]} {text}\t{label}\n" for text, label in rows)
        write(folder / name, f"sentence\tlabel\n{lines}")
    return str(folder)


def test_thirty_two_shots_come_before_each_prompt(tmp_path: Path) -> None:
    data = DataArguments(task="sst2", task_data_dir=sst2_folder(tmp_path), num_eval=5, shots=32)
    made = evaluation_examples(data, classifies=False, generates=False)
    assert made is not None
    assert len(made) == 5
    shown, asked = zip(*(example["prompt"].rsplit("\n\n", 1) for example in made))
    assert len(set(shown)) == 1
    assert len(set(asked)) == 5
    lines = shown[0].split("\n\n")
    assert len(set(lines)) == 32
    words = ["terrible", "great"]
    assert set(lines) < {f"tra film {n} It was {words[n % 2]}" for n in range(40)}
    for prompt, example in zip(asked, made):
        number = int(prompt.removeprefix("dev film ").removesuffix(" It was"))
        assert example["passage"] == f"dev film {number}"
        assert example["label"] == number % 2


def test_a_head_takes_no_shots(tmp_path: Path) -> None:
    data = DataArguments(task="sst2", task_data_dir=sst2_folder(tmp_path), shots=1)
    with pytest.raises(UserError, match="--shots is for language models"):
        evaluation_examples(data, classifies=True, generates=False)


def test_training_and_validation_come_from_the_training_file(tmp_path: Path) -> None:
    folder = sst2_folder(tmp_path)
    data = DataArguments(task="sst2", task_data_dir=folder, num_train=20, num_dev=10)
    train, dev = training_examples(data, classifies=False, generates=False, seed=0)
    assert dev is not None
    assert (len(train), len(dev)) == (20, 10)
    prompts = {example["prompt"] for example in train + dev}
    assert len(prompts) == 30
    assert all(prompt.startswith("tra film ") for prompt in prompts)
    again = training_examples(data, classifies=True, generates=False, seed=0)
    assert [e["text"] for e in again[0]] == [e["prompt"] for e in train]
    test = evaluation_examples(data, classifies=False, generates=False)
    assert test is not None
    assert len(test) == 40
    assert all(example["prompt"].startswith("dev film ") for example in test)


def test_completions_are_validated_by_options_and_rewarded_by_answers(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [ROWS["copa"]] * 4)
    data = DataArguments(task="copa", task_data_dir=str(tmp_path), num_train=3, num_dev=1)
    train, dev = training_examples(data, classifies=False, generates=False, seed=0)
    assert dev is not None
    assert [list(example) for example in train] == [["prompt", "completion"]] * 3
    assert [list(example) for example in dev] == [["prompt", "options", "label"]]
    rewarded, _ = training_examples(data, classifies=False, generates=True, seed=0)
    assert [list(example) for example in rewarded] == [["prompt", "options", "label"]] * 3


# ---- Truncation -------------------------------------------------------------------------------

LONG = (
    "The film is a warm and funny story of a boy who lost his dog in the snow, told with wit. "
    "It never drags, and its small cast is a joy to watch from the first scene to the last one."
)

#: By task: its row's column of the passage, and what stands before and after it in the prompt.
AROUND: dict[str, tuple[Row, str, str]] = {
    "sst2": ({"sentence": LONG}, "", " It was"),
    "rte": (
        {"premise": LONG},
        "",
        '\nDoes this mean that "A pear was eaten." is true? Yes or No?\n',
    ),
    "cb": (
        {"premise": LONG},
        "Suppose ",
        ' Can we infer that "it will rain"? Yes, No, or Maybe?\n',
    ),
    "boolq": ({"passage": LONG}, "", " Is ice a solid?\n"),
    "wsc": (
        {"text": LONG},
        "",
        '\nIn the previous sentence, does the pronoun "it" refer to the Cat? Yes or No?\n',
    ),
    "multirc": (
        {"paragraph": LONG},
        "",
        '\nQuestion: Whom did Ann meet?\nI found this answer "Bob". Is that correct? Yes or No?\n',
    ),
    "record": ({"passage": LONG}, "", "\n-"),
    "squad": (
        {"context": LONG},
        "Title: Super_Bowl_50\nContext: ",
        "\nQuestion: Which team won?\nAnswer:",
    ),
    "drop": (
        {"passage": LONG},
        "Passage: ",
        "\nQuestion: How many points did the Lions score?\nAnswer:",
    ),
}


CLASSES = ["sst2", "rte", "cb", "boolq", "wsc", "multirc"]
SEEN = [
    *((name, "example") for name in AROUND),
    *((name, "classified") for name in CLASSES),
    *((name, "training_example") for name in ("record", "squad", "drop")),
]


def length(text: str) -> int:
    return len(TOKENIZER(text)["input_ids"])


def spaced(prompt: str, ending: str) -> str:
    return prompt + ("" if prompt.endswith("\n") or ending.startswith(" ") else " ") + ending


def longest(name: str, form: str, before: str, after: str) -> int:
    """Tokens of the question with its longest option or its completion, without the passage."""
    if form == "classified" or (name in ("squad", "drop") and form == "example"):
        return length(before + after)
    if form == "training_example":
        return length(spaced(before + after, COMPLETIONS[name]))
    options = next(example["options"] for task, _, example in HUB if task == name)
    return max(length(spaced(before + after, option)) for option in options)


def seen(name: str, form: str, row: Row, **limits: Any) -> tuple[str, int]:
    """The prompt as the model sees it, and the most tokens with what comes behind it."""
    example = getattr(TASKS[name], form)(row)
    classes = 3 if form == "classified" else None
    features = Tokenization(TOKENIZER, num_labels=classes, **limits)(example, 0)
    endings = example.get("options") or [example.get("completion", "")]
    if classes is not None:
        endings = [""]
    if "option_ids" in features:
        wholes = [features["prompt_ids"] + option for option in features["option_ids"]]
    else:
        wholes = [features["input_ids" if "input_ids" in features else "prompt_ids"]]
    prompts = set()
    for whole, ending in zip(wholes, endings, strict=True):
        text = TOKENIZER.decode(whole, skip_special_tokens=True)
        assert text.endswith(ending)
        prompts.add(text.removesuffix(ending).removesuffix(" "))
    assert len(prompts) == 1
    return prompts.pop(), max(map(len, wholes))


def kept(prompt: str, before: str, after: str) -> str:
    """What is left of the passage in a prompt that is whole before and after it."""
    assert prompt.startswith(before)
    assert prompt.endswith(after)
    assert len(prompt) >= len(before + after)
    return prompt[len(before) : len(prompt) - len(after)]


@pytest.mark.parametrize(("name", "form"), SEEN)
def test_a_passage_is_cut_at_its_end_and_the_question_stays_whole(name: str, form: str) -> None:
    changes, before, after = AROUND[name]
    row = {**ROWS[name], **changes}
    limit = longest(name, form, before, after) + 12
    prompt, tokens = seen(name, form, row, max_length=limit)
    passage = kept(prompt, before, after)
    assert 0 < len(passage) < len(LONG)
    assert LONG.startswith(passage)
    assert passage == passage.rstrip()
    # One token less for the end of a completion, and as few as may be where tokens merge.
    assert limit - 4 <= tokens <= limit
    whole, tokens = seen(name, form, row)
    assert kept(whole, before, after) == LONG
    assert seen(name, form, row, max_length=tokens + 1) == (whole, tokens)


@pytest.mark.parametrize(("name", "form"), SEEN)
def test_a_passage_is_cut_to_the_context_where_no_length_is_set(name: str, form: str) -> None:
    changes, before, after = AROUND[name]
    context = longest(name, form, before, after) + 20
    room = 8 if (form, name) in (("example", "squad"), ("example", "drop")) else 0
    limits = {"context": context, "max_completion_length": 8}
    prompt, tokens = seen(name, form, {**ROWS[name], **changes}, **limits)
    assert LONG.startswith(kept(prompt, before, after))
    assert context - 4 <= tokens + room <= context


def test_sentences_to_compare_are_no_passage() -> None:
    """WiC and COPA are cut from the left, as any prompt."""
    for name in ("wic", "copa"):
        whole, tokens = seen(name, "example", ROWS[name])
        prompt, left = seen(name, "example", ROWS[name], max_length=tokens - 2)
        assert left == tokens - 2
        assert whole.endswith(prompt)
        assert prompt != whole


def test_a_question_too_long_by_itself_loses_its_passage_and_is_cut_from_the_left() -> None:
    changes, before, after = AROUND["rte"]
    row = {**ROWS["rte"], **changes}
    limit = longest("rte", "example", before, after) - 5
    prompt, tokens = seen("rte", "example", row, max_length=limit)
    assert tokens == limit
    assert after.endswith(prompt)
    assert 0 < len(prompt) < len(after)


def test_demonstrations_keep_their_passage() -> None:
    """Also where it is the same one."""
    changes, before, after = AROUND["squad"]
    row = {**ROWS["squad"], **changes}
    task = TASKS["squad"]
    example = with_demonstrations(task, task.example(row), [row])
    shown = f"{before}{LONG}{after} Denver Broncos\n\n"
    limit = length(shown + before + after) + 12
    features = Tokenization(TOKENIZER, max_length=limit)(example, 0)
    prompt = TOKENIZER.decode(features["prompt_ids"], skip_special_tokens=True)
    passage = kept(prompt, shown + before, after)
    assert 0 < len(passage) < len(LONG)
    assert LONG.startswith(passage)


# It begins with a letter that no question has: `test_what_a_passage_shares_with_its_question` is
# about the others.
PASSAGE = st.builds(
    lambda text: ("§" + text).strip(),
    st.text("ab .,\n\té☃😀", max_size=60)
    | st.lists(st.sampled_from(LONG.split()), max_size=60).map(" ".join)
    | st.text(st.characters(codec="utf-8"), max_size=40),
)


@given(st.sampled_from(SEEN), PASSAGE, st.integers(0, 60))
def test_any_passage_is_cut_to_fit(case: tuple[str, str], passage: str, room: int) -> None:
    name, form = case
    changes, before, after = AROUND[name]
    row = {**ROWS[name], **dict.fromkeys(changes, passage)}
    # With nothing of the passage left, one more for the end of a completion.
    limit = longest(name, form, before, after) + 1 + room
    prompt, tokens = seen(name, form, row, max_length=limit)
    assert tokens <= limit
    left = kept(prompt, before, after)
    assert passage.startswith(left)
    whole, all_tokens = seen(name, form, row)
    assert (prompt == whole) == (left == passage)
    if all_tokens + 1 <= limit:
        assert left == passage


@pytest.mark.parametrize(
    ("name", "changes", "before", "after", "limit"),
    [
        (
            "cb",
            {"premise": "no film is like this one", "hypothesis": "it is not good"},
            "Suppose ",
            ' Can we infer that "it is not good"? Yes, No, or Maybe?\n',
            4,
        ),
        (
            "rte",
            {"premise": "Cats sleep.", "hypothesis": "Cats sleep."},
            "",
            '\nDoes this mean that "Cats sleep." is true? Yes or No?\n',
            4,
        ),
    ],
)
def test_what_a_passage_shares_with_its_question_stays_in_the_question(
    name: str, changes: Row, before: str, after: str, limit: int
) -> None:
    row = {**ROWS[name], **changes}
    prompt, _ = seen(name, "example", row, max_length=length(before + after) + limit)
    assert changes["premise"].startswith(kept(prompt, before, after))


# ---- Mistakes ---------------------------------------------------------------------------------


def changed(name: str, **changes: Any) -> list[Row]:
    """The task's row twice, the second time with changes; None removes a column."""
    row = {**ROWS[name], **changes}
    return [ROWS[name], {key: value for key, value in row.items() if value is not None}]


MISTAKES: list[tuple[str, str, object, str]] = [
    ("mnli", "val.jsonl", [{}], "task='mnli' is not known; use one of sst2, rte, cb, boolq, wsc"),
    ("rte", "test.jsonl", [{}], "holds no data of rte; expected one of .*, val.jsonl"),
    ("squad", "val.jsonl", [{}], "holds no data of squad; expected one of dev-v1.1.jsonl, dev-v1"),
    ("rte", "val.jsonl", "", "val.jsonl has no rows"),
    ("rte", "val.jsonl", "{", "val.jsonl, line 1 is not JSON"),
    (
        "sst2",
        "dev.tsv",
        "text\tlabel\na\t1\n",
        "sst2, row 1: it has no column 'sentence'; it has text",
    ),
    ("sst2", "dev.tsv", "sentence\tlabel\na\t2\n", "sst2, row 1: .*'2' is none .* expected 0 to 1"),
    ("sst2", "dev.tsv", "sentence\tlabel\na\tpos\n", "sst2, row 1: label 'pos' is none"),
    ("rte", "val.jsonl", changed("rte", label=None), "rte, row 2: it has no column 'label'"),
    ("rte", "val.jsonl", changed("rte", label=-1), "rte, row 2: label -1 is none"),
    ("rte", "val.jsonl", changed("rte", label="neutral"), "rte, row 2: label 'neutral' is none"),
    (
        "rte",
        "val.jsonl",
        changed("rte", hypothesis=None),
        "rte, row 2: it has no column 'hypothesis'",
    ),
    ("cb", "val.jsonl", changed("cb", label=3), "cb, row 2: label 3 is none .* 0 to 2"),
    ("boolq", "val.jsonl", changed("boolq", answer=None), "boolq, row 2: it has no column 'label'"),
    ("boolq", "val.jsonl", changed("boolq", answer="false"), "boolq, row 2: .* 'false' is neither"),
    ("boolq", "val.jsonl", changed("boolq", answer=-1), "boolq, row 2: .* -1 is neither true nor"),
    ("boolq", "val.jsonl", changed("boolq", question=3), "boolq, row 2: it cannot be used"),
    (
        "wsc",
        "val.jsonl",
        changed("wsc", span1_text=None),
        "wsc, row 2: it has no column 'span1_text'",
    ),
    ("wsc", "val.jsonl", changed("wsc", label=2), "wsc, row 2: label 2 is none"),
    ("wic", "val.jsonl", changed("wic", label="T"), "wic, row 2: label 'T' is none"),
    ("multirc", "val.jsonl", changed("multirc", label=2), "multirc, row 2: label 2 is none"),
    ("multirc", "val.jsonl", [{"passage": "text"}], "val.jsonl is not laid out as multirc's"),
    ("copa", "val.jsonl", changed("copa", label=2), "copa, row 2: label 2 is none"),
    ("copa", "val.jsonl", changed("copa", choice2=None), "copa, row 2: it has no column 'choice2'"),
    ("record", "val.jsonl", changed("record", answers=["Bob"]), "record, row 2: .*'Bob'"),
    ("record", "val.jsonl", changed("record", answers=[]), "record, row 2: it cannot be used"),
    ("record", "val.jsonl", [{"passage": {"text": "a"}}], "val.jsonl is not laid out as record's"),
    (
        "squad",
        "validation.jsonl",
        changed("squad", title=None),
        "squad, row 2: it has no column 'title",
    ),
    ("squad", "dev-v1.1.json", "{", "dev-v1.1.json, line 1 is not JSON"),
    ("squad", "dev-v1.1.json", "7", "dev-v1.1.json, line 1 is not JSON: it is no object"),
    ("squad", "dev-v1.1.json", "[[1]]", "dev-v1.1.json, line 1 is not JSON: it is no object"),
    ("squad", "dev-v1.1.json", {"data": [{"title": "a"}]}, "not laid out as squad's release"),
    ("squad", "dev-v1.1.json", {"rows": []}, "dev-v1.1.json is not laid out as squad's release"),
    ("drop", "validation.jsonl", changed("drop", answers_spans={}), "drop, row 2: .* 'spans'"),
    ("drop", "drop_dataset_dev.json", {"nfl": {}}, "is not laid out as drop's release"),
    (
        "drop",
        "drop_dataset_dev.json",
        {"nfl": {"passage": "a", "qa_pairs": [{"question": "b", "answer": "7"}]}},
        "drop_dataset_dev.json is not laid out as drop's release",
    ),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    name: str,
    file: str,
    content: object,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / file, content)
    assert main(evaluate_argv(name, tmp_path)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert re.search(f"^zo-peft: error: .*{message}", printed.err)


def evaluate_argv(name: str, folder: Path) -> list[str]:
    model = ["--model_name_or_path", str(EMBEDDED / "model"), "--use_cpu", "true"]
    model += ["--disable_tqdm", "true"]
    return ["evaluate", *model, "--task", name, "--task_data_dir", str(folder)]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_measured_by_the_papers_metric(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "validation.jsonl", [ROWS[name]] * 2)
    assert main([*evaluate_argv(name, tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metric_name"] == ("f1" if name in ("squad", "drop") else "accuracy")
    assert result["examples"] == 2
    assert 0 <= result["metric"] <= 1


# ---- The data sets themselves -----------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data sets of shared/data")
@pytest.mark.parametrize(
    ("name", "counts", "labels"),
    [
        ("sst2", (60614, 2000), ["terrible", "great"]),
        ("rte", (1000, 277), ["Yes", "No"]),
        ("cb", (250, 56), ["Yes", "No", "Maybe"]),
        ("boolq", (1000, 3270), ["Yes", "No"]),
        ("copa", (400, 100), None),
    ],
)
def test_a_data_set_becomes_examples_and_token_ids(
    name: str, counts: tuple[int, int], labels: list[str] | None
) -> None:
    task, rows = TASKS[name], [task_rows(name, str(DATA / name), part) for part in (0, 1)]
    assert tuple(map(len, rows)) == counts
    for part in rows:
        made = converted(name, part, task.example)
        shares = Counter(example["label"] for example in made)
        assert sorted(shares) == list(range(len(labels or "12")))
        # CB has few neutral pairs.
        assert min(shares.values()) > (0.05 if name == "cb" else 0.35) * len(part)
        for example in made:
            assert labels is None or example["options"] == labels
            assert not re.search("[ ]{2,}$|^[ ]", example["prompt"])
            assert example.get("passage", "") in example["prompt"]
    chosen = sample(rows[1], 100)
    limits = Tokenization(TOKENIZER, max_length=128)
    for kind in (task.example, task.training_example):
        for features in tokenize_dataset(converted(name, chosen, kind), limits):
            assert features["length"] <= 128
    heads = Tokenization(TOKENIZER, max_length=128, num_labels=3)
    found = tokenize_dataset(converted(name, chosen, task.classified), heads)
    assert max(found["length"]) <= 128


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data sets of shared/data")
@pytest.mark.parametrize("name", ["boolq", "rte"])
def test_a_thousand_rows_are_scaled_down(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = DataArguments(task=name, task_data_dir=str(DATA / name))
    train, dev = training_examples(data, classifies=False, generates=False, seed=0)
    assert dev is not None
    assert (len(train), len(dev)) == (667, 333)
    assert not {e["prompt"] for e in train} & {e["prompt"] for e in dev}
    said = capsys.readouterr().err
    assert said == f"{name} has 1,000 training rows: 667 to train on, 333 to validate on\n"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data sets of shared/data")
def test_copas_sentences_go_on_without_a_break() -> None:
    for part in (0, 1):
        for example in converted("copa", task_rows("copa", str(DATA / "copa"), part), _copa):
            assert re.search(r"[^ .] (so|because)$", example["prompt"])
            for option in example["options"]:
                assert re.match(r"I |[^A-Z ]", option)


def _copa(row: Row) -> Row:
    return TASKS["copa"].example(row)
