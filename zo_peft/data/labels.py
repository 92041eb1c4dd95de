"""Label words: how they are given, found in data, and matched with the labels of rows."""

import csv
import json
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from zo_peft.data.forms import text_of
from zo_peft.errors import UserError

#: Two or more words, in label order; or the word of each label that the data have.
Words = Sequence[str] | Mapping[str, str]

#: How missing values are written into files of text.
MISSING = ("", "nan", "null")
#: More different values than this are no classes, unless they are asked for.
MOST_CLASSES = 100
#: So many unknown labels are named in an error.
MOST_NAMED = 20


def read_words(given: Sequence[str]) -> Words:
    """The label words that the values of an option stand for.

    One value may hold several words, separated by commas, or JSON: a list of words, or an object
    with the word of each label. All values may also be `label=word`.
    """
    words = list(given)
    if len(words) == 1 and words[0].lstrip()[:1] in ("[", "{"):
        try:
            read = json.loads(words[0])
        except (ValueError, RecursionError) as error:
            raise UserError(f"--label_words {words[0]!r} is no JSON: {error}") from None
        return checked_words(read)
    if len(words) == 1:
        words = next(csv.reader(words, skipinitialspace=True), [])
    pairs = [word.split("=", 1) for word in words if "=" in word]
    if pairs and len(pairs) < len(words):
        raise UserError(
            f"--label_words {words!r}: write label=word for all of them or for none; words that "
            "hold = are given as JSON, a list"
        )
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise UserError(f"--label_words gives the label {twice[0]!r} twice; drop one")
    return checked_words(dict(pairs) if pairs else words)


def write_words(words: Words) -> list[str]:
    """The values that `read_words` reads as these words."""
    if isinstance(words, Mapping):
        return [json.dumps(dict(words), ensure_ascii=False)]
    is_plain = all(word[0].isalnum() and "=" not in word for word in words)
    return list(words) if is_plain else [json.dumps(list(words), ensure_ascii=False)]


def checked_words(words: Words) -> Words:
    """The words without blanks around them; a UserError unless two or more are different."""
    if isinstance(words, Mapping):
        pairs = {text_of(name).strip(): text_of(word).strip() for name, word in words.items()}
        checked, bare = pairs, options_of(pairs)
    else:
        checked = bare = [] if isinstance(words, str) else [text_of(word).strip() for word in words]
    if len(bare) < 2 or "" in bare or len({*bare}) < len(bare):
        raise UserError(
            f"--label_words {words!r}: give two or more different words, separated by commas"
        )
    return checked


def options_of(words: Words) -> list[str]:
    """The different words, in label order."""
    return list(dict.fromkeys(words.values() if isinstance(words, Mapping) else words))


def found_words(labels: Iterable[object], column: str) -> Words:
    """The labels of a column as their own label words, in alphabetic order.

    A UserError says that there are fewer than two, or two that differ in case alone.
    """
    names = {
        str(label).lower() if isinstance(label, bool) else str(label).strip()
        for label in labels
        if isinstance(label, str | int | float)
    }
    found = sorted(name for name in names if name.lower() not in MISSING)
    alike = Counter(name.lower() for name in found)
    if twice := [name for name in found if alike[name.lower()] > 1]:
        raise UserError(
            f"column {column!r} has {twice[0]!r} and {twice[1]!r}, which differ in case alone; "
            f"write them alike, or give --label_words {twice[0]}=word {twice[1]}=word ..."
        )
    if len(found) < 2:
        raise UserError(
            f"column {column!r} has fewer than two labels ({', '.join(found) or 'none'}); name the "
            "column of the labels by --label_column"
        )
    # A word that is a number would be read as an index, too.
    is_number = any(name.isdecimal() for name in found)
    return checked_words({name: name for name in found} if is_number else found)


def are_texts(labels: Iterable[object]) -> bool:
    """Whether labels are texts, not numbers; None among them is no label."""
    texts = [label for label in labels if label is not None]
    return bool(texts) and all(isinstance(text, str) and not _is_number(text) for text in texts)


def repeat(labels: Sequence[object]) -> bool:
    """Whether there are few different labels, each twice or more on average."""
    return 2 <= len({*map(str, labels)}) <= min(MOST_CLASSES, len(labels) / 2)


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return name.lower() not in MISSING


def check_labels(
    labels: Sequence[object], words: Words | None, source: str, column: str
) -> bool | None:
    """Whether the labels of a source are indices: the last argument of `label_index`.

    A UserError names the labels (None where a row has none) that are neither words nor indices, or
    says that all can be read as either, which would differ.
    """
    are_indices, unknown = _are_indices(labels, words, source), dict[str, int]()
    for number, label in enumerate(labels, start=1):
        if label is not None and label_index(label, words, are_indices) is None:
            unknown.setdefault(reprlib.repr(label), number)
    if not unknown:
        return are_indices
    (first, row), *others = unknown.items()
    where = f"{source}, row {row}: column {column!r}: label {first}"
    if first[0] in "[{":
        raise UserError(f"{where} is not one text; write one label there, or a row for each")
    also = [f"{label} (row {row})" for label, row in others[:MOST_NAMED]]
    also += [f"{len(others) - MOST_NAMED} more"] if len(others) > MOST_NAMED else []
    same = f" (and {', '.join(also)})" if also else ""
    if words is None:
        raise UserError(f"{where}{same} is no class index; name the classes as --label_words")
    index = "" if isinstance(words, Mapping) else f", nor an index from 0 to {len(words) - 1}"
    raise UserError(
        f"{where}{same} is not among the label words {list(words)}{index}; correct the rows, or "
        "give each label its word: --label_words label=word ..."
    )


def label_index(label: object, words: Words | None, are_indices: bool | None = None) -> int | None:
    """The class index of a label: a word, an index or a truth value; None of what is none of them.

    Args:
        words: as `checked_words` gives them; the labels of a mapping are the only ones. None:
            labels are class indices.
        are_indices: whether a label that is a number is an index or a word. None: it is clear.
    """
    if words is None:
        text = _bare(label, ()).removesuffix(".0")
        return int(text) if text.isdecimal() and len(text) < 10 else None
    if isinstance(words, Mapping):
        own = words.get(_bare(label, words))
        return None if own is None else options_of(words).index(own)
    word, index = _readings(label, words)
    return index if are_indices or (are_indices is None and word is None) else word


def _bare(label: object, words: Iterable[str]) -> str:
    """The label as text; a boolean as the word that means it, or else as 0 or 1."""
    if not isinstance(label, bool):
        return str(label).strip()
    meant = ("true", "yes") if label else ("false", "no")
    return next((word for word in words if word.lower() in meant), str(int(label)))


def _readings(label: object, words: Sequence[str]) -> tuple[int | None, int | None]:
    """The index of a label if it is a word, and if it is an index into the words."""
    text, indices = _bare(label, words), [str(index) for index in range(len(words))]
    # pandas writes whole numbers of a column with gaps so.
    number = text.removesuffix(".0")
    word = words.index(text) if text in words else None
    return word, indices.index(number) if number in indices else None


def _are_indices(labels: Sequence[object], words: Words | None, source: str) -> bool | None:
    """Whether the labels of a source are indices (True) or words (False), where words are numbers.

    None where no word is a number, so that each label can be only one of the two. A UserError says
    that all labels can be read either way.
    """
    labels = [label for label in labels if label is not None]
    if words is None or isinstance(words, Mapping) or not labels:
        return None
    if not any(word.isdecimal() and word != str(index) for index, word in enumerate(words)):
        return None
    as_words, as_indices = zip(*(_readings(label, words) for label in labels))
    if None in as_words or None in as_indices:
        return None not in as_indices
    if as_words != as_indices:
        raise UserError(
            f"{source}: its labels may be label words ({', '.join(words)}) or indices from 0; give "
            f"each its word, for example --label_words {words[0]}={words[0]} ..., or words that "
            "are no numbers"
        )
    return False
