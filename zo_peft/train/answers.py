"""Answers to rows without labels: probabilities of options or classes, or generated texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import PredictionOutput

from zo_peft.core.batch import IGNORE_INDEX, Batch, Prediction
from zo_peft.core.lanes import replaced
from zo_peft.data import Tokenization, collator_for, tokenize_dataset
from zo_peft.data.examples import converted
from zo_peft.data.forms import OPTIONAL, Row, form_of
from zo_peft.data.tokenize import is_tokenized
from zo_peft.errors import UserError
from zo_peft.objectives.scoring import (
    ClassificationObjective,
    CompletionObjective,
    OptionObjective,
)


def first_row(dataset: Any) -> Row:
    """The first example of a data set, or of the first of several by name; empty without one."""
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()), None)
    first = {} if dataset is None else next(iter(dataset), {})
    return dict(first) if isinstance(first, Mapping) else {}


def is_chat(dataset: Any) -> bool:
    """Whether the examples of a data set are conversations."""
    first = first_row(dataset)
    return any(isinstance(first.get(name), list) for name in ("messages", "prompt"))


def form_named(kind: str, dataset: Any) -> str | None:
    """What examples ask for: `options`, `classes`, `messages`, `completions`; None: no examples."""
    if not first_row(dataset):
        return None
    return "messages" if is_chat(dataset) else "completions" if "answers" in kind else kind


def classes_of(rows: Any) -> int:
    """One more than the largest label of examples for a classification head; 0 without labels."""
    labels = [row["label"] if "label" in row else row.get("labels") for row in rows]
    return 1 + max((label for label in labels if isinstance(label, int)), default=-1)


def lacks_answers(dataset: Any, tokenization: Tokenization) -> bool:
    """Whether a data set's first row is one to answer: a prompt, options or a text, no label."""
    if isinstance(dataset, dict | str) or tokenization.generates or is_tokenized(dataset):
        return False
    return _question(first_row(dataset), tokenization.num_labels is not None) is not None


def _question(row: Row, classifies: bool) -> Row | None:
    """The row in a form that can be tokenized; None if it has an answer already, or no question.

    Options and classes get a label, which nothing reads.
    """
    form, kept = form_of(row), {name: row[name] for name in OPTIONAL if name in row}
    if classifies:
        return {**kept, "text": row["text"], "label": 0} if form == ("text",) else None
    if form == ("messages",):
        last = row["messages"][-1] if row["messages"] else {}
        return None if last.get("role") == "assistant" else {**kept, "prompt": row["messages"]}
    if form != ("prompt",):
        return None
    if row.get("options") is None:
        return {**kept, "prompt": row["prompt"]}
    return {**kept, "prompt": row["prompt"], "options": row["options"], "label": 0}


def answered(trainer: Any, dataset: Any) -> PredictionOutput:
    """What a trainer's model answers to rows without labels; see `BaseTrainer.predict`."""
    tokenization, tokenizer = trainer.tokenization, trainer.processing_class
    classifies = tokenization.num_labels is not None

    def asked(row: Row) -> Row:
        if (question := _question(row, classifies)) is None:
            raise UserError("it has an answer already, or no question, unlike the first row")
        return question

    questions = converted(getattr(dataset, "source", ""), dataset, asked)
    generates = not classifies and "options" not in questions[0]
    features = tokenize_dataset(questions, replace(tokenization, generates=generates))
    longest = trainer.args.max_completion_length
    answers = Answers(tokenizer, longest, _turn_end(tokenizer) if is_chat(questions) else None)
    scored = ClassificationObjective() if classifies else OptionObjective()
    kind = CompletionObjective() if generates else scored
    trainer.model.eval()
    collator = collator_for(trainer.model, tokenizer.pad_token_id, kind, examples=features)
    changes = {"eval_objective": answers, "data_collator": collator, "compute_metrics": None}
    with replaced([(trainer, name, value) for name, value in changes.items()]):
        found = Trainer.predict(trainer, features)
    metrics = {name: value for name, value in found.metrics.items() if not name.endswith("_loss")}
    # Batches of other widths have been padded with this.
    is_padding = found.predictions == IGNORE_INDEX
    if generates:
        rows = [row[~hidden].tolist() for row, hidden in zip(found.predictions, is_padding)]
        texts, whole = zip(*(answers.text(row) for row in rows))
        metrics["test_cut"] = whole.count(False)
        return PredictionOutput(np.array(texts, dtype=object), None, metrics)
    probabilities = np.where(is_padding, 0.0, found.predictions)
    if not np.isfinite(probabilities).all():
        raise UserError("the model gives NaN for some rows; load it in bfloat16 or float32")
    return PredictionOutput(probabilities, None, metrics)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What the chat template writes behind a turn of the assistant; None if that is nothing."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ANSWER"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return str(text).rpartition("ANSWER")[2].strip() or None


@dataclass(eq=False)
class Answers:
    """An objective that answers and measures nothing: its losses are zeros.

    Attributes:
        max_new_tokens: the most tokens of a generated text.
        turn_end: a text that ends a generated answer, as the tokens do that end a sequence.
    """

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    turn_end: str | None = None

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Zeros [B]; probabilities [B, K] of options or classes, or token ids [B, T]; `labels`."""
        labels = batch["labels"]
        if "columns" in batch:
            answers = self._generated(model, batch)
        elif "option_tokens" in batch or "is_option" in batch:
            answers = OptionObjective().scores(model, batch).softmax(dim=-1)
        else:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            answers = model(**inputs).logits.float().softmax(dim=-1)
        return torch.zeros(len(labels), device=labels.device), answers, labels

    def _generated(self, model: nn.Module, batch: Batch) -> Tensor:
        """Greedy completions; in all else the base's generation configuration counts."""
        own: Any = model.generation_config.eos_token_id  # type: ignore[union-attr]
        ends = self.tokenizer.eos_token_id if own is None else own
        self.ends = [ends] if isinstance(ends, int) else list(ends or ())
        stops = {"stop_strings": [self.turn_end], "tokenizer": self.tokenizer}
        generated = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.ends or None,
            pad_token_id=self.tokenizer.pad_token_id,
            **(stops if self.turn_end else {}),
        )
        return generated[:, batch["input_ids"].shape[1] :]

    def text(self, ids: Sequence[int]) -> tuple[str, bool]:
        """A generated answer without white space around it, and whether it came to its end."""
        kept = list(takewhile(lambda id_: id_ not in self.ends, ids))
        ended = len(ids) < self.max_new_tokens or len(kept) < len(ids)
        text = self.tokenizer.decode(kept, skip_special_tokens=not self.turn_end)
        if self.turn_end:
            text, end, _ = text.partition(self.turn_end)
            ended = ended or bool(end)
            for token in self.tokenizer.all_special_tokens:
                text = text.replace(token, "")
        return text.strip(), ended
