"""Rewards: functions judge what a model generates. They need no gradient."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from zo_peft.core.batch import Batch, Prediction
from zo_peft.core.noise import derive_seed
from zo_peft.errors import UserError, explained
from zo_peft.objectives import metrics

#: `reward(prompts, completions, **columns) -> list[float]`, as for TRL's trainers. It is called
#: with keyword arguments, each of them a list with a value for each completion. `columns` are all
#: columns of the examples, and `completion_ids`.
RewardFunction = Callable[..., Sequence[float]]

#: The rewards that `ZOConfig.objective` can name.
METRICS: dict[str, RewardFunction] = {"f1": metrics.f1, "exact_match": metrics.exact_match}


def generates(reward_funcs: Sequence[Any] | None, objective: str | None) -> bool:
    """Whether a run generates completions, for reward functions or an objective of `METRICS`."""
    return bool(reward_funcs) or objective in METRICS


@dataclass(eq=False)
class CommonNoise(LogitsProcessor):
    """Makes greedy decoding sample, with the same random numbers for every candidate.

    The token with the largest `logits / temperature + Gumbel noise` is a sample of the softmax
    (the Gumbel-max trick). All candidates have the same noise for an example, so two completions
    differ because the candidates do, and not because a sampler drew differently.

    Attributes:
        seed: the noise depends on it and on the position of the token.
        copies: how many times the whole batch is repeated.
        share: the examples that these are of a larger batch (`Batch.share`). None: all of them.
        position: how many tokens have been drawn.
    """

    seed: int
    copies: int
    temperature: float
    top_p: float
    share: tuple[int, int, int] | None = None
    position: int = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [copies * B, V] with the same noise [B, V] on each copy."""
        rows = len(scores) // self.copies
        first, _, examples = self.share or (0, rows, rows)
        self.position += 1
        own = [*range(first, first + rows)] * self.copies
        return self.added(scores, own, examples, self.position - 1)

    def added(self, scores: Tensor, own: Sequence[int], examples: int, position: int) -> Tensor:
        """The scores [N, V] with noise, for the token at this position of each completion.

        `own` are the numbers of the rows' examples, of so many `examples` in all.
        """
        scores = scores.float() / self.temperature
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        seed = derive_seed(self.seed, position)
        generator = torch.Generator(scores.device).manual_seed(seed)
        empty = torch.empty(examples, scores.shape[1], device=scores.device)
        return scores - empty.exponential_(generator=generator)[own].log_()


@dataclass(eq=False)
class RewardObjective:
    """Minus the weighted sum of the rewards of generated completions.

    `losses` samples at `temperature`, or decodes greedily where that is 0. Its random numbers
    depend on `seed` and the example's place in the batch alone, so all candidates of a step share
    them. `predict` decodes greedily.

    Batch: `labels` [B] (zeros), `input_ids`, `attention_mask` [B, L] (padded on the left),
    `columns` (a dictionary for each example), and `copies` if the batch is repeated.

    Attributes:
        reward_funcs, reward_weights: functions to maximise, and a weight for each; default: 1.
        tokenizer: the base's tokenizer.
        max_completion_length: the most tokens of a completion.
        temperature, top_p: as in transformers' sampling.
        seed: the sampler's seed, which the trainer sets for each step.
        metric_name: the name of the only function with a weight, or `reward` for the weighted sum.
    """

    repeatable: ClassVar[bool] = True

    reward_funcs: Sequence[RewardFunction]
    tokenizer: PreTrainedTokenizerBase
    reward_weights: Sequence[float] | None = None
    max_completion_length: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        count = len(self.reward_funcs)
        weights = [1.0] * count if self.reward_weights is None else self.reward_weights
        if len(weights) != count:
            advice = f"give one for each of {count} functions"
            raise UserError(f"reward_weights has {len(weights)} values; {advice}")
        self.weights = torch.tensor(weights)
        self.names = [_name(function) for function in self.reward_funcs]
        alone = [name for name, weight in zip(self.names, weights) if weight]
        self.metric_name = alone[0] if len(alone) == 1 else "reward"

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Minus the weighted rewards, float32, shape [B]."""
        return self._judged(batch, self._generate(model, batch, samples=True))[0]

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Losses [B]; each function's rewards [B, K]; zeros [B], because there is no reference."""
        return *self._judged(batch, self._generate(model, batch, samples=False)), batch["labels"]

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The mean of each function's rewards, and of their weighted sum if several have weight."""
        means = np.mean(prediction.predictions, axis=0)
        by_name = {name: float(mean) for name, mean in zip(self.names, means)}
        if self.metric_name == "reward":
            by_name = {"reward": float(means @ self.weights.numpy()), **by_name}
        return by_name

    def drawn(self, model: nn.Module, batch: Batch) -> list[list[int]]:
        """The token ids of a completion of each prompt, as `losses` draws them.

        If a completion ended before `max_completion_length`, the token that ends it is its last.
        """
        ends, longest = _ends(model, self.tokenizer)[:1], self.max_completion_length
        drawn = self._generate(model, batch, samples=True)
        return [ids + ends if len(ids) < longest else ids for ids in drawn]

    def losses_of(self, model: nn.Module, batch: Batch, drawn: Sequence[Sequence[int]]) -> Tensor:
        """As `losses`, of completions that `drawn` gave."""
        ends = _ends(model, self.tokenizer)
        ids = [list(takewhile(lambda id_: id_ not in ends, row)) for row in drawn]
        return self._judged(batch, ids)[0]

    def _judged(self, batch: Batch, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Losses [B] and rewards [B, K] of completions, without the tokens that end them."""
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        names = {name: None for columns in batch["columns"] for name in columns}
        columns = {name: [row.get(name) for row in batch["columns"]] for name in names}
        prompts = columns.pop("prompt")
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts)
        ]
        given = {"prompts": prompts, "completions": completions, **columns, "completion_ids": ids}
        values = [self._called(function, given) for function in self.reward_funcs]
        rewards = torch.tensor(values, device=batch["input_ids"].device).T
        return -(rewards @ self.weights.to(rewards.device)), rewards

    def _generate(self, model: nn.Module, batch: Batch, samples: bool) -> list[list[int]]:
        """The token ids of each completion, without the token that ends it."""
        ends, processors = _ends(model, self.tokenizer), LogitsProcessorList()
        if samples and self.temperature:
            copies, share = batch.get("copies", 1), batch.get("share")
            processors.append(CommonNoise(self.seed, copies, self.temperature, self.top_p, share))
        config = GenerationConfig(
            max_new_tokens=self.max_completion_length,
            do_sample=False,
            # Some bases bring a penalty along, and then this would be no sample of their softmax.
            repetition_penalty=1.0,
            eos_token_id=ends or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        generated = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=config,
            logits_processor=processors,
        )[:, batch["input_ids"].shape[1] :]
        return [list(takewhile(lambda id_: id_ not in ends, row)) for row in generated.tolist()]

    def _called(self, function: RewardFunction, given: dict[str, Any]) -> list[float]:
        """What a function returns; a UserError unless that is a number for each completion."""
        name, count = _name(function), len(given["completions"])
        try:
            values = [float(value) for value in function(**given)]
        except Exception as error:
            why = f"reward function {name} failed: {type(error).__name__}: {error}"
            given_names = ", ".join(given)
            form = f"lists of {count} values for {given_names}, and returns {count} numbers"
            raise UserError(f"{why}; it is called with {form}") from error
        if len(values) != count:
            why = f"reward function {name} returned {len(values)} values for {count} completions"
            raise UserError(f"{why}; return one number for each")
        return values


def load_function(name: str) -> RewardFunction:
    """The function that `module:function` names, also in the working directory; or a UserError."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    what, errors = f"reward function {name!r} cannot be loaded", (ImportError, AttributeError)
    advice = "give module:function, e.g. rewards:brevity for `def brevity` in rewards.py"
    with explained(what, *errors, ValueError, advice=advice):
        return getattr(importlib.import_module(module), function)


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _ends(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion."""
    own: Any = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = own if own is not None else tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or ())
