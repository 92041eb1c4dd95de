"""Read files into rows, and make examples of rows with a prompt template and label words."""

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from zo_peft.errors import UserError

Row = dict[str, Any]

#: The columns of each form of example that `zo_peft.data` describes.
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

    A file of one JSON object has one row, also where the object takes several lines.
    CSV and TSV files begin with a header line, and all their values are strings. In TSV files
    quotes are ordinary characters, as in GLUE's files. A UserError says that the file is missing,
    empty or of another kind, or that a line cannot be read.
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
    with contextlib.suppress(ValueError, RecursionError):
        # One object, which may be laid out over several lines.
        if isinstance(whole := json.loads(text), dict):
            return [whole]
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path.name}, line {number} is not JSON: {error}") from None
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path.name}, line {number} is not a JSON object of columns")
    return rows


def _read_csv(text: str, path: Path) -> list[Row]:
    tsv: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    dialect = tsv if path.suffix == ".tsv" else {}
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, **dialect)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path.name}, line {reader.line_num} has not as many fields as the header"
                )
            rows.append(row)
    except csv.Error as error:
        # DictReader has not counted the line that its inner reader failed on.
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
    """Make an example of each row, in one of the forms of `zo_peft.data`.

    With a template, the prompt is the template with the row's values in it. If there are label
    words, they are the options, and the row's label is one of them or an index. If not, the label
    column is the completion. Without a template, rows must have one of the forms already.

    Args:
        source: where the rows come from, for error messages.
        classifies: make examples for a sequence-classification head. Their text is the filled-in
            template (default: the column `text`), and the label an index or one of the words.
        generates: make examples for rewards. They keep the row's other columns and need no label.

    Raises:
        UserError: a row lacks a column, or its label is not among the label words.
    """

    def example(row: Row) -> Row:
        if prompt_template is None and not classifies:
            return _own_form(row, generates)
        text = fill_template(prompt_template or "{text}", row)
        if generates and not classifies and row.get(label_column) is None:
            return {**row, "prompt": text}
        label = _column(row, label_column)
        if classifies:
            return {"text": text, "label": label_index(label, label_words)}
        if label_words:
            index = label_index(label, label_words)
            return {"prompt": text, "options": list(label_words), "label": index}
        return {**(row if generates else {}), "prompt": text, "completion": str(label)}

    return converted(source, rows, example)


def converted(source: str, rows: Iterable[Row], convert: Callable[[Row], Row]) -> list[Row]:
    """What `convert` makes of each row.

    A UserError names `source` and a row that lacks a column, or whose values cannot be used.
    """
    made = []
    for number, row in enumerate(rows, start=1):
        try:
            made.append(convert(row))
        except KeyError as error:
            columns = ", ".join(map(str, row))
            raise UserError(
                f"{source}, row {number} has no column {error}; it has {columns}"
            ) from None
        except (ValueError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{source}, row {number} cannot be used: {error}") from None
    return made


def fill_template(template: str, row: Row) -> str:
    """Replace each `{column}` of the template by the row's value; other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda match: str(_column(row, match[1])), template)


def label_index(label: object, label_words: Sequence[str] | None) -> int:
    """The index of a label, which is one of the label words, an index into them, or a bool."""
    words = [word.strip() for word in label_words or ()]
    text = str(label).strip()
    if isinstance(label, bool):
        by_lower = {word.lower(): word for word in reversed(words)}
        text = by_lower.get(text.lower(), str(int(label)))
    if text in words:
        return words.index(text)
    if text.isdecimal() and (label_words is None or int(text) < len(words)):
        return int(text)
    if label_words is None:
        raise UserError(f"label {label!r} is no class index; name the classes as label words")
    raise UserError(
        f"label {label!r} is not among the label words {', '.join(words)}, nor an index from 0 to "
        f"{len(words) - 1}; correct the row or --label_words"
    )


def _column(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise KeyError(name)
    return row[name]


def form_of(columns: Iterable[str]) -> tuple[str, ...] | None:
    """The first of `FORMS` whose columns are all there."""
    present = set(columns)
    return next((form for form in FORMS if present.issuperset(form)), None)


def _own_form(row: Row, generates: bool) -> Row:
    form = form_of(name for name, value in row.items() if value is not None)
    if generates and "prompt" in row:
        return row
    if form is None or form == ("prompt",):
        wanted = "; ".join(" + ".join(form) for form in FORMS[1:-1])
        raise UserError(
            f"it has the columns {', '.join(map(str, row))}; expected {wanted}. For other "
            "columns give a --prompt_template (and --label_words)"
        )
    return {name: row[name] for name in (*form, "passage") if name in row}
