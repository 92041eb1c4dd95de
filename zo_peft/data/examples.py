"""Make examples of rows, with a prompt template and label words."""

import re
from collections.abc import Callable, Iterable
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
from zo_peft.data.labels import Words, check_labels, checked_words, label_index, options_of
from zo_peft.errors import UserError


class Examples(list[Row]):
    """Examples, and where they come from, for error messages."""

    def __init__(self, examples: Iterable[Row], source: str) -> None:
        super().__init__(examples)
        self.source = source


def make_examples(
    rows: Iterable[Row],
    source: str,
    prompt_template: str | None = None,
    label_column: str | None = None,
    label_words: Words | None = None,
    classifies: bool = False,
    generates: bool = False,
) -> Examples:
    """Make an example of each row, in one of the forms of `zo_peft.data`.

    With a template, the prompt is the template with the row's values in it. If there are label
    words, they are the options, and the row's label is one of them or an index; a mapping gives
    the word of each label. If not, the label column is the completion. Without a template, rows
    must have one of the forms already, and all of them the same.

    Args:
        source: where the rows come from, for error messages.
        label_column: default: `label`.
        classifies: make examples for a sequence-classification head. Their text is the filled-in
            template (default: the column `text`), and the label an index or one of the words.
        generates: make examples for rewards. They keep the row's other columns and need no label.

    Raises:
        UserError: a row lacks a column, a value cannot be used, or a label is not among the words.
    """
    rows, words = list(rows), None if label_words is None else checked_words(label_words)
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
    are_indices = None
    if words is not None or classifies:
        are_indices = check_labels(column_of(rows, column), words, source, column)
    needs_label = label_column is not None or words is not None or classifies or not generates

    options = options_of(words or ())

    def example(row: Row) -> Row:
        text, kept = fill_template(template, row), row if generates else {}
        if not needs_label and row.get(_key(row, column)) is None:
            return {**kept, "prompt": text}
        if words is None and not classifies:
            return {**kept, "prompt": text, "completion": _value(row, column, filled_text)}
        index = label_index(_value(row, column, _filled), words, are_indices)
        if classifies:
            return {"text": text, "label": index}
        return {"prompt": text, "options": options, "label": index}

    return converted(source, rows, example)


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
                has = f"it has {named(row)} (of a CSV file, the first line)"
                raise UserError(f"it has no column {error}; {has}") from None
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


def column_of(rows: Iterable[Row], name: str) -> list[Any]:
    """The values of a column; None where a row has none."""
    return [row.get(_key(row, name)) for row in rows]


def _filled(label: Any) -> Any:
    if label is None:
        raise UserError("null is no label; write one there, or drop the row")
    return label


def _value(row: Row, name: str, reader: Callable[[Any], Any]) -> Any:
    """What the reader makes of the row's value; a KeyError says that there is no such column."""
    return read(name, row[_key(row, name)], reader)
