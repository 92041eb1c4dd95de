"""Names of models, and why a folder or the Hub did not give one."""

from importlib import import_module
from pathlib import Path

from huggingface_hub import constants, errors, hf_hub_download, is_offline_mode
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from zo_peft.errors import UserError, first_line

#: The client that huggingface_hub reads the Hub with: httpx, or from its version 2 httpx2.
httpx = import_module(errors.HTTPError.__module__)

#: A base, or one with an adapter.
AnyModel = PreTrainedModel | PeftModel

#: What loading from a folder or from the Hub may raise.
LOAD_ERRORS = (OSError, ValueError, RecursionError, SafetensorError, httpx.HTTPError)
#: What stands for a Hub that is not reached.
UNREACHED = (errors.LocalEntryNotFoundError, ConnectionError, httpx.TransportError)


def public_name(name_or_path: str | None) -> str:
    """The Hub id of a model, or the name of its folder or file without the path to it."""
    path = Path(name_or_path or "base")
    return path.name if path.is_absolute() or path.exists() else path.as_posix()


def file_of(name: str, file: str) -> Path:
    """The path of a file of a folder, or of a repository of the Hub; else one of `LOAD_ERRORS`."""
    if not Path(name).is_dir():
        return Path(hf_hub_download(name, file))
    if not (Path(name) / file).is_file():
        raise FileNotFoundError(f"it holds no {file}.")
    return Path(name) / file


def check_apart(output_dir: str, *sources: str | None) -> None:
    """Raise a UserError where an output folder is the folder of a model that is read."""
    folder = Path(output_dir).resolve()
    if any(source and Path(source).resolve() == folder for source in sources):
        what = f"the model in --output_dir {output_dir}"
        raise UserError(f"{what} would be overwritten; give another folder")


def reason(error: BaseException) -> str:
    """Why a folder or the Hub did not give what was asked for, in a line that ends a sentence."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UNREACHED):
            if is_offline_mode() or "OfflineModeIsEnabled" in str(error):
                return "offline mode is on, and the cache does not hold it. Unset HF_HUB_OFFLINE."
            return f"{constants.ENDPOINT} cannot be reached, and the cache does not hold it."
        if isinstance(cause, errors.RepositoryNotFoundError):
            return "no such folder, and none such on the Hub; if it is private, `hf auth login`."
        if isinstance(cause, errors.RevisionNotFoundError):
            return "the Hub has it, but has no such revision of it."
        if isinstance(cause, errors.RemoteEntryNotFoundError):
            return f"it holds no {cause.response.url.path.rpartition('/')[2]}."
        cause = cause.__cause__
    return f"{first_line(error)}."
