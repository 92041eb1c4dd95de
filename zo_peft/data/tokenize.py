"""Turn examples into token ids."""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from zo_peft.data.forms import FORMS, NAMES, Form, Row, example_of, fitting_form, form_of, located
from zo_peft.errors import UserError, explained
from zo_peft.models.adapters import check_token

try:
    from datasets import Dataset, IterableDataset, Value

    HAS_DATASETS = True
except ImportError:
    HAS_DATASETS = False
    Dataset = IterableDataset = Value = type("Absent", (), {})


class Features(list[Row]):
    """Tokenized examples in memory, for environments without `datasets`."""


@dataclass(frozen=True)
class Tokenization:
    """How examples become token ids.

    Attributes:
        tokenizer: the base's tokenizer.
        context: how many tokens an example may have, which are those that the model can take less
            an adapter's virtual tokens. None: any number.
        max_length: cut prompts from the left, and texts from the right, to this many tokens. None:
            an example that does not fit the context is an error.
        num_labels: the number of classes of a classification head; None for a language model.
        generates: whether completions are generated for reward functions.
        max_completion_length: for how many generated tokens prompts leave room in the context.
        vocabulary: how many rows the model's embedding has. None: token ids are not checked.
        form: that of all examples. None: each example may have another.
        source: where the examples come from, for error messages.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int | None = None
    max_length: int | None = None
    num_labels: int | None = None
    generates: bool = False
    max_completion_length: int = 0
    vocabulary: int | None = None
    form: Form | None = None
    source: str = ""

    def __call__(self, example: Row, index: int) -> Row:
        """The features of an example, as `Collator` takes them.

        `length` among them is for transformers' `train_sampling_strategy="group_by_length"`. A
        UserError says that the example of this index cannot be used.
        """
        with located(self.source, index + 1):
            features = self._features(example_of(example, self.form, self.generates))
            ids = features["input_ids"] if "input_ids" in features else features["prompt_ids"]
            options = features.get("option_ids", [[]])
            length = len(ids) + max(map(len, options))
            generated = self.max_completion_length if "columns" in features else 0
            if self.context is not None and length + generated > self.context:
                what = f"it has {length + generated} tokens, but the model's context holds"
                cure = "shorten it, or set max_length to at most that, to cut it"
                raise UserError(f"{what} {self.context}; {cure}")
            labels = features.get("labels")
            scored = [i for i in labels if i != -100] if isinstance(labels, list) else []
            for token in {*ids, *scored, *(token for option in options for token in option)}:
                check_token(token, self.vocabulary)
        return {**features, "length": length}

    def _features(self, example: Row) -> Row:
        if "input_ids" in example and not self.generates:
            return self._tokenized(example["input_ids"], example["labels"])
        example = self._shortened(example)
        if self.num_labels is not None:
            return self._classified(example["text"], example["label"], self.num_labels)
        if self.generates or "answers" in example:
            return self._generated(example)
        if "options" in example:
            return self._options(example)
        if isinstance(example.get("completion"), list):
            prompt, completion = example["prompt"], example["completion"]
            return self._messages(prompt + completion, example.get("tools"), len(prompt))
        if "completion" in example:
            return self._completion(example["prompt"], example["completion"])
        if "text" in example:
            return self._text(example["text"])
        return self._messages(example["messages"], example.get("tools"))

    def _shortened(self, example: Row) -> Row:
        """Cut the example's passage at its end until everything fits `max_length` or the context.

        What stands around the passage stays, such as the question about it. The passage begins at
        the character `passage_start`, or where its words are first found.
        """
        passage = example.get("passage")
        column = "prompt" if "prompt" in example else "text"
        if passage is not None and not isinstance(example.get(column), str):
            raise UserError("column 'passage' is part of a text; with messages, leave it out")
        limits = [limit for limit in (self.max_length, self.context) if limit is not None]
        if self.context is not None and column == "prompt":
            generates = self.generates or "answers" in example
            limits[-1] -= generates * self.max_completion_length
        if passage is None or not limits:
            return example
        text = example[column]
        start = example.get("passage_start", text.find(passage))
        before, after = text[:start], text[start + len(passage) :]
        if before + passage + after != text:
            raise UserError(f"its passage is not part of its {column}")
        endings = [""]
        if not self.generates:
            endings += [*example.get("options", ()), example.get("completion", "")]
        while passage:
            whole = [text + spaced(text, ending) for ending in endings]
            # One more for the token that ends a completion.
            excess = 1 + max(len(ids) for ids in self.tokenizer(whole)["input_ids"]) - min(limits)
            if excess <= 0:
                break
            _, offsets = self._located(passage)
            kept = len(offsets) - excess
            passage = passage[: offsets[kept][0]].rstrip() if kept > 0 else ""
            text = before + passage + after
        return {**example, column: text}

    def _tokenized(self, ids: list[int], labels: Any) -> Row:
        if self.num_labels is not None:
            return {"input_ids": ids, "labels": _index(labels, self.num_labels, "classes")}
        if isinstance(labels, int) or len(labels) != len(ids) or _unscored(labels):
            what = "labels must be as long as input_ids"
            raise UserError(f"{what}, with one other than -100 behind the first")
        return {"input_ids": ids, "labels": labels}

    def _classified(self, text: str, label: object, classes: int) -> Row:
        ids, back = self._ids(text), self._around[1]
        ids = ids[: -len(back)] if back and ids[-len(back) :] == back else ids
        if self.max_length is not None:
            ids = ids[: max(0, self.max_length - len(back))]
        if len(ids) == self._kept(ids):
            raise UserError("no token of its text is left; put text there, or raise max_length")
        return {"input_ids": ids + back, "labels": _index(label, classes, "classes")}

    def _generated(self, example: Row) -> Row:
        prompt, columns = example["prompt"], dict(example)
        if columns.get("answers") is None and form_of(columns) in FORMS[1:3]:
            # Reward functions may give these columns another meaning, and then need no answers.
            with contextlib.suppress(UserError):
                right = example_of(columns)
                options = right.get("options", [right.get("completion")])
                answer = options[_index(right.get("label", 0), len(options), "options")]
                answer = answer if isinstance(answer, str) else answer[-1].get("content", "")
                columns["answers"] = [answer]
        if isinstance(prompt, str):
            ids = self._ids(prompt)
        else:
            tools = example.get("tools")
            ids, _ = self._located(self._rendered(prompt, tools, add_generation_prompt=True))
        if not ids:
            raise UserError("the prompt is empty; put text there")
        return {"prompt_ids": self._cut(ids), "columns": columns}

    def _options(self, example: Row) -> Row:
        prompt, options = example["prompt"], example["options"]
        label = _index(example["label"], len(options), "options")
        endings = [spaced(prompt, option) for option in options]
        if twice := [own for number, own in enumerate(endings) if own in endings[:number]]:
            raise UserError(f"column 'options': {twice[0].strip()!r} is there twice; drop one")
        prompt_ids, option_ids = self._split(prompt, endings)
        features = {"prompt_ids": prompt_ids, "option_ids": option_ids, "label": label}
        if "also_right" not in example:
            return features
        also = [_index(other, len(options), "options") for other in example["also_right"]]
        return {**features, "also_right": also}

    def _completion(self, prompt: str, completion: str) -> Row:
        ending = self._ended(spaced(prompt, completion))
        prompt_ids, (completion_ids,) = self._split(prompt, [ending])
        labels = [-100] * len(prompt_ids) + completion_ids
        return {"input_ids": prompt_ids + completion_ids, "labels": labels}

    def _text(self, text: str) -> Row:
        ids = self._ids(self._ended(text))[: self.max_length]
        if len(ids) < 2:
            raise UserError("its text has fewer than two tokens")
        return {"input_ids": ids, "labels": ids}

    def _messages(self, messages: list[Row], tools: list[Any] | None, first: int = 1) -> Row:
        """The loss is on the turns of the assistant from the first on that have no weight of 0."""
        turns, roles = [], [message["role"] for message in messages]
        if len(roles) < 2 or roles[-1] != "assistant":
            raise UserError("messages must be two or more, and the last one the assistant's")
        text = self._rendered(messages, tools)
        self._check_shown(text, messages, tools)
        for number, message in list(enumerate(messages))[first:]:
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            before = self._rendered(messages[:number], tools, add_generation_prompt=True)
            through = self._rendered(messages[: number + 1], tools)
            if not (text.startswith(before) and text.startswith(through)):
                why = "the chat template renders the prompt differently without its answer"
                raise UserError(f"{why}; use prompt and completion columns")
            turns.append(range(len(before), len(through)))
        ids, offsets = self._located(text)
        # A token that reaches into a turn of the assistant has a loss.
        labels = [
            token if any(start < turn.stop and end > turn.start for turn in turns) else -100
            for token, (start, end) in zip(ids, offsets)
        ]
        kept, cut = self._kept(ids), self._cut(ids)
        behind = labels[len(labels) - len(cut) + kept :]
        if len(cut) < len(ids):
            # Of a turn that begins before the cut, nobody would see what it answers.
            partial = len(list(takewhile(lambda label: label != -100, behind)))
            behind[:partial] = [-100] * partial
        ids, labels = cut, labels[:kept] + behind
        if _unscored(labels):
            advice = "shorten them, raise max_length, or put text before"
            raise UserError(f"no token of the assistant's turns is left; {advice}")
        return {"input_ids": ids, "labels": labels}

    def _check_shown(self, text: str, messages: list[Row], tools: list[Any] | None) -> None:
        """Refuse tools, and parts of messages, that the chat template leaves out."""
        if tools and self._rendered(messages, None) == text:
            raise UserError("the chat template does not show 'tools'; drop the column")
        for role in {message["role"] for message in messages if message.get("content")}:
            said = [m["role"] == role and m.get("content") for m in messages]
            others = [m | {"content": f"{s}."} if s else m for m, s in zip(messages, said)]
            if self._rendered(others, tools) == text:
                raise UserError(f"the chat template does not show content of {role!r}; drop it")
        for key in {key for message in messages for key in message if key not in NAMES}:
            without = [{k: value for k, value in m.items() if k != key} for m in messages]
            if self._rendered(without, tools) == text:
                raise UserError(f"the chat template does not show {key!r} of its messages; drop it")

    def _rendered(self, messages: list[Row], tools: list[Any] | None, **kwargs: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template; set one (--chat_template chatml, or a file), "
                "or write texts as prompt + completion"
            )
        # A template is a program: what it may raise is as open as with any other.
        with explained("the chat template refuses it", Exception):
            return self.tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, **kwargs
            )

    def _located(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids without special tokens, and where each begins and ends in the text."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts in front of every text, and behind it."""
        whole = self.tokenizer("a")["input_ids"]
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        starts = range(len(whole) - len(bare) + 1)
        start = next((n for n in starts if whole[n : n + len(bare)] == bare), 0)
        return whole[:start], whole[start + len(bare) :]

    def _ids(self, text: str) -> list[int]:
        """Token ids with the special tokens in front, once, and without those behind."""
        ids, front = self.tokenizer(text, add_special_tokens=False)["input_ids"], self._around[0]
        return ids if ids[: len(front)] == front else front + ids

    def _kept(self, ids: list[int]) -> int:
        """How many special tokens stand in front; no cut takes them."""
        front = self._around[0] or [self.tokenizer.bos_token_id]
        return len(front) if ids[: len(front)] == front else 0

    def _cut(self, ids: list[int], reserved: int = 0) -> list[int]:
        """The ids, cut from the left to `max_length` less what is reserved for an ending."""
        kept = self._kept(ids)
        if self.max_length is None or len(ids) + reserved <= self.max_length:
            return ids
        room = self.max_length - reserved - kept
        if room < 1:
            why = f"its ending of {reserved} tokens leaves no room for a prompt within max_length"
            raise UserError(f"{why}={self.max_length}; raise it")
        return ids[:kept] + ids[-room:]

    def _ended(self, text: str) -> str:
        """The text with the end of sequence written out once behind it."""
        end = self.tokenizer.eos_token or ""
        return text.removesuffix(end) + end

    def _split(self, prompt: str, endings: list[str]) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt and of each ending, from tokenizing both as one text.

        A token that reaches from the prompt into an ending belongs to the ending. The prompt is cut
        from the left until it and the longest ending fit `max_length`.
        """
        texts = (prompt + ending for ending in ("", *endings))
        alone, *joined = (self._ids(text) for text in texts)
        # The prompt ends where the texts begin to differ. An ending has at least one token.
        seam = len(list(takewhile(lambda ids: len(set(ids)) == 1, zip(alone, *joined))))
        seam = min(seam, *(len(whole) - 1 for whole in joined))
        if seam < 1:
            raise UserError("the prompt is empty or one token with its completion; put text before")
        prompt_ids, ending_ids = joined[0][:seam], [whole[seam:] for whole in joined]
        return self._cut(prompt_ids, max(map(len, ending_ids))), ending_ids


def _unscored(labels: list[int]) -> bool:
    """Whether no token has a loss; the first has none, because nothing predicts it."""
    return all(label == -100 for label in labels[1:])


def _index(label: object, count: int, what: str) -> int:
    """The label, if it is an index into `count` classes or options."""
    if isinstance(label, int) and 0 <= label < count:
        return int(label)
    raise UserError(f"label {label!r} is no index into its {what}, from 0 to {count - 1}")


def spaced(prompt: str, ending: str) -> str:
    """The ending with a space before it, unless white space is there already."""
    joined = not prompt or prompt[-1].isspace() or not ending or ending[0].isspace()
    return ending if joined else " " + ending


def tokenize_dataset(dataset: Any, tokenization: Tokenization) -> Any:
    """A data set of examples (or a sequence of dictionaries) as features for `Collator`.

    They come as an `IterableDataset` if the examples did, else as a `Dataset`, or where `datasets`
    is not installed as `Features`.
    A warning names columns that are not used. A UserError says that the data set is empty, that
    its columns make none of the forms of `zo_peft.data` that the model can use, or that an example
    cannot be used.
    """
    source = getattr(dataset, "source", "")
    dataset = unformatted(dataset)
    first = next(iter(dataset), None)
    if first is None:
        raise UserError("the data set is empty; it must hold at least one example")
    form = fitting_form(first, source, tokenization.num_labels is not None, tokenization.generates)
    tokenization = replace(tokenization, form=form, source=source)
    if isinstance(dataset, list):
        made = [tokenization(row, index) for index, row in enumerate(dataset)]
        names = dict.fromkeys(name for row in made for name in row)
        if not HAS_DATASETS:
            return Features({name: row.get(name) for name in names} for row in made)
        kinds = f"{source or 'the data set'} has a column with values of several kinds"
        with explained(kinds, ValueError, TypeError, OverflowError):
            return Dataset.from_dict({name: [row.get(name) for row in made] for name in names})
    columns = dataset.column_names or list(first)
    return dataset.map(tokenization, with_indices=True, remove_columns=columns)


def unformatted(dataset: Any) -> list[Row] | Dataset | IterableDataset:
    """The data set with Python's values, or its rows."""
    if isinstance(dataset, Dataset):
        if dataset.format["type"] == "custom":
            raise UserError("the data set has a transform; apply it with map, or reset_format()")
        for name in {"label", "labels", "length"} & set(dataset.column_names):
            # `map` would turn indices back into the booleans that the column had.
            if dataset.features[name] == Value("bool"):
                dataset = dataset.cast_column(name, Value("int64"))
    if isinstance(dataset, Dataset | IterableDataset):
        return dataset.with_format(None)
    listed = isinstance(dataset, Iterable) and not isinstance(dataset, Mapping)
    rows = list(dataset) if listed else []
    if not listed or not all(isinstance(row, Mapping) for row in rows):
        raise UserError("give one Dataset, or one list of examples, each of them a dictionary")
    return rows


def classes_of(dataset: Any) -> int:
    """One more than the largest class index of examples for a head; 0 without any.

    A UserError says that an index is so large that it is none.
    """
    rows = [] if dataset is None else unformatted(dataset)
    labels = (row.get("labels" if form_of(row) == FORMS[0] else "label") for row in rows)
    largest = max((label for label in labels if isinstance(label, int)), default=-1)
    if largest >= 100_000:
        # Such labels number something else, and a head has a row for each class.
        raise UserError(f"label {largest} is no class index; number the classes from 0")
    return 1 + largest


def is_tokenized(dataset: Any) -> bool:
    """Whether a data set holds features, as `tokenize_dataset` makes them."""
    if not isinstance(dataset, Dataset | IterableDataset | Features):
        return False
    first: Row = next(iter(dataset), {})
    made = "prompt_ids" in first or ("labels" in first and "attention_mask" not in first)
    return "length" in first and made
