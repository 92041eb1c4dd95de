"""`zo-peft doctor`: what works on this machine, each tried on a tiny model."""

import importlib.metadata
import math
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from zo_peft.runs import jobs
from zo_peft.tools.demo import EMBEDDED
from zo_peft.train.config import ZOConfig
from zo_peft.train.trainer import ZOTrainer

#: What a run depends on.
PACKAGES = (
    "zo_peft",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "numpy",
)

#: Seconds for one attempt, and for the start of a process.
TIMEOUT, START = 120.0, 300.0


def train_a_step(**model_init_kwargs: Any) -> None:
    """Tune a LoRA on the embedded model for one step.

    Raises:
        RuntimeError: the loss is not finite.
    """
    row = {"prompt": "A fine film. It was", "options": ["terrible", "great"], "label": 1}
    with tempfile.TemporaryDirectory() as folder:
        trainer = ZOTrainer(
            str(EMBEDDED / "model"),
            ZOConfig(
                folder,
                max_steps=1,
                zo_eps=1e-2,
                per_device_train_batch_size=2,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                model_init_kwargs=model_init_kwargs,
            ),
            train_dataset=[row, row],
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
        )
        loss = trainer.train().training_loss
    if not math.isfinite(loss):
        raise RuntimeError(f"a step's loss is {loss}")


def quantized(**settings: Any) -> None:
    """`train_a_step` on a base that bitsandbytes quantizes."""
    train_a_step(quantization_config=BitsAndBytesConfig(**settings))


def compile_a_layer() -> None:
    """Compile a layer of four numbers.

    Raises:
        RuntimeError: it computes something else than before.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer, given = torch.nn.Linear(4, 4, device=device), torch.ones(2, 4, device=device)
    with torch.no_grad():
        if not torch.allclose(torch.compile(layer)(given), layer(given), atol=1e-5):
            raise RuntimeError("a compiled layer computes something else")


#: One of two processes that add up a number; it takes its rank and where they meet.
RANK = """
import datetime, sys
import torch
rank, where = int(sys.argv[1]), sys.argv[2]
patience = datetime.timedelta(seconds=30)
torch.distributed.init_process_group("gloo", where, patience, world_size=2, rank=rank)
total = torch.tensor([rank + 1.0])
torch.distributed.all_reduce(total)
torch.distributed.destroy_process_group()
assert total.item() == 3.0, f"1 and 2 of two processes add up to {total.item()}"
"""


def exchange() -> None:
    """Add up a number of two processes through gloo, as those of `torchrun` would.

    Raises:
        RuntimeError: they do not come to its sum.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "rendezvous").as_uri()
        command = [sys.executable, "-c", RANK]
        ranks = [
            subprocess.Popen([*command, str(rank), where], stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        errors = [rank.communicate()[1] for rank in ranks]
    for rank, error in zip(ranks, errors):
        if rank.returncode:
            raise RuntimeError(error)


@dataclass(frozen=True)
class Check:
    """What is tried, and what to do where it raises."""

    attempt: Callable[[], None]
    fix: str


BITSANDBYTES = "pip install --upgrade bitsandbytes; it must know the CUDA of torch.version.cuda."

CHECKS = {
    "float32": Check(
        train_a_step, "Install the package again: pip install --force-reinstall zo_peft."
    ),
    "bfloat16": Check(
        partial(train_a_step, dtype=torch.bfloat16), "Load models with --dtype float32."
    ),
    "int8": Check(
        partial(quantized, load_in_8bit=True),
        f"{BITSANDBYTES} Without it: no --load_in_8bit.",
    ),
    "NF4": Check(
        partial(quantized, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        f"{BITSANDBYTES} Without it: no --load_in_4bit.",
    ),
    "compile": Check(
        compile_a_layer,
        "A C++ compiler is needed (g++, as in Debian's build-essential), on CUDA Triton as well. "
        "Without: no --torch_compile.",
    ),
    "distributed": Check(
        exchange,
        "Name the network interface that reaches the other processes: GLOO_SOCKET_IFNAME=lo on one "
        "machine (lo0 on macOS). Without: one process.",
    ),
}


def doctor(names: Sequence[str] = tuple(CHECKS)) -> dict[str, Any]:
    """Versions, devices, and what works here.

    Returns:
        `versions` by package, `devices`, and `checks` by name: `works`, and where it does not,
        `error` and `fix`.
    """
    checks: dict[str, dict[str, Any]] = {}
    for name, error in attempts({name: CHECKS[name].attempt for name in names}):
        checks[name] = {"works": error is None}
        if error is not None:
            checks[name] |= {"error": public(error), "fix": CHECKS[name].fix}
    return {
        "versions": {"python": platform.python_version(), **dict(_versions())},
        "devices": _devices(),
        "checks": checks,
    }


def attempts(
    checks: Mapping[str, Callable[[], None]], timeout: float = TIMEOUT
) -> Iterator[tuple[str, str | None]]:
    """Try each in another process, which may die or hang; yields its name and its error, if any."""
    context = multiprocessing.get_context("spawn")
    rest = list(checks)
    while rest:
        receiver, sender = context.Pipe(duplex=False)
        own = [checks[name] for name in rest]
        process = context.Process(target=_attempts, args=(own, sender))
        process.start()
        sender.close()
        alive, patience = True, START + timeout
        while rest and alive:
            print(f"trying {rest[0]} ...", file=sys.stderr)
            try:
                alive = receiver.poll(patience)
                error = receiver.recv() if alive else f"no answer within {timeout:.0f} s"
            except EOFError:
                process.join()
                alive, error = False, f"the process died with exit code {process.exitcode}"
            yield rest.pop(0), error
            patience = timeout
        _end(process)


def _attempts(checks: Sequence[Callable[[], None]], sender: Connection) -> None:
    """In the other process: send for each the last line of its error, or None."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    for attempt in checks:
        try:
            attempt()
            sender.send(None)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            sender.send(f"{type(error).__name__}: {lines[-1]}")


def _end(process: Any) -> None:
    """End a process and those that it started."""
    try:
        family = [
            *psutil.Process(process.pid).children(recursive=True),
            psutil.Process(process.pid),
        ]
    except psutil.NoSuchProcess:
        family = []
    process.join(1)
    for member in family:
        if member.is_running():
            member.kill()
    process.join()


def public(message: str) -> str:
    """A message without folders of this machine or its name."""
    name = platform.node()
    shown = re.sub(
        r"(?<![\w/:.])(?:[A-Za-z]:)?(?:[\\/][^\s\\/:'\"]+)*[\\/](?=[^\s\\/])", "", message
    )
    return shown.replace(name, "this machine") if name else shown


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"


def _devices() -> list[str]:
    memory = psutil.virtual_memory().total / 2**30
    found = [f"CPU ({platform.machine()}), {torch.get_num_threads()} threads, {memory:.0f} GiB"]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.append(f"CUDA {index}: {card.name}, {card.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("MPS")
    return found


def doctor_text(result: dict[str, Any]) -> str:
    """The result of `doctor` as tables, and what to do about what does not work."""
    versions = jobs.table(["package", "version"], list(result["versions"].items()))
    rows, fixes = [], []
    for name, check in result["checks"].items():
        rows.append([name, "works" if check["works"] else "does not work"])
        if not check["works"]:
            fixes.append(f"{name}: {check['error']}\n  {check['fix']}")
    devices = "\n".join(result["devices"])
    return "\n\n".join([versions, devices, jobs.table(["on this machine", ""], rows), *fixes])
