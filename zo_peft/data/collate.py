"""Features to padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from zo_peft.core.batch import IGNORE_INDEX, Batch, Objective
from zo_peft.models.adapters import peft_config_of
from zo_peft.models.offload import input_device
from zo_peft.objectives.rewards import RewardObjective
from zo_peft.objectives.scoring import ClassificationObjective, OptionObjective

Features = Sequence[dict[str, Any]]
Tensors = dict[str, Any]


@dataclass(frozen=True)
class Collator:
    """Pads features, to the longest of the batch, into a batch of their objective.

    The inputs of a batch are `input_ids` [R, L], and `attention_mask` [R, L] unless `is_causal`.
    With `shares_prompts`, options of several tokens stand behind their one prompt, as `input_ids`,
    `position_ids` and `segments` [B, L] (0: the prompt; 1 and on: an option).

    `labels` comes first in every batch and has one row per example, so that transformers counts
    examples and not rows.

    Attributes:
        is_causal: the model's outputs do not depend on later tokens, so padding needs no mask.
        shares_prompts: it takes position ids and masks of four dimensions (and `is_causal`).
    """

    pad_token_id: int
    is_causal: bool = False
    shares_prompts: bool = False

    def __call__(self, features: Features) -> Batch:
        """A batch of the objective that the features call for (`zo_peft.objectives`)."""
        return Batch(self._tensors(features))

    def _tensors(self, features: Features) -> Tensors:
        if "columns" in features[0]:
            return self._prompts(features)
        if "option_ids" in features[0]:
            right = torch.tensor([feature["label"] for feature in features])
            counts = {len(feature["option_ids"]) for feature in features}
            known = {"labels": right, **_rights(features, max(counts))}
            if len(counts) == 1 and all(len(o) == 1 for f in features for o in f["option_ids"]):
                return {**known, **self._one_token_options(features)}
            return {**known, **self._options(features, max(counts))}
        inputs = self._inputs([feature["input_ids"] for feature in features])
        labels = [torch.as_tensor(feature["labels"]) for feature in features]
        if labels[0].dim() == 0:
            return {"labels": torch.stack(labels), **inputs}
        padded = pad_sequence(labels, True, padding_value=IGNORE_INDEX)
        rows, positions = (padded[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        scored = {"rows": rows, "positions": positions, "tokens": padded[rows, positions + 1]}
        return {"labels": padded, **inputs, **scored}

    def _prompts(self, features: Features) -> Tensors:
        """Padded on the left: completions go on at the right."""
        ids = [torch.tensor(feature["prompt_ids"]) for feature in features]
        pad: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
        return {
            "labels": torch.zeros(len(features), dtype=torch.long),
            "input_ids": pad_sequence(ids, padding_value=self.pad_token_id, **pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], **pad),
            "columns": [feature["columns"] for feature in features],
        }

    def _inputs(self, sequences: Sequence[Sequence[int]]) -> Tensors:
        ids = [torch.as_tensor(sequence) for sequence in sequences]
        inputs = {"input_ids": pad_sequence(ids, True, padding_value=self.pad_token_id)}
        if not self.is_causal:
            inputs["attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], True)
        return inputs

    def _one_token_options(self, features: Features) -> Tensors:
        prompts = [feature["prompt_ids"] for feature in features]
        options = [[option[0] for option in feature["option_ids"]] for feature in features]
        return {
            **self._inputs(prompts),
            "rows": torch.arange(len(prompts)),
            "positions": torch.tensor([len(prompt) - 1 for prompt in prompts]),
            "option_tokens": torch.tensor(options),
        }

    def _options(self, features: Features, width: int) -> Tensors:
        """Options behind their prompts, without their last tokens, which predict nothing."""
        sequences: list[_Sequence] = []
        scored: list[tuple[int, int, int, int]] = []
        for number, feature in enumerate(features):
            prompt = feature["prompt_ids"]
            for index, option in enumerate(feature["option_ids"]):
                if index == 0 or not self.shares_prompts:
                    sequences.append(_Sequence(prompt))
                sequence, row = sequences[-1], len(sequences) - 1
                positions = sequence.append(option[:-1], index + 1)
                where = number * width + index
                scored += [
                    (row, position, token, where)
                    for position, token in zip([len(prompt) - 1, *positions], option)
                ]
        names = ("rows", "positions", "tokens", "token_options")
        counts = torch.tensor([len(feature["option_ids"]) for feature in features])
        return {
            **self._sequences(sequences),
            **dict(zip(names, torch.tensor(scored).unbind(1))),
            "is_option": torch.arange(width) < counts[:, None],
        }

    def _sequences(self, sequences: Sequence["_Sequence"]) -> Tensors:
        inputs = self._inputs([sequence.ids for sequence in sequences])
        if not self.shares_prompts:
            return inputs
        for name in ("position_ids", "segments"):
            rows = [torch.tensor(getattr(sequence, name)) for sequence in sequences]
            inputs[name] = pad_sequence(rows, True)
        return inputs


def _rights(features: Features, width: int) -> Tensors:
    """Where examples may have several right options: which are [B, width]."""
    if "also_right" not in features[0]:
        return {}
    rights = [{feature["label"], *feature["also_right"]} for feature in features]
    return {"is_right": torch.tensor([[i in right for i in range(width)] for right in rights])}


class _Sequence:
    """Token ids of a prompt, with the options behind it that share it."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt_length = len(prompt)
        self.ids = list(prompt)
        self.position_ids = list(range(len(prompt)))
        self.segments = [0] * len(prompt)

    def append(self, option: Sequence[int], segment: int) -> range:
        """The positions that the option takes."""
        first = len(self.ids)
        self.ids += option
        self.position_ids += range(self.prompt_length, self.prompt_length + len(option))
        self.segments += [segment] * len(option)
        return range(first, len(self.ids))


def drawn_batch(
    objective: RewardObjective, model: PreTrainedModel | PeftModel, batch: Batch
) -> Batch:
    """Prompts with completions as the objective draws them: a batch of `SequenceObjective`."""
    features = []
    drawn = zip(batch["input_ids"], batch["attention_mask"], objective.drawn(model, batch))
    for row, mask, ids in drawn:
        prompt = row[mask.bool()].tolist()
        features.append({"input_ids": prompt + ids, "labels": [IGNORE_INDEX] * len(prompt) + ids})
    made = Collator(objective.tokenizer.pad_token_id or 0)(features)
    shared = {} if batch.share is None else {"share": batch.share}
    return Batch(shared | {n: value.to(batch["input_ids"].device) for n, value in made.items()})


#: A few token ids that every vocabulary has.
_SOME_IDS = [5, 6, 7, 8, 9, 10]


@torch.no_grad()
def collator_for(
    model: PreTrainedModel | PeftModel, pad_token_id: int, *objectives: Objective
) -> Collator:
    """The collator that spares a model what it does not need, as tried on a few tokens.

    Whether its logits depend on later tokens, and whether options that stand behind one prompt
    score as they do behind one each, is found out by forwards of a dozen tokens.
    """
    collator = Collator(pad_token_id)
    if isinstance(objectives[0], ClassificationObjective) or not _is_causal(model):
        return collator
    collator = replace(collator, is_causal=True)
    sharing = replace(collator, shares_prompts=True)
    for objective in objectives:
        if isinstance(objective, OptionObjective) and _scores_alike(
            model, objective, collator, sharing
        ):
            return sharing
    return collator


def _is_causal(model: PreTrainedModel | PeftModel) -> bool:
    def logits(ending: list[int]) -> Tensor:
        ids = torch.tensor([_SOME_IDS + ending], device=input_device(model))
        return model(input_ids=ids, use_cache=False).logits[:, : -len(ending)]

    return torch.equal(logits(_SOME_IDS), logits(_SOME_IDS[::-1]))


def _scores_alike(
    model: PreTrainedModel | PeftModel, objective: OptionObjective, *collators: Collator
) -> bool:
    # PEFT puts a mask of two dimensions before that of the batch.
    config = peft_config_of(model)
    if config is not None and config.is_prompt_learning:
        return False
    options = [_SOME_IDS[:3], _SOME_IDS[2:], _SOME_IDS[4:]]
    features = [{"prompt_ids": _SOME_IDS, "option_ids": options, "label": 0}]
    batches = [collator(features) for collator in collators]
    try:
        first, second = (
            objective.scores(
                model, Batch({name: t.to(input_device(model)) for name, t in batch.items()})
            )
            for batch in batches
        )
    except (TypeError, ValueError, RuntimeError):
        return False
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    exact = base.dtype == torch.float32
    return torch.allclose(first, second, rtol=1e-4 if exact else 2e-2)
