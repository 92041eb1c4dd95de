"""What an inference engine is asked, and what it answers; and which engines there are."""

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from zo_peft.errors import UserError
from zo_peft.models.loading import files_hash
from zo_peft.objectives.rewards import CommonNoise

#: The engines, and the package that those in this process need.
PACKAGES = {"llamacpp": "xllamacpp", "openvino": "openvino"}
EngineName = Literal["llamacpp", "openvino", "vllm"]


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


def answers(logits: Tensor, rows: Iterable[Row]) -> Answers:
    """The answers to rows, of the logits [N, vocabulary] at all their places."""
    known = logits.log_softmax(dim=-1)
    return Answers(known.gather(1, torch.cat([row.tokens for row in rows])), known.argmax(dim=-1))


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        noise: what makes the likeliest token a sample; None: it is the likeliest.
        examples: the number of examples; prompt i is of example `i % examples`.
        ends: the tokens that end a completion.
        longest: the most tokens of a completion.
    """

    noise: CommonNoise | None
    examples: int
    ends: Sequence[int]
    longest: int

    def complete(
        self, rows: Iterable[int], ask: Callable[[dict[int, list[int]]], Tensor]
    ) -> list[list[int]]:
        """The completions of these prompts, with the tokens that end them.

        `ask` gets what has been drawn so far for those prompts that go on, by their number, and
        returns the logits of what follows [N, vocabulary].
        """
        drawn: dict[int, list[int]] = {row: [] for row in rows}
        for position in range(self.longest):
            going = {n: ids for n, ids in drawn.items() if not {*ids[-1:]} & {*self.ends}}
            if not going:
                break
            logits = ask(going)
            if self.noise:
                own = [row % self.examples for row in going]
                logits = self.noise.added(logits, own, self.examples, position)
            for ids, token in zip(going.values(), logits.argmax(dim=-1).tolist()):
                ids.append(token)
        return [*drawn.values()]


class Engine:
    """A base that somebody else computes, with adapters that are put in their place for each call.

    Args:
        name: of the engine.
        files: of the base.
        types: those of the numbers that the base's matrices are stored as.

    Attributes:
        identity: what tells this base from another, for the journal.
        is_float32: nothing of the base is rounded.
        swaps: how often another state was put in place so far.
        seconds: spent in the engine so far.
        training_inside, training_seconds: of the last training, those in the engine, and all.
    """

    def __init__(self, name: str, files: Iterable[Path], types: Iterable[str]) -> None:
        kinds = sorted({kind.lower() for kind in types})
        self.identity = {"files": files_hash(files), "loaded": f"{name} {', '.join(kinds)}"}
        self.is_float32 = kinds == ["f32"]
        self.swaps, self.seconds, self.training_inside, self.training_seconds = 0, 0.0, 0.0, 0.0

    def answer(self, states: States, rows: Sequence[Sequence[Row]]) -> Answers:
        """The answers to the rows [M][R], those of each m with state m, in the order of the rows.

        With empty `states` the base alone answers.
        """
        raise NotImplementedError

    def generate(
        self, states: States, prompts: Sequence[Sequence[list[int]]], sampling: Sampling
    ) -> list[list[int]]:
        """Completions of the prompts [M][R], those of each m with state m, in their order."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop whatever was kept of earlier calls."""

    def save_adapter(self, states: States, folder: str) -> None:
        """Write a single state in the engine's own format, where PEFT's is none of its formats."""

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within the context a run trains, and its seconds are counted."""
        inside, start = self.seconds, time.perf_counter()
        try:
            yield
        finally:
            self.training_inside = self.seconds - inside
            self.training_seconds = time.perf_counter() - start

    def timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of the engine returns; its seconds are counted."""
        start = time.perf_counter()
        result = function(*arguments)
        self.seconds += time.perf_counter() - start
        return result


def installed() -> dict[str, str | None]:
    """The version of each engine's package, None where it is not installed; vLLM is elsewhere."""
    versions = {name: version_of(package) for name, package in PACKAGES.items()}
    return versions | {"vllm": "any server"}


def version_of(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    found = [*importlib.metadata.distributions(name=package)]
    return found[0].version if found else None


def imported(*packages: str) -> list[Any]:
    """These packages; a UserError names the first that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the engine needs {package}: pip install {' '.join(packages)}")
    return [importlib.import_module(package) for package in packages]
