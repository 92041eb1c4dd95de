"""Pad features into batches, in the cheapest form that the model can take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from zo_peft.core.batch import IGNORE_INDEX, Batch, Objective
from zo_peft.models.adapters import input_device, peft_config_of
from zo_peft.objectives.scoring import ClassificationObjective, OptionObjective

Features = Sequence[dict[str, Any]]
Tensors = dict[str, Any]


@dataclass(frozen=True)
class Collator:
    """Pads features to the longest of the batch, and makes the batch of their objective.

    The inputs are `input_ids` [R, L], and `attention_mask` [R, L] unless `is_causal`. With
    `shares_prompts`, options of several tokens stand in one sequence behind the prompt that they
    share. Such a batch has `input_ids`, `position_ids` and `segments` [B, L]; segment 0 is the
    prompt, and segment 1 the first option.

    `labels` comes first in every batch and has one row for each example, because transformers
    counts the rows of the first tensor as examples.

    Attributes:
        is_causal: the model's outputs do not depend on later tokens, so padding needs no mask.
        shares_prompts: the model takes position ids and masks of four dimensions. Only a causal
            model may share prompts.
    """

    pad_token_id: int
    is_causal: bool = False
    shares_prompts: bool = False

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
        for number, (prompt, own) in enumerate(zip(prompts, options)):
            for index, option in enumerate(own):
                if index == 0 or not self.shares_prompts:
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
        if self.shares_prompts:
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


@torch.no_grad()
def collator_for(
    model: PreTrainedModel | PeftModel, pad_token_id: int, *objectives: Objective
) -> Collator:
    """The collator whose batches leave out what the model does not need.

    Forward passes of a dozen tokens find out whether the model's logits depend on later tokens, and
    whether options that share one prompt score as they do with a prompt each.
    """
    collator = Collator(pad_token_id)
    if isinstance(objectives[0], ClassificationObjective) or not _is_causal(model):
        return collator
    collator = replace(collator, is_causal=True)
    sharing = replace(collator, shares_prompts=True)
    shares = any(
        isinstance(objective, OptionObjective)
        and _scores_alike(model, objective, collator, sharing)
        for objective in objectives
    )
    return sharing if shares else collator


def _is_causal(model: PreTrainedModel | PeftModel) -> bool:
    def logits(ending: list[int]) -> Tensor:
        ids = torch.tensor([_SOME_IDS + ending], device=input_device(model))
        return model(input_ids=ids, use_cache=False).logits[:, : -len(ending)]

    return torch.equal(logits(_SOME_IDS), logits(_SOME_IDS[::-1]))


def _scores_alike(
    model: PreTrainedModel | PeftModel, objective: OptionObjective, *collators: Collator
) -> bool:
    # For a learned prompt, PEFT puts a mask of two dimensions before the one of four.
    config = peft_config_of(model)
    if config is not None and config.is_prompt_learning:
        return False
    options = [_SOME_IDS[:3], _SOME_IDS[2:], _SOME_IDS[4:]]
    features = [{"prompt_ids": _SOME_IDS, "option_ids": options, "label": 0}]
    made = (collator(features).items() for collator in collators)
    batches = (Batch({n: t.to(input_device(model)) for n, t in items}) for items in made)
    try:
        first, second = (objective.scores(model, batch) for batch in batches)
    except (TypeError, ValueError, RuntimeError):
        return False
    return torch.allclose(first, second, rtol=1e-4 if model.dtype == torch.float32 else 2e-2)
