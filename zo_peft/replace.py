"""Attributes of objects, mostly methods of modules, replaced for a while."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(methods: Iterable[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    """Within the context each (module, method, replacement) holds; after it, what was before."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for module, method, replacement in methods:
            before.append((module, method, module.__dict__.get(method)))
            setattr(module, method, replacement)
        yield
    finally:
        for module, method, own in reversed(before):
            module.__dict__.pop(method, None)
            if own is not None:
                setattr(module, method, own)
