"""What goes up to the Hub: files of an allow-list, without secrets and paths, in one commit."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id
from safetensors import SafetensorError, safe_open

from zo_peft.errors import UserError
from zo_peft.models.hub import public_name
from zo_peft.train.card import CARD_NAME, for_repository

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
#: A whole model, in one file or in shards; and the scales of one.
MODEL = r"(config|generation_config|model\.safetensors\.index)\.json"
MODEL_WEIGHTS = r"(model|model-\d+-of-\d+|zo_scales)\.safetensors"
#: JSON and text that this package or transformers writes for this run.
SETTINGS = r"(tokenizer_config|special_tokens_map|added_tokens|zo_metrics)\.json"
TEXTS = r"README\.md"
#: What belongs to the base's tokenizer, as it was.
VOCABULARY = (
    r"(tokenizer|vocab)\.json|(vocab|merges)\.txt|(tokenizer|spiece|sentencepiece.*)\.model|"
    r"chat_template\.jinja"
)

#: Values of these keys may be a folder or a file: its name is what readers are told.
PLACES = ("name_or_path", "_file", "_dir", "_path")
#: The prompt in a command has `\n`, which may stand before a path, and is no folder of a drive.
ABSOLUTE = re.compile(
    r"(?:(?<![\w/.~-])|(?<=file://)|(?<=\\n))(?:/[\w.@+-]+){2,}|(?<![\w/])~/\w|"
    r"\b[A-Za-z]:\\+(?!n)[\w.@+ -]+\\+\w"
)
#: Folders at the top that are alike on all machines, and those of people and their disks.
SYSTEM = {"bin", "dev", "etc", "lib", "proc", "sbin", "sys", "usr"}
HOMES = {"home", "Users", "root", "mnt"}
SECRET_NAMES = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API_?|ACCESS_|PRIVATE_)?KEY(_ID)?)$",
    re.IGNORECASE,
)
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


@dataclass
class PushArguments:
    """What is pushed, and where to."""

    folder: str = field(metadata={"help": "A run's output folder, or one that merge wrote."})
    repo_id: str = field(metadata={"help": "The model's name on the Hub: name, or owner/name."})
    private: bool = field(default=False, metadata={"help": "Only you may see a new repository."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch to push to; made if there is none. Default: main."}
    )
    commit_message: str = field(
        default="Upload with zo_peft", metadata={"help": "What the commit says."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Only show what would go up; nothing is sent."}
    )


def push(given: PushArguments) -> dict[str, Any]:
    """Upload a folder's adapter, or its model, with tokenizer, card and metrics.

    Returns:
        `repo_id`, `revision`, `private`, `files` (`name` and `size`), their `bytes` in all and the
        `url` of the commit, None of a dry run.

    Raises:
        UserError: nothing to push, something in it is private, or the Hub refuses; nothing has
            been committed then.
    """
    folder = Path(given.folder)
    with hub_errors(given.repo_id):
        validate_repo_id(given.repo_id)
    files = public_files(folder, given.repo_id)
    _check("commit_message", given.commit_message)
    sizes = {name: _size(content) for name, content in files.items()}
    result = {
        "repo_id": given.repo_id,
        "revision": given.revision or constants.DEFAULT_REVISION,
        "private": given.private,
        "files": [{"name": name, "size": size} for name, size in sizes.items()],
        "bytes": sum(sizes.values()),
        "url": None,
    }
    if given.dry_run:
        return result
    repo_id = create_repository(given.repo_id, given.private or None)
    commit = upload(folder, repo_id, given.commit_message, given.revision)
    return {**result, "repo_id": repo_id, "url": commit.commit_url}


def push_text(result: dict[str, Any]) -> str:
    """The files and their sizes, and where they are or would be."""
    files = [*result["files"], {"name": "bytes in all", "size": result["bytes"]}]
    lines = [f"{file['size']:>15,}  {file['name']}" for file in files]
    where = f"{result['repo_id']}, {result['revision']}"
    url = result["url"]
    end = f"a dry run: nothing was sent to {where}" if url is None else f"now in {where}: {url}"
    return "\n".join([*lines, end])


def create_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Make a repository, unless there is one; returns its whole name.

    Raises:
        UserError: the Hub refuses, or it is to be private and is public.
    """
    with hub_errors(repo_id):
        made = HfApi().create_repo(repo_id, private=private, exist_ok=True, token=token).repo_id
        if private and not HfApi().model_info(made, token=token).private:
            raise UserError(
                f"{made} is there already and is public; make it private in its settings on the "
                "Hub, or give another name"
            )
    return made


def upload(
    folder: Path,
    repo_id: str,
    commit_message: str,
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Commit the public files of a folder to a repository that exists.

    Args:
        revision: a branch, made if there is none; default: main.

    Raises:
        UserError: as `push`.
    """
    files = public_files(folder, repo_id, token)
    _check("commit_message", commit_message, token)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    with hub_errors(repo_id):
        if revision is not None and not revision.startswith("refs/"):
            HfApi().create_branch(repo_id, branch=revision, exist_ok=True, token=token)
        return HfApi().create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            token=token,
        )


def public_files(folder: Path, repo_id: str, token: str | None = None) -> dict[str, bytes | Path]:
    """What of a folder goes up, by name: as it lies there, or its content where that is changed.

    Folders in JSON are known by their names, and the card loads from `repo_id`.

    Args:
        token: of the Hub, which no file may hold; nor that of the environment.

    Raises:
        UserError: there is no adapter and no model, or a file holds a secret or a path.
    """
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if set(ADAPTER) <= present:
        weights, configs = re.escape(ADAPTER[1]), re.escape(ADAPTER[0])
    elif any(re.fullmatch(r"model.*\.safetensors", name) for name in present):
        weights, configs = MODEL_WEIGHTS, MODEL
    else:
        raise UserError(
            f"{folder.name} holds no adapter ({' and '.join(ADAPTER)}) and no model in "
            "safetensors; give the output folder of a run"
        )
    allowed = re.compile(f"{weights}|{configs}|{SETTINGS}|{TEXTS}|{VOCABULARY}")
    files: dict[str, bytes | Path] = {}
    for name in sorted(filter(allowed.fullmatch, present)):
        path = folder / name
        if name.endswith(".safetensors"):
            _check(name, "\n".join(_strings(_metadata(path))), token)
            files[name] = path
        elif re.fullmatch(VOCABULARY, name):
            _check_tokens(name, path.read_bytes().decode(errors="replace"), token)
            files[name] = path
        elif name == CARD_NAME:
            card = for_repository(_text(path), repo_id)
            _check(name, card, token)
            files[name] = card.encode()
        else:
            files[name] = _public_json(name, _text(path), token).encode()
    return files


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8: {error}; save it as UTF-8") from error


def _public_json(name: str, text: str, token: str | None) -> str:
    """The same JSON, checked; if it names folders, with their last parts alone."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}; save the run again") from error
    public = _public(content)
    _check(name, "\n".join(_strings(public)), token)
    _check_tokens(name, text, token)
    return text if public == content else json.dumps(public, indent=2) + "\n"


def _strings(value: Any) -> Iterator[str]:
    """The strings of JSON, as they are and not escaped; a chat template is the base's."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict):
        yield from value
        for key, part in value.items():
            if key != "chat_template":
                yield from _strings(part)


def _public(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _public(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_public(part, key) for part in value]
    if not (isinstance(value, str) and value and key.endswith(PLACES)):
        return value
    return public_name(value) if Path(value).is_absolute() or Path(value).is_dir() else value


def _metadata(path: Path) -> dict[str, str]:
    """What a file of tensors says beside them."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name} is damaged: {error}; save the run again") from error


def _check(name: str, text: str, token: str | None = None) -> None:
    """Refuse a text that says where on this machine something lies, or a secret."""
    _check_tokens(name, text, token)
    for variable, value in os.environ.items():
        if SECRET_NAMES.search(variable) and len(value) >= 8 and value in text:
            raise UserError(
                f"{name} holds the value of the environment variable {variable}; take it out, or "
                "unset the variable if it is no secret, and push again"
            )
    for found in ABSOLUTE.finditer(text):
        place = found[0]
        if place.startswith("/") and not _is_place(place):
            continue
        raise UserError(
            f"{name} holds {place!r}, a path of this machine; take it out, and push again"
        )


def _is_place(path: str) -> bool:
    """Whether it is a path here, or in somebody's home, and not just a text with slashes."""
    top = Path(path).parts[1]
    return top in HOMES or (top not in SYSTEM and Path("/", top).is_dir())


def _check_tokens(name: str, text: str, token: str | None) -> None:
    known = [value for value in (get_token(), token) if value and len(value) >= 8]
    if HUB_TOKEN.search(text) or any(value in text for value in known):
        raise UserError(f"{name} holds a token of the Hub; take it out, and push again")


def _size(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


@contextlib.contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Say what the Hub refuses, and what to do, in one line."""
    try:
        yield
    except (HfHubHTTPError, httpx.HTTPError, ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"{repo_id} cannot be pushed: {_refusal(error)}") from error


def _refusal(error: BaseException) -> str:
    known = (HfHubHTTPError, OfflineModeIsEnabled, httpx.TransportError)
    while not isinstance(error, known) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on; unset HF_HUB_OFFLINE"
    if isinstance(error, httpx.TransportError):
        return f"{constants.ENDPOINT} cannot be reached; check the network and HF_ENDPOINT"
    if not isinstance(error, HfHubHTTPError):
        return " ".join(str(error).split())
    status, said = error.response.status_code, error.server_message or ""
    if status == 401:
        return "the Hub does not know the token, or there is none; `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return (
            "this token may not write there; give a name of your own, or a token with the right "
            "to write"
        )
    return " ".join(f"the Hub answers {status}. {said}".split())
