"""Examples to token ids."""

from collections.abc import Callable, Sequence
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
        tokenizer: of the base model.
        context: tokens that the model can take (less an adapter's virtual tokens); None: any.
        max_length: cut prompts from the left (texts from the right) to this many tokens; None:
            what does not fit the context is an error.
        num_labels: classes of a sequence-classification head; None for a language model.
        generates: completions are generated and rewarded.
        max_completion_length: tokens for which prompts leave room in the context, if so.
    """

    tokenizer: PreTrainedTokenizerBase
    context: int | None = None
    max_length: int | None = None
    num_labels: int | None = None
    generates: bool = False
    max_completion_length: int = 0

    def __call__(self, example: Row, index: int) -> Row:
        """Features for `Collator`; `index` counts examples from 0, for messages.

        `length` is for transformers' `train_sampling_strategy="group_by_length"`.
        """
        features = self._features(example, index)
        ids = features["input_ids"] if "input_ids" in features else features["prompt_ids"]
        return {**features, "length": len(ids) + max(map(len, features.get("option_ids", [[]])))}

    def _features(self, example: Row, index: int) -> Row:
        where = f"example {index + 1}"
        form = form_of(example)
        if form == ("input_ids", "labels"):
            return self._tokenized(example, where)
        example = self._shortened(example, where)
        if self.num_labels is not None:
            return self._classified(example, where)
        if self.generates or form == ("prompt", "answers"):
            return self._generated(example, where)
        if form == ("prompt", "options", "label"):
            return self._options(example, where)
        if form == ("prompt", "completion"):
            return self._completion(str(example["prompt"]), str(example["completion"]), where)
        if form == ("text",):
            return self._text(str(example["text"]), where)
        return self._messages(example["messages"], where)

    def _shortened(self, example: Row, where: str) -> Row:
        """The example with its passage cut at the end until all fits `max_length`, or the context.

        What stands around the passage stays: the question that is asked about it. The passage is
        where `passage_start` says, in characters, or where its words stand first.
        """
        passage = example.get("passage")
        column = "text" if self.num_labels is not None else "prompt"
        generated = column == "prompt" and (self.generates or "answers" in example)
        room = (
            None if self.context is None else self.context - generated * self.max_completion_length
        )
        limits = [limit for limit in (self.max_length, room) if limit is not None]
        if passage is None or not limits:
            return example
        text = str(example[column])
        start = example.get("passage_start", text.find(passage))
        before, after = text[:start], text[start + len(passage) :]
        if before + passage + after != text:
            raise UserError(f"{where}: its passage is not part of its {column}")
        endings = ["", *example.get("options", ()), str(example.get("completion") or "")]
        while passage:
            whole = [text + _spaced(text, ending) for ending in endings]
            # One more for the token that ends a completion.
            excess = 1 + max(len(ids) for ids in self.tokenizer(whole)["input_ids"]) - min(limits)
            if excess <= 0:
                break
            starts = self.tokenizer(passage, add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
            kept = len(starts) - excess
            passage = passage[: starts[kept][0]].rstrip() if kept > 0 else ""
            text = before + passage + after
        return {**example, column: text}

    def _generated(self, example: Row, where: str) -> Row:
        prompt, columns = example["prompt"], dict(example)
        if "answers" not in example and "options" in example:
            columns["answers"] = [example["options"][example["label"]]]
        elif "answers" not in example and example.get("completion") is not None:
            columns["answers"] = [example["completion"]]
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            self._need_chat_template()
            text = self.tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id and self._closes():
            ids = ids[:-1]
        if not ids:
            raise UserError(f"{where}: the prompt is empty; put text there")
        ids = ids[-self.max_length :] if self.max_length is not None else ids
        self._fit(len(ids) + self.max_completion_length, where)
        return {"prompt_ids": ids, "columns": columns}

    def _text(self, text: str, where: str) -> Row:
        end = self.tokenizer.eos_token or ""
        ids = self.tokenizer(text if end and text.endswith(end) else text + end)["input_ids"]
        ids = ids[:-1] if self._closes() else ids
        ids = ids[: self.max_length] if self.max_length is not None else ids
        if len(ids) < 2:
            raise UserError(f"{where}: its text has no two tokens")
        self._fit(len(ids), where)
        return {"input_ids": ids, "labels": ids}

    def _tokenized(self, example: Row, where: str) -> Row:
        ids, labels = example["input_ids"], example["labels"]
        self._fit(len(ids), where)
        if self.num_labels is not None:
            return {"input_ids": ids, "labels": _index(labels, self.num_labels, "classes", where)}
        if (
            not isinstance(labels, list)
            or len(labels) != len(ids)
            or all(label == -100 for label in labels[1:])
        ):
            raise UserError(
                f"{where}: labels must be as long as input_ids, and one other than -100"
            )
        return {"input_ids": ids, "labels": labels}

    def _classified(self, example: Row, where: str) -> Row:
        label = _index(example["label"], self.num_labels or 0, "classes", where)
        ids = self.tokenizer(
            example["text"], truncation=self.max_length is not None, max_length=self.max_length
        )["input_ids"]
        if not ids:
            raise UserError(f"{where}: its text is empty")
        self._fit(len(ids), where)
        return {"input_ids": ids, "labels": label}

    def _options(self, example: Row, where: str) -> Row:
        prompt, options = example["prompt"], example["options"]
        label = _index(example["label"], len(options), "options", where)
        prompt_ids, option_ids = self._split(prompt, [_spaced(prompt, o) for o in options], where)
        prompt_ids = self._cut(prompt_ids, max(map(len, option_ids)), where)
        others = {"also_right": example["also_right"]} if "also_right" in example else {}
        return {"prompt_ids": prompt_ids, "option_ids": option_ids, "label": label, **others}

    def _completion(self, prompt: str, completion: str, where: str) -> Row:
        end = self.tokenizer.eos_token or ""
        text = _spaced(prompt, completion)
        text = text if end and text.endswith(end) else text + end
        prompt_ids, (completion_ids,) = self._split(prompt, [text], where)
        return self._labelled(prompt_ids, completion_ids, where)

    def _messages(self, messages: Sequence[dict[str, Any]], where: str) -> Row:
        roles = [m.get("role") if isinstance(m, dict) else None for m in messages]
        if len(roles) < 2 or None in roles or roles[-1] != "assistant":
            raise UserError(
                f"{where}: messages must be a list of role and content, the last of them the "
                "assistant's and one before it"
            )
        self._need_chat_template()
        render: Callable[..., str] = self.tokenizer.apply_chat_template
        full = render(messages, tokenize=False)
        turns = []
        for number in (i for i, role in enumerate(roles) if role == "assistant" and i):
            prompt = render(messages[:number], tokenize=False, add_generation_prompt=True)
            through = render(messages[: number + 1], tokenize=False)
            if not (full.startswith(prompt) and full.startswith(through)):
                raise UserError(
                    f"{where}: the chat template renders the prompt differently without its "
                    "answer; use prompt and completion columns"
                )
            turns.append(range(len(prompt), len(through)))
        return self._turns(full, turns, where)

    def _turns(self, text: str, turns: Sequence[range], where: str) -> Row:
        """The loss on the tokens that reach into one of the turns, ranges of characters."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        labels = [
            token if any(start < turn.stop and end > turn.start for turn in turns) else -100
            for token, (start, end) in zip(ids, offsets)
        ]
        if self.max_length is not None:
            ids, labels = ids[-self.max_length :], labels[-self.max_length :]
        self._fit(len(ids), where)
        if all(label == -100 for label in labels[1:]):
            raise UserError(
                f"{where}: no token of the assistant's turns is left; shorten them, raise "
                "max_length, or put text before"
            )
        return {"input_ids": ids, "labels": labels}

    def _need_chat_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; use prompt and completion columns")

    def _closes(self) -> bool:
        """Whether the tokenizer closes every text; here only what is written out closes one."""
        return self.tokenizer("a")["input_ids"][-1] == self.tokenizer.eos_token_id

    def _labelled(self, prompt_ids: list[int], completion_ids: list[int], where: str) -> Row:
        prompt_ids = self._cut(prompt_ids, len(completion_ids), where)
        labels = [-100] * len(prompt_ids) + completion_ids
        return {"input_ids": prompt_ids + completion_ids, "labels": labels}

    def _split(
        self, prompt: str, endings: list[str], where: str
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of the prompt and of each ending, from tokenizing both together.

        Where a tokenizer merges across the seam, the merged tokens go to the endings.
        """
        closes = self._closes()

        def ids(text: str) -> list[int]:
            encoded = self.tokenizer(text)["input_ids"]
            return encoded[:-1] if closes else encoded

        alone, joined = ids(prompt), [ids(prompt + ending) for ending in endings]
        # At least one token is left for each ending, and one before it to predict it from.
        seam = min(_shared(alone, whole) for whole in joined)
        seam = min(seam, *(len(whole) - 1 for whole in joined))
        if seam < 1:
            raise UserError(
                f"{where}: the prompt is empty or one token with its completion; put text before"
            )
        return joined[0][:seam], [whole[seam:] for whole in joined]

    def _cut(self, prompt_ids: list[int], behind: int, where: str) -> list[int]:
        """The prompt, cut from the left to `max_length` less what stands behind it."""
        if self.max_length is not None:
            room = self.max_length - behind
            if room < 1:
                raise UserError(
                    f"{where}: its completion of {behind} tokens leaves no room for a prompt "
                    f"within max_length={self.max_length}; raise it"
                )
            prompt_ids = prompt_ids[-room:]
        self._fit(len(prompt_ids) + behind, where)
        return prompt_ids

    def _fit(self, length: int, where: str) -> None:
        if self.context is not None and length > self.context:
            raise UserError(
                f"{where} has {length} tokens, but the model's context holds {self.context}; "
                f"shorten it, or set max_length to {self.context} or less to cut it"
            )


def _index(label: object, count: int, what: str, where: str) -> int:
    """The label, when it is an index into `count` classes or options."""
    if isinstance(label, int) and 0 <= label < count:
        return int(label)
    raise UserError(f"{where}: label {label!r} is no index into its {what}, from 0 to {count - 1}")


def _shared(first: list[int], second: list[int]) -> int:
    """How many ids two lists begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


def _spaced(prompt: str, ending: str) -> str:
    """The ending with a space before it, unless one of the two brings white space along."""
    joined = not prompt or prompt[-1].isspace() or not ending or ending[0].isspace()
    return ending if joined else " " + ending


def tokenize_dataset(dataset: Any, tokenization: Tokenization) -> Dataset | IterableDataset:
    """A data set of examples (or a sequence of dictionaries) as features for `Collator`.

    Raises:
        UserError: it is empty, its columns make none of the forms of `zo_peft.data`, or an example
            cannot be used.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        dataset = Dataset.from_list(list(dataset))
    columns = dataset.column_names
    if isinstance(dataset, Dataset) and not len(dataset):
        raise UserError("the data set is empty; it must hold at least one example")
    form = form_of(columns or ())
    if tokenization.num_labels is not None:
        fits = form in (FORMS[0], ("text", "label"))
        wanted = "text + label (a class index)"
    elif tokenization.generates:
        fits = "prompt" in (columns or ())
        wanted = "prompt, and what the reward functions need"
    else:
        fits = form not in (None, ("prompt",), ("text", "label"))
        wanted = "prompt + completion, prompt + options + label, messages, or text (on the command "
        wanted += "line, --prompt_template and --label_words make them)"
    if not fits:
        raise UserError(
            f"the data set has the columns {', '.join(columns or ())}; this model needs {wanted}"
        )
    return dataset.map(tokenization, with_indices=True, remove_columns=columns)
