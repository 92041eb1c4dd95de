"""Objectives: a model and a batch in, one loss per example out; they know of no perturbation.

Each has `losses(model, batch) -> [B]` for training and
`predict(model, batch) -> (losses [B], predictions, references)` for evaluation, where accuracy is
the share of predictions that equal their reference (references of -100 do not count). All losses
are natural-log cross entropies in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]
Prediction = tuple[Tensor, Tensor, Tensor]

#: References with this value are not compared, as everywhere in transformers.
IGNORE_INDEX = -100


class Objective(Protocol):
    """What a trainer minimises; see the module's docstring."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """One loss per example, float32, shape [B]."""

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Losses [B], predictions and references (both [B] or both [B, T], integers)."""


@contextmanager
def _only_positions(model: nn.Module, rows: Tensor, positions: Tensor, length: int) -> Iterator:
    """The LM head sees the hidden states at (row, position) alone.

    Prompt tuning puts its virtual tokens in front, so positions count from the end of the inputs.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        where = positions + hidden.shape[1] - length
        return (hidden[rows.to(hidden.device), where.to(hidden.device)], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def labelled_logits(model: nn.Module, batch: Batch, rows: Tensor, positions: Tensor) -> Tensor:
    """Next-token logits at the given positions of `batch["input_ids"]` [R, L]: float32 [N, V]."""
    input_ids = batch["input_ids"]
    with _only_positions(model, rows, positions, input_ids.shape[1]):
        logits = model(
            input_ids=input_ids, attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    if logits.dim() == 3:  # a model that applies its head without calling the module
        logits = logits[rows, positions + logits.shape[1] - input_ids.shape[1]]
    return logits.float()


def _spread(values: Tensor, batch: Batch) -> Tensor:
    """Values of the scored tokens [N] on the grid of their rows and positions [R, L], else zero."""
    grid = values.new_zeros(batch["input_ids"].shape)
    grid[batch["rows"], batch["positions"]] = values
    return grid


class CompletionObjective:
    """Language modelling on the completion: mean negative log-likelihood of its tokens.

    Batch: `input_ids`, `attention_mask` [B, L], `labels` [B, L] (-100 outside the completion), and
    where the N scored tokens are predicted: `rows`, `positions`, `tokens` [N].
    """

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """One loss per example, float32, shape [B]."""
        return self.predict(model, batch)[0]

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Losses [B]; the likeliest next tokens and the true ones [B, L - 1], -100 elsewhere."""
        logits = labelled_logits(model, batch, batch["rows"], batch["positions"])
        nll = F.cross_entropy(logits, batch["tokens"], reduction="none")
        labels = batch["labels"][:, 1:]
        losses = _spread(nll, batch).sum(dim=1) / (labels != IGNORE_INDEX).sum(dim=1)
        predictions = torch.full_like(labels, IGNORE_INDEX)
        predictions[batch["rows"], batch["positions"]] = logits.argmax(dim=-1)
        return losses, predictions, labels


class OptionObjective:
    """Classification by the likelihood of label words (or longer options) after the prompt.

    An option's score is the mean log-likelihood of its tokens; the loss is the cross entropy of the
    scores over an example's options (MeZO, arXiv:2305.17333, appendix on training details).

    Batch: `labels` [B], and either, where every option is one token, the prompts as `input_ids`
    [B, L] with `rows`, `positions` (of the last prompt token) [B] and `option_tokens` [B, K]; or
    every option behind its prompt as `input_ids` [R, L] with `rows`, `positions`, `tokens` [N] and
    `option_rows` [B, K], the row of each option (-1: the example has fewer).
    """

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """One loss per example, float32, shape [B]."""
        return F.cross_entropy(self.scores(model, batch), batch["labels"], reduction="none")

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Losses [B]; the index of the likeliest option and of the right one [B]."""
        scores = self.scores(model, batch)
        losses = F.cross_entropy(scores, batch["labels"], reduction="none")
        return losses, scores.argmax(dim=-1), batch["labels"]

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean log-likelihood of each option, float32 [B, K]; -inf where there is none."""
        log_probs = labelled_logits(model, batch, batch["rows"], batch["positions"]).log_softmax(-1)
        if "option_tokens" in batch:
            return log_probs.gather(1, batch["option_tokens"])
        likelihoods = log_probs.gather(1, batch["tokens"][:, None]).squeeze(1)
        counts = _spread(torch.ones_like(likelihoods), batch).sum(dim=1)
        means = _spread(likelihoods, batch).sum(dim=1) / counts
        scores = means[batch["option_rows"].clamp(min=0)]
        return scores.masked_fill(batch["option_rows"] < 0, -torch.inf)


class ClassificationObjective:
    """The model's own head for sequence classification: cross entropy over its classes.

    Batch: `input_ids`, `attention_mask` [B, L], `labels` [B].
    """

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """One loss per example, float32, shape [B]."""
        return self.predict(model, batch)[0]

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Losses [B]; the index of the likeliest class and of the right one [B]."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = F.cross_entropy(logits.float(), batch["labels"], reduction="none")
        return losses, logits.argmax(dim=-1), batch["labels"]
