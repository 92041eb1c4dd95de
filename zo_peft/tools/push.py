"""`zo-peft push`: a folder's adapter, or its model, on the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id
from transformers.hf_argparser import HfArg

from zo_peft.train.upload import check_tokens, create_repository, hub_errors, public_files, upload


@dataclass
class PushArguments:
    """What is pushed, and where to."""

    folder: str = HfArg(help="A run's output folder, or one that merge wrote.")
    repo_id: str = HfArg(help="The model's name on the Hub: name, or owner/name.")
    private: bool = HfArg(default=False, help="Only you may see a new repository.")
    revision: str | None = HfArg(
        default=None, help="Branch to push to; made if there is none. Default: main."
    )
    commit_message: str = HfArg(default="Upload with zo_peft", help="What the commit says.")
    dry_run: bool = HfArg(default=False, help="Only show what would go up; nothing is sent.")


def push(given: PushArguments) -> dict[str, Any]:
    """Upload a folder's adapter, or its model, with tokenizer, card and metrics.

    Returns `repo_id`, `revision`, `private`, `files` (each with `name` and `size` in bytes), the
    sum of their sizes as `bytes`, and the `url` of the commit, which is None for a dry run. A
    UserError says that there is nothing to push, a file holds a token, or the Hub refuses it.
    """
    folder = Path(given.folder)
    with hub_errors(given.repo_id):
        validate_repo_id(given.repo_id)
    files = public_files(folder, given.repo_id)
    check_tokens("commit_message", given.commit_message)
    sizes = [len(c) if isinstance(c, bytes) else c.stat().st_size for c in files.values()]
    result = {
        "repo_id": given.repo_id,
        "revision": given.revision or constants.DEFAULT_REVISION,
        "private": given.private,
        "files": [{"name": name, "size": size} for name, size in zip(files, sizes)],
        "bytes": sum(sizes),
        "url": None,
    }
    if given.dry_run:
        return result
    repo_id = create_repository(given.repo_id, given.private or None)
    commit = upload(folder, repo_id, given.commit_message, given.revision)
    return {**result, "repo_id": repo_id, "url": commit.commit_url}
