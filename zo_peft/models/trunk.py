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


class _Reached(Exception):
    """Ends a forward pass that has come far enough."""


def _stop(*_: Any) -> None:
    raise _Reached


def _first(output: Any) -> Tensor:
    """The hidden states in the output of a layer."""
    return output[0] if isinstance(output, tuple) else output


def _hidden(*args: Any, **kwargs: Any) -> Tensor:
    """The hidden states among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


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
    """The layers that a forward pass ends before it reaches a module with tuned parameters.

    Args:
        forward: runs the model on some batch. It is run up to that module.

    Returns:
        The first layers of the model; none if one does not pass its output straight to the next.
    """
    ids = {id(parameter) for parameter in tuned}
    layers = layers_of(model)
    stack = set(layers)
    done: list[nn.Module] = []
    last, straight = None, True

    def started(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal straight
        straight &= not done or _hidden(*args, **kwargs) is last

    def finished(layer: nn.Module, _: Any, output: Any) -> None:
        nonlocal last
        done.append(layer)
        last = _first(output)

    with ExitStack() as hooks:
        for module in model.modules():
            owns = any(id(parameter) in ids for parameter in module.parameters())
            if owns and stack.isdisjoint(set(module.modules()) - {module}):
                hooks.enter_context(module.register_forward_pre_hook(_stop))
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(started, with_kwargs=True))
            hooks.enter_context(layer.register_forward_hook(finished))
        with suppress(_Reached):
            forward()
            return []
    return done if straight and done == layers[: len(done)] else []


class Trunk:
    """Runs the layers below every tuned parameter once for each batch.

    Args:
        tuned: the tuned parameters. The first forward pass finds which layers lie below them.
    """

    def __init__(self, model: nn.Module, tuned: Iterable[nn.Parameter]) -> None:
        self.model, self.tuned = model, list(tuned)
        self._layers: list[nn.Module] | None = None
        self._output: Any = None

    @contextmanager
    def reused(self, forward: Callable[[], object]) -> Iterator[None]:
        """Run the layers once; within the context they give their output without running.

        Args:
            forward: runs the model on a batch. Within the context the model may be run on that
                batch only, repeated any number of times.
        """
        if self._layers is None:
            self._layers = find_trunk(self.model, self.tuned, forward)
        if not self._layers:
            yield
            return
        *below, last = self._layers
        with last.register_forward_hook(self._keep), suppress(_Reached):
            forward()
        methods = [(layer, "forward", self._pass_on) for layer in below]
        try:
            with replaced([*methods, (last, "forward", self._repeat)]):
                yield
        finally:
            self._output = None

    def _keep(self, _: nn.Module, args: Any, output: Any) -> None:
        self._output = output
        raise _Reached

    def _like_output(self, hidden: Tensor) -> Any:
        return (hidden, *self._output[1:]) if isinstance(self._output, tuple) else hidden

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        return self._like_output(_hidden(*args, **kwargs))

    def _repeat(self, *args: Any, **kwargs: Any) -> Any:
        kept = _first(self._output)
        times = _hidden(*args, **kwargs).shape[0] // kept.shape[0]
        return self._like_output(kept.repeat(times, *[1] * (kept.dim() - 1)))


def compile_frozen_parts(
    model: nn.Module, tuned: Iterable[nn.Parameter], **options: Any
) -> list[nn.Module]:
    """Compile the parts of each layer that own no tuned parameter, in place, and return them.

    Where only attention is tuned these are MLPs and norms. Modules of PyTorch itself and single
    linear layers are left alone, because there is nothing to fuse. `options` are arguments of
    `torch.compile`.
    """
    ids = {id(parameter) for parameter in tuned}
    parts = [
        part
        for layer in layers_of(model)
        for part in layer.children()
        if not isinstance(part, nn.Linear)
        and not type(part).__module__.startswith("torch.nn.")
        and ids.isdisjoint(id(parameter) for parameter in part.parameters())
    ]
    for part in parts:
        part.compile(**options)
    return parts
