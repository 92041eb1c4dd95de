"""What goes up to the Hub: files of an allow-list, in one commit, unless one holds a token."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from zo_peft.errors import UserError, explained
from zo_peft.models.hub import httpx, public_name
from zo_peft.train.card import CARD_NAME, for_repository

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
#: A whole model, in one file or in shards; and the scales of one.
MODEL = r"(config|generation_config|model\.safetensors\.index)\.json"
MODEL_WEIGHTS = r"(model|model-\d+-of-\d+|zo_scales)\.safetensors"
#: JSON that this package or transformers writes for a run.
SETTINGS = r"(tokenizer_config|special_tokens_map|added_tokens|zo_metrics)\.json"
#: Files of the base's tokenizer, which go up unchanged.
VOCABULARY = (
    r"(tokenizer|vocab)\.json|(vocab|merges)\.txt|(tokenizer|spiece|sentencepiece.*)\.model|"
    r"chat_template\.jinja"
)

#: JSON keys with these endings may name folders or files, of which only the last part goes up.
PLACES = ("name_or_path", "_file", "_dir", "_path")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")

#: What answers of the Hub mean.
REMEDIES = {
    401: "the Hub does not know the token, or there is none; `hf auth login`, or set HF_TOKEN",
    403: "this token may not write there; give a name of your own, or a token that may",
}


def create_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Make a repository unless it exists, and return its whole name.

    A UserError says that the Hub refuses, or that there is a public one in spite of `private`.
    """
    api = HfApi(token=token)
    with hub_errors(repo_id):
        made = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(made).private:
            advice = "make it private in its settings on the Hub, or give another name"
            raise UserError(f"{made} is there already and is public; {advice}")
    return made


def upload(
    folder: Path,
    repo_id: str,
    commit_message: str,
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Commit the public files of a folder to a branch of a repository; a new branch is made.

    A UserError says that the Hub refuses, that there is nothing to send, or that a file holds a
    token. Without `token`, it is that of the environment or of `hf auth login`.
    """
    files = public_files(folder, repo_id, token)
    check_tokens("commit_message", commit_message, token)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api = HfApi(token=token)
    with hub_errors(repo_id):
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision
        )


def public_files(folder: Path, repo_id: str, token: str | None = None) -> dict[str, bytes | Path]:
    """Return what goes up by file name: the file itself, or its new content if that is changed.

    JSON names folders by their last part alone, and the card loads from `repo_id`. A UserError says
    that there is neither an adapter nor a model, or that a file is damaged or holds a token.
    """
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if set(ADAPTER) <= present:
        weights, configs = re.escape(ADAPTER[1]), re.escape(ADAPTER[0])
    elif any(re.fullmatch(r"model.*\.safetensors", name) for name in present):
        weights, configs = MODEL_WEIGHTS, MODEL
    else:
        what = f"no adapter ({' and '.join(ADAPTER)}) and no model in safetensors"
        raise UserError(f"{folder.name} holds {what}; give the output folder of a run")
    allowed = re.compile(f"{weights}|{configs}|{SETTINGS}|{re.escape(CARD_NAME)}|{VOCABULARY}")
    files: dict[str, bytes | Path] = {}
    for name in sorted(filter(allowed.fullmatch, present)):
        errors, advice = (OSError, ValueError, SafetensorError), "save the run again"
        with explained(f"{name} cannot be read", *errors, advice=advice):
            files[name], text = _content(folder / name, repo_id)
        check_tokens(name, text, token)
    return files


def _content(path: Path, repo_id: str) -> tuple[bytes | Path, str]:
    """What goes up of a file, and the text in which a token is looked for."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return path, json.dumps(file.metadata())
    if re.fullmatch(VOCABULARY, path.name):
        return path, path.read_bytes().decode(errors="replace")
    text = path.read_text(encoding="utf-8")
    if path.name == CARD_NAME:
        text = for_repository(text, repo_id)
    elif (public := _public(content := json.loads(text))) != content:
        text = json.dumps(public, indent=2) + "\n"
    return text.encode(), text


def _public(value: Any, key: str = "") -> Any:
    """The same JSON value, in which folders of this machine are named by their last part."""
    if isinstance(value, dict):
        return {name: _public(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_public(part, key) for part in value]
    if not (isinstance(value, str) and value and key.endswith(PLACES)):
        return value
    return public_name(value) if Path(value).is_absolute() or Path(value).is_dir() else value


def check_tokens(name: str, text: str, token: str | None = None) -> None:
    """Refuse a text that holds `token`, the token of the environment, or what looks like one."""
    known = [value for value in (get_token(), token) if value]
    if HUB_TOKEN.search(text) or any(value in text for value in known):
        raise UserError(f"{name} holds a token of the Hub; take it out, and push again")


@contextlib.contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn a refusal of the Hub into a `UserError` of one line that says what to do."""
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
    if (status := error.response.status_code) in REMEDIES:
        return REMEDIES[status]
    return " ".join(f"the Hub answers {status}. {error.server_message or ''}".split())
