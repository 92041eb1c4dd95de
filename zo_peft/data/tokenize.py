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
    """

    tokenizer: PreTrainedTokenizerBase
    context: int | None = None
    max_length: int | None = None
    num_labels: int | None = None

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
        if self.num_labels is not None:
            return self._classified(example, where)
        if form == ("prompt", "options", "label"):
            return self._options(example, where)
        if form == ("prompt", "completion"):
            return self._completion(str(example["prompt"]), str(example["completion"]), where)
        return self._messages(example["messages"], where)

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
        return {"prompt_ids": prompt_ids, "option_ids": option_ids, "label": label}

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
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; use prompt and completion columns")
        render: Callable[..., str] = self.tokenizer.apply_chat_template
        prompt = render(messages[:-1], tokenize=False, add_generation_prompt=True)
        full = render(messages, tokenize=False)
        if not full.startswith(prompt):
            raise UserError(
                f"{where}: the chat template renders the prompt differently without its answer; "
                "use prompt and completion columns"
            )
        prompt_ids, (completion_ids,) = self._split(
            prompt, [full[len(prompt) :]], where, special_tokens=False
        )
        return self._labelled(prompt_ids, completion_ids, where)

    def _labelled(self, prompt_ids: list[int], completion_ids: list[int], where: str) -> Row:
        prompt_ids = self._cut(prompt_ids, len(completion_ids), where)
        labels = [-100] * len(prompt_ids) + completion_ids
        return {"input_ids": prompt_ids + completion_ids, "labels": labels}

    def _split(
        self, prompt: str, endings: list[str], where: str, special_tokens: bool = True
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of the prompt and of each ending, from tokenizing both together.

        Where a tokenizer merges across the seam, the merged tokens go to the endings.
        """

        # Some tokenizers close every text; here only what is written out closes one.
        closes = special_tokens and self.tokenizer("a")["input_ids"][-1] == (
            self.tokenizer.eos_token_id
        )

        def ids(text: str) -> list[int]:
            encoded = self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
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
    fits = form is not None and (
        form == FORMS[0] or (tokenization.num_labels is not None) == (form == ("text", "label"))
    )
    if not fits:
        wanted = "text + label (a class index)"
        if tokenization.num_labels is None:
            wanted = "prompt + completion, prompt + options + label, or messages (on the command "
            wanted += "line, --prompt_template and --label_words make them)"
        raise UserError(
            f"the data set has the columns {', '.join(columns or ())}; this model needs {wanted}"
        )
    return dataset.map(tokenization, with_indices=True, remove_columns=columns)
