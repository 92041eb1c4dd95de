"""The forms that an example may have, and one strict pass over its values.

Every value of a form is either used as meant or refused, by the name of its column.
"""

import json
import math
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from zo_peft.errors import Notice, UserError

Row = dict[str, Any]
Form = tuple[str, ...]

#: The columns of each form of example that `zo_peft.data` describes.
FORMS: tuple[Form, ...] = (
    ("input_ids", "labels"),
    ("prompt", "options", "label"),
    ("prompt", "completion"),
    ("prompt", "answers"),
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("text", "label"),
    ("text",),
    ("prompt",),
)
#: Columns that may stand beside those of a form.
TOKENIZED = ("attention_mask", "token_type_ids", "length")
OPTIONAL = ("passage", "passage_start", "also_right", "tools")
#: Columns that would change what is learned, and cannot be used: of tokenized rows, and of others.
REFUSED = ("position_ids", "completion_mask", "assistant_masks", "loss_mask")
REFUSED_OF_TURNS = ("system", "history", "chat_template_kwargs")
CONVERSED = (FORMS[2], *FORMS[4:9])
#: What `astype(str)` of pandas makes of a value that is missing.
MISSING = ("nan", "<NA>", "NaT")
#: Keys of a message that a chat template may leave out, because they only say whose it is.
NAMES = ("role", "content", "weight", "name", "tool_call_id")
#: The prompt with which alpaca was trained.
INSTRUCTION = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{task}\n\n{given}### Response:\n"
)
PAIRED = ", paired with an input that provides further context"
#: Who speaks in ShareGPT's conversations, as roles of messages.
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
ROLES |= {role: role for role in ("user", "assistant", "system", "tool")}


@contextmanager
def located(source: str, number: int) -> Iterator[None]:
    """Within the context, a UserError becomes one line that begins with the source and the row."""
    try:
        yield
    except UserError as error:
        where = f"{source}, row {number}" if source else f"row {number}"
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None


def named(columns: Iterable[object]) -> str:
    """The names of columns, for a message."""
    return ", ".join(str(column) or "''" for column in columns) or "none"


def form_of(row: Row) -> Form | None:
    """The first of `FORMS` of which the row has all values; null is no value."""
    present = {name for name, value in row.items() if value is not None}
    return next((form for form in FORMS if present.issuperset(form)), None)


def check_layout(rows: list[Row], source: str) -> None:
    """Raise a UserError for one object that holds columns, with the command that makes rows."""
    if len(rows) == 1 and rows[0] and all(isinstance(value, dict) for value in rows[0].values()):
        code = f"pandas.read_json({source!r}).to_json('rows.json', orient='records')"
        cure = f'convert it: python -c "import pandas; {code}"'
        raise UserError(f"{source} holds columns, not rows; {cure}")


def called(form: Form | None) -> str:
    """What a form is called, for a message."""
    return "plain text" if form == ("text",) else " + ".join(form or ())


def prompt_of(row: Row, answer: str | None) -> str:
    """A column that may be the prompt of this answer, for a message: `prompt`, or the longest."""
    others = [name for name in row if name not in (answer, "rejected")] or ["text"]
    return "prompt" if "prompt" in others else max(others, key=lambda name: len(str(row.get(name))))


def _unfit(row: Row, classifies: bool = False) -> str:
    """Why a row is no example, and what the model needs."""
    has = named(name if value is not None else f"{name} (null)" for name, value in row.items())
    if classifies:
        return f"it has the columns {has}; this model needs text + label (a class index)"
    *_, last = ["label", *row]
    column = next((name for name in ("label", "chosen") if name in row), last)
    answer = "--label_words first,second" if column == "label" else f'--label_column "{column}"'
    return (
        f"it has the columns {has}; this model needs prompt + completion, messages, text or "
        f'another form of docs/data.md, which --prompt_template "{{{prompt_of(row, column)}}}" '
        f"{answer} may make (a CSV file names its columns in its first line)"
    )


def fitting_form(first: Row, source: str, classifies: bool, generates: bool) -> Form | None:
    """The form of a data set, by its first row; None where completions of prompts are rewarded.

    A warning names columns that are not used. A UserError says what the model needs instead, which
    has a head for classes or not.
    """
    if generates and not classifies:
        return None
    form, head = form_of(first), (FORMS[0], ("text", "label"))
    fits = form in head if classifies else form not in (None, ("prompt",), head[1])
    with located(source, 1):
        if blank := [n for n in first if n != n.strip() and any(n.strip() in f for f in FORMS)]:
            raise UserError(f"column {blank[0]!r} has blanks around its name; take them away")
        if form is None or not fits:
            raise UserError(_unfit(first, classifies))
    beside = OTHERS[form][0] if form in OTHERS else OPTIONAL
    known = (*form, *((*TOKENIZED, *REFUSED) if form == FORMS[0] else beside))
    if unused := [n for n, value in first.items() if value is not None and n not in known]:
        what = f"is read as {called(form)}; these columns are not used: {named(unused)}"
        warnings.warn(f"{source or 'the data set'} {what}", Notice, stacklevel=3)
    return form


def example_of(row: Row, form: Form | None = None, generates: bool = False) -> Row:
    """The example that a row holds: the columns of its form, with each value as it is meant.

    Args:
        form: that of the rows before it.
        generates: completions of the prompt are rewarded, and all other columns are left as they
            are, for the reward functions.

    Raises:
        UserError: the row has no form, or another one; or a value is not what its column is for.
    """
    row = {name: plain(value) for name, value in row.items()}
    if generates:
        if row.get("prompt") is None:
            raise UserError(f"column 'prompt' is missing; the row has {named(row)}")
        known = [name for name in ("prompt", "passage", "passage_start", "tools") if name in row]
        return {**row, **{name: read(name, row[name], READERS[name]) for name in known}}
    own = form_of(row)
    if form is not None and own != form:
        lacking = [name for name in form if row.get(name) is None]
        has = named(name for name, value in row.items() if value is not None)
        what = f"no value in column {lacking[0]!r}" if lacking else "another form"
        how = "correct or drop it, or put rows of another form into a file of their own"
        raise UserError(f"it has {what}: rows before have {named(form)}, this one has {has}; {how}")
    if own is None or own == ("prompt",):
        raise UserError(_unfit(row))
    _check_beside(row, own)
    if own in OTHERS:
        beside, convert = OTHERS[own]
        row = convert({name: row[name] for name in (*own, *beside) if row.get(name) is not None})
        own = form_of(row) or own
    used = (*own, *(TOKENIZED if own == FORMS[0] else OPTIONAL))
    # A data set of Arrow has null for those who have no other right options.
    if "also_right" in row and row["also_right"] is None:
        row["also_right"] = []
    kept = ((name, row[name]) for name in row if name in used and row[name] is not None)
    example = {name: read(name, value, READERS[name]) for name, value in kept}
    conversation = isinstance(example.get("completion"), list)
    if own != ("prompt", "answers") and isinstance(example.get("prompt"), list) != conversation:
        raise UserError("a prompt of messages needs a completion of messages, and text needs text")
    if "tools" in example and not (conversation or own == ("messages",)):
        raise UserError("column 'tools' is for messages, which a chat template turns into text")
    return _unpadded(example) if own == FORMS[0] else example


def _check_beside(row: Row, form: Form) -> None:
    """Raise a UserError for a column that would change what is learned, and cannot be used."""
    names, instead = (REFUSED, "labels") if form == FORMS[0] else (REFUSED_OF_TURNS, "its texts")
    beside = OTHERS[form][0] if form in OTHERS else ()
    for name in names if form in (FORMS[0], *CONVERSED) else ():
        if name not in beside and row.get(name) not in (None, "", [], {}):
            raise UserError(f"column {name!r} cannot be used; write it into {instead}, or drop it")
    if form == ("prompt", "completion") and str(row.get("label")).lower() == "false":
        raise UserError("column 'label' marks a bad completion; leave out such rows")


def plain(value: Any) -> Any:
    """The value in Python's own types, if it is a tensor or an array."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def text_of(value: Any) -> str:
    """A text, or a number as text. A UserError refuses null, booleans, lists and other values."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        shown = "null" if value is None else reprlib.repr(value)
        raise UserError(f"{shown} is no text; write text there, or drop the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError("it holds half of a character (a lone surrogate); correct it") from None
    return value


def filled_text(value: Any) -> str:
    """The same; a UserError refuses an empty text, too."""
    text = text_of(value)
    if not text.strip():
        raise UserError("it is empty; write text there, or drop the row")
    return text


def _listed(value: Any, part: Callable[[Any], Any], what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{reprlib.repr(value)} must be a list of {what}; write [..., ...]")
    return [part(one) for one in value]


def _texts(value: Any) -> list[str]:
    return _listed(value, filled_text, "texts")


def _answer(value: Any) -> Any:
    return _texts(value) if isinstance(value, list) else filled_text(value)


def _label(value: Any) -> int:
    if not isinstance(value, int):
        raise UserError(f"label {reprlib.repr(value)} is no index; write a whole number from 0")
    return int(value)


def _numbers(value: Any) -> list[int]:
    if not isinstance(value, list) or {type(part) for part in value} - {int}:
        raise UserError(f"{reprlib.repr(value)} must be one list of whole numbers")
    return value


def _messages(value: Any) -> list[Row]:
    return _listed(value, _message, "messages with role and content")


def _message(value: Any) -> Row:
    message = _without_nulls(value)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{reprlib.repr(value)} must be a message with role and content")
    text_of(message["role"])
    trained = message["role"] == "assistant"
    if "content" in message or "tool_calls" not in message:
        filled = trained and message.get("weight") != 0 and not message.keys() - NAMES
        message["content"] = (filled_text if filled else text_of)(_joined(message.get("content")))
    if "weight" in message and message["weight"] not in ((0, 1) if trained else (0,)):
        raise UserError(f"weight {message['weight']!r} must be 0 or 1, and 1 only of the assistant")
    return message


def _joined(content: Any) -> Any:
    """The text of a message whose content is a list of parts, as images need, if all are text."""
    parts = content if isinstance(content, list) else ()
    are_texts = all(isinstance(part, dict) and part.get("type") == "text" for part in parts)
    return "".join(text_of(p.get("text")) for p in parts) if parts and are_texts else content


def _conversation(row: Row) -> Row:
    """Messages; the turns behind the last one of the assistant teach nothing, and are left out."""
    turns = _turns(row)
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise UserError("column 'conversations' has no turn of gpt to learn from; drop the row")
    return {"messages": turns, **({"tools": row["tools"]} if row.get("tools") else {})}


def _turns(row: Row) -> list[dict[str, Any]]:
    what = "turns with from and value"
    turns = read("conversations", row["conversations"], lambda value: _listed(value, _turn, what))
    return [{"role": "system", "content": row["system"]}, *turns] if row.get("system") else turns


def _turn(value: Any) -> dict[str, Any]:
    turn = dict(value) if isinstance(value, dict) else {}
    role = ROLES.get(str(turn.pop("from", turn.pop("role", None))))
    if role is None:
        raise UserError(f"{reprlib.repr(value)} must have from ({', '.join(ROLES)}) and value")
    return {"role": role, "content": text_of(turn.pop("value", turn.pop("content", None))), **turn}


def _instruction(row: Row) -> Row:
    """An instruction as alpaca's prompt, and its answer."""
    readers = dict.fromkeys(("output", "response"), filled_text)
    texts = {name: read(name, value, readers.get(name, text_of)) for name, value in row.items()}
    given = texts.get("input", texts.get("context", ""))
    read("instruction", texts["instruction"] + given, filled_text)
    paired, given = (PAIRED, f"### Input:\n{given}\n\n") if given.strip() else ("", "")
    prompt = INSTRUCTION.format(paired=paired, task=texts["instruction"], given=given)
    return {"prompt": prompt, "completion": texts.get("output", texts.get("response"))}


def _mask(value: Any) -> list[int]:
    parts = value if isinstance(value, list) else [value]
    return _numbers([int(part) if isinstance(part, bool) else part for part in parts])


def _tools(value: Any) -> list[Any]:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise UserError("it is text that is no JSON; write a list of tools") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(f"{reprlib.repr(value)} must be a list of tools")
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """Without the keys that data sets of Arrow add where another row's object has them."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


#: Forms of other programs: the columns that may stand beside, and what makes an own form of them.
OTHERS: dict[Form, tuple[Form, Callable[[Row], Row]]] = {
    ("conversations",): (("tools", "system"), _conversation),
    ("instruction", "output"): (("input",), _instruction),
    ("instruction", "response"): (("context",), _instruction),
    ("prompt", "response"): ((), lambda r: {"prompt": r["prompt"], "completion": r["response"]}),
}


def question_of(row: Row, classifies: bool = False) -> Row:
    """What a row asks, without its answer: `prompt` (of a head `text`), and what may stand beside.

    A UserError or a KeyError says that the row has no column that asks.
    """
    row = {name: value for name, value in row.items() if value is not None}
    if classifies:
        return {"text": row["text"], **{name: row[name] for name in OPTIONAL if name in row}}
    _check_beside(row, next((f for f in CONVERSED if f[0] in row and "options" not in row), ()))
    if "instruction" in row:
        asked = {"instruction", "input", "context"} & row.keys()
        return {"prompt": _instruction({name: row[name] for name in asked})["prompt"]}
    turns = _turns(row) if "conversations" in row else [*row.get("messages", ())]
    while turns and is_answer(turns[-1]):
        turns.pop()
    prompt = row.get("prompt") or turns or row.get("text")
    if not prompt:
        raise UserError(f"it has the columns {named(row)}; give a --prompt_template")
    return {"prompt": prompt, **{n: row[n] for n in ("options", *OPTIONAL) if n in row}}


def is_answer(turn: Any) -> bool:
    """Whether a turn of a conversation is the assistant's."""
    return isinstance(turn, dict) and turn.get("role") == "assistant"


READERS: dict[str, Callable[[Any], Any]] = {
    "prompt": lambda value: _messages(value) if isinstance(value, list) else text_of(value),
    "completion": lambda value: _messages(value) if isinstance(value, list) else filled_text(value),
    "messages": _messages,
    "tools": _tools,
    "text": filled_text,
    "passage": text_of,
    "passage_start": _label,
    "options": _texts,
    "answers": lambda value: _listed(value, _answer, "right answers"),
    "label": _label,
    "also_right": _numbers,
    "input_ids": _numbers,
    "labels": lambda value: _numbers(value) if isinstance(value, list) else _label(value),
    "attention_mask": _mask,
    "token_type_ids": _numbers,
    "length": lambda value: value,
}


def read(name: str, value: Any, reader: Callable[[Any], Any]) -> Any:
    """What a reader makes of a column's value; its UserError then begins with the column."""
    if isinstance(value, str) and value in MISSING:
        warnings.warn(f"column {name!r} has {value!r}, as pandas writes a missing value", Notice, 2)
    try:
        return reader(value)
    except UserError as error:
        raise UserError(f"column {name!r}: {error}") from None


def _unpadded(example: Row) -> Row:
    """A tokenized example without the tokens that its attention mask hides."""
    ids, labels = example["input_ids"], example["labels"]
    mask = example.get("attention_mask", [1] * len(ids))
    start = mask.index(1) if 1 in mask else 0
    stop = start + sum(mask)
    if len(mask) != len(ids) or mask != [int(start <= i < stop) for i in range(len(ids))]:
        raise UserError("column 'attention_mask' must be 1 for the tokens of input_ids, 0 around")
    if any(example.get("token_type_ids", ())[start:stop]):
        raise UserError("column 'token_type_ids' cannot be used; only zeros are taken")
    if isinstance(labels, list) and len(labels) == len(ids):
        labels = labels[start:stop]
    return {"input_ids": ids[start:stop], "labels": labels}
