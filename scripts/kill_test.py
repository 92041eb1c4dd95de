"""Runs that are killed at random moments and then resumed end as one that was left alone.

Each run trains the embedded model in a process of its own. The process is forked from this one,
which has imported everything, so that a run takes seconds. It is killed with SIGKILL at a random
moment, every third run twice, and then resumed to its end. The adapters are compared byte by byte.

    python scripts/kill_test.py --runs 50
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import disable_progress_bars
from peft import LoraConfig
from transformers.utils import logging
from workloads import texts

from zo_peft import ZOConfig, ZOTrainer
from zo_peft.tools.demo import EMBEDDED

ADAPTER = "adapter_model.safetensors"


def train(folder: Path, steps: int) -> None:
    """Train with checkpoints; a run that is there already goes on where it was."""
    args = ZOConfig(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=7,
        save_total_limit=2,
        logging_steps=5,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    trainer = ZOTrainer(
        str(EMBEDDED / "model"), args, train_dataset=texts("train")[:200], peft_config=lora
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


def forked(folder: Path, steps: int, kill_after: float | None = None) -> tuple[int, float]:
    """Train in a forked process; its exit code, which is minus a signal's number, and seconds."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            train(folder, steps)
        except BaseException as error:
            (folder.parent / "error.txt").write_text(repr(error))
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, time.monotonic() - start


def main() -> int:
    """Print a line for each run; returns 1 if one of them ends with another adapter."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.set_verbosity_error()
    moments, same, longest = random.Random(given.seed), 0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        code, seconds = forked(whole, given.steps)
        if code:
            raise SystemExit((Path(scratch) / "error.txt").read_text())
        expected = (whole / ADAPTER).read_bytes()
        for number in range(given.runs):
            folder = Path(scratch) / f"run-{number}"
            kills: list[float] = []
            while len(kills) < 1 + (number % 3 == 2):
                after = moments.uniform(0, seconds)
                if forked(folder, given.steps, after)[0] == -signal.SIGKILL:
                    kills.append(after)
                else:  # The run was faster than the first one and has ended: start it anew.
                    shutil.rmtree(folder)
                    kills.clear()
            code, last = forked(folder, given.steps)
            longest = max(longest, last, *kills)
            equal = code == 0 and (folder / ADAPTER).read_bytes() == expected
            same += equal
            times = " and ".join(f"{after:.2f} s" for after in kills)
            print(f"run {number}: killed after {times}: {'same' if equal else 'DIFFERENT'}")
            sys.stdout.flush()
    print(f"{same} of {given.runs} the same; a run took {seconds:.1f} s, at most {longest:.1f} s")
    return int(same < given.runs)


if __name__ == "__main__":
    sys.exit(main())
