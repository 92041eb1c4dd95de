"""The errors a user can mend: each says what was wrong, where, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class Notice(UserWarning):
    """What a user should know of a run that goes on; the command line shows no other warnings."""


class UserError(ValueError):
    """Settings, data or a model that cannot work as given; the command line exits with 2."""


class NonFiniteLossError(UserError):
    """Too many losses in a row were of no use; the adapter holds its last good values."""


@contextmanager
def explained(what: str, *kinds: type[Exception], advice: str = "") -> Iterator[None]:
    """Within the context, an error of these kinds becomes a UserError: `what: why; advice`.

    JSON and YAML that are nested too deep count as a ValueError. A UserError, and an error that
    says that memory is full, stay as they are.
    """
    too_deep = (RecursionError,) if ValueError in kinds else ()
    try:
        yield
    except (*kinds, *too_deep) as error:
        if isinstance(error, UserError) or type(error).__name__ == "OutOfMemoryError":
            raise
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{what}: {why}{'; ' * bool(advice)}{advice}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message (with what a colon announces), without a full stop."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    # PyTorch's message begins with a headline.
    return " ".join([first, *rest[:1]] if first.endswith(":") else [first]).strip().rstrip(".")
