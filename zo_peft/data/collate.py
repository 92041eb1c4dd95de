"""Pad features into batches, in the cheapest form that the model can take."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from zo_peft.core.batch import IGNORE_INDEX, Batch, Objective
from zo_peft.errors import UserError
from zo_peft.models.adapters import classifies, input_device, name_of, peft_config_of, running
from zo_peft.models.agreement import rounding
from zo_peft.objectives.rewards import RewardObjective
from zo_peft.objectives.scoring import ClassificationObjective, CompletionObjective, OptionObjective

Features = Sequence[dict[str, Any]]
Tensors = dict[str, Any]


@dataclass(frozen=True)
class Collator:
    """Pads features to the longest of the batch, and makes the batch of their objective.

    The inputs are `input_ids` [R, L], and `attention_mask` [R, L] unless `is_causal`. With
    `shares_prompts`, and where no example of the batch is longer than `shares_up_to`, options of
    several tokens stand in one sequence behind the prompt that they share. Such a batch has
    `input_ids`, `position_ids` and `segments` [B, L]; segment 0 is the prompt, 1 the first option.

    `labels` comes first in every batch and has one row for each example, because transformers
    counts the rows of the first tensor as examples.

    Attributes:
        is_causal: the model's outputs do not depend on later tokens, so padding needs no mask.
        shares_prompts: the model takes position ids and masks of four dimensions, and is causal.
        shares_up_to: the most tokens of a prompt and one option with which it may.
    """

    pad_token_id: int
    is_causal: bool = False
    shares_prompts: bool = False
    shares_up_to: float = math.inf

    def __call__(self, features: Features) -> Batch:
        """The batch of the objective that the features are for; see `zo_peft.objectives`."""
        if "columns" in features[0]:
            return Batch(self._prompts(features))
        if "option_ids" in features[0]:
            return Batch(self._options(features))
        inputs = self._inputs([feature["input_ids"] for feature in features])
        labels = [torch.as_tensor(feature["labels"]) for feature in features]
        if labels[0].dim() == 0:
            return Batch({"labels": torch.stack(labels), **inputs})
        padded = pad_sequence(labels, True, padding_value=IGNORE_INDEX)
        rows, positions = (padded[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        scored = {"rows": rows, "positions": positions, "tokens": padded[rows, positions + 1]}
        return Batch({"labels": padded, **inputs, **scored})

    def _prompts(self, features: Features) -> Tensors:
        """Prompts are padded on the left, because completions are appended on the right."""
        ids = [feature["prompt_ids"] for feature in features]
        return {
            "labels": torch.zeros(len(features), dtype=torch.long),
            "input_ids": _padded(ids, self.pad_token_id, "left"),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0, "left"),
            "columns": [feature["columns"] for feature in features],
        }

    def _inputs(self, sequences: Sequence[Sequence[int]]) -> Tensors:
        inputs = {"input_ids": _padded(sequences, self.pad_token_id)}
        if not self.is_causal:
            inputs["attention_mask"] = _padded([[1] * len(row) for row in sequences])
        return inputs

    def _options(self, features: Features) -> Tensors:
        prompts = [feature["prompt_ids"] for feature in features]
        options = [feature["option_ids"] for feature in features]
        width = max(map(len, options))
        batch: Tensors = {"labels": torch.tensor([feature["label"] for feature in features])}
        if "also_right" in features[0]:
            rights = [{feature["label"], *(feature["also_right"] or ())} for feature in features]
            is_right = [[index in right for index in range(width)] for right in rights]
            batch["is_right"] = torch.tensor(is_right)
        if any(len(own) < width or max(map(len, own)) > 1 for own in options):
            return batch | self._long_options(prompts, options, width)
        return {
            **batch,
            **self._inputs(prompts),
            "rows": torch.arange(len(prompts)),
            "positions": torch.tensor([len(prompt) - 1 for prompt in prompts]),
            "option_tokens": torch.tensor(options)[..., 0],
        }

    def _long_options(
        self, prompts: list[list[int]], options: list[list[list[int]]], width: int
    ) -> Tensors:
        """Options stand behind their prompts without their last tokens, which predict nothing."""
        sequences: list[tuple[list[int], list[int], list[int]]] = []
        scored = []
        most = max(len(prompt) + max(map(len, own)) for prompt, own in zip(prompts, options))
        shares = self.shares_prompts and most <= self.shares_up_to
        for number, (prompt, own) in enumerate(zip(prompts, options)):
            for index, option in enumerate(own):
                if index == 0 or not shares:
                    sequences.append((list(prompt), list(range(len(prompt))), [0] * len(prompt)))
                ids, position_ids, segments = sequences[-1]
                length = len(option) - 1
                positions = [len(prompt) - 1, *range(len(ids), len(ids) + length)]
                ids += option[:-1]
                position_ids += range(len(prompt), len(prompt) + length)
                segments += [index + 1] * length
                row, place = len(sequences) - 1, number * width + index
                scored += [(row, where, token, place) for where, token in zip(positions, option)]
        all_ids, all_position_ids, all_segments = zip(*sequences)
        batch = self._inputs(all_ids)
        if shares:
            batch |= {"position_ids": _padded(all_position_ids), "segments": _padded(all_segments)}
        names = ("rows", "positions", "tokens", "token_options")
        batch |= zip(names, torch.tensor(scored).unbind(1))
        is_option = [[index < len(own) for index in range(width)] for own in options]
        return batch | {"is_option": torch.tensor(is_option)}


def _padded(rows: Sequence[Sequence[int]], value: int = 0, side: str = "right") -> Tensor:
    return pad_sequence([torch.as_tensor(row) for row in rows], True, value, side)


def drawn_batch(batch: Batch, drawn: Sequence[Sequence[int]], pad_token_id: int | None) -> Batch:
    """Prompts with the completions that were drawn of them, as a `CompletionObjective` batch."""
    features = []
    for row, mask, own in zip(batch["input_ids"], batch["attention_mask"], drawn):
        ids = list(own)
        prompt = row[mask.bool()].tolist()
        features.append({"input_ids": prompt + ids, "labels": [IGNORE_INDEX] * len(prompt) + ids})
    made = Collator(pad_token_id or 0)(features)
    shared = {} if batch.share is None else {"share": batch.share}
    return Batch(shared | {n: value.to(batch["input_ids"].device) for n, value in made.items()})


#: A few token ids that every vocabulary has.
_SOME_IDS = [5, 6, 7, 8, 9, 10]

#: How configurations call what limits how far back an attention sees.
_WINDOWS = "(window|window_size|window_len|attention_chunk_size|local_attention)$"

#: The objectives that score or draw next tokens.
GENERATIVE = (CompletionObjective, OptionObjective, RewardObjective)

#: The longest of so many examples says how long sequences are.
_SEEN = 10_000


@torch.no_grad()
def collator_for(
    model: PreTrainedModel | PeftModel,
    pad_token_id: int,
    *objectives: Objective,
    examples: Iterable[dict[str, Any]] = (),
) -> Collator:
    """The collator whose batches leave out what the model does not need.

    A few forward passes find out whether the model's logits depend on later tokens, and whether
    options that share one prompt score as they do with a prompt each: on the longest of `examples`
    (features), as far as the model's attention has no window, of which its configuration tells.
    Longer examples get prompts of their own.

    Raises:
        UserError: the model does not run, or predicts no next tokens (an encoder, for example).
    """
    collator, features = Collator(pad_token_id), iter(examples)
    first, kind = next(features, {}), objectives[0]
    served = hasattr(model, "next_tokens")  # by an inference engine, which takes no padding
    if served or not isinstance(kind, (ClassificationObjective, *GENERATIVE)):
        return collator
    if isinstance(kind, ClassificationObjective):
        if _logits(model, first.get("input_ids", _SOME_IDS)).dim() != 2:
            raise UserError(f"{name_of(model)} has no head that gives a text one class")
        return collator
    early, other = (_logits(model, _SOME_IDS + end) for end in (_SOME_IDS, _SOME_IDS[::-1]))
    if early.dim() != 3 or getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name_of(model)} is no causal language model; give a decoder")
    difference = (early - other)[:, : len(_SOME_IDS)].abs().max()
    # Rounding may depend on later tokens, where those are dealt out to experts, for example.
    if difference > 64 * rounding(model) * early.std():
        raise UserError(
            f"{name_of(model)} predicts no next tokens, because its outputs depend on later ones, "
            "as an encoder's do; give a decoder, or tune a sequence classifier"
        )
    if difference:
        return collator
    collator = replace(collator, is_causal=True)
    scoring = [objective for objective in objectives if isinstance(objective, OptionObjective)]
    seen = chain([first], islice(features, _SEEN)) if scoring else []
    long = [e for e in seen if max(map(len, e.get("option_ids", [[]]))) > 1]
    window = _window(model.config)
    longest = max((e for e in long if _tokens(e) <= window), key=_tokens, default=None)
    if longest and _scores_alike(model, scoring[0], collator, longest):
        return replace(collator, shares_prompts=True, shares_up_to=_tokens(longest))
    return collator


def _logits(model: PreTrainedModel | PeftModel, ids: list[int]) -> Tensor:
    with running(model):
        inputs = torch.tensor([ids], device=input_device(model))
        mask = torch.ones_like(inputs)
        # Some classifiers give their model a `use_cache` of their own.
        cached = {} if classifies(model) else {"use_cache": False}
        return model(input_ids=inputs, attention_mask=mask, **cached).logits.float()


def _tokens(example: dict[str, Any]) -> int:
    return len(example["prompt_ids"]) + max(map(len, example["option_ids"]))


def _window(config: PreTrainedConfig) -> float:
    """How many tokens back the attention of every layer sees, as the configuration names it."""
    named = config.get_text_config().to_dict().items()
    sizes = [v for name, v in named if re.search(_WINDOWS, name) and type(v) is int and v > 0]
    return min(sizes, default=math.inf)


def _scores_alike(
    model: PreTrainedModel | PeftModel,
    objective: OptionObjective,
    collator: Collator,
    example: dict[str, Any],
) -> bool:
    """Whether the example's options score behind one prompt as they do with a prompt each.

    In half precision rounding would hide small differences. So the model also has to heed position
    ids, and another first option may change the scores of the others no more than where each is a
    row of its own, which is not at all, or by the rounding of rows that share a forward.
    """
    # For a learned prompt, PEFT puts a mask of two dimensions before the one of four.
    config = peft_config_of(model)
    if config is not None and config.is_prompt_learning:
        return False
    first, *others = example["option_ids"]
    changed = {**example, "option_ids": [first[::-1] if first != first[::-1] else [5] * len(first)]}
    changed["option_ids"] += others
    sharing = replace(collator, shares_prompts=True)

    def scores(made: Tensors) -> Tensor:
        batch = Batch({name: tensor.to(input_device(model)) for name, tensor in made.items()})
        return objective.scores(model, batch)[0]

    own, own_changed = (scores(collator([e]).data) for e in (example, changed))
    try:
        made = sharing([example]).data
        shared, shared_changed = scores(made), scores(sharing([changed]).data)
        moved = scores(made | {"position_ids": made["position_ids"] + made["segments"]})
    except Exception:  # models say in many ways that they take no such mask
        return False
    noise = (own - own_changed)[1:].abs().amax() if others else own.new_zeros(())
    isolated = torch.allclose(shared[1:], shared_changed[1:], rtol=1e-6, atol=2 * noise.item())
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    return isolated and not torch.equal(shared, moved) and torch.allclose(own, shared, tolerance)
