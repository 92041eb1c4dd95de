"""Objectives of labelled text. They take a model and a batch, and return a loss for each example.

All losses are cross entropies in float32, with natural logarithms. Evaluation reports accuracy, the
share of predictions that equal their reference; a reference of -100 does not count. Of completions
it is called `token_accuracy`, because their predictions are the next tokens.

A model for which an inference engine answers has a method `next_tokens` (`zo_peft.engines`). Of a
batch it gives the log-probabilities [N, K] of the `option_tokens` or `tokens`, and the likeliest
tokens [N], at the N positions.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import EvalPrediction

from zo_peft.core.batch import IGNORE_INDEX, Batch, Objective, Prediction
from zo_peft.errors import UserError


def labelled_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Next-token logits at the N positions (`rows`, `positions`) of a batch: float32 [N, V].

    The head of the language model gets the hidden states of these positions alone.
    """
    rows, positions, length = batch["rows"], batch["positions"], batch["input_ids"].shape[1]

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        # Prompt tuning puts virtual tokens in front, so positions count from the end.
        where = positions + hidden.shape[1] - length
        return (hidden[rows.to(hidden.device), where.to(hidden.device)], *args[1:])

    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name] for name in names if name in batch}
    if "segments" in batch:
        dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        inputs["attention_mask"] = _segment_mask(batch["segments"], dtype)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    with head.register_forward_pre_hook(gather):
        logits = model(**inputs, use_cache=False).logits
    if logits.dim() == 3:  # a model that applies its head without calling the module
        logits = logits[rows, positions + logits.shape[1] - length]
    return logits.float()


def token_losses(model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
    """The negative log-likelihoods of the N scored tokens of a batch, float32 [N]."""
    if ask := getattr(model, "next_tokens", None):
        return -ask(batch).log_probabilities[:, 0]
    logits = labelled_logits(model, batch)
    logits = logits if temperature == 1.0 else logits.div_(temperature)
    return F.cross_entropy(logits, batch["tokens"], reduction="none")


def _segment_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive attention mask [B, 1, T, T] of prompts (segment 0) with options behind them.

    A token sees earlier tokens alone, and of the options only its own.
    """
    to, start = segments[:, None, :, None], segments[:, None, None, :]
    earlier = torch.ones(*segments.shape[1:] * 2, dtype=torch.bool, device=segments.device).tril()
    seen = earlier & ((start == 0) | (start == to))
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


class CompletionObjective:
    """Language modelling on the completion: the mean negative log-likelihood of its tokens.

    Batch: `labels` [B, L] (-100 outside the completion), the inputs [B, L], and for the N tokens
    that are scored, `tokens` [N] and where they are predicted, `rows` and `positions` [N].
    """

    repeatable = True
    metric_name = "token_accuracy"

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """One loss per example, float32, shape [B]."""
        return self._means(token_losses(model, batch), batch)

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Losses [B]; the likeliest next tokens and the true ones [B, L - 1], -100 elsewhere."""
        if ask := getattr(model, "next_tokens", None):
            known, likeliest = ask(batch)
            nll = -known[:, 0]
        else:
            logits = labelled_logits(model, batch)
            nll = F.cross_entropy(logits, batch["tokens"], reduction="none")
            likeliest = logits.argmax(dim=-1)
        labels = batch["labels"][:, 1:]
        predictions = torch.full_like(labels, IGNORE_INDEX)
        predictions[batch["rows"], batch["positions"]] = likeliest
        return self._means(nll, batch), predictions, labels

    def _means(self, nll: Tensor, batch: Batch) -> Tensor:
        return _mean_by(batch["rows"], nll, len(batch["labels"]))


class SequenceObjective(CompletionObjective):
    """As `CompletionObjective`, but with the negative log-likelihood of the whole completion."""

    def _means(self, nll: Tensor, batch: Batch) -> Tensor:
        counts = torch.bincount(batch["rows"], minlength=len(batch["labels"]))
        return super()._means(nll, batch) * counts


class PolicyObjective(CompletionObjective):
    """As `CompletionObjective`, times how much better than others of its prompt a completion is.

    Of sampled completions its gradient is a policy gradient: the better ones become likelier.

    They were sampled at `temperature`. Batch: also `advantages` [B].
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """One loss per example, float32, shape [B]."""
        return self._means(token_losses(model, batch, self.temperature), batch)

    def _means(self, nll: Tensor, batch: Batch) -> Tensor:
        return super()._means(nll, batch) * batch["advantages"]


class _Choice:
    """What objectives have in common of which each example is a choice between K scores."""

    repeatable = True

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Float32 [B, K]; -inf where an example has fewer than K options."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The cross entropy of each example's scores, float32 [B]."""
        return F.cross_entropy(self.scores(model, batch), batch["labels"], reduction="none")

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Losses [B]; the index of the highest score (any right one as `labels`); `labels`."""
        scores, labels = self.scores(model, batch), batch["labels"]
        predictions = scores.argmax(dim=-1)
        if "is_right" in batch:
            right = batch["is_right"].gather(1, predictions[:, None])[:, 0]
            predictions = torch.where(right, labels, predictions)
        return F.cross_entropy(scores, labels, reduction="none"), predictions, labels


class OptionObjective(_Choice):
    """Classification by the likelihood of label words (or longer options) after the prompt.

    An option's score is the mean log-likelihood of its tokens. The loss is the cross entropy of the
    scores of an example's options (MeZO, arXiv:2305.17333, appendix on training details).

    Batch: `labels` [B] and the inputs. If every option is one token: `option_tokens` [B, K], and
    `rows` and `positions` [B] of the last tokens of the prompts. If not, for the N tokens of all
    options: `tokens`, where they are predicted (`rows`, `positions`) and whose they are
    (`token_options`, an index into the flattened [B, K]), all [N]; and `is_option` [B, K], False
    where an example has fewer options. If examples have several right options, `is_right` [B, K],
    and `labels` has the first of them.
    """

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-likelihoods up to a constant of the example."""
        if "option_tokens" in batch:
            if ask := getattr(model, "next_tokens", None):
                return ask(batch).log_probabilities
            return labelled_logits(model, batch).gather(1, batch["option_tokens"])
        is_option, nll = batch["is_option"], token_losses(model, batch)
        means = _mean_by(batch["token_options"], nll, is_option.numel()).view_as(is_option)
        return (-means).masked_fill(~is_option, -torch.inf)


class ClassificationObjective(_Choice):
    """The model's own head for sequence classification: the cross entropy of its classes.

    Batch: `input_ids`, `attention_mask` [B, L], `labels` [B].
    """

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of the classes."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**inputs).logits.float()


#: The objectives that have a gradient, and whose losses change with anything that acts.
DIFFERENTIABLE = (CompletionObjective, OptionObjective, ClassificationObjective)


class AccuracyObjective:
    """The share of the predictions of another objective, `inner`, that are wrong.

    It is 0 or 1 for options and classes, and may lie between for the tokens of a completion.
    """

    def __init__(self, inner: Objective) -> None:
        self.inner, self.predict = inner, inner.predict
        self.repeatable = getattr(inner, "repeatable", False)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The share of each example's predictions that are wrong, float32, shape [B]."""
        _, predictions, references = self.predict(model, batch)
        counted = (references != IGNORE_INDEX).view(len(references), -1)
        wrong = (predictions != references).view_as(counted) & counted
        return wrong.sum(dim=1) / counted.sum(dim=1)


class BlackBoxObjective:
    """A function of the adapter alone, without data: for example a server that uses the adapter.

    `evaluate` gives the loss of its tensors, which are named as in `adapter_model.safetensors`.
    """

    def __init__(self, evaluate: Callable[[dict[str, Tensor]], float]) -> None:
        self.evaluate = evaluate

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The function's value, float32, shape [1]."""
        name: str = model.active_adapter  # type: ignore[assignment]
        state = get_peft_model_state_dict(model, None, name, save_embedding_layers=False)
        value = self.evaluate({name: tensor.detach() for name, tensor in state.items()})
        return torch.tensor([float(value)])

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """The loss [1], and labels in place of predictions, because nothing is predicted."""
        return self.losses(model, batch), batch["labels"], batch["labels"]


def accuracy(prediction: EvalPrediction, name: str = "accuracy") -> dict[str, float]:
    """The share of predictions that equal their reference, where there is one, by its name."""
    counted = prediction.label_ids != IGNORE_INDEX
    right = (prediction.predictions == prediction.label_ids)[counted]
    return {name: float(np.mean(right))}


class _Decided(np.ndarray):
    """Predictions that are indices, of which nobody takes the highest score."""

    def argmax(self, *_: Any, **__: Any) -> Any:
        raise UserError("predictions of compute_metrics are indices already; leave argmax out")

    def __array_wrap__(self, array: Any, *_: Any) -> Any:
        """What is computed of them is a plain array, or a number, of which anything is asked."""
        return array.view(np.ndarray)[()]


def on_decided(metrics: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """The same function of an `EvalPrediction`, with a UserError where it takes an argmax."""

    @wraps(metrics)
    def computed(prediction: EvalPrediction, **kwargs: Any) -> dict[str, float]:
        given = prediction.predictions
        # An objective of the user's own may give scores, which are not decided.
        if isinstance(given, np.ndarray) and given.dtype.kind in "iu":
            given = given.view(_Decided)
        others = prediction.label_ids, prediction.inputs, prediction.losses
        return metrics(EvalPrediction(given, *others), **kwargs)

    return computed


def _mean_by(groups: Tensor, values: Tensor, count: int) -> Tensor:
    """The mean of the values [N] of each group, float32 [count]; NaN for an empty group."""
    member = groups == torch.arange(count, device=groups.device)[:, None]
    return torch.where(member, values, 0.0).sum(dim=1) / member.sum(dim=1)
