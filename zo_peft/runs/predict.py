"""`zo-peft predict`: rows without labels in, the same rows with predictions out."""

import csv
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from transformers.hf_argparser import HfArg

from zo_peft.data.examples import converted, fill_template, make_examples
from zo_peft.data.forms import OPTIONAL, Row, named
from zo_peft.errors import UserError
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.runs.earlier import tell_differences
from zo_peft.runs.run import settings, trainer_of
from zo_peft.runs.sources import own_rows
from zo_peft.train.base import BaseTrainer
from zo_peft.train.config import ZOConfig

#: The columns that are added to the rows.
ADDED = ("prediction", "probability", "probabilities")


@dataclass
class PredictArguments:
    """Where predictions go."""

    output_file: str | None = HfArg(
        default=None,
        help="File for the rows with their predictions: .jsonl or .csv. Default: JSON lines on "
        "stdout.",
    )


def predict(
    given: PredictArguments, model: ModelArguments, data: DataArguments, args: ZOConfig
) -> dict[str, Any]:
    """Answer the rows of `data.eval_file`, or of a split of a data set, which need no labels.

    What the command line does not give is that of the adapter's run. All columns of the rows are
    kept. Added are `prediction` (a label word, a class or a generated text), and of labels
    `probability` and `probabilities` (by label), rounded to six decimals.

    Returns:
        `output_file`, the number of `examples`, and the `rows`, which are None if they were
        written to a file.

    Raises:
        UserError: rows cannot be answered, or not be written; nothing has been written then.
    """
    write = _writer(given.output_file, data.eval_file)
    found = own_rows(data, data.eval_file, data.dataset_test_split)
    if found is None:
        raise UserError("nothing to answer; give --eval_file, or --dataset_name and its split")
    source, rows = found
    if taken := [name for name in ADDED if name in rows[0]]:
        raise UserError(f"{source} has a column {taken[0]!r} already; rename it")
    tell_differences(model, settings(model, data, args))
    # What was maximised has no say in an answer.
    args.objective = None
    words = [word.strip() for word in data.words() or ()]
    classifies = model.task_type == "SEQ_CLS"
    # No rows: label words are looked at, and whether they have a template.
    template, column = data.prompt_template, data.label_column
    make_examples((), source, template, column, data.words(), classifies)
    questions = converted(source, rows, lambda row: _question(row, template, words, classifies))
    with tempfile.TemporaryDirectory() as args.output_dir:
        trainer = trainer_of(BaseTrainer, model, data, args)
        answers = trainer.predict(questions)
    if cut := answers.metrics.get("test_cut"):
        limit = f"--max_completion_length {args.max_completion_length}"
        print(f"{cut} of {len(rows)} completions were cut by {limit}", file=sys.stderr)
    classes = words or _class_names(trainer.model.config) if classifies else []
    for row, question, answer in zip(rows, questions, answers.predictions):
        labels = question.get("options", classes)
        row |= _labelled(answer, labels) if labels else {"prediction": answer}
    if write is not None and trainer.is_world_process_zero():
        write(rows)
    told = None if write else rows
    return {"output_file": given.output_file, "examples": len(rows), "rows": told}


def _question(row: Row, template: str | None, words: Sequence[str], classifies: bool) -> Row:
    """The example that a row is, without its answer if it has one."""
    if classifies:
        return {"text": fill_template(template or "{text}", row)}
    if template is not None:
        return {"prompt": fill_template(template, row), **({"options": [*words]} if words else {})}
    kept = {name: row[name] for name in OPTIONAL if row.get(name) is not None}
    if row.get("prompt") is not None:
        options = {} if row.get("options") is None else {"options": row["options"]}
        return {**kept, "prompt": row["prompt"], **options}
    if row.get("messages") is not None:
        turns = [*row["messages"]]
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        return {**kept, "prompt": turns}
    if row.get("text") is not None:
        return {"prompt": row["text"]}
    raise UserError(f"it has the columns {named(row)}; give a --prompt_template")


def _class_names(config: Any) -> list[Any]:
    """The names of a head's classes; their numbers where they were given none."""
    names = [config.id2label[index] for index in range(config.num_labels)]
    plain = [f"LABEL_{index}" for index in range(config.num_labels)]
    return [*range(config.num_labels)] if names == plain else names


def _labelled(probabilities: Any, labels: Sequence[Any]) -> Row:
    shares = [round(float(share), 6) for share in probabilities[: len(labels)]]
    best = int(probabilities.argmax())
    by_label = dict(zip(labels, shares))
    return {"prediction": labels[best], "probability": shares[best], "probabilities": by_label}


def _writer(name: str | None, source: str | None) -> Callable[[list[Row]], None] | None:
    """What writes rows into the file of this name, in one piece; or a UserError."""
    if name is None:
        return None
    path, kinds = Path(name), {".jsonl": _write_json, ".csv": _write_csv}
    if path.suffix.lower() not in kinds:
        raise UserError(f"--output_file {name}: give a name that ends in {' or '.join(kinds)}")
    if source is not None and path.resolve() == Path(source).resolve():
        raise UserError(f"--output_file {name} is the file that is read; give another name")
    if not path.parent.is_dir():
        raise UserError(f"--output_file {name}: there is no folder {path.parent}; make it")

    def write(rows: list[Row]) -> None:
        unfinished = path.with_name(path.name + ".tmp")
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            kinds[path.suffix.lower()](rows, file)
        unfinished.replace(path)

    return write


def _write_json(rows: Iterable[Row], file: TextIO) -> None:
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_csv(rows: list[Row], file: TextIO) -> None:
    """Lists and objects are written as JSON."""
    writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
    writer.writeheader()
    for row in rows:
        nested = {name: value for name, value in row.items() if isinstance(value, list | dict)}
        texts = {name: json.dumps(value, ensure_ascii=False) for name, value in nested.items()}
        writer.writerow(row | texts)
