"""Runs of `zo-peft train` in processes of their own, none of which is made twice."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from zo_peft.core.journal import JOURNAL_NAME
from zo_peft.errors import UserError
from zo_peft.train.results import METRICS_NAME, write_json

#: The options that a folder's run was started with.
OPTIONS_NAME = "zo_options.json"


def train(folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """The contents of `zo_metrics.json` of `zo-peft train` with these options, in `folder`.

    A process of its own, so that time and peak memory are the run's alone. A run of the same
    options that has ended is not made again; one that was stopped goes on.

    Raises:
        UserError: the run fails, or the folder holds one with other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics, noted = folder / METRICS_NAME, folder / OPTIONS_NAME
    resumed = get_last_checkpoint(str(folder)) or (folder / JOURNAL_NAME).is_file()
    if (metrics.is_file() or resumed) and _read(noted) != list(options):
        raise UserError(
            f"{folder} holds a run with other options; remove it or give another --output_dir"
        )
    if not metrics.is_file():
        write_json(noted, list(options))
        further = ["--output_dir", str(folder)]
        further += ["--resume_from_checkpoint", "True"] if resumed else []
        command = [sys.executable, "-m", "zo_peft", "train", *options, *further]
        print(f"{folder.name}:", file=sys.stderr)
        # Its progress and its messages go where this process's go.
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f"the run in {folder.name} failed; its message is above")
    return _read(metrics)


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def flags(options: dict[str, Any]) -> list[str]:
    """Options by name as a command line; None leaves one out, lists have several values."""
    argv = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            argv += [f"--{name}", *map(str, values)]
    return argv


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
