"""`zo-peft doctor`: try on a tiny model what this machine can do."""

import importlib.metadata
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from zo_peft.runs import jobs
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE

#: The packages whose versions decide how a run behaves.
PACKAGES: tuple[str, ...] = ("zo_peft", "torch", "transformers", "peft", "accelerate")
PACKAGES += ("bitsandbytes", "datasets", "huggingface_hub", "safetensors", "numpy")

#: Seconds that a check may take, the start of its process included.
TIMEOUT = 300.0

#: A short run on the embedded model. It fails if ten losses in a row are not finite.
TRAIN = {
    "model_name_or_path": EMBEDDED / "model",
    "lora_target_modules": "q_proj",
    "train_file": EMBEDDED / "train.jsonl",
    "prompt_template": TEMPLATE,
    "label_words": LABEL_WORDS,
    "max_steps": 10,
    "zo_eps": 1e-2,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}

COMPILE = """
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
layer, given = torch.nn.Linear(4, 4, device=device), torch.ones(2, 4, device=device)
with torch.no_grad():
    alike = torch.allclose(torch.compile(layer)(given), layer(given), atol=1e-5)
assert alike, "a compiled layer computes something else"
"""

#: Rank 0 starts rank 1, and the two add up a number through gloo, as those of `torchrun` would.
EXCHANGE = """
import datetime, pathlib, subprocess, sys
import torch
rank, folder = sys.argv[1:]
if rank == "0":
    other = subprocess.Popen([*sys.orig_argv[:-2], "1", folder])
rendezvous, patience = pathlib.Path(folder, "rendezvous").as_uri(), datetime.timedelta(seconds=30)
torch.distributed.init_process_group("gloo", rendezvous, patience, world_size=2, rank=int(rank))
total = torch.tensor([int(rank) + 1.0])
torch.distributed.all_reduce(total)
torch.distributed.destroy_process_group()
assert total.item() == 3.0, f"1 and 2 of two processes add up to {total.item()}"
"""


@dataclass(frozen=True)
class Check:
    """Something that is tried, and what the user can do if it fails.

    Attributes:
        arguments: of Python; a temporary folder is given as one more.
    """

    arguments: Sequence[str]
    fix: str


def _training(fix: str, **options: Any) -> Check:
    return Check(("-m", "zo_peft", "train", *jobs.flags(TRAIN | options), "--output_dir"), fix)


BITSANDBYTES = "pip install --upgrade bitsandbytes; it must know the CUDA of torch.version.cuda."

CHECKS = {
    "float32": _training("Install the package again: pip install --force-reinstall zo_peft."),
    "bfloat16": _training("Load models with --dtype float32.", dtype="bfloat16"),
    "int8": _training(f"{BITSANDBYTES} Without it: no --load_in_8bit.", load_in_8bit=True),
    "NF4": _training(f"{BITSANDBYTES} Without it: no --load_in_4bit.", load_in_4bit=True),
    "compile": Check(
        ("-c", COMPILE),
        "A C++ compiler is needed (g++, as in Debian's build-essential), on CUDA Triton as well. "
        "Without: no --torch_compile.",
    ),
    "distributed": Check(
        ("-c", EXCHANGE, "0"),
        "Name the network interface that reaches the other processes: GLOO_SOCKET_IFNAME=lo on one "
        "machine (lo0 on macOS). Without: one process.",
    ),
}


def doctor() -> dict[str, Any]:
    """Find out which versions and devices are here, and which `CHECKS` work.

    Returns:
        `versions` by package, `devices`, and `checks` by name: `works`, and if it does not, `error`
        and `fix`.
    """
    checks: dict[str, dict[str, Any]] = {}
    for name, check in CHECKS.items():
        print(f"trying {name} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            error = attempt([*check.arguments, folder])
        checks[name] = {"works": error is None}
        if error is not None:
            checks[name] |= {"error": public(error), "fix": check.fix}
    versions = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    return {"versions": versions, "devices": _devices(), "checks": checks}


def attempt(arguments: Sequence[str], timeout: float = TIMEOUT) -> str | None:
    """Run Python, which may die or hang; returns what went wrong, None if nothing did."""
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=timeout,
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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    memory = psutil.virtual_memory().total / 2**30
    found = [f"CPU ({platform.machine()}), {torch.get_num_threads()} threads, {memory:.0f} GiB"]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.append(f"CUDA {index}: {card.name}, {card.total_memory / 2**30:.0f} GiB")
    return found + (["MPS"] if torch.backends.mps.is_available() else [])
