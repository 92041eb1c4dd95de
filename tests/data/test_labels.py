"""Label words: how they are given, found in data, and matched with labels."""

from typing import Any

import pytest

from zo_peft import UserError
from zo_peft.data import make_examples
from zo_peft.data.labels import (
    are_texts,
    found_words,
    label_index,
    options_of,
    read_words,
    repeat,
    write_words,
)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["terrible,great"], ["terrible", "great"]),
        (['"so, so", great'], ["so, so", "great"]),
        (["Hardware, Printers", "Billing"], ["Hardware, Printers", "Billing"]),
        (['["a, b", "x=1"]'], ["a, b", "x=1"]),
        (["-1=bad, 1=good"], {"-1": "bad", "1": "good"}),
        (["neg=bad", "pos=good", "ok=good"], {"neg": "bad", "pos": "good", "ok": "good"}),
        (['{"1": "one", "a=b": "x, y"}'], {"1": "one", "a=b": "x, y"}),
    ],
)
def test_words_are_read_and_written(given: list[str], words: Any) -> None:
    assert read_words(given) == words
    assert read_words(write_words(words)) == words
    # A command line takes what is written for values, not for options.
    assert not any(value.startswith("-") for value in write_words(words))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["a"], "two or more"),
        (["a=x", "b=x"], "two or more"),
        (["a=x", "a=y"], "label 'a' twice"),
        (["a=x", "b"], "for all of them or for none"),
        (["[a, b]"], "is no JSON"),
        (['["a", ["b"]]'], "no text"),
    ],
)
def test_words_that_are_none_are_refused(given: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        read_words(given)


def test_labels_of_a_column_are_its_words() -> None:
    assert found_words(["b ", "a", None, "b", "", "nan"], "c") == ["a", "b"]
    assert found_words([True, False], "c") == ["false", "true"]
    # Numbers among words would be indices, too; as names they are not.
    stars = found_words(["5", "1", "4"], "c")
    assert [label_index(label, stars) for label in ("1", 4, "5", "0")] == [0, 1, 2, None]
    for labels, part in (
        (["Ab", "ab", "c"], "'Ab' and 'ab', which differ in case"),
        (["a"], "two"),
    ):
        with pytest.raises(UserError, match=part):
            found_words(labels, "c")


def test_which_labels_are_classes() -> None:
    assert are_texts(["a", None])
    assert not any(map(are_texts, (["a", "1"], ["1.5"], [True], [["a"]], [None], [])))
    assert repeat(["a", "b"] * 2)
    assert not any(map(repeat, (["a", "b", "a"], ["a"] * 4, [*map(str, range(101))] * 2)))


def test_a_mapping_gives_the_word_of_each_label() -> None:
    words = {"-1": "bad", "0": "good", "1": "good"}
    rows = [{"text": "x", "label": label} for label in ("1", -1, 0)]
    made = make_examples(rows, "f", "{text}", label_words=words)
    assert [example["label"] for example in made] == [1, 0, 1]
    assert made[0]["options"] == options_of(words) == ["bad", "good"]
    # Elsewhere 2 would be an index.
    assert label_index(0, {"0": "b", "1": "a"}) == 0
    assert label_index("a", {"0": "b", "1": "a"}) is None


def test_whole_numbers_as_pandas_writes_them_are_indices() -> None:
    assert [label_index(label, None) for label in ("1.0", 0.0, "1.5")] == [1, 0, None]
    assert [label_index(label, ["a", "b"]) for label in ("1.0", 0.0, "0.5")] == [1, 0, None]
    assert label_index("1.0", ["0.0", "1.0"]) == 1


def test_all_unknown_labels_are_named_at_once() -> None:
    labels = ["a", "x", "y", "x", *map(str, range(2, 40))]
    rows = [{"text": "t", "label": label} for label in labels]
    with pytest.raises(UserError) as caught:
        make_examples(rows, "f", "{text}", label_words=["a", "b"])
    message = str(caught.value)
    assert message.startswith("f, row 2: column 'label': label 'x' (and 'y' (row 3), '2' (row 5)")
    assert "19 more) is not among the label words ['a', 'b'], nor an index from 0 to 1;" in message
    assert message.endswith("give each label its word: --label_words label=word ...")
