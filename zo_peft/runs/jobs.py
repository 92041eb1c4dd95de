"""Run commands such as `zo-peft train` in processes of their own, and no run twice."""

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

#: The file in a run's folder that holds the options of the run.
OPTIONS_NAME = "zo_options.json"


def train(folder: Path, options: Sequence[str], command: str = "train") -> dict[str, Any]:
    """Run `zo-peft COMMAND` with these options in `folder`, and return its `zo_metrics.json`.

    The run has a process of its own, so that it measures its own time and peak memory. If a run
    with the same options has ended, it is not repeated; if it was stopped, it goes on. A UserError
    says that it fails, or that the folder holds a run with other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics, noted = folder / METRICS_NAME, folder / OPTIONS_NAME
    resumed = get_last_checkpoint(str(folder)) or (folder / JOURNAL_NAME).is_file()
    if (metrics.is_file() or resumed) and _read(noted) != list(options):
        raise UserError(f"{folder} holds a run with other options; give another --output_dir")
    if not metrics.is_file():
        write_json(noted, list(options))
        argv = [sys.executable, "-m", "zo_peft", command, *options, "--output_dir", str(folder)]
        argv += ["--resume_from_checkpoint", "True"] if resumed else []
        print(f"{folder.name}:", file=sys.stderr)
        # The run's progress and messages go to this process's stderr.
        if subprocess.run(argv, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"the run in {folder.name} failed; its message is above")
    return _read(metrics)


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def flags(options: dict[str, Any]) -> list[str]:
    """Options by name as a command line. None leaves an option out; a list is several values."""
    argv = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            argv += [f"--{name}", *(str(getattr(v, "value", v)) for v in values)]
    return argv
