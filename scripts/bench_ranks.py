"""How much faster a step is with two processes: candidates in parallel on the embedded model.

Runs of one process and of two, each of one thread, alternate; a run's figure is the median time
of its steps. Both evaluate several candidates in one forward.

    python scripts/bench_ranks.py
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from statistics import median
from typing import Any

import torch
from bench_cost import StepClock
from peft import LoraConfig

from zo_peft import ZOConfig, ZOTrainer
from zo_peft.data import make_examples, read_rows
from zo_peft.demo import EMBEDDED, LABEL_WORDS, TEMPLATE


def run(parallel: Any, steps: int, batch_size: int, candidates: int, shared: bool) -> None:
    """Train, in this process as one of those that the environment says; rank 0 prints the time."""
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    rows = read_rows(EMBEDDED / "train.jsonl")[:400]
    examples = make_examples(rows, "train", TEMPLATE, label_words=LABEL_WORDS.split(","))
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(
            folder,
            parallel=parallel,
            max_steps=steps,
            per_device_train_batch_size=batch_size // (ranks if parallel == "data" else 1),
            num_candidates=candidates,
            per_example_noise=not shared,
            zo_eps=1e-2,
            save_strategy="no",
            logging_steps=steps,
            disable_tqdm=True,
            use_cpu=True,
            report_to="none",
        )
        lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
        trainer = ZOTrainer(str(EMBEDDED / "model"), args, train_dataset=examples, peft_config=lora)
        clock = StepClock(trainer.model)
        trainer.add_callback(clock)
        trainer.train()
    if args.process_index == 0:
        sent = trainer.ranks.wire_bytes / steps if trainer.ranks else 0
        print("RESULT", json.dumps([median(clock.steps[3:]), sent]))


def measured(count: int, argv: list[str]) -> list[float]:
    """Seconds a step, and bytes that a process sends in it, of so many processes."""
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
        command = [sys.executable, "-W", "ignore", __file__, "--child", *argv]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
    printed = [process.communicate()[0] for process in processes][0]
    line = next(line for line in printed.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT "))


def main() -> None:
    """Print a row for each round and the median; with `--child`, be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parallel", choices=["candidates", "data"], default="candidates")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--shared", action="store_true", help="examples share their candidates")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run(given.parallel, given.steps, given.batch_size, given.candidates, given.shared)
        return
    argv = sys.argv[1:]
    print("| processes 1, s | processes 2, s | ratio | bytes a candidate, process and step |")
    print("|" + " --- |" * 4)
    ratios = []
    for _ in range(given.rounds):
        (one, _), (two, sent) = measured(1, argv), measured(2, argv)
        ratios.append(one / two)
        each = sent / given.candidates
        print(f"| {one:.4f} | {two:.4f} | {one / two:.2f} | {each:.0f} |", flush=True)
    print(f"median ratio {median(ratios):.2f}")


if __name__ == "__main__":
    main()
