"""Features to padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zo_peft.objectives import IGNORE_INDEX, Batch

Features = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Collator:
    """Pads features on the right, to the longest of the batch, into a batch of their objective.

    `labels` comes first in every batch and has one row per example, so that transformers counts
    examples and not rows.
    """

    pad_token_id: int

    def __call__(self, features: Features) -> Batch:
        """A batch for `OptionObjective`, `ClassificationObjective` or `CompletionObjective`."""
        if "option_ids" in features[0]:
            if all(len(o) == 1 for f in features for o in f["option_ids"]) and _same_count(
                features
            ):
                return self._single_token_options(features)
            return self._options(features)
        labels = [feature["labels"] for feature in features]
        if isinstance(labels[0], int):
            return {
                "labels": torch.tensor(labels),
                **self._inputs([f["input_ids"] for f in features]),
            }
        return {
            "labels": pad_sequence(
                [torch.as_tensor(row) for row in labels], True, padding_value=IGNORE_INDEX
            ),
            **self._inputs([f["input_ids"] for f in features]),
            **_scored([torch.as_tensor(row) for row in labels]),
        }

    def _inputs(self, sequences: Sequence[Sequence[int]]) -> Batch:
        ids = [torch.as_tensor(sequence) for sequence in sequences]
        return {
            "input_ids": pad_sequence(ids, True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
        }

    def _single_token_options(self, features: Features) -> Batch:
        prompts = [feature["prompt_ids"] for feature in features]
        return {
            "labels": torch.tensor([feature["label"] for feature in features]),
            **self._inputs(prompts),
            "rows": torch.arange(len(prompts)),
            "positions": torch.tensor([len(prompt) - 1 for prompt in prompts]),
            "option_tokens": torch.tensor(
                [[option[0] for option in f["option_ids"]] for f in features]
            ),
        }

    def _options(self, features: Features) -> Batch:
        sequences: list[list[int]] = []
        labels, option_rows = [], []
        for feature in features:
            first = len(sequences)
            for option in feature["option_ids"]:
                sequences.append(feature["prompt_ids"] + option)
                prompt_labels = [IGNORE_INDEX] * len(feature["prompt_ids"])
                labels.append(torch.tensor(prompt_labels + option))
            option_rows.append(torch.arange(first, len(sequences)))
        return {
            "labels": torch.tensor([feature["label"] for feature in features]),
            **self._inputs(sequences),
            **_scored(labels),
            "option_rows": pad_sequence(option_rows, True, padding_value=-1),
        }


def _same_count(features: Features) -> bool:
    return len({len(feature["option_ids"]) for feature in features}) == 1


def _scored(labels: Sequence[Tensor]) -> Batch:
    """Where each labelled token is predicted (the position before it), and which it is."""
    where = [(row[1:] != IGNORE_INDEX).nonzero().squeeze(1) for row in labels]
    return {
        "rows": torch.cat([torch.full_like(p, row) for row, p in enumerate(where)]),
        "positions": torch.cat(where),
        "tokens": torch.cat([row[1:][p] for row, p in zip(labels, where)]),
    }
