"""Read files into rows, and make examples of rows with a prompt template and label words."""

import csv
import io
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from zo_peft.data.forms import (
    Row,
    example_of,
    filled_text,
    fitting_form,
    located,
    named,
    read,
    text_of,
)
from zo_peft.errors import UserError


class Examples(list[Row]):
    """Examples, and where they come from, for error messages."""

    def __init__(self, examples: Iterable[Row], source: str) -> None:
        super().__init__(examples)
        self.source = source


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSON (.jsonl, .ndjson, .json), CSV (.csv) or TSV (.tsv) file, in order.

    JSON files hold one object after another, most often a line each, or one list of objects. CSV
    and TSV files begin with a header line, and all their values are strings. In TSV files quotes
    are ordinary characters, as in GLUE's files. A UserError says that the file is missing, empty
    or of another kind, or that a line cannot be read.
    """
    path = Path(path)
    readers: dict[str, Callable[[str, Path], list[Row]]] = {
        **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_json),
        **dict.fromkeys((".csv", ".tsv"), _read_csv),
    }
    if path.suffix not in readers:
        known = ", ".join(readers)
        raise UserError(f"{path.name}: unknown kind of file; unpack or convert it to {known}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8 (byte {error.start}); convert it") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path.name}, line {line} holds a NUL character; remove it")
    rows = readers[path.suffix](text, path)
    if not rows:
        raise UserError(f"{path.name} has no rows; it must hold at least one example")
    return rows


_SPACE = re.compile(r"[ \t\r\n]*")


def _read_json(text: str, path: Path) -> list[Row]:
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    rows: list[Row] = []
    place = _SPACE.match(text).end()  # type: ignore[union-attr]
    while place < len(text):
        try:
            value, stop = decoder.raw_decode(text, place)
            found = value if isinstance(value, list) else [value]
            if not all(isinstance(row, dict) for row in found):
                raise ValueError("it is no object of columns")
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, place) + 1
            raise UserError(
                f"{path.name}, line {line} is not JSON: {error}; write one object after another, "
                "without commas between them, or one list of objects"
            ) from None
        rows += found
        place = _SPACE.match(text, stop).end()  # type: ignore[union-attr]
    return rows


def _object(pairs: list[tuple[str, Any]]) -> Row:
    if twice := _twice([name for name, _ in pairs]):
        raise ValueError(f"an object has {twice[0]!r} twice")
    return dict(pairs)


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _read_csv(text: str, path: Path) -> list[Row]:
    tsv: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    dialect = tsv if path.suffix == ".tsv" else {}
    # By default a field has at most 131,072 characters.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, **dialect)
    rows = []
    try:
        if twice := _twice(reader.fieldnames or ()):
            raise UserError(f"{path.name}: the header has {twice[0]!r} twice; rename or drop one")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path.name}, line {reader.line_num} has not as many fields as the header; "
                    "quote a field that holds the separator (in a .csv file; a .tsv has no quotes)"
                )
            rows.append(row)
    except csv.Error as error:
        # DictReader has not counted the line that its inner reader failed on.
        line = reader.reader.line_num
        raise UserError(
            f'{path.name}, line {line}: {error}; in a quoted field, write a quote as ""'
        ) from None
    return rows


def make_examples(
    rows: Iterable[Row],
    source: str,
    prompt_template: str | None = None,
    label_column: str | None = None,
    label_words: Sequence[str] | None = None,
    classifies: bool = False,
    generates: bool = False,
) -> Examples:
    """Make an example of each row, in one of the forms of `zo_peft.data`.

    With a template, the prompt is the template with the row's values in it. If there are label
    words, they are the options, and the row's label is one of them or an index. If not, the label
    column is the completion. Without a template, rows must have one of the forms already, and all
    of them the same.

    Args:
        source: where the rows come from, for error messages.
        label_column: default: `label`.
        classifies: make examples for a sequence-classification head. Their text is the filled-in
            template (default: the column `text`), and the label an index or one of the words.
        generates: make examples for rewards. They keep the row's other columns and need no label.

    Raises:
        UserError: a row lacks a column, a value cannot be used, or a label is not among the words.
    """
    rows, words = list(rows), None if label_words is None else _checked_words(label_words)
    if prompt_template is None and not classifies:
        if label_column is not None or words is not None:
            raise UserError(
                "--label_column and --label_words need a --prompt_template, for example "
                f'"{{{next(iter(rows[0]), "text") if rows else "text"}}}"'
            )
        form = fitting_form(rows[0], source, classifies, generates) if rows else None
        return converted(source, rows, lambda row: example_of(row, form, generates))
    template = "{text}" if prompt_template is None else prompt_template
    column = label_column or "label"
    found = [row.get(_key(row, column)) for row in rows]
    are_indices = _are_indices([label for label in found if label is not None], words, source)
    needs_label = label_column is not None or words is not None or classifies or not generates

    def example(row: Row) -> Row:
        text, kept = fill_template(template, row), row if generates else {}
        if not needs_label and row.get(_key(row, column)) is None:
            return {**kept, "prompt": text}
        if words is None and not classifies:
            return {**kept, "prompt": text, "completion": _value(row, column, filled_text)}
        index = _value(row, column, lambda label: label_index(label, words, are_indices))
        if classifies:
            return {"text": text, "label": index}
        return {"prompt": text, "options": words, "label": index}

    return converted(source, rows, example)


def _checked_words(words: Sequence[str]) -> list[str]:
    """The label words without blanks around them."""
    bare = [text_of(word).strip() for word in words]
    if isinstance(words, str) or len(bare) < 2 or "" in bare or _twice(bare):
        raise UserError(
            f"--label_words {words!r}: give two or more different words, separated by commas"
        )
    return bare


def converted(source: str, rows: Iterable[Row], convert: Callable[[Row], Row]) -> Examples:
    """What `convert` makes of each row.

    A UserError names `source` and a row that lacks a column, or whose values cannot be used.
    """
    made = Examples((), source)
    for number, row in enumerate(rows, start=1):
        with located(source, number):
            try:
                made.append(convert(row))
            except UserError:
                raise
            except KeyError as error:
                raise UserError(f"it has no column {error}; it has {named(row)}") from None
            except (ValueError, IndexError, TypeError, AttributeError) as error:
                raise UserError(f"it cannot be used: {error}") from None
    return made


_BRACES = re.compile(r"(\{\{|\}\})|\{([^{}]*)\}|[{}]")


def fill_template(template: str, row: Row) -> str:
    """Replace each `{column}` of the template by the row's value, and `{{` and `}}` by one brace.

    A UserError says that a brace names no column, that the template uses none, or that all the
    values that it uses are empty.
    """
    values: list[str] = []

    def filled(match: re.Match[str]) -> str:
        if match[1]:
            return match[1][0]
        if match[2] is None:
            raise UserError(
                f"the prompt template has a {match[0]} alone; write {match[0] * 2} for a brace. "
                f"The columns are {named(row)}"
            )
        values.append(_value(row, match[2], text_of))
        return values[-1]

    text = _BRACES.sub(filled, template)
    if not values:
        raise UserError(
            f"the prompt template {template!r} uses no column; name some of {named(row)} in "
            "single braces"
        )
    if not any(value.strip() for value in values):
        raise UserError("all columns that the prompt template uses are empty; drop the row")
    return text


def _key(row: Row, name: str) -> str:
    """The column of this name, or the only one that differs from it in blanks around it."""
    alike = [own for own in row if own.strip() == name.strip()]
    return name if name in row or len(alike) != 1 else alike[0]


def _value(row: Row, name: str, reader: Callable[[Any], Any]) -> Any:
    """What the reader makes of the row's value; a KeyError says that there is no such column."""
    return read(name, row[_key(row, name)], reader)


def _bare(label: object, words: Sequence[str]) -> str:
    """The label as text; a boolean as the word that means it, or else as 0 or 1."""
    if not isinstance(label, bool):
        return str(label).strip()
    meant = ("true", "yes") if label else ("false", "no")
    return next((word for word in words if word.lower() in meant), str(int(label)))


def _readings(label: object, words: Sequence[str]) -> tuple[int | None, int | None]:
    """The index of a label if it is a word, and if it is an index into the words."""
    text = _bare(label, words)
    indices = [str(index) for index in range(len(words))]
    word = words.index(text) if text in words else None
    return word, indices.index(text) if text in indices else None


def _are_indices(labels: Sequence[object], words: Sequence[str] | None, source: str) -> bool | None:
    """Whether the labels of a source are indices (True) or words (False), where words are numbers.

    None where no word is a number, so that each label can be only one of the two. A UserError says
    that all labels can be read either way.
    """
    numbers = [word for n, word in enumerate(words or ()) if word.isdecimal() and word != str(n)]
    if not (words and numbers and labels):
        return None
    as_words, as_indices = zip(*(_readings(label, words) for label in labels))
    if None in as_words or None in as_indices:
        return None not in as_indices
    if as_words != as_indices:
        raise UserError(
            f"{source}: its labels may be label words ({', '.join(words)}) or indices from 0; use "
            "label words that are no numbers, with the same words or indices from 0 in the file"
        )
    return False


def label_index(
    label: object, label_words: Sequence[str] | None, are_indices: bool | None = None
) -> int:
    """The index of a label, which is one of the label words, an index into them, or a bool.

    Args:
        label_words: two or more, without blanks around them. None: labels are class indices.
        are_indices: whether a label that is a number is an index or a word. None: it is clear.
    """
    if label is None:
        raise UserError("null is no label; write one there, or drop the row")
    if label_words is None:
        if (text := _bare(label, ())).isdecimal() and len(text) < 10:
            return int(text)
        raise UserError(
            f"label {reprlib.repr(label)} is no class index; name the classes as label words"
        )
    word, index = _readings(label, label_words)
    found = index if are_indices or (are_indices is None and word is None) else word
    if found is None:
        raise UserError(
            f"label {reprlib.repr(label)} is not among the label words {list(label_words)}, "
            f"nor an index from 0 to {len(label_words) - 1}; correct the row or --label_words"
        )
    return found
