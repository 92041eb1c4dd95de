"""The benchmark tasks of the paper: their data, prompts, label words and metrics.

Prompts and sources are in `tasks.yaml`; what takes code to make of a row is here.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from zo_peft.data import read_rows
from zo_peft.data.forms import Row
from zo_peft.data.tokenize import spaced
from zo_peft.errors import UserError, explained
from zo_peft.models.hub import LOAD_ERRORS, reason
from zo_peft.objectives import metrics
from zo_peft.objectives.rewards import RewardFunction

#: The most tokens of a generated answer, as in MeZO's runs.
ANSWER_TOKENS = 50


@dataclass(frozen=True)
class Task:
    """A benchmark task: its entry in `tasks.yaml`, which says what the keys mean, and code.

    Attributes:
        columns: makes columns that a row lacks or has in another form, of the row.
        flatten: for a nested original release: a column of the Hub that the release lacks, and a
            function that makes rows with the Hub's columns of one of its rows.
        rewards: how evaluation judges generated answers.
    """

    hub: tuple[str, str | None]
    prompt: str
    passage: str | None = None
    options: Sequence[str] = ()
    features: Sequence[str] = ()
    text: str | None = None
    files: Sequence[Sequence[str]] = (("train",), ("validation", "val"))
    num_dev: int = 500
    completes: bool = False
    columns: Callable[[Row], Row] = dict
    flatten: tuple[str, Callable[[Row], Iterator[Row]]] | None = None
    rewards: tuple[RewardFunction, ...] = ()

    def example(self, row: Row) -> Row:
        """The example that is evaluated, of a row with the Hub's columns.

        It has a `prompt`, most often a `passage`, and either `options` and `label` or `answers`.
        """
        columns = {**row, **self.columns(row)}
        example: Row = {"prompt": self.prompt.format_map(columns)}
        if self.passage is not None:
            example["passage"] = columns[self.passage]
        if self.options:
            words = [option.format_map(columns) for option in self.options]
            return {**example, "options": words, "label": _label(columns["label"], words)}
        return {**example, **{name: columns[name] for name in self.features}}

    def training_example(self, row: Row) -> Row:
        """The example that is trained on: the one that is evaluated, or the right completion."""
        example = self.example(row)
        if not self.completes:
            return example
        right = example["answers"][0] if "answers" in example else right_option(example)
        completion = right if isinstance(right, str) else ", ".join(right)
        kept: Row = {name: example[name] for name in ("prompt", "passage") if name in example}
        return {**kept, "completion": completion}

    def classified(self, row: Row) -> Row:
        """The example for a classification head: `text`, `label` and, if there is one, `passage`.

        A UserError says that the task has no classes.
        """
        example = self.example(row)
        if self.text is not None:
            text = self.text.format_map({**row, **self.columns(row)})
        elif self.completes:
            raise UserError("this task has no classes; train it as a language model, CAUSAL_LM")
        else:
            text = example["prompt"]
        kept: Row = {name: example[name] for name in ("passage", "label") if name in example}
        return {"text": text, **kept}


def right_option(example: Row) -> str:
    """The text of the option that is right."""
    return example["options"][example["label"]]


#: The labels that the original releases write as words, as their indices on the Hub.
NAMES = {"entailment": 0, "not_entailment": 1, "contradiction": 1, "neutral": 2}


def _label(label: object, words: Sequence[str]) -> int:
    if isinstance(label, bool):
        return words.index("Yes" if label else "No")
    index = str(NAMES.get(label, label) if isinstance(label, str) else label)
    if index.isdecimal() and int(index) < len(words):
        return int(index)
    raise UserError(f"label {label!r} is none of this task's; expected 0 to {len(words) - 1}")


def _boolq(row: Row) -> Row:
    question = row["question"].removesuffix("?")
    answer = row["answer"] if "answer" in row else row["label"]
    if answer not in (True, False):
        raise UserError(f"answer {answer!r} is neither true nor false")
    return {"question": f"{question[:1].upper()}{question[1:]}", "label": bool(answer)}


def _wsc(row: Row) -> Row:
    target = row.get("target", row)
    return {"pronoun": target["span2_text"].lower(), "noun": target["span1_text"]}


def _multirc_rows(row: Row) -> Iterator[Row]:
    passage = row["passage"]
    for question in passage["questions"]:
        for answer in question["answers"]:
            asked = {"paragraph": passage["text"], "question": question["question"]}
            yield {**asked, "answer": answer["text"], "label": answer["label"]}


def _copa(row: Row) -> Row:
    words = {"effect": "so", "cause": "because"}
    if row["question"] not in words:
        raise ValueError(f"its question is {row['question']!r}, neither effect nor cause")
    made = {"premise": row["premise"].strip().removesuffix("."), "word": words[row["question"]]}
    for number in "12":
        choice = row[f"choice{number}"].strip()
        choice = choice if choice.startswith("I ") else choice[:1].lower() + choice[1:]
        made |= {f"choice{number}": choice, f"clause{number}": choice.rstrip(".")}
    return made


def _record(row: Row) -> Row:
    entities = list(dict.fromkeys(row["entities"]))
    right, *others = (entities.index(answer) for answer in dict.fromkeys(row["answers"]))
    options = [f" {row['query'].replace('@placeholder', entity)}" for entity in entities]
    passage = row["passage"].replace("@highlight\n", "- ")
    return {"passage": passage, "options": options, "label": right, "also_right": others}


def _record_rows(row: Row) -> Iterator[Row]:
    passage, text = row["passage"], row["passage"]["text"]
    entities = [text[e["start"] : e["end"] + 1] for e in passage["entities"]]
    for asked in row["qas"]:
        answers = [answer["text"] for answer in asked["answers"]]
        yield {"passage": text, "query": asked["query"], "entities": entities, "answers": answers}


def _squad_rows(row: Row) -> Iterator[Row]:
    for article in row["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = {"text": [answer["text"] for answer in asked["answers"]]}
                about = {"title": article["title"], "context": paragraph["context"]}
                yield {**about, "question": asked["question"], "answers": answers}


def _drop(row: Row) -> Row:
    # Each answer is a list of spans. The Hub's rows do not say which spans belong together, so
    # there each span is an answer of its own, as in MeZO's code.
    spans = row["answers_spans"]["spans"]
    return {"answers": [[span] if isinstance(span, str) else list(span) for span in spans]}


def _drop_rows(row: Row) -> Iterator[Row]:
    for passage in row.values():
        for asked in passage["qa_pairs"]:
            given = [asked["answer"], *asked.get("validated_answers", ())]
            spans = [own for answer in given if (own := _drop_spans(answer))]
            found = {"question": asked["question"], "answers_spans": {"spans": spans}}
            yield {"passage": passage["passage"], **found}


def _drop_spans(answer: Row) -> list[str]:
    """The answer's number or its spans, or its date as one span; an empty list if it has none."""
    if answer.get("number"):
        return [str(answer["number"])]
    if answer.get("spans"):
        return list(answer["spans"])
    date = answer.get("date") or {}
    text = " ".join(date[part] for part in ("day", "month", "year") if date.get(part))
    return [text] if text else []


def _rewards(f1: Callable[..., float], exact: Callable[..., float]) -> tuple[RewardFunction, ...]:
    """Both metrics of a completion's first line, because MeZO's generation ends with the line."""
    scores = {"f1": f1, "exact_match": exact}
    return tuple(metrics.answer_reward(name, score, True) for name, score in scores.items())


#: What of the tasks takes code, as fields of `Task`.
CODE: dict[str, dict[str, Any]] = {
    "sst2": {"columns": lambda row: {"sentence": row["sentence"].strip()}},
    "boolq": {"columns": _boolq},
    "wsc": {"columns": _wsc},
    "multirc": {"flatten": ("paragraph", _multirc_rows)},
    "copa": {"columns": _copa},
    "record": {"columns": _record, "flatten": ("query", _record_rows)},
    "squad": {
        "columns": lambda row: {"answers": list(dict.fromkeys(row["answers"]["text"]))},
        "flatten": ("context", _squad_rows),
        "rewards": _rewards(metrics.squad_f1, metrics.squad_exact_match),
    },
    "drop": {
        "columns": _drop,
        "flatten": ("question", _drop_rows),
        "rewards": _rewards(metrics.drop_f1, metrics.drop_exact_match),
    },
}

TABLE = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_bytes())

#: The tasks by name.
TASKS = {name: Task(**entries, **CODE.get(name, {})) for name, entries in TABLE.items()}


def task_rows(name: str, folder: str | None, part: int) -> list[Row]:
    """All rows of a task, with the Hub's columns; or a UserError.

    Args:
        folder: has the original release, or the Hub's rows as JSON lines. None: those of the Hub.
        part: 0 for the rows to train on, 1 for those to evaluate on.
    """
    task = TASKS[name]
    if folder is None:
        path, config = task.hub
        return hub_rows(path, config, ("train", "validation")[part])
    wanted = [f"{file}{kind}" for file in task.files[part] for kind in (".jsonl", ".json", ".tsv")]
    found = next((p for p in (Path(folder) / w for w in wanted) if p.is_file()), None)
    if found is None:
        what = f"--task_data_dir {Path(folder).name} holds no data of {name}"
        raise UserError(f"{what}; expected one of {', '.join(wanted)}")
    rows = read_rows(found)
    if task.flatten is None or task.flatten[0] in rows[0]:
        return rows
    what = f"{found.name} is not laid out as {name}'s release"
    with explained(what, KeyError, TypeError, AttributeError):
        return [flat for row in rows for flat in task.flatten[1](row)]


def hub_rows(name: str, config: str | None, split: str) -> list[Row]:
    """All rows of a split of a data set of the Hub, or a UserError."""
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        return datasets.load_dataset(name, config, split=split).to_list()
    except (*LOAD_ERRORS, RuntimeError, DatasetsError) as error:
        generating = isinstance(error, DatasetGenerationError) and error.__cause__
        cure = "Give an id of the Hub, or local data: --train_file, --eval_file, --task_data_dir"
        what = f"data set {name!r}, split {split!r} cannot be loaded"
        raise UserError(f"{what}: {reason(generating or error)} {cure}") from error


def train_parts(
    name: str, rows: list[Row], num_train: int, num_dev: int | None, seed: int
) -> tuple[list[Row], list[Row]]:
    """Different random rows to train on and to validate on.

    If there are too few rows, validation gets a third of them, or its full number where that is at
    most 0.4 of the rows; training gets the others. A line on stderr says so.
    """
    wanted = dev = TASKS[name].num_dev if num_dev is None else num_dev
    if num_train + dev > len(rows) and dev > 0.4 * len(rows):
        dev = len(rows) // 3
    train = min(num_train, len(rows) - dev)
    if (train, dev) != (num_train, wanted):
        message = f"{name} has {len(rows):,} training rows: {train:,} to train on, {dev:,} to"
        print(f"{message} validate on", file=sys.stderr)
    order = random.Random(seed).sample(rows, train + dev)
    return order[:train], order[train:]


def sample(rows: list[Row], count: int) -> list[Row]:
    """The same `count` random rows for every run, or all rows where there are not more."""
    return random.Random(0).sample(rows, count) if count < len(rows) else rows


def with_demonstrations(task: Task, example: Row, shown: Sequence[Row]) -> Row:
    """The example with answered rows before its prompt, as in in-context learning.

    Blank lines separate the rows.
    """
    before = ""
    for row in shown:
        complete = task.training_example(row)
        answer = complete.get("completion") or right_option(complete)
        before += f"{complete['prompt']}{spaced(complete['prompt'], answer)}\n\n"
    made = {**example, "prompt": before + example["prompt"]}
    if "passage" in example:
        made["passage_start"] = len(before) + example["prompt"].index(example["passage"])
    return made
