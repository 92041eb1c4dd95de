"""Files to rows, and rows to examples by a prompt template and label words."""

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from zo_peft.errors import UserError

Row = dict[str, Any]

#: The forms an example may have, by its columns; see `zo_peft.data`.
FORMS = (
    ("input_ids", "labels"),
    ("prompt", "options", "label"),
    ("prompt", "completion"),
    ("prompt", "answers"),
    ("messages",),
    ("text", "label"),
    ("text",),
    ("prompt",),
)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSON lines (.jsonl, .json), CSV (.csv) or TSV (.tsv) file, in order.

    CSV and TSV have a header line and give strings; quotes are literal in TSV, as in GLUE's files.

    Raises:
        UserError: the file is missing, empty, of another kind, or a line cannot be read.
    """
    path = Path(path)
    readers = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
    if path.suffix not in readers:
        raise UserError(f"{path.name}: unknown kind of file; use {', '.join(readers)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8 (byte {error.start}); convert it") from None
    rows = readers[path.suffix](text, path)
    if not rows:
        raise UserError(f"{path.name} has no rows; it must hold at least one example")
    return rows


def _read_json(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path.name}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path.name}, line {number} is not a JSON object of columns")
        rows.append(row)
    return rows


def _read_csv(text: str, path: Path) -> list[Row]:
    tabs = path.suffix == ".tsv"
    reader = csv.DictReader(
        io.StringIO(text, newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path.name}, line {reader.line_num} has not as many fields as the header"
                )
            rows.append(row)
    except csv.Error as error:
        # The outer reader's own count lags behind where the inner one raises.
        raise UserError(f"{path.name}, line {reader.reader.line_num}: {error}") from None
    return rows


def make_examples(
    rows: Iterable[Row],
    source: str,
    prompt_template: str | None = None,
    label_column: str = "label",
    label_words: Sequence[str] | None = None,
    classifies: bool = False,
    generates: bool = False,
) -> list[Row]:
    """Rows to examples of one of the forms of `zo_peft.data`.

    With a template, the prompt is the template filled in with the row's columns. With `label_words`
    they are its options, and the label is one of them or an index; without, the label column is its
    completion. Without a template, the rows already have a form of their own.

    Args:
        source: what the rows came from, for error messages.
        classifies: for a sequence-classification head: the filled-in template (or the column
            `text`) is its text, and the label an index or one of the label words.
        generates: for rewards: the row's other columns are kept, and no label is needed.

    Raises:
        UserError: a row lacks a column, or its label is not among the label words.
    """
    examples = []
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        if classifies:
            text = fill_template(prompt_template or "{text}", row, where)
            label = label_index(_column(row, label_column, where), label_words, where)
            examples.append({"text": text, "label": label})
            continue
        if prompt_template is None:
            examples.append(_own_form(row, where, generates))
            continue
        prompt = fill_template(prompt_template, row, where)
        if generates and row.get(label_column) is None:
            examples.append({**row, "prompt": prompt})
            continue
        if label_words:
            label = label_index(_column(row, label_column, where), label_words, where)
            examples.append({"prompt": prompt, "options": list(label_words), "label": label})
        else:
            completion = str(_column(row, label_column, where))
            others = row if generates else {}
            examples.append({**others, "prompt": prompt, "completion": completion})
    return examples


def fill_template(template: str, row: Row, where: str) -> str:
    """Replace each `{column}` of the template by the row's value; other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda match: str(_column(row, match[1], where)), template)


def label_index(label: object, label_words: Sequence[str] | None, where: str) -> int:
    """The index of a row's label: one of the label words, an index (into them), or a bool."""
    words = [word.strip() for word in label_words or ()]
    text = str(label).strip()
    if isinstance(label, bool):
        lower = [word.lower() for word in words]
        text = words[lower.index(text.lower())] if text.lower() in lower else str(int(label))
    if text in words:
        return words.index(text)
    if text.isdecimal() and (label_words is None or int(text) < len(words)):
        return int(text)
    if label_words is None:
        raise UserError(
            f"{where}: label {label!r} is no class index; name the classes as label words"
        )
    raise UserError(
        f"{where}: label {label!r} is not among the label words {', '.join(words)}, nor an index "
        f"from 0 to {len(words) - 1}; correct the row or --label_words"
    )


def _column(row: Row, name: str, where: str) -> Any:
    if row.get(name) is None:
        raise UserError(f"{where} has no column {name!r}; it has {', '.join(map(str, row))}")
    return row[name]


def form_of(columns: Iterable[str]) -> tuple[str, ...] | None:
    """The form of `FORMS` that these columns make, the first that is complete."""
    present = set(columns)
    return next((form for form in FORMS if present.issuperset(form)), None)


def _own_form(row: Row, where: str, generates: bool) -> Row:
    form = form_of(name for name, value in row.items() if value is not None)
    if generates and "prompt" in row:
        return row
    if form is None or form == ("prompt",):
        wanted = "; ".join(" + ".join(form) for form in FORMS[1:-1])
        raise UserError(
            f"{where} has the columns {', '.join(map(str, row))}; expected {wanted}. For other "
            "columns give a --prompt_template (and --label_words)"
        )
    return {name: row[name] for name in (*form, "passage") if name in row}
