"""`zo-peft predict`: rows without labels in, the same rows with predictions out."""

import csv
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from zo_peft.data import make_examples
from zo_peft.data.examples import Words, converted, fill_template
from zo_peft.data.forms import Row, question_of
from zo_peft.errors import UserError
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.runs.run import trainer_of
from zo_peft.runs.sources import own_rows
from zo_peft.train.base import BaseTrainer
from zo_peft.train.config import ZOConfig

#: What the columns are called that are added to the rows, and to those of a CSV file.
ADDED = "prediction|probability|probabilities"
ADDED_TO_CSV = f"{ADDED}|probability_.*"


@dataclass
class PredictArguments:
    """Where predictions go."""

    output_file: str | None = HfArg(
        default=None,
        help="File for rows and predictions: .jsonl or .csv. Default: JSON lines on stdout.",
    )


def predict(
    given: PredictArguments, model: ModelArguments, data: DataArguments, args: ZOConfig
) -> dict[str, Any]:
    """Answer the rows of `data.eval_file`, or of a split of a data set, which need no labels.

    What the command line does not give is that of the adapter's run. All columns of the rows are
    kept. Added are `prediction` (a label word, a class or a generated text), and of labels
    `probability` and `probabilities` (by label; in CSV a column `probability_LABEL` for each),
    rounded to six decimals.

    Returns `output_file`, the number of `examples`, and the `rows`, None where a file has them. A
    UserError says that rows cannot be answered, or not be written; nothing has been written then.
    """
    output = None if given.output_file is None else Path(given.output_file)
    source, rows = _rows(data, output)
    # What was maximised has no say in an answer.
    args.objective = None
    given_words, words = data.given_words(), data.words() or []
    classifies = model.task_type == "SEQ_CLS"
    # No rows: label words are looked at, and whether they have a template.
    template, column = data.prompt_template, data.label_column
    make_examples((), source, template, column, given_words, classifies)
    questions = converted(source, rows, lambda row: _asked(row, template, words, classifies))
    # Of Parquet files, dates and the like become text.
    rows = json.loads(json.dumps(rows, default=str))
    with tempfile.TemporaryDirectory() as args.output_dir:
        trainer = trainer_of(BaseTrainer, model, data, args)
        answers = trainer.predict(questions)
    if cut := answers.metrics.get("test_cut"):
        limit = f"--max_completion_length {args.max_completion_length}"
        print(f"{cut} of {len(rows)} completions were cut by {limit}", file=sys.stderr)
    names = words or [*trainer.model.config.id2label.values()] if classifies else []
    titles = _titles(given_words, words)
    for row, question, answer in zip(rows, questions, answers.predictions):
        labels = [titles.get(label, label) for label in question.get("options", names)]
        row |= _labelled(answer, labels) if labels else {"prediction": answer}
    if output is not None and trainer.is_world_process_zero():
        _write(output, rows)
    shown = rows if output is None else None
    return {"output_file": given.output_file, "examples": len(rows), "rows": shown}


def _rows(data: DataArguments, output: Path | None) -> tuple[str, list[Row]]:
    """The source and the rows to answer; a UserError: there are none, or no place for answers."""
    if output and (output.suffix.lower() not in (".jsonl", ".csv") or output.is_dir()):
        raise UserError(f"--output_file {output}: give a name that ends in .jsonl or .csv")
    found = own_rows(data, data.eval_file, data.dataset_test_split)
    if found is None:
        raise UserError("nothing to answer; give a file of rows, or --dataset_name and its split")
    source, rows = found
    added = ADDED_TO_CSV if output and output.suffix.lower() == ".csv" else ADDED
    if taken := [name for row in rows for name in row if re.fullmatch(added, name)]:
        raise UserError(f"{source} has a column {taken[0]!r} already; rename it")
    if data.label_words == ["auto"]:
        raise UserError("--label_words auto reads labels, which rows to answer lack; give words")
    return found


def _titles(given: Words | None, words: Sequence[str]) -> dict[str, str]:
    """By label word the label that it stands for, where each label has a word of its own."""
    pairs = given if isinstance(given, Mapping) and len(given) == len(words) else {}
    return {word: label for label, word in pairs.items()}


def _asked(row: Row, template: str | None, words: Sequence[str], classifies: bool) -> Row:
    """The example that a row is, without its answer if it has one."""
    if template is None:
        return question_of(row, classifies)
    text = fill_template(template, row)
    if classifies:
        return {"text": text}
    return {"prompt": text, **({"options": [*words]} if words else {})}


def _labelled(probabilities: Any, labels: Sequence[Any]) -> Row:
    shares = {label: round(float(share), 6) for label, share in zip(labels, probabilities)}
    best = labels[probabilities.argmax()]
    return {"prediction": best, "probability": shares[best], "probabilities": shares}


def _write(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines or, by the name, as CSV, in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    # Half a character (a lone surrogate) is written as JSON writes it.
    with unfinished.open("w", -1, "utf-8", "backslashreplace", "") as file:
        if path.suffix.lower() == ".jsonl":
            file.writelines(_json(row) + "\n" for row in rows)
        else:
            table = [_cells(row) for row in rows]
            writer = csv.DictWriter(file, dict.fromkeys(name for row in table for name in row))
            writer.writeheader()
            writer.writerows(table)
    unfinished.replace(path)


def _cells(row: Row) -> Row:
    """A row of a table: a column for the probability of each label, and JSON for other lists."""
    shares = row.get("probabilities", {})
    cells = {n: _json(v) if isinstance(v, list | dict) else v for n, v in row.items()}
    cells.pop("probabilities", None)
    return cells | {f"probability_{label}": share for label, share in shares.items()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
