"""Label words: how they are given, found in data, and matched with labels."""

from typing import Any

import pytest

from zo_peft import UserError
from zo_peft.data import make_examples
from zo_peft.data.examples import (
    find_words,
    label_reader,
    options_of,
    read_words,
    write_words,
)


def index_of(label: object, words: Any) -> int:
    return label_reader([label], words, "f", "c")(label)


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
        (["a=x", "a=y"], "label=word for each, once"),
        (["a=x", "b"], "label=word for each, once"),
        (['{"a": "x"}'], "two or more"),
        (['["a", ["b"]]'], "no text"),
    ],
)
def test_words_that_are_none_are_refused(given: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        read_words(given)


def test_labels_of_a_column_are_its_words() -> None:
    assert find_words(["b ", "a", None, "b", "", "nan"], "c", False, True) == ["a", "b"]
    assert find_words([True, False], "c", True, True) == ["False", "True"]
    # Numbers among words would be indices, too; as labels of a mapping they are not.
    stars = find_words(["5", "1", "4"], "c", True, False)
    read = label_reader(["1", 4, "5"], stars, "f", "c")
    assert [read(label) for label in ("1", 4, "5")] == [0, 1, 2]
    for labels, part in (
        (["Ab", "ab", "c"], "'Ab' and 'ab', which differ in case"),
        (["a"], r"^c has fewer than two labels: \['a'\], and 'a' in row 1"),
        (["a", "", "nan"], "fewer than two labels: .*, and '' in row 2"),
        ([["a"], 1], r"and \['a'\] in row 1; correct its rows"),
    ):
        with pytest.raises(UserError, match=part):
            find_words(labels, "c", True, True)


def test_which_labels_are_classes() -> None:
    for labels in (["a", "b"] * 2, ["a", "b", None, "b", "a"]):
        assert find_words(labels, "c", False, False) == ["a", "b"]
    # A column of this name, or a head for classes, needs few classes, or that they repeat.
    many = [f"v{number}" for number in range(101)]
    assert find_words(["a", "b", "c"], "c", False, True) == ["a", "b", "c"]
    assert find_words(many * 2, "c", False, True) == sorted(many)
    assert find_words([*many, many[0]], "c", False, True) is None
    few: list[Any] = [["a", "b", "a"], ["a"] * 4, [*map(str, range(101))] * 2]
    for labels in [*few, ["a", "1"] * 2, ["1.5", "2"] * 2, [True, False] * 2, [["a"]] * 4, [None]]:
        assert find_words(labels, "c", False, False) is None


def test_a_truth_value_without_a_word_of_its_own_is_refused() -> None:
    assert [index_of(value, ["no", "yes"]) for value in (True, False)] == [1, 0]
    assert [index_of(value, ["bad", "good"]) for value in (True, False)] == [1, 0]
    # As an index, False would be "true".
    assert index_of(True, ["true", "fake"]) == 0
    with pytest.raises(UserError, match="label False is not among the label words"):
        index_of(False, ["true", "fake"])


def test_a_mapping_gives_the_word_of_each_label() -> None:
    words = {"-1": "bad", "0": "good", "1": "good"}
    rows = [{"text": "x", "label": label} for label in ("1", -1, 0)]
    made = make_examples(rows, "f", "{text}", label_words=words)
    assert [example["label"] for example in made] == [1, 0, 1]
    assert made[0]["options"] == options_of(words) == ["bad", "good"]
    # Elsewhere 2 would be an index.
    assert index_of(0, {"0": "b", "1": "a"}) == 0
    with pytest.raises(UserError, match="label 'a' is not among"):
        index_of("a", {"0": "b", "1": "a"})


def test_whole_numbers_as_pandas_writes_them_are_indices() -> None:
    for words in (None, ["a", "b"]):
        assert [index_of(label, words) for label in ("1.0", 0.0)] == [1, 0]
        with pytest.raises(UserError, match=r"'1\.5' is no"):
            index_of("1.5", words)
    assert index_of("1.0", ["0.0", "1.0"]) == 1


def test_all_unknown_labels_are_named_at_once() -> None:
    labels = ["a", "x", "y", "x", *map(str, range(2, 40))]
    rows = [{"text": "t", "label": label} for label in labels]
    with pytest.raises(UserError) as caught:
        make_examples(rows, "f", "{text}", label_words=["a", "b"])
    message = str(caught.value)
    assert message.startswith("f, row 2: column 'label': label 'x', 'y', '2', '3', '4'")
    assert "'19', ... is not among the label words ['a', 'b'], nor an index from 0 to 1;" in message
    assert message.endswith("--label_words, which may be label=word ...")
