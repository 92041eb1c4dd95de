"""`zo-peft doctor`: try on a tiny model what this machine can do."""

import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from zo_peft import __version__
from zo_peft.engines.engine import installed, version_of
from zo_peft.runs import jobs
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE

#: Seconds that a check may take, the start of its process included.
TIMEOUT = 300.0

TABLE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("doctor.yaml").read_bytes())
CHECKS: dict[str, dict[str, Any]] = TABLE["checks"]

TRAIN = {
    "model_name_or_path": EMBEDDED / "model",
    "train_file": EMBEDDED / "train.jsonl",
    "prompt_template": TEMPLATE,
    "label_words": LABEL_WORDS,
    **TABLE["run"],
}


def doctor() -> dict[str, Any]:
    """Find out which versions and devices are here, and which checks of `doctor.yaml` work.

    It returns `versions` by package, those of `engines` (None: not installed), `devices`, and
    `checks` by name: `works`, and if it does not, `error` and `fix`.
    """
    checks: dict[str, dict[str, Any]] = {}
    for name, check in CHECKS.items():
        print(f"trying {name} ...", file=sys.stderr)
        if "code" in check:
            arguments = ["-c", check["code"], *check["arguments"]]
        else:
            options = jobs.flags(TRAIN | check["options"])
            arguments = ["-m", "zo_peft", "train", *options, "--output_dir"]
        with tempfile.TemporaryDirectory() as folder:
            error = attempt([*arguments, folder])
        checks[name] = {"works": error is None}
        if error is not None:
            checks[name] |= {"error": public(error), "fix": check["fix"]}
    versions: dict[str, str | None] = {"python": platform.python_version(), "zo_peft": __version__}
    versions |= {package: version_of(package) for package in TABLE["packages"]}
    memory = psutil.virtual_memory().total / 2**30
    devices = [f"CPU ({platform.machine()}), {torch.get_num_threads()} threads, {memory:.0f} GiB"]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        devices.append(f"CUDA {index}: {card.name}, {card.total_memory / 2**30:.0f} GiB")
    devices += ["MPS"] if torch.backends.mps.is_available() else []
    found = {"versions": versions, "engines": installed(), "devices": devices}
    return found | {"checks": checks}


def attempt(arguments: Sequence[str], timeout: float = TIMEOUT) -> str | None:
    """Run Python, which may die or hang; returns what went wrong, None if nothing did."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, errors="replace", timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:.0f} s"
    said = done.stderr.strip().splitlines()
    # 1 is the exit code of an exception, 2 that of an error of zo-peft: the last line tells it.
    if done.returncode in (1, 2) and said:
        return said[-1]
    return f"the process died with exit code {done.returncode}" if done.returncode else None


def public(message: str) -> str:
    """Return a message without this machine's folders and name."""
    name = platform.node()
    shown = re.sub(
        r"(?<![\w/:.])(?:[A-Za-z]:)?(?:[\\/][^\s\\/:'\"]+)*[\\/](?=[^\s\\/])", "", message
    )
    return shown.replace(name, "this machine") if name else shown
