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

    Why is the first line of the error's message; a UserError stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        why = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        end = f"; {advice}" if advice else ""
        raise UserError(f"{what}: {why or type(error).__name__}{end}") from error
