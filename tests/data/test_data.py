"""User data: files to rows, rows to examples, examples to token ids, token ids to batches."""

import csv
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from zo_peft import UserError
from zo_peft.core.batch import Batch
from zo_peft.data import Collator, Tokenization, make_examples, read_rows, tokenize_dataset
from zo_peft.data.examples import fill_template, label_reader
from zo_peft.data.forms import named
from zo_peft.data.tokenize import is_tokenized

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}
MERGES = [("Ċ", "n"), ("Ġ", "y"), ("o", "k"), ("a", "b")]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


ANSWER = {"role": "assistant", "content": "ok"}


def make_tokenizer(start: str = "", end: str = "", chat: str | None = None) -> Any:
    """Bytes and four merges, also across spaces; `start` and `end` are put around every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *("".join(merge) for merge in MERGES)]
    vocabulary = {**SPECIAL, **{piece: i + len(SPECIAL) for i, piece in enumerate(pieces)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}".strip(), special_tokens=list(SPECIAL.items())
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = chat
    return fast


TOKENIZER = make_tokenizer()


def ids(*pieces: str) -> list[int]:
    """Of these tokens; what is no token of its own is taken letter by letter."""
    vocabulary = TOKENIZER.get_vocab()
    letters = [[p] if p in vocabulary else list(p.replace(" ", "Ġ")) for p in pieces]
    return [vocabulary[letter] for piece in letters for letter in piece]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


# ---- Files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.jsonl", '{"a": 1}\n\n  \n{"a": [true, null]}', [{"a": 1}, {"a": [True, None]}]),
        ("a.json", '{"a": "x"}\r\n{"b": 0.5}\r\n', [{"a": "x"}, {"b": 0.5}]),
        ("a.jsonl", '\ufeff{"a": "é ☃ \\ud83d\\ude00"}', [{"a": "é ☃ 😀"}]),
        ("a.json", '{\n "a": [\n  1]\n}\n', [{"a": [1]}]),
        ("a.jsonl", '{\n "a": 1\n}\n{\n "a": 2\n}', [{"a": 1}, {"a": 2}]),
        ("a.json", ' [\n{"a": 1}, {"a": 2}\n]', [{"a": 1}, {"a": 2}]),
        ("a.ndjson", '{"a": 1} {"a": 2}', [{"a": 1}, {"a": 2}]),
        ("a.csv", f"a\n{'x' * 200_000}\n", [{"a": "x" * 200_000}]),
        ("a.jsonl", '{"a": "one\u2028line"}\n', [{"a": "one\u2028line"}]),
        ("a.csv", 'a,b\n1,"x, ""y""\nz"\n', [{"a": "1", "b": 'x, "y"\nz'}]),
        ("a.csv", "\ufeffa,b\r\n1,é\r\n\r\n,\r\n", [{"a": "1", "b": "é"}, {"a": "", "b": ""}]),
        ("a.tsv", 'a\tb\n"x, y\t"\n\n\'\t""\n', [{"a": '"x, y', "b": '"'}, {"a": "'", "b": '""'}]),
        ("a.tsv", "\ufeffsentence\tlabel\n☃ \t1", [{"sentence": "☃ ", "label": "1"}]),
    ],
)
def test_reads_rows(name: str, text: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, name, text)) == rows
    assert read_rows(str(tmp_path / name)) == rows


NAMES = st.lists(st.text("abcdef_ 1é", min_size=1), min_size=1, max_size=4, unique=True)
IN_TMP_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@IN_TMP_PATH
@given(NAMES, st.data())
def test_csv_comes_back(tmp_path: Path, names: list[str], data: st.DataObject) -> None:
    text = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"))
    row = st.fixed_dictionaries(dict.fromkeys(names, text))
    rows = data.draw(st.lists(row, min_size=1, max_size=5))
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    assert read_rows(tmp_path / "rows.csv") == rows


@IN_TMP_PATH
@given(NAMES, st.data())
def test_tsv_comes_back(tmp_path: Path, names: list[str], data: st.DataObject) -> None:
    # TSV has no way to write these three; a line without any character counts as blank.
    text = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\t\0"), min_size=1)
    rows = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(names, text)), min_size=1))
    lines = ["\t".join(names), *("\t".join(row[name] for name in names) for row in rows)]
    write(tmp_path, "rows.tsv", "\n".join(lines))
    assert read_rows(tmp_path / "rows.tsv") == rows


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@IN_TMP_PATH
@given(
    st.lists(st.dictionaries(st.text(), JSON_VALUES), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_json_lines_come_back(
    tmp_path: Path, rows: list[dict[str, Any]], ascii_only: bool, newline: str
) -> None:
    text = newline.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    assert read_rows(write(tmp_path, "rows.jsonl", text)) == rows


def fails(action: Callable[[], object], *parts: str) -> None:
    """It is a UserError of one line that holds these parts."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", None, ["a.jsonl", "No such file", "check the path"]),
        ("a.txt", "x", ["a.txt", "unknown kind", ".jsonl", ".csv", ".tsv"]),
        ("a.json.gz", "x", ["a.json.gz", "gzip", "check the path and the file"]),
        ("a.zip", "x", ["unknown kind", "unpack it", ".jsonl"]),
        ("a.xlsx", "x", ["unknown kind", "read_excel('a.xlsx').to_csv('a.csv'"]),
        ("a", "x", ["unknown kind"]),
        ("a.jsonl", "", ["a.jsonl has no rows", "at least one"]),
        ("a.jsonl", "\n \n", ["a.jsonl has no rows"]),
        ("a.csv", "a,b\n", ["a.csv has no rows"]),
        ("a.tsv", "", ["a.tsv has no rows"]),
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', ["a.jsonl, line 3 is not JSON"]),
        ("a.jsonl", "{'a': 1}\n", ["a.jsonl, line 1 is not JSON"]),
        ("a.jsonl", '{"a": 1},\n{"a": 2}', ["a.jsonl, line 1", "without commas between"]),
        ("a.json", "[]", ["a.json has no rows"]),
        ("a.jsonl", '{"a": 1}\n[1]', ["a.jsonl, line 2", "no object of columns"]),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}', ["a.jsonl, line 2", "'a' twice"]),
        ("a.csv", "a,b,a\n1,2,3\n", ["a.csv", "'a' twice", "rename"]),
        ("a.csv", 'a,b\n"19" screen",1\n', ["a.csv, line 2", 'write a quote as ""']),
        ("a.csv", "a\nx\0y\n", ["a.csv, line 2", "NUL"]),
        ("a.jsonl", "[" * 100_000, ["a.jsonl, line 1"]),
        ("a.csv", "a,b\n1,2\n3\n", ["a.csv, line 3", "fields"]),
        ("a.csv", "a,b\n1,2,3\n", ["a.csv, line 2", "fields"]),
        ("a.tsv", "a\tb\n1\t2\n\n1 2\n", ["a.tsv, line 4", "fields"]),
        ("a.csv", 'a,b\n1,"x\n2,y\n3,z\n', ["a.csv, line"]),
        ("a.csv", "дым\nвид".encode("cp1251"), ["a.csv is not UTF-8 (byte 0)", "iconv -f"]),
        ("a.csv", b"text of\n a page: \x81", ["a.csv is not UTF-8 (byte 17)", "iconv -f"]),
        (
            "a.csv",
            "text\nä\n".encode("utf-16-le"),
            ["NUL", "iconv -f utf-16le -t utf-8 a.csv > new_a"],
        ),
        ("a.csv", "a\nx\0y" + "z" * 9, ["NUL", "tr -d '\\0' < a.csv > new_a.csv"]),
        ("a.parquet", "PAR1", ["a.parquet cannot be read as Parquet", "save it anew"]),
    ],
)
def test_a_file_that_cannot_be_read_is_the_users_error(
    name: str, content: str | bytes | None, parts: list[str], tmp_path: Path
) -> None:
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    fails(lambda: read_rows(tmp_path / name), *parts)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    fails(lambda: read_rows(tmp_path / "a.jsonl"), "a.jsonl", "cannot be read")


# ---- Examples ---------------------------------------------------------------------------------


def test_a_template_and_label_words_make_options() -> None:
    rows = [{"sentence": "Fun.", "label": 1}, {"sentence": "Bad", "label": " terrible "}]
    assert make_examples(rows, "f", "{sentence} It was", label_words=["terrible", "great"]) == [
        {"prompt": "Fun. It was", "options": ["terrible", "great"], "label": 1},
        {"prompt": "Bad It was", "options": ["terrible", "great"], "label": 0},
    ]


def test_a_template_alone_makes_completions_of_the_label_column() -> None:
    rows = [{"q": "2+2", "a": 4, "label": 0}]
    assert make_examples(rows, "f", "{q}=", label_column="a") == [
        {"prompt": "2+2=", "completion": "4"}
    ]


FORMS: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "b"},
    {"prompt": [{"role": "user", "content": "x"}], "completion": [ANSWER]},
    {"prompt": "a", "options": ["b", "c"], "label": 1},
    {"messages": [{"role": "user", "content": "x"}, ANSWER]},
    {"text": "a"},
    {"input_ids": [1, 2], "labels": [-100, 2]},
]


@pytest.mark.parametrize("form", FORMS)
def test_rows_may_have_a_form_of_their_own(form: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="f is read as .*; these columns are not used: id"):
        assert make_examples([{**form, "id": 7, "empty": None}], "f") == [form]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_examples([form] * 2, "f") == [form] * 2


def test_plain_text_is_called_so() -> None:
    with pytest.warns(UserWarning, match="f is read as plain text; .* not used: category"):
        make_examples([{"text": "a", "category": "b"}], "f")


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_all_rows_have_the_form_of_the_first(first: Any, second: Any) -> None:
    if [*first] == [*second]:
        return
    for made in (
        lambda: make_examples([first, second], "f"),
        lambda: tokenize_dataset([first, second], Tokenization(make_tokenizer(chat=CHAT))),
    ):
        fails(made, "row 2", named(first), named(second))


def test_a_classifier_reads_text_or_a_template() -> None:
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": 0}]
    expected = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    assert make_examples(rows, "f", label_words=["no", "yes"], classifies=True) == expected
    rows = [{"x": "a", "y": "2"}]
    assert make_examples(rows, "f", "<{x}>", "y", classifies=True) == [{"text": "<a>", "label": 2}]


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{a} {b}", "1 {a}"),
        ("{ a }{b }", "1{a}"),
        ('{{"json": "{a}"}} {{a}} {{{a}}}', '{"json": "1"} {a} {1}'),
        ("{é_1}", "ü"),
        ("{Ticket Description}/{review-text}/{a.b}/{0}/{x!r:>3}", "t/r/d/z/y"),
        ("{Blank}", "k"),
    ],
)
def test_a_template_takes_columns_of_any_name(template: str, filled: str) -> None:
    row = {"a": 1, "b": "{a}", "é_1": "ü", "Ticket Description": "t", "review-text": "r"}
    row |= {"a.b": "d", "0": "z", "x!r:>3": "y", " Blank ": "k"}
    assert fill_template(template, row) == filled


@pytest.mark.parametrize("template", ["", "no column", "{{a}}", "{b}", "{}", "{a", "a}", "{a}}"])
def test_a_template_that_names_no_column_is_refused(template: str) -> None:
    fails(lambda: make_examples([{"a": "x", "label": "y"}], "f", template), "f, row 1", "a, label")


@pytest.mark.parametrize(
    ("label", "words", "index"),
    [
        ("great", ["terrible", "great"], 1),
        (" great", ["terrible", "great"], 1),
        (0, ["terrible", "great"], 0),
        ("1", ["terrible", "great"], 1),
        (" 1 ", ["terrible", "great"], 1),
        (True, ["No", "Yes"], 1),
        (False, ["No", "Yes"], 0),
        (True, ["Yes", "No"], 0),
        (False, ["Yes", "No"], 1),
        (7, None, 7),
        ("7", None, 7),
        (True, None, 1),
    ],
)
def test_a_label_is_a_word_an_index_or_a_bool(label: object, words: Any, index: int) -> None:
    found = label_reader([label], words, "f", "c")(label)
    assert (found, type(found)) == (index, int)


@pytest.mark.parametrize(
    ("labels", "words", "indices"),
    [
        ([0, 1, 2, 3, 4], "1 2 3 4 5", [0, 1, 2, 3, 4]),
        (["4", "0", "1"], "1 2 3 4 5", [4, 0, 1]),
        ([1, 2, 3, 4, 5], "1 2 3 4 5", [0, 1, 2, 3, 4]),
        (["5", "1"], "1 2 3 4 5", [4, 0]),
        ([0, 1], "0 1", [0, 1]),
        (["1", 3], "5 1 3", [1, 2]),
        ([0, 1, 2], "1 0 x", [0, 1, 2]),
    ],
)
def test_labels_of_a_file_are_all_words_or_all_indices(
    labels: list[object], words: str, indices: list[int]
) -> None:
    rows = [{"text": "a", "label": label} for label in labels]
    made = make_examples(rows, "f", "{text}", label_words=words.split())
    assert [example["label"] for example in made] == indices


@pytest.mark.parametrize(
    ("labels", "words", "parts"),
    [
        ([1, 2, 3], "1 2 3 4 5", ["f: its labels may be label words (1, 2, 3, 4, 5) or indices"]),
        (["0", "1"], "1 0", ["f: its labels may be"]),
        ([0, 1, 5], "1 2 3 4 5", ["f, row 1", "label 0 is not among"]),
    ],
)
def test_labels_that_may_be_words_or_indices_are_refused(
    labels: list[object], words: str, parts: list[str]
) -> None:
    rows = [{"text": "a", "label": label} for label in labels]
    fails(lambda: make_examples(rows, "f", "{text}", label_words=words.split()), *parts)


@pytest.mark.parametrize("words", [["a", ""], ["a", "  "], ["a", "a "], ["a"], [], "ab"])
def test_label_words_are_two_or_more_different_ones(words: Any) -> None:
    rows = [{"text": "x", "label": 0}]
    fails(lambda: make_examples(rows, "f", "{text}", label_words=words), "--label_words")


def test_blanks_around_names_and_labels_do_not_count() -> None:
    rows = [{"Text ": "x", " Label": " b "}]
    assert make_examples(rows, "f", "{Text}", "Label", [" a", "b "]) == [
        {"prompt": "x", "options": ["a", "b"], "label": 1}
    ]


def test_blanks_around_the_name_of_a_column_are_not_passed_over() -> None:
    fails(lambda: make_examples([{"text": "a", " label": "x"}], "f"), "f, row 1", "' label'")


@pytest.mark.parametrize("template", ["{text} is {label}", "{ label }: {text}"])
@pytest.mark.parametrize("more", [{"label_words": ["x", "y"]}, {"classifies": True}], ids=str)
def test_a_template_that_shows_the_answer_is_refused(template: str, more: dict[str, Any]) -> None:
    rows = [{"text": "a", "label": "x"}]
    fails(lambda: make_examples(rows, "f", template, **more), "{label}, the answer")
    assert make_examples(rows, "f", "{text} {{label}}", label_words=["x", "y"])
    assert make_examples(rows, "f", template, generates=True)[0]["prompt"]


def test_what_pandas_writes_for_no_value_is_told() -> None:
    with pytest.warns(UserWarning, match="column 'text' has 'nan', as pandas writes a missing"):
        assert make_examples([{"text": "nan"}], "f") == [{"text": "nan"}]


@pytest.mark.parametrize("settings", [{"label_column": "label"}, {"label_words": ["a", "b"]}])
def test_options_of_a_template_need_one(settings: dict[str, Any]) -> None:
    rows = [{"id": "1", "text": "a text", "label": "a"}]
    fails(lambda: make_examples(rows, "f", **settings), "need a --prompt_template", "{text}")
    fails(
        lambda: make_examples(rows, "f", "{text}", "no"), "no column 'no'; it has id, text, label"
    )
    tickets = [{"ID": "1", "Description": "It is broken.", "Type": "hardware"}]
    hint = '--prompt_template "{Description}" --label_column "Type"'
    fails(lambda: make_examples(tickets, "f"), hint)
    fails(lambda: make_examples(tickets, "f", "{ID}"), "'label'", "--label_column names another")


@pytest.mark.parametrize("words", [["True", "False"], ["true", "false"]])
def test_a_bool_is_the_word_it_reads_as(words: list[str]) -> None:
    read = label_reader([True, False], words, "f", "c")
    assert [read(True), read(False)] == [0, 1]


@pytest.mark.parametrize(
    ("rows", "settings", "parts"),
    [
        (
            [{"s": "x", "label": 0}, {"s": "x", "label": "good"}],
            {"prompt_template": "{s}", "label_words": ["bad", "great"]},
            ["f, row 2", "'good'", "['bad', 'great']", "0 to 1", "--label_words"],
        ),
        (
            [{"s": "x", "label": 2}],
            {"prompt_template": "{s}", "label_words": ["bad", "great"]},
            ["f, row 1", "2", "'bad', 'great'"],
        ),
        (
            [{"s": "x", "label": -1}],
            {"prompt_template": "{s}", "label_words": ["bad", "great"]},
            ["f, row 1", "-1"],
        ),
        (
            [{"s": "x", "label": 0}, {"label": 0}],
            {"prompt_template": "{s}"},
            ["f, row 2", "no column 's'", "it has label"],
        ),
        ([{"s": "x"}], {"prompt_template": "{s}"}, ["f, row 1", "no column 'label'", "it has s"]),
        ([{"s": "x"}], {"prompt_template": "{0}"}, ["f, row 1", "no column '0'"]),
        (
            [{"s": None, "label": 1}],
            {"prompt_template": "{s}"},
            ["f, row 1", "column 's'", "null"],
        ),
        ([{"s": " ", "label": 1}], {"prompt_template": "{s}"}, ["f, row 1", "empty"]),
        ([{"text": "x", "label": 1}], {"prompt_template": ""}, ["uses no {column} of text, label"]),
        ([{"text": "x", "label": "9" * 99}], {"classifies": True}, ["no class index"]),
        (
            [{"s": "x", "label": 1}],
            {"prompt_template": "{s}", "label_column": "lable", "generates": True},
            ["no column 'lable'"],
        ),
        ([{"s": True, "label": 1}], {"prompt_template": "{s}"}, ["column 's'", "True is no text"]),
        ([{"s": ["a"], "label": 1}], {"prompt_template": "{s}"}, ["column 's'", "no text"]),
        ([{"s": "x", "label": math.nan}], {"prompt_template": "{s}"}, ["column 'label'", "nan"]),
        ([{"s": "x", "label": ""}], {"prompt_template": "{s}"}, ["column 'label'", "empty"]),
        ([{"s": "x", "label": None}], {"prompt_template": "{s}"}, ["column 'label'", "null"]),
        (
            [{"s": "x", "label": ["a"]}],
            {"prompt_template": "{s}", "label_words": ["a", "b"]},
            ["column 'label'", "label ['a'] is not among"],
        ),
        ([{"text": "\ud800"}], {}, ["f, row 1", "column 'text'", "surrogate"]),
        (
            [{"text": "a", "label": "x"}],
            {"classifies": True},
            ["f, row 1", "'x'", "label words"],
        ),
        ([{"label": 1}], {"classifies": True}, ["f, row 1", "no column 'text'"]),
        (
            [{"prompt": "a", "answer": "b"}],
            {},
            ["f, row 1", "prompt, answer", "prompt + completion", "--prompt_template"],
        ),
        ([{"prompt": "a", "completion": None}], {}, ["f, row 1", "completion (null)"]),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
            {},
            ["f, row 2", "no value in column 'completion'"],
        ),
    ],
)
def test_rows_that_make_no_example_are_the_users_error(
    rows: list[dict[str, Any]], settings: dict[str, Any], parts: list[str]
) -> None:
    fails(lambda: make_examples(rows, "f", **settings), *parts)


# ---- Token ids --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "ending", "spaced"),
    [
        ("It was", "great", " great"),
        ("It was ", "great", "great"),
        ("Yes or No?\n", "Yes", "Yes"),
        ("It was", " great", " great"),
        ("It was", "\tgreat", "\tgreat"),
        ("", "great", "great"),
        ("It\u00a0", "great", "great"),
    ],
)
def test_one_space_goes_between(prompt: str, ending: str, spaced: str) -> None:
    found = completion(prompt, ending, make_tokenizer(start="<s>"))["input_ids"]
    assert found == [1, *TOKENIZER(prompt + spaced)["input_ids"], 2]


def tokenized(example: dict[str, Any], tokenizer: Any = TOKENIZER, **settings: Any) -> Any:
    """The features of an example, less their length, which is checked here."""
    features = Tokenization(tokenizer, **settings)(example, 0)
    if "input_ids" in features:
        assert features.pop("length") == len(features["input_ids"])
    else:
        ends = {len(features["prompt_ids"] + option) for option in features["option_ids"]}
        assert features.pop("length") in ends
    return features


def completion(prompt: str, answer: str, tokenizer: Any = TOKENIZER, **settings: Any) -> Any:
    return tokenized({"prompt": prompt, "completion": answer}, tokenizer, **settings)


def test_a_completion_ends_with_the_end_of_sequence() -> None:
    expected = {
        "input_ids": [*ids("q", "Ġ", "n", "ok"), 2],
        "labels": [-100, *ids("Ġ", "n", "ok"), 2],
    }
    assert completion("q", "nok") == expected
    assert completion("q", "nok</s>") == expected
    assert completion("q", " nok") == expected


def test_merges_across_the_seam_are_the_completions() -> None:
    """As the model sees the text when it is tokenized whole."""
    assert completion("q\n", "no") == {
        "input_ids": [*ids("q", "Ċn", "o"), 2],
        "labels": [-100, *ids("Ċn", "o"), 2],
    }
    features = tokenized({"prompt": "qa", "options": [" y", " no", "\nq"], "label": 2})
    assert features == {
        "prompt_ids": ids("q", "a"),
        "option_ids": [ids("Ġy"), ids("Ġ", "n", "o"), ids("Ċ", "q")],
        "label": 2,
    }
    # One option merges with the prompt's last letter, so that letter belongs to all of them.
    options = {"prompt": "q\n", "options": ["no", "yes"], "label": 0}
    assert tokenized(options) == {
        "prompt_ids": ids("q"),
        "option_ids": [ids("Ċn", "o"), ids("Ċ", "y", "e", "s")],
        "label": 0,
    }


TEXT = st.text("abkonqy \n", max_size=8)


WORD = TEXT.filter(str.strip)


@given(TEXT, WORD, st.lists(WORD, min_size=1, max_size=4, unique_by=str.strip))
def test_prompt_and_ending_are_the_whole_text(rest: str, answer: str, options: list[str]) -> None:
    prompt = "q" + rest  # a letter that merges with nothing

    def whole(ending: str, end: str = "") -> list[int]:
        space = "" if prompt[-1] in " \n" or ending[:1] in ("", " ", "\n") else " "
        return TOKENIZER(prompt + space + ending + end)["input_ids"]

    row = completion(prompt, answer)
    assert row["input_ids"] == whole(answer, "</s>")
    unlabelled = row["labels"].count(-100)
    assert row["labels"][unlabelled:] == row["input_ids"][unlabelled:]
    assert 0 < unlabelled <= len(prompt)
    features = tokenized({"prompt": prompt, "options": options, "label": 0})
    found = [features["prompt_ids"] + option for option in features["option_ids"]]
    assert found == list(map(whole, options))
    assert all(features["option_ids"])


def test_special_tokens_stand_once_at_either_end() -> None:
    start = make_tokenizer(start="<s>")
    assert completion("", "ok", start) == {
        "input_ids": [1, *ids("ok"), 2],
        "labels": [-100, *ids("ok"), 2],
    }
    features = tokenized({"prompt": "q", "options": ["y", "n"], "label": 1}, start)
    assert features["prompt_ids"] == [1, *ids("q")]
    assert features["option_ids"] == [ids("Ġy"), ids("Ġ", "n")]


@pytest.mark.parametrize("answer", ["ok", "ok</s>"])
def test_an_end_that_the_tokenizer_appends_is_not_doubled(answer: str) -> None:
    both = make_tokenizer(start="<s>", end="</s>")
    features = tokenized({"prompt": "q", "options": ["y", "n"], "label": 1}, both)
    assert features["prompt_ids"] == [1, *ids("q")]
    assert features["option_ids"] == [ids("Ġy"), ids("Ġ", "n")]
    assert completion("q\n", answer, both) == {
        "input_ids": [1, *ids("q", "Ċ", "ok"), 2],
        "labels": [-100, -100, -100, *ids("ok"), 2],
    }


def test_max_length_cuts_prompts_from_the_left() -> None:
    row = completion("qqab\n", "ok", max_length=4)
    assert row == {
        "input_ids": [*ids("ab", "Ċ", "ok"), 2],
        "labels": [-100, -100, *ids("ok"), 2],
    }
    assert completion("qqab\n", "ok", max_length=9) == completion("qqab\n", "ok")
    options = {"prompt": "qqab\n", "options": ["ok", "yes"], "label": 0}
    features = tokenized(options, max_length=4)
    assert features["prompt_ids"] == ids("Ċ")
    assert features["option_ids"] == [ids("ok"), ids("y", "e", "s")]


@pytest.mark.parametrize("room", [1, 2, 3])
def test_special_tokens_in_front_are_not_cut(room: int) -> None:
    start = make_tokenizer(start="<s>", chat="<s>" + CHAT)
    kept = [1, *ids("qqqy")[-room:]]
    row = completion("qqqy\n", "ok", start, max_length=room + 4)
    assert row["input_ids"] == [1, *ids("qqqyĊ")[-room - 1 :], *ids("ok"), 2]
    options = {"prompt": "qqqy", "options": ["y", "n"], "label": 1}
    assert tokenized(options, start, max_length=room + 3)["prompt_ids"] == kept
    turns = {"messages": [{"role": "user", "content": "qqqq"}, ANSWER]}
    whole = tokenized(turns, start)["input_ids"]
    assert tokenized(turns, start, max_length=len(whole) - room)["input_ids"] == [
        1,
        *whole[room + 1 :],
    ]
    generation = Tokenization(start, generates=True, max_length=room + 1)
    assert generation({"prompt": "qqqy"}, 0)["prompt_ids"] == kept


def test_a_turn_that_a_cut_goes_through_has_no_loss() -> None:
    start = make_tokenizer(start="<s>", chat="<s>" + CHAT)
    question = {"role": "user", "content": "qq"}
    turns = {"messages": [question, {**ANSWER, "content": "yyyy"}, question, ANSWER]}
    whole, last = tokenized(turns, start), tokenized({"messages": [question, ANSWER]}, start)
    first = whole["labels"].index(ids("y")[0])
    for gone in (
        first,
        first + 1,
        first + 3,
    ):  # the whole question, and none to three of the answer
        cut = tokenized(turns, start, max_length=len(whole["input_ids"]) - gone + 1)
        assert cut["input_ids"] == [1, *whole["input_ids"][gone:]]
        scored = [label for label in cut["labels"] if label != -100]
        assert scored == [label for label in last["labels"] if label != -100]
    fails(lambda: tokenized({"messages": [question, ANSWER]}, start, max_length=3), "max_length")


def test_special_tokens_that_a_text_brings_are_not_doubled() -> None:
    both = make_tokenizer(start="<s>", end="</s>")
    for prompt in ("q", "<s>q"):
        assert completion(prompt, "ok</s>", both) == completion("q", "ok", both)
    assert tokenized({"text": "<s>qa</s>"}, both) == tokenized({"text": "qa"}, both)
    head = {"tokenizer": both, "num_labels": 2}
    for text in ("qa", "<s>qa", "qa</s>", "<s>qa</s>"):
        row = tokenized({"text": text, "label": 1}, **head)
        assert row == {"input_ids": [1, *ids("qa"), 2], "labels": 1}
    row = tokenized({"text": "qqqqq", "label": 1}, max_length=4, **head)
    assert row["input_ids"] == [1, *ids("qq"), 2]


def test_max_length_cuts_texts_from_the_right() -> None:
    for text, kept in (("qab", ids("q", "ab")), ("qqab", ids("q", "q"))):
        row = tokenized({"text": text, "label": 1}, max_length=2, num_labels=2)
        assert row == {"input_ids": kept, "labels": 1}


def test_the_loss_of_messages_is_on_all_turns_of_the_assistant() -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "qq"},
        {"role": "assistant", "content": "ab"},
    ]
    start = make_tokenizer(start="<s>", chat=CHAT)
    row = tokenized({"messages": messages}, start)
    question, again = [*ids("<user>", "q"), 2], [*ids("<user>", "qq"), 2]
    header, turn, last = ids("<assistant>"), [*ids("ok"), 2], [*ids("ab"), 2]
    assert row["input_ids"] == [*question, *header, *turn, *again, *header, *last]
    unseen = [-100] * len([*question, *header]), [-100] * len([*again, *header])
    assert row["labels"] == [*unseen[0], *turn, *unseen[1], *last]


def test_conversations_of_prompt_and_completion_are_messages() -> None:
    chat = make_tokenizer(chat=CHAT)
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}]
    asked += [{"role": "user", "content": "qq"}]
    row = tokenized({"prompt": asked, "completion": [ANSWER]}, chat)
    whole = tokenized({"messages": [*asked, ANSWER]}, chat)
    assert row["input_ids"] == whole["input_ids"]
    # The prompt's own answer is not scored.
    assert [label for label in row["labels"] if label != -100] == [*ids("ok"), 2]


def test_parts_of_text_are_joined_and_others_are_refused() -> None:
    chat, question = make_tokenizer(chat=CHAT), {"role": "user", "content": "qq"}
    # Arrow fills the keys of other parts with null.
    parts = [{"type": "text", "text": "q", "image_url": None}, {"type": "text", "text": "q"}]
    row = tokenized({"messages": [{**question, "content": parts}, ANSWER]}, chat)
    assert row == tokenized({"messages": [question, ANSWER]}, chat)
    for bad in ([*parts, {"type": "image_url", "image_url": "x"}], [{"type": "text"}], []):
        turns = {"messages": [{**question, "content": bad}, ANSWER]}
        fails(lambda turns=turns: tokenized(turns, chat), "is no text")


def test_weights_of_messages_count() -> None:
    chat = make_tokenizer(chat=CHAT)
    wrong = {"role": "assistant", "content": "ab", "weight": 0}
    again = {"role": "user", "content": "qq"}
    turns = [{"role": "user", "content": "q"}, wrong, again, {**ANSWER, "weight": 1}]
    row = tokenized({"messages": turns}, chat)
    assert [label for label in row["labels"] if label != -100] == [*ids("ok"), 2]
    assert row["input_ids"] == tokenized({"messages": [*turns[:3], ANSWER]}, chat)["input_ids"]


TOOLS = "{% for t in tools or [] %}({{ t.name }}){% endfor %}"
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.name }}]{% endfor %}"


def test_tools_reach_the_chat_template_or_are_refused() -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "ab", "x": None}], "content": None}
    turns = {"messages": [{"role": "user", "content": "q"}, call], "tools": [{"name": "y"}]}
    shown = make_tokenizer(chat=TOOLS + CHAT.replace("{{ m.content }}", "{{ m.content }}" + CALLS))
    for tools in (turns["tools"], json.dumps(turns["tools"])):
        row = tokenized({**turns, "tools": tools}, shown)
        assert row["input_ids"][:3] == ids("(y)")
        assert [label for label in row["labels"] if label != -100] == [*ids("[", "ab", "]"), 2]
    fails(lambda: tokenized(turns, make_tokenizer(chat=CHAT)), "does not show 'tools'")
    fails(lambda: tokenized(turns, make_tokenizer(chat=TOOLS + CHAT)), "show 'tool_calls'")


def test_an_attention_mask_hides_tokens() -> None:
    row = {"input_ids": [0, 0, 5, 6], "labels": [-100, -100, -100, 6]}
    found = tokenized({**row, "attention_mask": [0, 0, 1, 1], "token_type_ids": [1, 0, 0, 0]})
    assert found == {"input_ids": [5, 6], "labels": [-100, 6]}
    row = {"input_ids": [5, 6, 0], "attention_mask": [True, True, False], "labels": True}
    assert tokenized(row, num_labels=2) == {"input_ids": [5, 6], "labels": 1}


def test_tokenized_rows_stay_as_they_are() -> None:
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}
    assert tokenized(row, context=3) == row
    row = {"input_ids": [5, 6, 7], "labels": 1}
    assert tokenized(row, num_labels=2) == row


BAD: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"prompt": "q" * 9, "completion": "ok"}, {"context": 11}, ["12 tokens", "11", "max_length"]),
    ({"prompt": "q" * 9, "options": ["a", "b"], "label": 0}, {"context": 9}, ["11 tokens"]),
    ({"text": "qqq", "label": 0}, {"context": 2, "num_labels": 2}, ["3 tokens", "context holds 2"]),
    ({"input_ids": [3] * 4, "labels": [3] * 4}, {"context": 3}, ["4 tokens"]),
    ({"prompt": "q", "completion": "okokok"}, {"max_length": 5}, ["5 tokens", "max_length=5"]),
    ({"prompt": "", "completion": "a"}, {}, ["the prompt is empty"]),
    ({"prompt": "q", "completion": ""}, {}, ["column 'completion'", "empty"]),
    ({"prompt": "q", "completion": ["a"]}, {}, ["'completion'", "role and content"]),
    ({"prompt": "q", "completion": [ANSWER]}, {}, ["messages needs a completion of messages"]),
    ({"prompt": [ANSWER], "options": ["a", "b"], "label": 0}, {}, ["completion of messages"]),
    ({"prompt": "q", "completion": True}, {}, ["column 'completion'", "True is no text"]),
    ({"prompt": "q", "options": "yes", "label": 0}, {}, ["'options'", "list of texts"]),
    ({"prompt": "q", "options": ["a", ""], "label": 0}, {}, ["'options'", "empty"]),
    ({"prompt": "q", "options": ["a", " a"], "label": 0}, {}, ["options", "'a'", "twice"]),
    ({"prompt": "q", "options": ["a", None], "label": 0}, {}, ["'options'", "null is no text"]),
    ({"prompt": "q", "answers": "ab"}, {}, ["'answers'", "list of right answers"]),
    ({"text": "qq", "tools": [{}]}, {}, ["column 'tools' is for messages"]),
    ({"messages": [ANSWER], "passage": "q"}, {"max_length": 5}, ["'passage'", "part of a text"]),
    ({"prompt": "", "options": ["a", "b"], "label": 0}, {}, ["the prompt is empty"]),
    ({"prompt": "q", "options": [], "label": 0}, {}, ["list of texts", "options"]),
    ({"prompt": "q", "options": ["a", "b"], "label": 2}, {}, ["label 2", "options"]),
    ({"prompt": "q", "options": ["a", "b"], "label": -1}, {}, ["label -1", "options"]),
    ({"text": "", "label": 0}, {"num_labels": 2}, ["empty"]),
    ({"text": "q", "label": 2}, {"num_labels": 2}, ["label 2", "from 0 to"]),
    ({"text": "q", "label": "good"}, {"num_labels": 2}, ["'good'"]),
    ({"messages": []}, {}, ["list of messages"]),
    ({"messages": [ANSWER, {"role": "user", "content": "q"}]}, {}, ["assistant"]),
    ({"input_ids": [3, 4], "labels": [-100]}, {}, ["labels must be as long"]),
    ({"input_ids": [3, 4], "labels": [3, -100]}, {}, ["one other than -100"]),
    ({"input_ids": [], "labels": []}, {}, ["labels must be"]),
    # What JSON and CSV files may hold in place of the right types.
    ({"prompt": "q", "options": ["a", "b"], "label": "b"}, {}, ["label 'b' is no index"]),
    ({"prompt": "q", "options": ["a", "b"], "label": "1"}, {}, ["label '1' is no index"]),
    ({"prompt": "q", "options": ["a", "b"], "label": 1.0}, {}, ["label 1.0 is no index"]),
    ({"messages": [ANSWER]}, {}, ["messages"]),
    ({"messages": "hello"}, {}, ["messages"]),
    ({"messages": [{"role": "user", "content": ["q"]}, ANSWER]}, {}, ["['q'] is no text"]),
    ({"messages": [{"role": "user", "content": "q", "weight": 1}, ANSWER]}, {}, ["weight 1"]),
    ({"messages": [{"role": "user"}, {**ANSWER, "weight": 0.5}]}, {}, ["no text"]),
    ({"messages": [{"from": "user", "value": "q"}, ANSWER]}, {}, ["role and content"]),
    ({"messages": [{"role": "user", "content": "q", "x": 1}, ANSWER]}, {}, ["not show 'x'"]),
    ({"input_ids": [[3, 4]], "labels": [[3, 4]]}, {}, ["'input_ids'", "list of whole numbers"]),
    ({"input_ids": [3, 4.0], "labels": [3, 4]}, {}, ["'input_ids'", "whole numbers"]),
    ({"input_ids": [3, 9], "labels": [3, 4]}, {"vocabulary": 9}, ["token id 9", "resize_token"]),
    ({"input_ids": [3, 4], "labels": [3, 9]}, {"vocabulary": 9}, ["token id 9"]),
    ({"input_ids": [3, -1], "labels": [3, 4]}, {}, ["token id -1"]),
    ({"input_ids": [3, 4], "labels": [3, 4], "attention_mask": [1]}, {}, ["attention_mask"]),
    ({"input_ids": [3, 4, 5], "labels": [3, 4, 5], "attention_mask": [1, 0, 1]}, {}, ["_mask"]),
    ({"input_ids": [3, 4], "labels": [3, 4], "token_type_ids": [0, 1]}, {}, ["only zeros"]),
    ({"input_ids": [3, 4], "labels": [3, 4], "position_ids": [1, 2]}, {}, ["position_ids"]),
    ({"input_ids": [3, 4], "labels": 1}, {}, ["labels"]),
    ({"input_ids": [3, 4], "labels": 5}, {"num_labels": 2}, ["label"]),
    ({"input_ids": [3, 4], "labels": [3, 4]}, {"num_labels": 2}, ["label"]),
]


@pytest.mark.parametrize(("example", "settings", "parts"), BAD)
def test_an_example_that_cannot_be_used_is_the_users_error(
    example: dict[str, Any], settings: dict[str, Any], parts: list[str]
) -> None:
    tokenization = Tokenization(make_tokenizer(chat=CHAT), **settings)
    fails(lambda: tokenization(example, 6), "row 7", *parts)


def test_a_number_is_a_completion() -> None:
    """JSON rows may well have numbers for answers, as label columns may."""
    assert completion("q=", 4) == completion("q=", "4")  # type: ignore[arg-type]


def test_messages_need_a_chat_template_that_goes_on() -> None:
    turns = {"messages": [{"role": "user", "content": "q"}, ANSWER]}
    fails(lambda: Tokenization(TOKENIZER)(turns, 0), "no chat template", "set one")
    strange = make_tokenizer(chat="{{ messages | length }}" + CHAT)
    fails(lambda: Tokenization(strange)(turns, 0), "row 1", "renders the prompt differently")


def test_a_data_set_is_tokenized_row_by_row() -> None:
    rows = [{"prompt": "q", "completion": "ok"}, {"prompt": "qq", "completion": "ab"}]
    found = tokenize_dataset(rows, Tokenization(TOKENIZER))
    assert {"prompt", "completion"}.isdisjoint(found.column_names)
    expected = [completion("q", "ok"), completion("qq", "ab")]
    assert list(found.select_columns(["input_ids", "labels"])) == expected


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize(
    "kind",
    [
        Dataset.from_list,
        lambda rows: Dataset.from_list(rows).with_format("torch"),
        lambda rows: Dataset.from_list(rows).with_format("numpy"),
        stream,
        lambda rows: stream(rows).map(lambda row: row),
        lambda rows: [{n: torch.tensor(v) for n, v in row.items()} for row in rows],
    ],
)
@pytest.mark.parametrize("label", [True, 1])
def test_data_sets_of_all_kinds_are_the_same(kind: Callable[..., Any], label: int) -> None:
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0], "labels": label}] * 2
    found = list(tokenize_dataset(kind(rows), Tokenization(TOKENIZER, num_labels=2)))
    assert found == [{"input_ids": [5, 6], "labels": 1, "length": 2}] * 2
    assert is_tokenized(Dataset.from_list(found))
    assert not is_tokenized(Dataset.from_list(rows))


def test_booleans_are_labels_of_options() -> None:
    rows = [{"prompt": "q", "options": ["y", "n"], "label": label} for label in (True, False)]
    for data in (rows, Dataset.from_list(rows)):
        batch = Collator(0)(list(tokenize_dataset(data, Tokenization(TOKENIZER))))
        assert batch["labels"].tolist() == [1, 0]
        assert batch["labels"].dtype == torch.long


def test_several_right_options_may_be_in_some_rows_alone() -> None:
    rows = [{"prompt": "q", "options": ["y", "n"], "label": 0, "also_right": [1]}]
    rows += [{"prompt": "q", "options": ["y", "n"], "label": 1}]
    kinds = (rows, rows[::-1], Dataset.from_list(rows), Dataset.from_list(rows).select([1, 0]))
    for order in kinds:
        batch = Collator(0)(list(tokenize_dataset(order, Tokenization(TOKENIZER))))
        assert sorted(batch["is_right"].tolist()) == [[False, True], [True, True]]


def transformed() -> Dataset:
    data = Dataset.from_list([{"text": "q"}])
    data.set_transform(lambda rows: rows)
    return data


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (DatasetDict({"train": Dataset.from_list([{"text": "qq"}])}), "one Dataset"),
        (["text"], "dictionary"),
        (transformed(), "transform"),
        (stream([]), "empty"),
        ([{"prompt": "q", "answers": ["a"]}, {"prompt": "q", "answers": [["a"]]}], "several kinds"),
    ],
)
def test_what_is_no_data_set_of_examples_is_the_users_error(data: Any, part: str) -> None:
    fails(lambda: tokenize_dataset(data, Tokenization(TOKENIZER)), part)


@pytest.mark.parametrize(
    ("rows", "settings", "parts"),
    [
        ([], {}, ["empty", "at least one"]),
        ([{"a": 1}], {}, ["row 1", "columns a;", "prompt + completion"]),
        ([{"text": "a", "label": 1}], {}, ["text, label", "prompt + completion"]),
        ([{"prompt": "a", "completion": "b"}], {"num_labels": 2}, ["text + label"]),
        ([{"prompt": "q", "completion": "ok"}] * 3, {"context": 2}, ["row 1", "tokens"]),
    ],
)
def test_a_data_set_that_does_not_fit_is_the_users_error(
    rows: list[dict[str, Any]], settings: dict[str, Any], parts: list[str]
) -> None:
    fails(lambda: tokenize_dataset(rows, Tokenization(TOKENIZER, **settings)), *parts)


# ---- Batches ----------------------------------------------------------------------------------

IDS = st.lists(st.integers(1, 99), min_size=1, max_size=6)


def rows_of(batch: Batch) -> list[list[int]]:
    """The sequences without padding, which stands on the right and holds zeros."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    steps = torch.arange(batch["input_ids"].shape[1])
    assert torch.equal(batch["attention_mask"], (steps < torch.tensor(lengths)[:, None]).long())
    assert max(lengths) == len(steps)
    assert batch["input_ids"][batch["attention_mask"] == 0].eq(0).all()
    return [row[:length] for row, length in zip(batch["input_ids"].tolist(), lengths)]


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5))
def test_completions_are_padded_and_scored(pairs: list[tuple[list[int], list[int]]]) -> None:
    features = [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for prompt, answer in pairs
    ]
    batch = Collator(0)(features)
    assert list(batch)[0] == "labels"
    assert batch["labels"].shape == batch["input_ids"].shape
    assert rows_of(batch) == [prompt + answer for prompt, answer in pairs]
    expected = [
        (row, len(prompt) + i - 1, token)
        for row, (prompt, answer) in enumerate(pairs)
        for i, token in enumerate(answer)
    ]
    scored = zip(*(batch[name].tolist() for name in ("rows", "positions", "tokens")))
    assert list(scored) == expected
    assert (batch["labels"] != -100).sum() == len(expected)


@given(st.lists(st.tuples(IDS, st.lists(IDS, min_size=1, max_size=4)), min_size=1, max_size=5))
def test_options_are_padded_and_scored(examples: list[tuple[list[int], list[list[int]]]]) -> None:
    features = [
        {"prompt_ids": prompt, "option_ids": options, "label": len(options) - 1}
        for prompt, options in examples
    ]
    batch = Collator(0)(features)
    assert list(batch)[0] == "labels"
    assert batch["labels"].tolist() == [len(options) - 1 for _, options in examples]
    one_token = all(len(o) == 1 for _, options in examples for o in options)
    if one_token and len({len(options) for _, options in examples}) == 1:
        assert rows_of(batch) == [prompt for prompt, _ in examples]
        assert batch["positions"].tolist() == [len(prompt) - 1 for prompt, _ in examples]
        assert batch["rows"].tolist() == list(range(len(examples)))
        assert batch["option_tokens"].tolist() == [[o[0] for o in opts] for _, opts in examples]
        return
    assert rows_of(batch) == [prompt + o[:-1] for prompt, options in examples for o in options]
    most, row, expected = max(len(options) for _, options in examples), 0, []
    for number, (prompt, options) in enumerate(examples):
        for index, option in enumerate(options):
            where = number * most + index
            expected += [(row, len(prompt) + i - 1, token, where) for i, token in enumerate(option)]
            row += 1
    names = ("rows", "positions", "tokens", "token_options")
    assert list(zip(*(batch[name].tolist() for name in names))) == expected
    assert batch["is_option"].sum(dim=1).tolist() == [len(options) for _, options in examples]


@given(st.lists(st.tuples(IDS, st.lists(IDS, min_size=1, max_size=4)), min_size=1, max_size=5))
def test_options_behind_one_prompt_are_the_same_sequences(
    examples: list[tuple[list[int], list[list[int]]]],
) -> None:
    """What an option's tokens see (its segment and the prompt's) is the prompt and the option."""
    features = [
        {"prompt_ids": prompt, "option_ids": [*options, [1, 2]], "label": 0}
        for prompt, options in examples
    ]
    batch = Collator(0, is_causal=True, shares_prompts=True)(features)
    assert len(batch["input_ids"]) == len(features)
    scored = torch.stack([batch[n] for n in ("rows", "positions", "tokens", "token_options")], 1)
    width = batch["is_option"].shape[1]
    for number, feature in enumerate(features):
        for index, option in enumerate(feature["option_ids"]):
            mine = scored[scored[:, 3] == number * width + index]
            assert mine[:, 2].tolist() == option
            assert mine[:, 0].unique().tolist() == [number]
            ids, segments = batch["input_ids"][number], batch["segments"][number]
            where = batch["position_ids"][number]
            for _, position, token, _ in mine.tolist():
                seen = (segments == 0) | (segments == segments[position])
                seen &= torch.arange(len(ids)) <= position
                whole = feature["prompt_ids"] + option
                assert ids[seen].tolist() == whole[: len(whole[: where[position] + 1])]
                assert where[seen].tolist() == list(range(int(where[position]) + 1))
                assert whole[where[position] + 1] == token


@given(st.lists(st.tuples(IDS, st.integers(0, 3)), min_size=1, max_size=5))
def test_classes_are_padded(pairs: list[tuple[list[int], int]]) -> None:
    batch = Collator(0)([{"input_ids": row, "labels": label} for row, label in pairs])
    assert list(batch) == ["labels", "input_ids", "attention_mask"]
    assert batch["labels"].tolist() == [label for _, label in pairs]
    assert rows_of(batch) == [row for row, _ in pairs]


def test_the_padding_token_is_the_tokenizers() -> None:
    batch = Collator(42)([{"input_ids": [1], "labels": 0}, {"input_ids": [1, 2], "labels": 0}])
    assert batch["input_ids"].tolist() == [[1, 42], [1, 2]]


# ---- From file to batch -----------------------------------------------------------------------


def test_from_file_to_batch(tmp_path: Path) -> None:
    path = write(tmp_path, "train.tsv", "sentence\tlabel\nq\t1\nqq\t0\n")
    examples = make_examples(read_rows(path), path.name, "{sentence}", label_words=["n", "y"])
    batch = Collator(0)(list(tokenize_dataset(examples, Tokenization(TOKENIZER))))
    assert batch["labels"].tolist() == [1, 0]
    assert rows_of(batch)[:2] == [ids("q", "Ġ"), ids("q")]
    assert batch["is_option"].tolist() == [[True, True], [True, True]]
