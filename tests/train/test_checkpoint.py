"""The state of a tuner beside what it tunes: saved, loaded into another tuner, gone on with."""

from pathlib import Path

import pytest
import torch
from core_alone import SquaredError
from tiny import assert_same
from torch import nn

from zo_peft.core.batch import Batch
from zo_peft.core.evaluator import Evaluator
from zo_peft.core.flat_space import FlatSpace
from zo_peft.core.strategies import Options
from zo_peft.core.tuner import Tuner
from zo_peft.core.updates import AUTOMATIC, RULES
from zo_peft.train import checkpoint


def make(rule: str) -> Tuner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    space = FlatSpace(dict(model.named_parameters()))
    moves = RULES[rule](space, 0.01, automatic=rule in AUTOMATIC)
    evaluator, options = Evaluator(model, space, SquaredError()), Options(carry_best=True)
    return Tuner(evaluator, moves, "greedy", options, per_example_noise=False)


def run(tuner: Tuner, first: int, last: int) -> None:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        x, labels = torch.randn(6, 4, generator=generator), torch.ones(6)
        tuner.step([Batch(x=x, labels=labels)], number)


@pytest.mark.parametrize("rule", RULES)
def test_a_loaded_tuner_goes_on_bit_for_bit(rule: str, tmp_path: Path) -> None:
    whole, first, second = make(rule), make(rule), make(rule)
    run(whole, 0, 6)
    run(first, 0, 3)
    remembered = checkpoint.remembered(first)
    assert sum(tensor.numel() for tensor in remembered.values()) <= 2 * first.space.numel
    state = checkpoint.state_of(first)
    checkpoint.save_state(str(tmp_path), first.space.tensors() | remembered, state)

    tensors = checkpoint.load_tensors(tmp_path / checkpoint.TENSORS_NAME)
    mine = second.space.tensors()
    second.space.load({name: tensors[name] for name in mine})
    checkpoint.load_into(second, checkpoint.load_state(str(tmp_path)), tensors)
    run(second, 3, 6)
    assert_same(second.space.tensors(), whole.space.tensors())
    assert_same(checkpoint.remembered(second), checkpoint.remembered(whole))
    assert checkpoint.state_of(second) == checkpoint.state_of(whole)
