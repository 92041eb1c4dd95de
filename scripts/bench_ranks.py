"""How much faster a step is with two processes: candidates in parallel on the embedded model.

A run of one process and a run of two, each process with one thread, take turns of a few seconds, in
which the other run is stopped, so that both meet the machine as it is. A turn's figure is the
median time from the end of a step to the end of the next one. Both runs evaluate several candidates
in one forward.

    python scripts/bench_ranks.py
"""

import argparse
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from measuring import SILENT, print_header, print_row
from peft import LoraConfig
from transformers import TrainerCallback
from workloads import texts

from zo_peft import ZOConfig, ZOTrainer
from zo_peft.tools.demo import EMBEDDED


class Reports(TrainerCallback):
    """Prints at the end of every step how many bytes the process has sent so far."""

    def __init__(self, trainer: ZOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Print the line that the measuring process waits for."""
        print("STEP", self.trainer.ranks.wire_bytes, flush=True)


def run(folder: Path, parallel: Any, batch_size: int, candidates: int, shared: bool) -> None:
    """Train without end, in this process as one of those that the environment says."""
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    args = ZOConfig(
        str(folder),
        strategy="gv",
        parallel=parallel,
        max_steps=1_000_000,
        per_device_train_batch_size=batch_size // (ranks if parallel == "data" else 1),
        num_candidates=candidates,
        per_example_noise=not shared,
        zo_eps=1e-2,
        use_cpu=True,
        **SILENT,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    trainer = ZOTrainer(
        str(EMBEDDED / "model"), args, train_dataset=texts("train")[:400], peft_config=lora
    )
    trainer.add_callback(Reports(trainer))
    trainer.train()


def started(count: int, folder: Path, argv: list[str]) -> list[subprocess.Popen[str]]:
    """The processes of one run, so many of them; the first one's standard output is a pipe."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    processes = []
    for rank in range(count):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if count > 1:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            values = (str(rank), str(rank), str(count), "localhost", port)
            environment |= dict(zip(names, values))
        command = [sys.executable, "-W", "ignore", __file__, "--child", str(folder), *argv]
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        devnull = subprocess.DEVNULL
        processes.append(
            subprocess.Popen(command, env=environment, stdout=out, stderr=devnull, text=True)
        )
    return processes


def turn(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[float, int]]:
    """Seconds of each whole step of a run, and the bytes sent in it.

    The run goes on for so many seconds, and if it has made no whole step in them until it has.
    """
    for process in processes:
        process.send_signal(signal.SIGCONT)
    out = processes[0].stdout
    assert out is not None
    ends, stop = list[tuple[float, int]](), time.monotonic() + seconds
    while (left := stop - time.monotonic()) > 0 or len(ends) < 2:
        if select.select([out], [], [], left if len(ends) > 1 else None)[0]:
            line = out.readline()
            if not line:
                raise SystemExit("a run has ended; see what it says with --child")
            if line.startswith("STEP"):
                ends.append((time.monotonic(), int(line.split()[1])))
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    return [(end - start, sent - before) for (start, before), (end, sent) in pairwise(ends)]


def main() -> None:
    """Print medians, the ratio and its quartiles; with `--child`, be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parallel", choices=["candidates", "data"], default="candidates")
    parser.add_argument("--turns", type=int, default=25, help="of each run; at least 2")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--shared", action="store_true", help="examples share their candidates")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run(given.child, given.parallel, given.batch_size, given.candidates, given.shared)
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = [started(count, Path(folder) / f"{count}", sys.argv[1:]) for count in (1, 2)]
        try:
            for processes in runs:
                turn(processes, given.seconds)  # the first steps are a warm-up
            seconds: list[list[float]] = [[], []]
            for _ in range(given.turns):
                for found, processes in zip(seconds, runs):
                    taken, sent = zip(*turn(processes, given.seconds))
                    found.append(median(taken))
        finally:
            for process in (process for processes in runs for process in processes):
                process.kill()
                process.wait()
    ratios = [one / two for one, two in zip(*seconds)]
    low, middle, high = quantiles(ratios, n=4)
    each = median(sent) / given.candidates
    print_header("processes 1, s", "processes 2, s", "ratio", "quartiles", "bytes")
    one, two = map(median, seconds)
    print_row(
        f"{one:.4f}", f"{two:.4f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{each:.0f}"
    )
    print("The bytes are those of a candidate, process and step.")


if __name__ == "__main__":
    main()
