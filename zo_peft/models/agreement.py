"""One check before the first step: do losses come out as they do one by one?

A batch whose candidates and examples share a forward, as in a step, is compared with one candidate
of one example at a time, which runs PEFT's own modules without padding. That settles for any
adapter, option and family whether candidates may share a forward, whether examples may share a
batch, and whether what is tuned acts at all.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from zo_peft.core.batch import Batch, Objective
from zo_peft.core.direction import Direction
from zo_peft.core.evaluator import Evaluator
from zo_peft.core.flat_space import FlatSpace
from zo_peft.core.lanes import NotInLanes, replaced
from zo_peft.errors import UserError, first_line
from zo_peft.models.adapters import name_of, running
from zo_peft.models.in_place_space import InPlaceSpace
from zo_peft.models.loading import is_packed
from zo_peft.objectives.scoring import DIFFERENTIABLE

#: Displacements, of which the first is taken that moves losses well beyond rounding.
LENGTHS = (1e-2, 1e-1, 1.0)


class _Counted:
    """Counts how often losses are asked for; of wrong predictions they are those behind them."""

    def __init__(self, objective: Objective) -> None:
        self.inner, self.forwards = getattr(objective, "inner", objective), 0

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        self.forwards += 1
        return self.inner.losses(model, batch).double()


@torch.no_grad()
def check(evaluator: Evaluator, batch: Batch, alone: Sequence[Batch]) -> int:
    """Send candidates one by one, with a warning, where a shared forward gives other losses.

    `batch` is one example, or two of different length; `alone` has each as a batch of its own, in
    its plainest form. Counts of the evaluator and generators of random numbers stay as they are.
    Returns the forwards that this took. A UserError says that the model does not run, that examples
    of a batch change each other's losses, or that nothing that is tuned has an effect.
    """
    counted = _Counted(evaluator.objective)
    kept = torch.random.fork_rng(range(torch.cuda.device_count()))
    with replaced([(evaluator, "objective", counted)]), kept:
        _settle(evaluator, batch, [alone[0], alone[-1]], type(counted.inner) in DIFFERENTIABLE)
    return counted.forwards


def _settle(evaluator: Evaluator, batch: Batch, alone: Sequence[Batch], smooth: bool) -> None:
    """`alone` is what the first and the second candidate are evaluated on one by one."""
    if evaluator.objective.losses(evaluator.model, batch).numel() != batch.examples:
        # An objective of one's own may give a mean, which tells nothing of examples.
        return
    parts, name = evaluator.parts([batch]), name_of(evaluator.model)
    relative = rounding(evaluator.model)
    with running(evaluator.model):
        if isinstance(evaluator.space, InPlaceSpace):
            _check_own_forwards(evaluator, evaluator.space, alone[0])
        rest = torch.cat([_loss(evaluator, Direction(), own) for own in alone])
        for length in LENGTHS:
            points = [
                [length * Direction.of(c + 2 * part) for part in range(parts)] for c in (0, 1)
            ]
            own = [points[0][0], points[1][-1]]
            expected = torch.cat([_loss(evaluator, *pair) for pair in zip(own, alone)])
            moved, noise = _size(expected - rest), relative * _size(rest)
            if not moved <= 4 * noise:
                break
    if moved == 0 and smooth:
        why = f"{name} does not use it, or not on the first examples"
        raise UserError(f"nothing that is tuned changes a loss, so nothing would be learned: {why}")
    if moved == 0 or not math.isfinite(moved):
        return
    tolerance = (0.01 + 8 * relative) * moved + 2 * noise
    fault = _fault(evaluator, points, batch, expected, tolerance) or _unread(evaluator, alone, rest)
    if fault and evaluator.one_by_one(NotInLanes(f"{name} ({fault})")):
        fault = _fault(evaluator, points, batch, expected, tolerance)
    if not fault and evaluator.candidates_per_forward == 1 and batch.examples > 1:
        fault = _mixing(evaluator, own[0], batch)
    if fault:
        why = f"examples that share a batch change each other's losses in {name} ({fault})"
        advice = "per_device_train_batch_size=1 and per_device_eval_batch_size=1, with "
        raise UserError(f"{why}; use {advice}gradient_accumulation_steps for larger batches")


def _loss(evaluator: Evaluator, point: Direction, batch: Batch) -> Tensor:
    with evaluator.space.displaced(point):
        return evaluator.objective.losses(evaluator.model, batch)


def _fault(
    evaluator: Evaluator,
    points: Sequence[Sequence[Direction]],
    batch: Batch,
    expected: Tensor,
    tolerance: float,
) -> str | None:
    """How the losses of the batch differ from what is expected: first and last of [2, examples]."""
    try:
        losses = evaluator.batch_losses(points, batch).flatten()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    off = _size(losses[[0, -1]] - expected)
    return None if off <= tolerance else f"a loss would be off by {off:.2g}"


def _mixing(evaluator: Evaluator, point: Direction, batch: Batch) -> str | None:
    """A layer of an adapter whose output for the first row changes with what is in the last one.

    By losses alone, a base in a coarse dtype would hide that.
    """
    found = list[str]()

    def compare(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        fits = isinstance(layer, BaseTunerLayer) and isinstance(output, Tensor) and inputs
        if fits and inputs[0].is_floating_point() and len(inputs[0]) > 1:
            # The other sign leaves the outliers of LLM.int8() where they are.
            rows, last = inputs[0][:-1], inputs[0][-1:]
            own, other = (layer.forward(torch.cat([rows, x]), *inputs[1:]) for x in (last, -last))
            if not torch.equal(own[0], other[0]):
                found.append(f"{type(layer).__module__} mixes the rows of a batch")

    with register_module_forward_hook(compare):
        _loss(evaluator, point, batch)
    return min(found, default=None)


def _unread(evaluator: Evaluator, alone: Sequence[Batch], rest: Tensor) -> str | None:
    """A tuned parameter that acts on a loss, but that no lane has read the values of."""
    space = evaluator.space
    if not evaluator.read or not isinstance(space, FlatSpace):
        return None
    noise = {
        name: tensor
        for index in range(len(space.buffers))
        for name, tensor in space.views(index, space.dense(index, Direction.of(0))).items()
        if space.parameters[name] not in evaluator.read
    }
    if not noise:
        return None
    with space.vectors([noise]) as seeds:
        moved = [_loss(evaluator, Direction.combine(seeds, [1.0]), own) for own in alone]
    return None if torch.equal(torch.cat(moved), rest) else f"{min(noise)} would stay as it is"


class _Reads(TorchFunctionMode):
    """Finds tuned numbers of a base that are read outside of the forward of their own module."""

    def __init__(self, space: InPlaceSpace) -> None:
        super().__init__()
        self.space, self.outside = space, set[str]()
        self.names = {id(parameter): name for name, parameter in space.parameters.items()}

    def __torch_function__(self, do: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = do(*args, **(kwargs or {}))
        read = {self.names[id(a)] for a in args if id(a) in self.names}
        if read and isinstance(result, Tensor):  # and not a shape or a dtype
            self.outside |= read - self.space.own_forwards()
        return result


def _check_own_forwards(evaluator: Evaluator, space: InPlaceSpace, batch: Batch) -> None:
    """Raise a UserError for numbers of a base of which a displacement would not be seen."""
    with _Reads(space) as reads:
        _loss(evaluator, LENGTHS[0] * Direction.of(0), batch)
    if reads.outside:
        kinds = sorted({".".join(name.split(".")[-2:]) for name in reads.outside})
        why = f"{min(reads.outside)} is also read by another module, which would not see candidates"
        raise UserError(f"{why}; leave it out with tunable='^(?!.*({'|'.join(kinds)})$)'")


def _size(losses: Tensor) -> float:
    return losses.square().mean().sqrt().item()


def rounding(model: nn.Module) -> float:
    """The relative rounding of a forward: of the coarsest dtype; of a quantized base 2**-7."""
    # compressed-tensors goes on rounding activations when it has unpacked the weights.
    if is_packed(model) or any(hasattr(m, "quantization_scheme") for m in model.modules()):
        return 2.0**-7
    return max(torch.finfo(parameter.dtype).eps for parameter in model.parameters())
