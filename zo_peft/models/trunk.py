"""Frozen parts of a model.

The trunk is the layers below every tuned parameter. It is run once for each batch, and its output
is used for all candidates. Frozen parts of the other layers can be compiled.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from zo_peft.core.lanes import replaced
from zo_peft.models.int8 import base_replacements


class _Reached(Exception):
    """Ends a forward pass that has come far enough."""


def _stop(*_: Any) -> None:
    raise _Reached


def first_of(output: Any) -> Tensor:
    """The hidden states in the output of a layer."""
    return output[0] if isinstance(output, tuple) else output


def hidden_of(*args: Any, **kwargs: Any) -> Tensor:
    """The hidden states among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(
    hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The transformer layers in order; none unless the model has exactly one stack of them."""
    stacks = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    return stacks[0] if len(stacks) == 1 else []


def find_trunk(
    model: nn.Module, tuned: Iterable[nn.Parameter], forward: Callable[[], object]
) -> list[nn.Module]:
    """The first layers: those that `forward` ends before it reaches a module with tuned parameters.

    There are none if one does not pass its output straight to the next.
    """
    ids = {id(parameter) for parameter in tuned}
    layers = layers_of(model)
    stack = set(layers)
    done: list[nn.Module] = []
    last, straight = None, True

    def finished(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal last, straight
        straight &= not done or hidden_of(*args, **kwargs) is last
        done.append(layer)
        last = first_of(output)

    with ExitStack() as hooks:
        for module in model.modules():
            owns = any(id(parameter) in ids for parameter in module.parameters())
            if owns and stack.isdisjoint(set(module.modules()) - {module}):
                hooks.enter_context(module.register_forward_pre_hook(_stop))
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(finished, with_kwargs=True))
        with suppress(_Reached):
            forward()
            return []
    return done if straight and done == layers[: len(done)] else []


class Trunk:
    """Runs the layers below every tuned parameter once for each batch."""

    def __init__(self, model: nn.Module, tuned: Iterable[nn.Parameter]) -> None:
        self.model, self.tuned = model, list(tuned)
        self._layers: list[nn.Module] | None = None

    @contextmanager
    def reused(self, forward: Callable[[], object]) -> Iterator[None]:
        """Run the layers once; within the context they give their output without running.

        `forward` runs the model on a batch, the only one that it may be run on within the context,
        repeated any number of times.
        """
        if self._layers is None:
            self._layers = find_trunk(self.model, self.tuned, forward)
        if not self._layers:
            yield
            return
        kept: Any = None

        def keep(_: nn.Module, args: Any, output: Any) -> None:
            nonlocal kept
            kept = output
            raise _Reached

        def pass_on(*args: Any, **kwargs: Any) -> Any:
            hidden = hidden_of(*args, **kwargs)
            return (hidden, *kept[1:]) if isinstance(kept, tuple) else hidden

        def repeat(*args: Any, **kwargs: Any) -> Any:
            once = first_of(kept)
            times = hidden_of(*args, **kwargs).shape[0] // once.shape[0]
            return pass_on(once.repeat(times, *[1] * (once.dim() - 1)))

        *below, last = self._layers
        with last.register_forward_hook(keep), suppress(_Reached):
            forward()
        methods = [(layer, "forward", pass_on) for layer in below]
        with replaced([*methods, (last, "forward", repeat)]):
            yield


def compile_frozen_parts(
    model: nn.Module, tuned: Iterable[nn.Parameter], **options: Any
) -> list[nn.Module]:
    """Compile the parts of each layer that own no tuned parameter, in place, and return them.

    Where only attention is tuned these are MLPs and norms. Modules of PyTorch itself and single
    linear layers are left alone, because there is nothing to fuse; so are int8 layers on a CPU,
    which are other functions in every forward pass. `options` are arguments of `torch.compile`.
    """
    ids = {id(parameter) for parameter in tuned}
    parts = [
        part
        for layer in layers_of(model)
        for part in layer.children()
        if not isinstance(part, nn.Linear)
        and not type(part).__module__.startswith("torch.nn.")
        and ids.isdisjoint(id(parameter) for parameter in part.parameters())
        and not base_replacements(part)
    ]
    for part in parts:
        part.compile(**options)
    return parts
