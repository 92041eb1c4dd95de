"""Make examples of rows, with a prompt template and label words."""

import csv
import json
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from zo_peft.data.forms import (
    MISSING,
    Row,
    example_of,
    filled_text,
    fitting_form,
    located,
    named,
    prompt_of,
    read,
    text_of,
)
from zo_peft.errors import UserError

#: Two or more words, in label order; or the word of each label that the data have.
Words = Sequence[str] | Mapping[str, str]
#: More different values than this are no classes, unless they are asked for.
MOST_CLASSES = 100
#: How many unknown labels an error names.
MOST_NAMED = 20


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
            prompt = prompt_of(rows[0] if rows else {}, label_column)
            what = "--label_column and --label_words need a --prompt_template, for example"
            raise UserError(f'{what} "{{{prompt}}}"')
        form = fitting_form(rows[0], source, classifies, generates) if rows else None
        return converted(source, rows, lambda row: example_of(row, form, generates))
    template = "{text}" if prompt_template is None else prompt_template
    column = label_column or "label"
    labelled = words is not None or classifies
    needs_label = label_column is not None or labelled or not generates
    used = {match[2].strip() for match in _BRACES.finditer(template) if match[2]}
    if labelled and rows and column.strip() in used:
        raise UserError(f"the prompt template shows {{{column}}}, the answer; leave it out")
    if labelled:
        index_of = label_reader(column_of(rows, column), words, source, column)
    options = options_of(words or ())

    def example(row: Row) -> Row:
        text, kept = fill_template(template, row), row if generates else {}
        if not needs_label and row.get(_key(row, column)) is None:
            return {**kept, "prompt": text}
        if not labelled:
            return {**kept, "prompt": text, "completion": _value(row, column, filled_text)}
        label = _value(row, column, index_of)
        if classifies:
            return {"text": text, "label": label}
        return {"prompt": text, "options": options, "label": label}

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
                cure = "; --label_column names another" if error.args == ("label",) else ""
                raise UserError(f"it has no column {error}; {has}{cure}") from None
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
            why = f"the prompt template has a {match[0]} alone; write {match[0] * 2} for a brace"
            raise UserError(f"{why}. The columns are {named(row)}")
        values.append(_value(row, match[2], text_of))
        return values[-1]

    text = _BRACES.sub(filled, template)
    if not values:
        raise UserError(f"the prompt template {template!r} uses no {{column}} of {named(row)}")
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


def _value(row: Row, name: str, reader: Callable[[Any], Any]) -> Any:
    """What the reader makes of the row's value; a KeyError says that there is no such column."""
    return read(name, row[_key(row, name)], reader)


def read_words(given: Sequence[str]) -> Words:
    """The label words that the values of an option stand for.

    One value may hold several words, separated by commas, or JSON: a list of words, or an object
    with the word of each label. All values may also be `label=word`.
    """
    words: Any = list(given)
    if len(words) == 1:
        with suppress(json.JSONDecodeError):
            if isinstance(read := json.loads(words[0]), list | dict):
                return checked_words(read)
        words = next(csv.reader(words, skipinitialspace=True), [])
    pairs = dict(word.split("=", 1) for word in words if "=" in word)
    if pairs and len(pairs) < len(words):
        raise UserError(f"--label_words {words}: write label=word for each, once, or a JSON list")
    return checked_words(pairs or words)


def write_words(words: Words) -> list[str]:
    """The values that `read_words` reads as these words."""
    is_plain = all(word[0].isalnum() and "=" not in word for word in words)
    if is_plain and not isinstance(words, Mapping):
        return list(words)
    return [json.dumps(words, ensure_ascii=False)]


def checked_words(words: Words) -> Words:
    """The words without blanks around them; a UserError unless two or more are different."""
    pairs = words if isinstance(words, Mapping) else {text_of(word).strip(): word for word in words}
    bare = {text_of(name).strip(): text_of(word).strip() for name, word in pairs.items()}
    options = options_of(bare)
    if isinstance(words, str) or len(options) < 2 or "" in options or len(bare) < len(words):
        raise UserError(f"--label_words {words!r}: give two or more different words, with commas")
    return bare if isinstance(words, Mapping) else options


def options_of(words: Words) -> list[str]:
    """The different words, in label order."""
    return list(dict.fromkeys(words.values() if isinstance(words, Mapping) else words))


def find_words(labels: Sequence[Any], where: str, asked: bool, sure: bool) -> Words | None:
    """The labels of a column as their own label words, in alphabetic order; or None.

    A UserError says that they are fewer than two, or differ in case alone.

    Args:
        labels: those of all rows; None where a row has none.
        where: the source and the column, for error messages.
        asked: take any values for labels. If not, they must be texts that are no numbers.
        sure: the column holds labels, where there are few or they repeat, each twice on average.
            If not, both must be so.
    """
    given = [label for label in labels if label is not None]
    names = {str(label).strip() for label in given if isinstance(label, str | int | float)}
    are_texts = all(isinstance(label, str) for label in given)
    are_texts &= not any(re.fullmatch(r"[-+.\d]+", name) for name in names)
    enough = (MOST_CLASSES, len(labels) / 2)
    fit = len(names) <= max(enough) if sure else 2 <= len(names) <= min(enough)
    if not (asked or (names and are_texts and fit)):
        return None
    found = sorted(names - {"", "null", *MISSING})
    folded = [name.lower() for name in found]
    if twice := [name for name in found if folded.count(name.lower()) > 1]:
        cure = f"write them alike, or give --label_words {twice[0]}=word {twice[1]}=word ..."
        what = f"{where} has {twice[0]!r} and {twice[1]!r}, which differ in case alone"
        raise UserError(f"{what}; {cure}")
    if len(found) < 2:
        row = next((n for n, label in enumerate(labels) if str(label).strip() not in found), 0)
        what = f"fewer than two labels: {found}, and {reprlib.repr(labels[row])} in row {row + 1}"
        raise UserError(f"{where} has {what}; correct its rows, or name another column")
    # In a list of words, a number would be an index, too.
    is_number = any(name.isdecimal() for name in found)
    return checked_words({name: name for name in found} if is_number else found)


def label_reader(
    labels: Sequence[object], words: Words | None, source: str, column: str
) -> Callable[[object], int]:
    """The function that makes a class index of a label: of a word, an index or a truth value.

    A UserError names the labels that are none, or says that all are words as well as indices.

    Args:
        labels: all of the source; None where a row has none.
        words: as `checked_words` gives them; there are no others. None: labels are class indices.
    """
    texts = [None if label is None else _text(label, words or ()) for label in labels]
    known = _known({text for text in texts if text is not None}, words, source)
    unknown = [n for n, text in enumerate(texts) if text is not None and text not in known]
    if not unknown:
        return lambda label: known[_text(label, words or ())]
    names = list(dict.fromkeys(reprlib.repr(labels[n]) for n in unknown))
    shown = ", ".join(names[:MOST_NAMED]) + ", ..." * (len(names) > MOST_NAMED)
    what = f"{source}, row {unknown[0] + 1}: column {column!r}: label {shown} is"
    if words is None:
        raise UserError(f"{what} no class index; name the classes as label words")
    index = "" if isinstance(words, Mapping) else f", nor an index from 0 to {len(words) - 1}"
    cure = "correct the row or --label_words, which may be label=word ..."
    raise UserError(f"{what} not among the label words {list(words)}{index}; {cure}")


def _text(label: object, words: Collection[str]) -> str:
    """A label as text; a truth value as the word that means it, or else as 0 or 1."""
    if label is None:
        raise UserError("null is no label; write one there, or drop the row")
    if isinstance(label, bool):
        meant = ("true", "yes") if label else ("false", "no")
        means = {word.lower() for word in words} & {"true", "yes", "false", "no"}
        # With a word for the other truth value alone, a number would be a guess.
        unsaid = meant[0] if means else str(int(label))
        return next((word for word in words if word.lower() in meant), unsaid)
    text = str(label).strip()
    # pandas writes whole numbers of a column with gaps so.
    return text if text in words else text.removesuffix(".0")


def _known(texts: set[str], words: Words | None, source: str) -> dict[str, int]:
    """The class indices of labels as texts, where numbers are either words or indices."""
    if words is None:
        return {text: int(text) for text in texts if text.isdecimal() and len(text) < 10}
    if isinstance(words, Mapping):
        options = options_of(words)
        return {label: options.index(word) for label, word in words.items()}
    as_words = {word: index for index, word in enumerate(words)}
    as_indices = {str(index): index for index in range(len(words))}
    if not any(word.isdecimal() and word != str(index) for index, word in enumerate(words)):
        return as_indices | as_words
    if not texts <= as_indices.keys():
        return as_words
    if texts <= as_words.keys() and any(as_words[text] != as_indices[text] for text in texts):
        what = f"{source}: its labels may be label words ({', '.join(words)}) or indices from 0"
        cure = f"give each label its word, for example --label_words {words[0]}={words[0]} ..."
        raise UserError(f"{what}; {cure}")
    return as_indices
