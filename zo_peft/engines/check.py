"""One check before the first step: does the engine compute with the adapter that it was given?

An engine that keeps what it computed with the last adapter, or that takes an adapter in another
form than is meant, answers without any error, and a run learns nothing or something else.
"""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from zo_peft.core.batch import Batch
from zo_peft.engines.engine import Engine, Matrices, Row, States, answers
from zo_peft.engines.served import rows_of, states_of
from zo_peft.errors import Notice, UserError
from zo_peft.models.loading import load_base

#: The places of a sequence, and the tokens, that answers are compared at.
PLACES, TOKENS = 32, 20

#: How long random adapters are: the first length that moves answers by `MOVED` nats; else the last.
LENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
MOVED = 0.3

#: By how much of an adapter's effect an answer may be off where another adapter was there before.
SWAPPED = 0.01

#: The least cosine between the effects of an adapter on a base in float32, here and there. On a
#: quantized base nothing tells what it must be; below the lower one there is a notice.
THE_SAME, ALIKE = 0.99, 0.6


def check_answers(model: PeftModel, batch: Batch, reference: str | None = None) -> None:
    """Compare answers with first answers, and with those of the float base where it is named.

    Raises:
        UserError: answers do not depend on the adapter, or on the one that was there before; or an
            adapter acts otherwise than in PyTorch.
    """
    base, given = model.get_base_model(), rows_of(batch)
    # Asked at the last places about tokens of the first of them.
    tokens, rows = torch.tensor(given[0].ids[:TOKENS]), []
    for row in given:
        places = [*range(len(row.ids))][-PLACES:]
        rows.append(Row(row.ids, places, tokens.expand(len(places), -1)))
    _check_swaps(base.engine, _two(base, "", rows), rows)
    if reference is not None:
        _check_effects(model, rows, reference)


def _two(base: Any, kind: str, rows: Sequence[Row]) -> States:
    """Two random adapters on modules whose names end so, of which the first moves the answers."""
    generator = torch.Generator().manual_seed(0)
    two = {}
    for name, pair in states_of(base).items():
        a, b = (torch.randn(2, *x.shape[1:], generator=generator) for x in pair)
        two[name] = Matrices(a / a.shape[-1] ** 0.5, b * name.endswith(kind))
    rest = _alone(base.engine, _longer(two, 0.0), 0, rows)
    for length in LENGTHS:
        longer = _longer(two, length)
        base.engine.forget()
        moved = (_alone(base.engine, longer, 0, rows) - rest).abs().max()
        if moved > MOVED:
            return longer
    if moved > 0:
        return longer
    what = f"the engine's answers do not depend on an adapter on {kind or 'any module'}"
    cure = "name other lora_target_modules"
    raise UserError(f"{what}, so that it would learn nothing; {cure}")


def _longer(states: States, length: float) -> States:
    return {name: Matrices(a, length * b) for name, (a, b) in states.items()}


def _alone(engine: Engine, states: States, index: int, rows: Sequence[Row]) -> Tensor:
    """One of the states in a call of its own."""
    state = {name: Matrices(*(x[index : index + 1] for x in m)) for name, m in states.items()}
    return engine.answer(state, [rows]).log_probabilities


def _check_swaps(engine: Engine, two: States, rows: Sequence[Row]) -> None:
    """Each adapter's first answers are those of an engine that has forgotten everything else."""
    first = []
    for index in (0, 1):
        engine.forget()
        first.append(_alone(engine, two, index, rows))
    together = engine.answer(two, [rows, rows]).log_probabilities.chunk(2)
    swapped = [_alone(engine, two, index, rows) for index in (0, 1, 0, 1)]
    moved = (first[0] - first[1]).abs().max()
    for index, again in enumerate([*together, *swapped]):
        off = (again - first[index % 2]).abs().max()
        if not off <= SWAPPED * moved:
            what = "the engine answers otherwise where another adapter was there before"
            much = f"by {off:.2g} nats, where adapters differ by {moved:.2g}"
            cure = "switch its prefix cache off, or use another version"
            raise UserError(f"{what}: {much}. It keeps something of it; {cure}")


def _check_effects(model: PeftModel, rows: Sequence[Row], reference: str) -> None:
    """For each kind of module: an adapter on these alone acts as in PyTorch."""
    base = model.get_base_model()
    config = deepcopy(model.active_peft_config)
    own = peft.get_peft_model(load_base(reference, dtype="float32"), config).eval().get_base_model()
    for kind in sorted({name.rpartition(".")[2] for name in states_of(base)}):
        states = _two(base, kind, rows)
        without = _longer(states, 0.0)
        there = _alone(base.engine, states, 0, rows) - _alone(base.engine, without, 0, rows)
        here = _in_torch(own, states, rows) - _in_torch(own, without, rows)
        cosine = torch.cosine_similarity(there.flatten(), here.flatten(), dim=0).item()
        message = f"an adapter on {kind} acts otherwise in the engine than in {reference} (cosine "
        message += f"{cosine:.2f}); is the engine's base made of that model?"
        if base.engine.is_float32 and not cosine >= THE_SAME:
            raise UserError(message)
        if not cosine >= ALIKE:
            warnings.warn(message, Notice, stacklevel=2)


@torch.no_grad()
def _in_torch(base: nn.Module, states: States, rows: Sequence[Row]) -> Tensor:
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            key = layer.active_adapters[0]
            layer.lora_A[key].weight.copy_(states[name].a[0])
            layer.lora_B[key].weight.copy_(states[name].b[0] / layer.scaling[key])
    logits = [base(input_ids=torch.tensor([row.ids])).logits[0, row.positions] for row in rows]
    return answers(torch.cat(logits), rows).log_probabilities
