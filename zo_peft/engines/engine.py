"""What an inference engine is asked, and what it answers; and which engines there are."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

#: The engines, and the package that each of them needs.
PACKAGES = {"llamacpp": "xllamacpp", "openvino": "openvino"}
EngineName = Literal["llamacpp", "openvino"]


class Matrices(NamedTuple):
    """The LoRA matrices of one module in M states: `a` [M, r, in], `b` [M, out, r], float32.

    The module adds `b @ a @ x` to its output: PEFT's scaling is part of `b`.
    """

    a: Tensor
    b: Tensor


#: M states of an adapter, by the names that modules have in transformers.
States = Mapping[str, Matrices]


@dataclass(frozen=True)
class Row:
    """A sequence of token ids, and which next tokens it is asked about.

    Attributes:
        ids: all tokens, without padding.
        positions: the P places whose next token is asked about, in ascending order.
        tokens: the tokens whose log-probabilities are wanted there, integers [P, K].
    """

    ids: list[int]
    positions: list[int]
    tokens: Tensor


class Answers(NamedTuple):
    """For each of N places: log-probabilities of the K tokens [N, K], and the likeliest token [N].

    The log-probabilities are float32 with natural logarithms.
    """

    log_probabilities: Tensor
    likeliest: Tensor


class Engine(Protocol):
    """A base that somebody else computes, with adapters that are put in its place for each call.

    Attributes:
        identity: what tells this base from another, for the journal.
        swaps: how often another state was put in place so far.
        seconds: spent in the engine so far.
        is_float32: nothing of the base is quantized.
    """

    identity: dict[str, str]
    swaps: int
    seconds: float
    is_float32: bool

    def answer(self, states: States, rows: Sequence[Sequence[Row]]) -> Answers:
        """The answers to the rows [M][R], those of each m with state m, in the order of the rows.

        With empty `states` the base alone answers.
        """

    def forget(self) -> None:
        """Drop whatever was kept of earlier calls."""

    def save_adapter(self, states: States, folder: str) -> None:
        """Write the single state that `states` has in the engine's own format, if there is one."""


def installed() -> dict[str, str | None]:
    """The version of each engine's package; None where it is not installed."""
    found = {name: [*importlib.metadata.distributions(name=p)] for name, p in PACKAGES.items()}
    return {name: packages[0].version if packages else None for name, packages in found.items()}
