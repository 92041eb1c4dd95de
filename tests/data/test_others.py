"""Files of other programs: their columns become the prompts, completions and messages they are."""

from typing import Any

import pytest
from test_data import fails, make_tokenizer

from zo_peft.data import Tokenization, make_examples, tokenize_dataset
from zo_peft.data.forms import check_layout, question_of
from zo_peft.models.loading import CHATML

#: As in alpaca's own code (`prompt_dict` of its `train.py`).
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd"
    "\n\n### Input:\n{2}\n\n### Response:\n"
)
WITHOUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nSay hi\n\n### Response:\n"
)
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "c"}
SILENT = {"role": "assistant", "content": "", "weight": 0}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
TOOLS = [{"name": "look"}]


@pytest.mark.parametrize(
    ("row", "example"),
    [
        (
            {"instruction": "Add", "input": "{2}", "output": "4", "text": "whole"},
            {"prompt": WITH_INPUT, "completion": "4"},
        ),
        ({"instruction": "Say hi", "output": "hi"}, {"prompt": WITHOUT, "completion": "hi"}),
        (
            {"instruction": "Say hi", "context": None, "response": "hi"},
            {"prompt": WITHOUT, "completion": "hi"},
        ),
        (
            {"instruction": "Add", "context": "{2}", "response": 4},
            {"prompt": WITH_INPUT, "completion": "4"},
        ),
        ({"prompt": "a", "response": "b"}, {"prompt": "a", "completion": "b"}),
        ({"conversations": [HUMAN, GPT, HUMAN]}, {"messages": [USER, ANSWER]}),
        ({"conversations": [USER, ANSWER], "tools": ""}, {"messages": [USER, ANSWER]}),
        (
            {"conversations": [SYSTEM, HUMAN, {**GPT, "weight": 0}, HUMAN, GPT]},
            {"messages": [SYSTEM, USER, {**ANSWER, "weight": 0}, USER, ANSWER]},
        ),
        ({"conversations": [HUMAN, GPT], "system": "c"}, {"messages": [SYSTEM, USER, ANSWER]}),
        (
            {"instruction": "Say hi", "output": "hi", "history": [], "system": ""},
            {"prompt": WITHOUT, "completion": "hi"},
        ),
        ({"messages": [USER, SILENT, ANSWER]}, {"messages": [USER, SILENT, ANSWER]}),
        (
            {"conversations": [HUMAN, GPT], "tools": '[{"name": "look"}]'},
            {"messages": [USER, ANSWER], "tools": TOOLS},
        ),
    ],
)
def test_rows_of_other_programs(row: dict[str, Any], example: dict[str, Any]) -> None:
    assert make_examples([row], "f") == [example]
    if "tools" not in example:
        tokenization = Tokenization(make_tokenizer(chat=CHATML.read_text()))
        own, other = (list(tokenize_dataset([one], tokenization)) for one in (example, row))
        assert own == other


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"instruction": True, "output": "b"}, ["column 'instruction'", "no text"]),
        ({"instruction": "a", "input": ["b"], "output": "b"}, ["column 'input'", "no text"]),
        ({"instruction": "a", "output": ""}, ["column 'output'", "empty"]),
        ({"instruction": " ", "input": "", "output": "b"}, ["column 'instruction'", "empty"]),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, ["column 'messages'", "empty"]),
        ({"messages": [USER, ANSWER], "system": "c"}, ["column 'system'", "its texts"]),
        ({"instruction": "a", "output": "b", "system": "c"}, ["column 'system'"]),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, ["column 'history'"]),
        (
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"a": 1}},
            ["column 'chat_template_kwargs'"],
        ),
        ({"prompt": "a", "completion": "b", "label": False}, ["marks a bad completion"]),
        ({"prompt": "a", "completion": "b", "label": "FALSE"}, ["marks a bad completion"]),
        ({"conversations": [HUMAN]}, ["column 'conversations'", "no turn of gpt"]),
        ({"conversations": [{"from": "cat", "value": "b"}]}, ["'cat'", "human, gpt"]),
        ({"messages": [{**USER, "role": "\ud800"}, ANSWER]}, ["column 'messages'", "surrogate"]),
        ({"conversations": [GPT, "b"]}, ["column 'conversations'", "'b' must have from"]),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            ['--prompt_template "{prompt}" --label_column "chosen"'],
        ),
        ({"chosen": "b", "rejected": "c"}, ['--prompt_template "{text}" --label_column "chosen"']),
    ],
)
def test_rows_that_cannot_be_used_name_their_column(row: dict[str, Any], parts: list[str]) -> None:
    fails(lambda: make_examples([row], "f"), "f, row 1", *parts)


def test_completions_that_are_marked_as_good_are_learned() -> None:
    row = {"prompt": "a", "completion": "b"}
    with pytest.warns(UserWarning, match="not used: label"):
        assert make_examples([row | {"label": True}], "f") == [row]


def test_a_system_prompt_of_a_row_is_asked_with_it() -> None:
    asked = question_of({"conversations": [HUMAN], "system": "c"})
    assert asked == {"prompt": [SYSTEM, USER]}
    fails(lambda: question_of({"messages": [USER], "system": "c"}), "column 'system'")
    assert question_of({"text": "a", "system": "Linux"}) == {"prompt": "a"}


def test_messages_that_the_chat_template_leaves_out_are_refused() -> None:
    shown = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer = make_tokenizer(chat=shown + "{% if add_generation_prompt %}<assistant>{% endif %}")

    def tokenized(*messages: dict[str, str]) -> Any:
        return list(tokenize_dataset([{"messages": [*messages]}], Tokenization(tokenizer)))

    fails(lambda: tokenized(SYSTEM, USER, ANSWER), "row 1", "does not show content of 'system'")
    assert len(tokenized(USER, ANSWER)) == len(tokenized(USER, ANSWER, USER, ANSWER)) == 1


def test_a_template_need_not_take_content_beside_tool_calls() -> None:
    calls = "{{ m.tool_calls | tojson }}{% if m.content %}{{ raise_exception('both') }}{% endif %}"
    turn = "{% if m.tool_calls %}" + calls + "{% else %}{{ m.content }}{% endif %}"
    chat = "{% for m in messages %}<{{ m.role }}>" + turn + "{% endfor %}"
    end = "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenization = Tokenization(make_tokenizer(chat=chat + end))
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    assert len(list(tokenize_dataset([{"messages": [USER, call, ANSWER]}], tokenization))) == 1


def test_columns_instead_of_rows_are_refused_with_the_command() -> None:
    row = {"a": {"0": "x", "1": "y"}, "b": {"0": 1, "1": 2}}
    fails(lambda: check_layout([row], "f.json"), "f.json holds columns", 'python -c "import pandas')
    for rows in ([row] * 2, [{"a": {"0": "x"}, "b": "y"}], [{}]):
        check_layout(rows, "f.json")


def test_chatml() -> None:
    tokenizer = make_tokenizer(chat=CHATML.read_text())
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages = [SYSTEM, USER, asked, {"role": "tool", "content": "d"}, ANSWER]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<s><|im_start|>system\nc<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call><|im_end|></s>\n'
        "<|im_start|>tool\nd<|im_end|>\n<|im_start|>assistant\nb<|im_end|></s>\n"
    )
    asks = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert asks == "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    shown = tokenizer.apply_chat_template([USER], tools=TOOLS, tokenize=False)
    assert '<tools>\n{"name": "look"}\n</tools>' in shown
    # Where the token is there, it is the one that ends a sequence.
    tokenizer.eos_token = "<|im_end|>"
    assert tokenizer.apply_chat_template([ANSWER], tokenize=False).endswith("b<|im_end|>\n")
