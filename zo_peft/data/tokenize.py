"""Turn examples into token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from zo_peft.data.examples import FORMS, Row, form_of
from zo_peft.errors import UserError


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
    """

    tokenizer: PreTrainedTokenizerBase
    context: int | None = None
    max_length: int | None = None
    num_labels: int | None = None
    generates: bool = False
    max_completion_length: int = 0

    def __call__(self, example: Row, index: int) -> Row:
        """The features of an example, as `Collator` takes them.

        `length` among them is for transformers' `train_sampling_strategy="group_by_length"`. A
        UserError says that the example of this index cannot be used.
        """
        try:
            features = self._features(example)
            ids = features["input_ids"] if "input_ids" in features else features["prompt_ids"]
            length = len(ids) + max(map(len, features.get("option_ids", [[]])))
            generated = self.max_completion_length if "columns" in features else 0
            if self.context is not None and length + generated > self.context:
                raise UserError(
                    f"it has {length + generated} tokens, but the model's context holds "
                    f"{self.context}; shorten it, or set max_length to {self.context} or less to "
                    "cut it"
                )
        except UserError as error:
            raise UserError(f"example {index + 1}: {error}") from None
        return {**features, "length": length}

    def _features(self, example: Row) -> Row:
        form = form_of(example)
        if form == ("input_ids", "labels"):
            return self._tokenized(example["input_ids"], example["labels"])
        example = self._shortened(example)
        if self.num_labels is not None:
            return self._classified(example["text"], example["label"], self.num_labels)
        if self.generates or form == ("prompt", "answers"):
            return self._generated(example)
        if form == ("prompt", "options", "label"):
            return self._options(example)
        if form == ("prompt", "completion"):
            return self._completion(str(example["prompt"]), str(example["completion"]))
        if form == ("text",):
            return self._text(str(example["text"]))
        return self._messages(example["messages"])

    def _shortened(self, example: Row) -> Row:
        """Cut the example's passage at its end until everything fits `max_length` or the context.

        What stands around the passage stays, such as the question about it. The passage begins at
        the character `passage_start`, or where its words are first found.
        """
        passage = example.get("passage")
        column = "text" if self.num_labels is not None else "prompt"
        limits = [limit for limit in (self.max_length, self.context) if limit is not None]
        if self.context is not None and column == "prompt":
            generates = self.generates or "answers" in example
            limits[-1] -= generates * self.max_completion_length
        if passage is None or not limits:
            return example
        text = str(example[column])
        start = example.get("passage_start", text.find(passage))
        before, after = text[:start], text[start + len(passage) :]
        if before + passage + after != text:
            raise UserError(f"its passage is not part of its {column}")
        endings = ["", *example.get("options", ()), str(example.get("completion") or "")]
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
        if not isinstance(labels, list) or len(labels) != len(ids) or _unscored(labels):
            raise UserError(
                "labels must be as long as input_ids, with one other than -100 behind the first"
            )
        return {"input_ids": ids, "labels": labels}

    def _classified(self, text: str, label: object, classes: int) -> Row:
        index, cut = _index(label, classes, "classes"), self.max_length is not None
        ids = self.tokenizer(text, truncation=cut, max_length=self.max_length)["input_ids"]
        if not ids:
            raise UserError("its text is empty")
        return {"input_ids": ids, "labels": index}

    def _generated(self, example: Row) -> Row:
        prompt, columns = example["prompt"], dict(example)
        if "answers" not in example and "options" in example:
            columns["answers"] = [example["options"][example["label"]]]
        elif "answers" not in example and example.get("completion") is not None:
            columns["answers"] = [example["completion"]]
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            text = self._rendered(prompt, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = self._open(ids) or ids
        if not ids:
            raise UserError("the prompt is empty; put text there")
        return {"prompt_ids": ids[-(self.max_length or 0) :], "columns": columns}

    def _options(self, example: Row) -> Row:
        prompt, options = example["prompt"], example["options"]
        label = _index(example["label"], len(options), "options")
        prompt_ids, option_ids = self._split(prompt, [spaced(prompt, o) for o in options])
        others = {"also_right": example["also_right"]} if "also_right" in example else {}
        return {"prompt_ids": prompt_ids, "option_ids": option_ids, "label": label, **others}

    def _completion(self, prompt: str, completion: str) -> Row:
        ending = self._ended(spaced(prompt, completion))
        prompt_ids, (completion_ids,) = self._split(prompt, [ending])
        labels = [-100] * len(prompt_ids) + completion_ids
        return {"input_ids": prompt_ids + completion_ids, "labels": labels}

    def _text(self, text: str) -> Row:
        ids = self._open(self.tokenizer(self._ended(text))["input_ids"])[: self.max_length]
        if len(ids) < 2:
            raise UserError("its text has fewer than two tokens")
        return {"input_ids": ids, "labels": ids}

    def _messages(self, messages: Sequence[dict[str, Any]]) -> Row:
        roles = [m.get("role") if isinstance(m, dict) else None for m in messages]
        if len(roles) < 2 or None in roles or roles[-1] != "assistant":
            raise UserError(
                "messages must be a list of two or more messages with role and content, and the "
                "last one the assistant's"
            )
        text = self._rendered(messages)
        turns = []
        for number in (i for i, role in enumerate(roles) if role == "assistant" and i):
            before = self._rendered(messages[:number], add_generation_prompt=True)
            through = self._rendered(messages[: number + 1])
            if not (text.startswith(before) and text.startswith(through)):
                raise UserError(
                    "the chat template renders the prompt differently without its answer; use "
                    "prompt and completion columns"
                )
            turns.append(range(len(before), len(through)))
        ids, offsets = self._located(text)
        # A token that reaches into a turn of the assistant has a loss.
        labels = [
            token if any(start < turn.stop and end > turn.start for turn in turns) else -100
            for token, (start, end) in zip(ids, offsets)
        ]
        ids, labels = (row[-(self.max_length or 0) :] for row in (ids, labels))
        if _unscored(labels):
            raise UserError(
                "no token of the assistant's turns is left; shorten them, raise max_length, or "
                "put text before"
            )
        return {"input_ids": ids, "labels": labels}

    def _rendered(self, messages: Sequence[dict[str, Any]], **kwargs: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; use prompt and completion columns")
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    def _located(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids without special tokens, and where each begins and ends in the text."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _open(self, ids: list[int]) -> list[int]:
        """The ids without the end of sequence that some tokenizers append to every text."""
        end = self.tokenizer.eos_token_id
        appended = ids[-1:] == [end] and self.tokenizer("a")["input_ids"][-1] == end
        return ids[:-1] if appended else ids

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
        alone, *joined = (self._open(self.tokenizer(text)["input_ids"]) for text in texts)
        # The prompt ends where the texts begin to differ. An ending has at least one token.
        seam = len(list(takewhile(lambda ids: len(set(ids)) == 1, zip(alone, *joined))))
        seam = min(seam, *(len(whole) - 1 for whole in joined))
        if seam < 1:
            raise UserError("the prompt is empty or one token with its completion; put text before")
        prompt_ids, ending_ids = joined[0][:seam], [whole[seam:] for whole in joined]
        longest = max(map(len, ending_ids))
        if self.max_length is not None:
            room = self.max_length - longest
            if room < 1:
                raise UserError(
                    f"its completion of {longest} tokens leaves no room for a prompt within "
                    f"max_length={self.max_length}; raise it"
                )
            prompt_ids = prompt_ids[-room:]
        return prompt_ids, ending_ids


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


def tokenize_dataset(dataset: Any, tokenization: Tokenization) -> Dataset | IterableDataset:
    """A data set of examples (or a sequence of dictionaries) as features for `Collator`.

    A UserError says that the data set is empty, that its columns make none of the forms of
    `zo_peft.data` that the model can use, or that an example cannot be used.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        dataset = Dataset.from_list(list(dataset))
    columns = dataset.column_names or []
    if isinstance(dataset, Dataset) and not len(dataset):
        raise UserError("the data set is empty; it must hold at least one example")
    form = form_of(columns)
    if tokenization.num_labels is not None:
        fits = form in (FORMS[0], ("text", "label"))
        wanted = "text + label (a class index)"
    elif tokenization.generates:
        fits, wanted = "prompt" in columns, "prompt, and what the reward functions need"
    else:
        fits = form not in (None, ("prompt",), ("text", "label"))
        wanted = "prompt + completion, prompt + options + label, messages, or text (on the command "
        wanted += "line, --prompt_template and --label_words make them)"
    if not fits:
        raise UserError(
            f"the data set has the columns {', '.join(columns)}; this model needs {wanted}"
        )
    return dataset.map(tokenization, with_indices=True, remove_columns=columns)
