"""The benchmark tasks of the paper: data, prompts, label words and metrics.

Prompts are MeZO's (arXiv:2305.17333, appendix on prompts), as arXiv:2601.04710 uses them.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetsError

from zo_peft.data import read_rows
from zo_peft.data.examples import Row
from zo_peft.errors import UserError
from zo_peft.models.hub import LOAD_ERRORS, reason
from zo_peft.objectives import metrics
from zo_peft.objectives.rewards import RewardFunction

YES_NO, NO_YES = ("Yes", "No"), ("No", "Yes")

#: The most tokens that an answer is generated with, as in MeZO.
ANSWER_TOKENS = 50


@dataclass(frozen=True)
class Task:
    """A benchmark task.

    Attributes:
        hub: the Hub's data set, and its configuration.
        example: makes an example of `zo_peft.data` from a row of the Hub's columns. It has
            `prompt`, `passage` if there is one, and either `options` and `label` or `answers`.
        files: for training and for evaluation, the names that a local file may have, without their
            ending; the first that exists is read.
        flatten: for an original release that is nested: a column that only the Hub's rows have, and
            a function that yields such rows from a row of the release.
        num_dev: the number of validation examples in the paper's runs.
        completes: whether training is language modelling of the right answer.
        rewards: of generated answers, for a task that is evaluated by generating.
        choose: makes the text for a sequence-classification head from a row, for a task whose
            options differ between examples.
    """

    hub: tuple[str, str | None]
    example: Callable[[Row], Row]
    files: tuple[tuple[str, ...], tuple[str, ...]] = (("train",), ("validation", "val"))
    flatten: tuple[str, Callable[[Row], Iterator[Row]]] | None = None
    num_dev: int = 500
    completes: bool = False
    rewards: tuple[RewardFunction, ...] = ()
    choose: Callable[[Row], str] | None = None

    def training_example(self, row: Row) -> Row:
        """Make the example that is trained on; if the task `completes`, it has a `completion`."""
        example = self.example(row)
        if not self.completes:
            return example
        if "answers" in example:
            first = example["answers"][0]
            right = first if isinstance(first, str) else ", ".join(first)
        else:
            right = example["options"][example["label"]]
        kept: Row = {key: example[key] for key in ("prompt", "passage") if key in example}
        return {**kept, "completion": right}

    def classified(self, row: Row) -> Row:
        """Make an example for a sequence-classification head: `text`, `label`, maybe `passage`.

        Raises:
            UserError: the task has no classes.
        """
        example = self.example(row)
        if self.choose is None and (self.completes or "options" not in example):
            raise UserError("this task has no classes; train it as a language model, CAUSAL_LM")
        text = example["prompt"] if self.choose is None else self.choose(row)
        passage = {"passage": example["passage"]} if "passage" in example else {}
        return {"text": text, **passage, "label": example["label"]}


def _options(prompt: str, words: tuple[str, ...], label: object, passage: str = "") -> Row:
    example = {"prompt": prompt, "options": list(words), "label": _label(label, words)}
    return {**example, "passage": passage} if passage else example


#: The labels of the original releases, and their index on the Hub.
NAMES = {"entailment": 0, "not_entailment": 1, "contradiction": 1, "neutral": 2}


def _label(label: object, words: tuple[str, ...]) -> int:
    if isinstance(label, str) and NAMES.get(label, len(words)) < len(words):
        return NAMES[label]
    if isinstance(label, bool):
        return words.index("Yes" if label else "No")
    if str(label).isdecimal() and int(str(label)) < len(words):
        return int(str(label))
    raise UserError(f"label {label!r} is none of this task's; expected 0 to {len(words) - 1}")


def _sst2(row: Row) -> Row:
    sentence = row["sentence"].strip()
    words = ("terrible", "great")
    return _options(f"{sentence} It was", words, row["label"], sentence)


def _rte(row: Row) -> Row:
    question = f'Does this mean that "{row["hypothesis"]}" is true? Yes or No?\n'
    return _options(f"{row['premise']}\n{question}", YES_NO, row["label"], row["premise"])


def _cb(row: Row) -> Row:
    question = f'Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n'
    prompt = f"Suppose {row['premise']} {question}"
    return _options(prompt, ("Yes", "No", "Maybe"), row["label"], row["premise"])


def _boolq(row: Row) -> Row:
    question = row["question"].removesuffix("?")
    prompt = f"{row['passage']} {question[:1].upper()}{question[1:]}?\n"
    answer = row["answer"] if "answer" in row else row["label"]
    if answer not in (True, False):
        raise UserError(f"answer {answer!r} is neither true nor false")
    return _options(prompt, YES_NO, bool(answer), row["passage"])


def _wsc(row: Row) -> Row:
    target = row.get("target", row)
    pronoun, noun = target["span2_text"].lower(), target["span1_text"]
    question = f'In the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?'
    return _options(f"{row['text']}\n{question}\n", NO_YES, row["label"], row["text"])


def _wic(row: Row) -> Row:
    question = f'Does the word "{row["word"]}" have the same meaning in these two sentences?'
    prompt = f"{question} Yes, No?\n{row['sentence1']}\n{row['sentence2']}\n"
    return _options(prompt, NO_YES, row["label"])


def _multirc(row: Row) -> Row:
    asked = f'Question: {row["question"]}\nI found this answer "{row["answer"]}".'
    prompt = f"{row['paragraph']}\n{asked} Is that correct? Yes or No?\n"
    return _options(prompt, NO_YES, row["label"], row["paragraph"])


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
    word = words[row["question"]]
    prompt = f"{row['premise'].strip().removesuffix('.')} {word}"
    return _options(prompt, _choices(row), row["label"])


def _choices(row: Row) -> tuple[str, ...]:
    choices = (row["choice1"].strip(), row["choice2"].strip())
    return tuple(c if c.startswith("I ") else c[:1].lower() + c[1:] for c in choices)


def _copa_text(row: Row) -> str:
    first, second = (choice.rstrip(".") for choice in _choices(row))
    return f"{_copa(row)['prompt']} {first}, or {second}?"


def _record(row: Row) -> Row:
    passage = row["passage"].replace("@highlight\n", "- ")
    entities = list(dict.fromkeys(row["entities"]))
    right, *others = (entities.index(answer) for answer in dict.fromkeys(row["answers"]))
    options = [f" {row['query'].replace('@placeholder', entity)}" for entity in entities]
    example = {"prompt": f"{passage}\n-", "passage": passage, "options": options}
    return {**example, "label": right, "also_right": others}


def _record_rows(row: Row) -> Iterator[Row]:
    passage, text = row["passage"], row["passage"]["text"]
    entities = [text[e["start"] : e["end"] + 1] for e in passage["entities"]]
    for asked in row["qas"]:
        answers = [answer["text"] for answer in asked["answers"]]
        yield {"passage": text, "query": asked["query"], "entities": entities, "answers": answers}


def _squad(row: Row) -> Row:
    prompt = f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question']}\n"
    answers = list(dict.fromkeys(row["answers"]["text"]))
    return {"prompt": f"{prompt}Answer:", "passage": row["context"], "answers": answers}


def _squad_rows(row: Row) -> Iterator[Row]:
    for article in row["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                yield {
                    "title": article["title"],
                    "context": paragraph["context"],
                    "question": asked["question"],
                    "answers": {"text": [answer["text"] for answer in asked["answers"]]},
                }


def _drop(row: Row) -> Row:
    prompt = f"Passage: {row['passage']}\nQuestion: {row['question']}\nAnswer:"
    # An answer is a list of spans. The Hub's rows do not say which spans belong together, so each
    # span is an answer of its own, as in MeZO's code.
    spans = row["answers_spans"]["spans"]
    answers = [[span] if isinstance(span, str) else list(span) for span in spans]
    return {"prompt": prompt, "passage": row["passage"], "answers": answers}


def _drop_rows(row: Row) -> Iterator[Row]:
    for passage in row.values():
        for asked in passage["qa_pairs"]:
            given = [asked["answer"], *asked.get("validated_answers", ())]
            spans = {"spans": [found for answer in given if (found := _drop_spans(answer))]}
            text, question = passage["passage"], asked["question"]
            yield {"passage": text, "question": question, "answers_spans": spans}


def _drop_spans(answer: Row) -> list[str]:
    """The spans of an answer: one of a number or a date, or several; empty if the answer is."""
    if answer.get("number"):
        return [str(answer["number"])]
    if answer.get("spans"):
        return list(answer["spans"])
    date = answer.get("date") or {}
    text = " ".join(date[part] for part in ("day", "month", "year") if date.get(part))
    return [text] if text else []


def _first_line(name: str, score: Callable[[str, Any], float]) -> RewardFunction:
    """Make a reward of a completion's first line, since MeZO stops generating at its end."""

    def reward(prompts: Any, completions: Any, answers: Any, **columns: Any) -> list[float]:
        lines = [metrics.text_of(c).split("\n")[0].strip() for c in completions]
        return metrics.best_of(score, lines, answers)

    reward.__name__ = name
    return reward


def _answered(f1: Callable[..., float], exact: Callable[..., float]) -> tuple[RewardFunction, ...]:
    return _first_line("f1", f1), _first_line("exact_match", exact)


_SUPER = "aps/super_glue"

#: Tasks by name. The Hub's data sets are copies that need no loading script.
TASKS: dict[str, Task] = {
    "sst2": Task(("nyu-mll/glue", "sst2"), _sst2, (("train",), ("dev", "validation"))),
    "rte": Task((_SUPER, "rte"), _rte),
    "cb": Task((_SUPER, "cb"), _cb, num_dev=100),
    "boolq": Task(("google/boolq", None), _boolq),
    "wsc": Task((_SUPER, "wsc.fixed"), _wsc),
    "wic": Task((_SUPER, "wic"), _wic),
    "multirc": Task((_SUPER, "multirc"), _multirc, flatten=("paragraph", _multirc_rows)),
    "copa": Task((_SUPER, "copa"), _copa, num_dev=100, completes=True, choose=_copa_text),
    "record": Task((_SUPER, "record"), _record, flatten=("query", _record_rows), completes=True),
    "squad": Task(
        ("rajpurkar/squad", None),
        _squad,
        (("train-v1.1", "train"), ("dev-v1.1", "validation")),
        ("context", _squad_rows),
        completes=True,
        rewards=_answered(metrics.squad_f1, metrics.squad_exact_match),
    ),
    "drop": Task(
        ("ucinlp/drop", None),
        _drop,
        (("drop_dataset_train", "train"), ("drop_dataset_dev", "validation")),
        ("question", _drop_rows),
        completes=True,
        rewards=_answered(metrics.drop_f1, metrics.drop_exact_match),
    ),
}


def task_rows(name: str, folder: str | None, part: int) -> list[Row]:
    """Read all rows of a task in the Hub's columns.

    Args:
        folder: of the original release, or of the Hub's rows as JSON lines; None: the Hub.
        part: 0 for the rows to train on, 1 for those to evaluate on.

    Raises:
        UserError: the data cannot be found or read.
    """
    task = TASKS[name]
    if folder is None:
        path, config = task.hub
        return hub_rows(path, config, ("train", "validation")[part])
    wanted = [f"{file}{kind}" for file in task.files[part] for kind in (".jsonl", ".json", ".tsv")]
    found = next((p for p in (Path(folder) / w for w in wanted) if p.is_file()), None)
    if found is None:
        raise UserError(
            f"--task_data_dir {Path(folder).name} holds no data of {name}; expected one of "
            f"{', '.join(wanted)}"
        )
    rows = _whole_json(found) if name in ("squad", "drop") else read_rows(found)
    if task.flatten is None or task.flatten[0] in rows[0]:
        return rows
    try:
        return [flat for row in rows for flat in task.flatten[1](row)]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{found.name} is not laid out as {name}'s release: {error!r}") from None


def _whole_json(path: Path) -> list[Row]:
    """Read an original release's file as one row, or JSON lines as their rows."""
    if path.suffix != ".json":
        return read_rows(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is not one JSON object, as the release's file is")
    return [content]


def hub_rows(name: str, config: str | None, split: str) -> list[Row]:
    """Read all rows of a split of a data set of the Hub.

    Raises:
        UserError: the data set cannot be loaded.
    """
    try:
        return datasets.load_dataset(name, config, split=split).to_list()
    except (*LOAD_ERRORS, RuntimeError, DatasetsError) as error:
        generating = isinstance(error, DatasetGenerationError) and error.__cause__
        raise UserError(
            f"data set {name!r}, split {split!r} cannot be loaded: {reason(generating or error)} "
            "Give an id of the Hub, or local data: --train_file, --eval_file, --task_data_dir"
        ) from error


def train_parts(
    name: str, rows: list[Row], num_train: int, num_dev: int | None, seed: int
) -> tuple[list[Row], list[Row]]:
    """Choose random rows to train on and `num_dev` others (None: the task's own) to validate on.

    If there are too few, those to validate on keep their number if it is at most 0.4 of all rows,
    and are a third of all rows otherwise; the rest is trained on.
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
    """Choose `count` random rows, the same for every run; all rows if there are no more."""
    return random.Random(0).sample(rows, count) if count < len(rows) else rows


def examples(name: str, rows: list[Row], convert: Callable[[Row], Row]) -> list[Row]:
    """Make examples of rows.

    Args:
        convert: a task's `example`, `training_example` or `classified`.

    Raises:
        UserError: a row lacks a column, or has a value that the task's data set cannot have.
    """
    made = []
    for number, row in enumerate(rows, start=1):
        try:
            made.append(convert(row))
        except KeyError as error:
            found = ", ".join(row)
            raise UserError(f"{name}, row {number} has no column {error}; it has {found}") from None
        except (ValueError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{name}, row {number} cannot be used: {error}") from None
    return made


def with_demonstrations(task: Task, example: Row, shown: Sequence[Row]) -> Row:
    """Put answered rows before an example's prompt, separated by blank lines (in-context)."""
    answered = []
    for row in shown:
        complete = task.training_example(row)
        answer = complete.get("completion") or complete["options"][complete["label"]]
        prompt = complete["prompt"]
        space = "" if prompt[-1].isspace() or answer[:1].isspace() else " "
        answered.append(f"{prompt}{space}{answer}")
    before = "".join(f"{shot}\n\n" for shot in answered)
    shifted = {**example, "prompt": before + example["prompt"]}
    if "passage" in example:
        shifted["passage_start"] = len(before) + example["prompt"].index(example["passage"])
    return shifted
