"""The check of an engine's answers, on engines that go wrong in ways that real ones do."""

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

from zo_peft.data.collate import Collator
from zo_peft.engines.check import check_answers
from zo_peft.engines.engine import Answers, Matrices, Row, States, imported
from zo_peft.engines.served import check_engine
from zo_peft.errors import UserError


class Faultless:
    """An engine of a single layer, which adds up what it has read, with the LoRA in it."""

    is_float32 = True

    def __init__(self) -> None:
        self.embeddings = torch.randn(tiny.VOCABULARY, tiny.WIDTH)
        self.kept: dict[Any, Any] = {}

    def answer(self, states: States, rows: Sequence[Sequence[Row]]) -> Answers:
        """The answers to all rows, each with its own state."""
        found = []
        for index, own in enumerate(rows):
            state = {name: Matrices(a[index], b[index]) for name, (a, b) in states.items()}
            for row in own:
                logits = self.read(row, state)[row.positions] @ self.embeddings.T
                known = logits.log_softmax(dim=-1)
                found.append((known.gather(1, row.tokens), known.argmax(dim=-1)))
        return Answers(*map(torch.cat, zip(*found)))

    def read(self, row: Row, state: dict[str, Matrices]) -> Any:
        """What was read up to each token [T, width]."""
        x = self.embeddings[row.ids]
        for a, b in state.values():
            x = x + x @ a.T @ b.T
        return x.cumsum(dim=0)

    def forget(self) -> None:
        """Keep nothing."""
        self.kept.clear()


class KeepsAnswers(Faultless):
    """Answers as before where the prompt is as before."""

    def read(self, row: Row, state: dict[str, Matrices]) -> Any:
        key = tuple(row.ids)
        if key not in self.kept:
            self.kept[key] = super().read(row, state)
        return self.kept[key]


class KeepsPrefixes(Faultless):
    """Keeps all of a prompt but its last token, as a prefix cache does."""

    def read(self, row: Row, state: dict[str, Matrices]) -> Any:
        key, read = tuple(row.ids[:-1]), super().read(row, state)
        prefix = self.kept.setdefault(key, read[:-1])
        return torch.cat([prefix, prefix[-1:] + read[-1:] - read[-2:-1]])


class KeepsTheFirst(Faultless):
    """Answers a call about several adapters with the first of them."""

    def answer(self, states: States, rows: Sequence[Sequence[Row]]) -> Answers:
        first = {name: Matrices(*(x[:1].expand_as(x) for x in m)) for name, m in states.items()}
        return super().answer(first, rows)


class Ignores(Faultless):
    """Takes adapters, and does not use them."""

    def read(self, row: Row, state: dict[str, Matrices]) -> Any:
        return super().read(row, {})


@pytest.fixture(scope="module")
def model() -> PeftModel:
    torch.manual_seed(0)
    targets = ["v_proj", "o_proj"]
    sizes = {"num_key_value_heads": 4}
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
    return get_peft_model(tiny.llama(**sizes), config)


FAULTS = [
    (Faultless, None),
    (KeepsAnswers, "another adapter was there before"),
    (KeepsPrefixes, "another adapter was there before"),
    (KeepsTheFirst, "another adapter was there before"),
    (Ignores, "do not depend on an adapter"),
]


@pytest.mark.parametrize(("kind", "message"), FAULTS)
def test_an_engine_that_keeps_the_wrong_things_is_found(
    model: PeftModel, kind: Any, message: str | None
) -> None:
    model.get_base_model().engine = kind()
    rows = [{"prompt_ids": [5, 9, 3, 8], "option_ids": [[7], [9]], "label": 0}]
    batch = Collator(tiny.PAD)(rows)
    if message is None:
        check_answers(model, batch)
    else:
        with pytest.raises(UserError, match=message):
            check_answers(model, batch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("llamacpp", 2), "an engine answers to one process"),
        ((None, 1), "give the name of its file as the model, with engine"),
    ],
)
def test_what_no_engine_does_is_refused(model: PeftModel, given: Any, message: str) -> None:
    model.get_base_model().engine = Faultless()
    with pytest.raises(UserError, match=message):
        check_engine(model, *given)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=2),
            "prompt_encoder.* of a PREFIX_TUNING",
        ),
        (
            LoraConfig("CAUSAL_LM", target_modules=["v_proj"], use_dora=True),
            r"\(no DoRA or bias\), not",
        ),
        (LoraConfig("CAUSAL_LM", target_modules=["v_proj"]), None),
    ],
)
def test_an_adapter_that_is_not_tuned_is_looked_at_too(config: Any, message: str | None) -> None:
    config.inference_mode = True
    model = get_peft_model(tiny.llama(), config).requires_grad_(False)
    model.get_base_model().engine = engine = Faultless()
    if message is None:
        assert check_engine(model, "llamacpp", 1) is engine
    else:
        with pytest.raises(UserError, match=message):
            check_engine(model, "llamacpp", 1)


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="needs no_such_package: pip install torch no_such_package"):
        imported("torch", "no_such_package")
