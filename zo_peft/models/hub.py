"""Names of models, and why a folder or the Hub did not give one."""

from pathlib import Path

from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from safetensors import SafetensorError

#: What loading from a folder or from the Hub may raise.
LOAD_ERRORS = (OSError, ValueError, SafetensorError, httpx.HTTPError)


def public_name(name_or_path: str | None) -> str:
    """The Hub id of a model, or the name of its folder without the path to it."""
    path = Path(name_or_path or "base")
    return path.name if path.is_absolute() or path.is_dir() else path.as_posix()


def reason(error: BaseException) -> str:
    """Why a folder or the Hub did not give what was asked for, in a line that ends a sentence."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, LocalEntryNotFoundError | ConnectionError | httpx.TransportError):
            if is_offline_mode() or "OfflineModeIsEnabled" in str(error):
                return "offline mode is on, and the cache does not hold it. Unset HF_HUB_OFFLINE."
            return f"{constants.ENDPOINT} cannot be reached, and the cache does not hold it."
        if isinstance(cause, RepositoryNotFoundError):
            return "no such folder, and none such on the Hub; if it is private, `hf auth login`."
        if isinstance(cause, RevisionNotFoundError):
            return "the Hub has it, but has no such revision of it."
        if isinstance(cause, RemoteEntryNotFoundError):
            return f"it holds no {cause.response.url.path.rpartition('/')[2]}."
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with a full stop."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return line if line.endswith(".") else line + "."
