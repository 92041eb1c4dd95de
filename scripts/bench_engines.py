"""What engines take for the losses of candidates beside PyTorch, and what they learn.

The first table is of the same work: 8 LoRAs on 16 prompts each, in CPU seconds, the same prompts
without a LoRA, and which share of the time is spent around the engine. The second table is of runs
on the embedded task. Engines whose packages are missing are left out; int4 needs nncf. vLLM needs
an environment of its own, because it pins other versions; with its Python, a server is started for
the time of the measurements.

    python scripts/bench_engines.py
    python scripts/bench_engines.py --size 100M --forward_passes 0
    python scripts/bench_engines.py --size 100M --forward_passes 0 --per_example
    python scripts/bench_engines.py --engines --vllm_python /path/to/vllm/environment/bin/python
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import torch
from convert import write_gguf, write_openvino
from measuring import SILENT, print_header, print_row, quiet, random_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from zo_peft.core.direction import Direction
from zo_peft.core.flat_space import FlatSpace
from zo_peft.data.collate import Collator
from zo_peft.engines.served import evaluator_of as served_evaluator_of
from zo_peft.engines.served import load_served, rows_of
from zo_peft.models.adapters import tuned_parameters
from zo_peft.models.recipe import evaluator_of
from zo_peft.objectives.scoring import CompletionObjective
from zo_peft.runs import run
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE
from zo_peft.train.config import ZOConfig

#: What each engine needs, how a base gets its form, and the types of its matrices.
ENGINES: dict[Any, tuple[list[str], Callable[..., None], list[str]]] = {
    "llamacpp": (["xllamacpp", "gguf"], write_gguf, ["F32", "Q4_0", "Q4_K"]),
    "openvino": (["openvino", "nncf"], write_openvino, ["f32", "int4"]),
}

#: Kinds whose matrices are not rounded.
FLOAT = {"F32", "f32"}

#: A server of vLLM: what it is started with, where it is, and the seconds until it has started.
VLLM = "--enable-lora --max-loras 16 --max-lora-rank 8 --max-model-len 256 --dtype float32"
VLLM += " --enforce-eager --host 127.0.0.1 --port 8193"
VLLM_ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
VLLM_URL, VLLM_STARTS = "http://127.0.0.1:8193", 300

LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
CANDIDATES, PROMPTS, LENGTH = 8, 16, 32

#: Measurements of each evaluator, of which the least counts.
ROUNDS = 3
MODEL = str(EMBEDDED / "model")


@contextlib.contextmanager
def vllm_server(python: str, model: str) -> Iterator[None]:
    """Within the context, a server of vLLM has the model."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *VLLM.split()]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own |= VLLM_ENVIRONMENT
    # In a session of its own, so that its workers end with it.
    with subprocess.Popen(command, env=own, stdout=sys.stderr, start_new_session=True) as server:
        try:
            end = time.monotonic() + VLLM_STARTS
            while not _is_up():
                if server.poll() is not None or time.monotonic() > end:
                    sys.exit(f"no server has started at {VLLM_URL}; what it says stands above")
                time.sleep(1)
            yield
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def _is_up() -> bool:
    try:
        return urlopen(f"{VLLM_URL}/health").status == 200
    except (URLError, ConnectionError):
        return False


def llama_100m() -> LlamaForCausalLM:
    """91 million random numbers."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    sizes |= {"num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 8192}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


class Clock:
    """The least CPU seconds of some calls, and their share around the engine."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seconds, self.around = engine, float("inf"), 0.0

    def __call__(self, function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        """What the function returns."""
        inside = self.engine.seconds if self.engine else 0.0
        start, clock = time.process_time(), time.perf_counter()
        result = function(*arguments)
        spent, wall = time.process_time() - start, time.perf_counter() - clock
        if spent < self.seconds:
            self.seconds = spent
            self.around = 1 - (self.engine.seconds - inside) / wall if self.engine else 0.0
        return result


@torch.no_grad()
def speed(model: Any, bases: dict[tuple[Any, str], str], folder: str, per_example: bool) -> None:
    """Print the table of the same work."""
    batch = Collator(0)(random_rows(PROMPTS, LENGTH))
    own = get_peft_model(model, LORA).eval()
    objective = CompletionObjective()
    tuned = tuned_parameters(own)
    evaluators = {"PyTorch float32": evaluator_of(own, FlatSpace(tuned), objective)}
    engines = {}
    for (engine, kind), path in bases.items():
        servers = {"urls": [VLLM_URL], "folder": None, "timeout": 120.0}
        served = get_peft_model(load_served(path, engine, folder, **servers)[0], LORA)
        for key, parameter in tuned_parameters(served).items():
            parameter.data.copy_(tuned[key])
        space = FlatSpace(tuned_parameters(served))
        name = f"{engine} {kind}"
        evaluators[name] = served_evaluator_of(served, space, objective)
        engines[name] = served.get_base_model().engine
    full, bare = ({name: Clock(engines.get(name)) for name in evaluators} for _ in range(2))
    seeds = torch.arange(CANDIDATES * PROMPTS).view(CANDIDATES, -1)
    seeds = seeds if per_example else seeds[:, :1]
    points = [[0.1 * Direction.of(seed) for seed in own] for own in seeds.tolist()]
    rows, losses = [rows_of(batch)] * CANDIDATES, {}
    for name, evaluator in evaluators.items():
        for _ in range(ROUNDS):
            losses[name] = full[name](evaluator.batch_losses, points, batch)
            if name in engines:
                bare[name](engines[name].answer, {}, rows)
    columns = "CPU s", "without LoRA", "times PyTorch's speed", "around the engine", "off by, nats"
    print_header("evaluator", *columns)
    ours, expected = full["PyTorch float32"].seconds, losses["PyTorch float32"]
    print_row("PyTorch float32", f"{ours:.2f}", "", "1.0", "", "")
    for name in engines:
        spent, around = full[name].seconds, f"{100 * full[name].around:.0f}%"
        row = f"{spent:.2f}", f"{bare[name].seconds:.2f}", f"{ours / spent:.2f}"
        if name.startswith("vllm"):  # Its seconds are those of another process.
            row = "", "", ""
        is_float = name.split()[1] in FLOAT
        off = f"{(losses[name] - expected).abs().max():.1e}" if is_float else ""
        print_row(name, *row, around, off)


def learn(bases: dict[tuple[Any, str], str], forward_passes: int, folder: Path) -> None:
    """Print the table of runs on the embedded task, on quantized bases or through a server."""
    columns = "forward passes", "accuracy", "adapters put in place", "s in the engine", "s in all"
    print_header("engine", *columns)
    data = DataArguments(
        train_file=str(EMBEDDED / "train.jsonl"),
        eval_file=str(EMBEDDED / "test.jsonl"),
        prompt_template=TEMPLATE,
        label_words=[LABEL_WORDS],
    )
    for (engine, kind), path in bases.items():
        if kind in FLOAT and engine != "vllm":
            continue
        settings = {"engine": engine, "tokenizer_name": MODEL, "engine_reference": MODEL, **SILENT}
        settings["engine_url"] = [VLLM_URL] if engine == "vllm" else None
        args = ZOConfig(
            str(folder / f"run-{engine}"),
            max_forward_passes=forward_passes,
            per_device_train_batch_size=16,
            **settings,
        )
        given = ModelArguments(path, lora_target_modules=["q_proj", "v_proj"])
        with contextlib.redirect_stdout(sys.stderr):
            told = run.train(given, data, args)
        accuracy = f"{told['metric_before']:.4f} -> {told['metric_after']:.4f}"
        spent = told["engine"]
        seconds = f"{spent['seconds']:.1f}", f"{spent['training_seconds']:.1f}"
        counts = f"{told['forward_passes']:,}", accuracy, f"{spent['swaps']:,}"
        print_row(f"{engine} {kind}", *counts, *seconds)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=["embedded", "100M"], default="embedded")
    parser.add_argument("--engines", nargs="*", choices=[*ENGINES], default=[*ENGINES])
    parser.add_argument("--types", nargs="*", help="Of the matrices: F32, Q4_K ...; default: all.")
    parser.add_argument("--per_example", action="store_true", help="Each example has own LoRAs.")
    parser.add_argument("--vllm_python", help="Of the environment of vLLM.")
    parser.add_argument("--forward_passes", type=int, default=400, help="Of a run; 0: no run.")
    given = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder, bases = Path(scratch), dict[tuple[Any, str], str]()
        small = given.size == "embedded"
        model = AutoModelForCausalLM.from_pretrained(MODEL) if small else llama_100m()
        model.eval().save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "model")
        for engine in given.engines:
            packages, write, kinds = ENGINES[engine]
            if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
                print(f"{engine} is left out: no {missing[0]}", file=sys.stderr)
                continue
            for kind in kinds:
                # The blocks of a k-quant have 256 numbers, more than a row of the small model.
                if (kind == "Q4_K" and small) or kind not in (given.types or kinds):
                    continue
                path = bases[engine, kind] = str(folder / f"{engine}-{kind}")
                with contextlib.redirect_stdout(sys.stderr):
                    write(model, Path(path), kind)
        if given.vllm_python is not None:
            path = bases["vllm", "f32"] = str(folder / "model")
            stack.enter_context(vllm_server(given.vllm_python, path))
        speed(model, bases, str(folder / "model"), given.per_example)
        if given.forward_passes and small:
            print()
            learn(bases, given.forward_passes, folder)


if __name__ == "__main__":
    main()
