"""A batch and an objective: what is evaluated, whatever the model is."""

from collections import UserDict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

#: Predictions and references that have this value are not compared, as everywhere in transformers.
IGNORE_INDEX = -100

#: Losses [B], predictions and references.
Prediction = tuple[Tensor, Tensor, Tensor]

#: What a batch has of each scored position.
SCORED = ("rows", "positions", "tokens", "token_options")


class Batch(UserDict[str, Any]):
    """The tensors of a batch by name, and the sizes that can be read off them.

    `zo_peft.data.Collator` says which names there are; code that needs sizes asks here.

    >>> Batch({"input_ids": torch.ones(2, 5), "labels": torch.ones(2)}).repeated(3).rows
    6
    """

    @property
    def share(self) -> tuple[int, int, int] | None:
        """Which examples of a larger batch these are: first, behind the last, of how many."""
        return self.get("share")

    @property
    def examples(self) -> int:
        """The number of examples of the whole batch, of which this may be a share."""
        own = self["labels"] if "labels" in self else self["input_ids"]
        return self.share[2] if self.share else len(own)

    @property
    def rows(self) -> int:
        """The number of sequences that the model sees; an example may be several."""
        return len(self["input_ids" if "input_ids" in self else "labels"])

    @property
    def scored(self) -> int:
        """The number of positions that pass the model's head; 0 where it chooses them itself."""
        return len(self.get("rows", ()))

    def repeated(self, times: int) -> "Batch":
        """The batch `times` times over; indices (`rows`, `token_options`) are of their own copy."""
        counts = {"rows": self.rows}
        if "is_option" in self:
            counts["token_options"] = self["is_option"].numel()
        copies = Batch(self.data | {"copies": times})
        for name, value in self.items():
            if isinstance(value, Tensor):
                copies[name] = value.repeat(times, *[1] * (value.dim() - 1))
            elif isinstance(value, list):
                copies[name] = value * times
            if name in counts:
                start = counts[name] * torch.arange(times, device=value.device)
                copies[name] += start.repeat_interleave(len(value))
        return copies

    def of_rows(self, start: int, stop: int) -> "Batch":
        """The rows from `start` up to `stop`, of a batch with one row for each example."""
        found = Batch(self.data)
        inside: slice | Tensor = slice(start, stop)
        for name, value in self.items():
            if isinstance(value, Tensor | list) and name not in SCORED:
                found[name] = value[inside]
        if "rows" in self:
            inside = (self["rows"] >= start) & (self["rows"] < stop)
            found |= {name: self[name][inside] for name in SCORED if name in self}
            found["rows"] = found["rows"] - start
        if "is_option" in self:
            found["token_options"] = found["token_options"] - start * self["is_option"].shape[1]
        return found


class Objective(Protocol):
    """What is minimised. It sees a model and a batch, and knows of no perturbation.

    With `repeatable = True` the model works on each row of a batch by itself, so that a batch can
    be repeated and several candidates share a forward pass.
    """

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """One loss for each example, float32, shape [B]."""

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Losses [B], and predictions and references (both [B] or both [B, T], integers)."""
