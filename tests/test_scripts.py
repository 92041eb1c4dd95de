"""Every script runs in its smallest form and prints the figures that it is for."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from engines.standin import StandIn
from tiny import MODEL
from transformers import AutoModelForCausalLM

SCRIPTS = Path(__file__).parents[1] / "scripts"
DATA = Path(__file__).parents[2] / "shared" / "data"
#: Other scripts and tests import these.
MODULES = {"convert", "exactness", "measuring", "workloads"}
TABLE = r"^\| {header}.*\|\n\|( -+ \|)+\n\| {row} *\|.*\d.*\|$"


def table(header: str, row: str) -> str:
    """A pattern of a Markdown table with these first columns, whose row has a number."""
    return TABLE.format(header=header, row=row)


def form(name: str, options: str, *patterns: str) -> Any:
    """A script, the options of a small form of it, and patterns of what that prints."""
    data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the data sets of shared/data")
    return pytest.param(
        name, options, patterns, id=name, marks=data if str(DATA) in options else ()
    )


#: The smallest forms of the scripts.
SMALLEST = [
    form(
        "adapters",
        "--only LORA CPT BOFT",
        r"^\| LORA \| llama float32 \| exact \| the same \|$",
        r"^\| BOFT \| opt float32 \| one by one: .*BOFT.* \| the same \|$".replace(
            "BOFT.*", "boft.*"
        ),
        r"^\| CPT \| llama float32 \| refused: nothing that is tuned changes a loss.*\|$",
    ),
    form(
        "families",
        "--only llama mistral gpt_oss gpt_neo mamba jamba bert",
        r"^\| llama \| options \| exact \(one prompt\) \|$",
        r"^\| mistral \| words, options, completions \| exact \|$",
        r"^\| gpt_oss \| words, options, completions \| exact \|$",
        r"^\| gpt_neo \| words, options, completions \| exact \|$",
        r"^\| mamba \| words, options, completions \| exact \|$",
        r"^\| jamba \| words, options, completions \| (exact|one by one.*) \|$",
        r"^\| bert \| words, options, completions \| refused: BertLMHeadModel.*\|$",
        r"^\| bert \| classes \| exact \|$",
    ),
    form(
        "bench_cost",
        "--shape embedded --steps 2",
        table("strategy", "mezo"),
        table("what", "plain forward"),
        r"^\| zo_peft, gv \| \d+",
    ),
    form(
        "bench_cluster",
        "--servers 1 3 --tasks 2 --steps 2 --plot cluster.png",
        table("servers", "1"),
    ),
    form(
        "bench_engines",
        "--forward_passes 0",
        table("evaluator", "PyTorch float32"),
    ),
    form(
        "gpu_rows",
        "--dry_run",
        r"^\| integers of Philox \| 0 of .* differ \|$",
        r"^\| a replayed run \| largest difference 0.0e\+00 after 20 steps \|$",
        r"^\| embedded, int8, 2 x 12: guided \|",
        r"^\| embedded, nf4, 2 x 12: QLoRA, checkpointed \|",
        table("base", "float32"),
        r"^\| guided, int8 \| 0.5000 -> 0.9",
        r"^\| 2, gloo \| .*; adapters equal \|$",
        table("frozen parts", "embedded, 4 x 48, as they are"),
    ),
    form(
        "bench_defaults",
        "--seeds 1 --passes 30 --rows IA3 'rank 2' --learning_rates 1e-2 --data_dir none",
        table("work", "IA3, float32"),
        table("setting", "rank 2"),
        table("adapter", "IA3"),
    ),
    form(
        "bench_dial",
        "--workloads 'embedded LoRA float32' --seeds 0 --steps 1 --shape embedded",
        table("workload", "embedded LoRA float32"),
        table("exact layers", "0"),
        r"^\| Adam, full gradients \| \d",
    ),
    form(
        "bench_estimators",
        "--draws 2 --batch_size 2",
        table("strategy", "mezo"),
        r"^\| gv, M=16, loss, reuse, by example \| 16 \| \d",
    ),
    form(
        "bench_estimators",
        f"--work encoder --data_dir {DATA} --draws 1 --batch_size 1",
        table("strategy", "mezo"),
    ),
    form(
        "bench_estimators",
        "--work stacked --guide --steps 2 --batch_size 2",
        table("layer", "0"),
        r"^\| 11 \| -?\d\.\d+",
    ),
    form(
        "bench_guides",
        "--works 'embedded LoRA float32' --seeds 0 --forward_passes 40 --data_dir none",
        table("work", "embedded LoRA float32"),
        r"^\| embedded LoRA float32 \| guided, shuffled \| \d",
    ),
    form(
        "bench_learning",
        "--workloads 'embedded LoRA float32' --methods MeZO gv guided readout Adam "
        "--seeds 0 --shares 1 --learning_rates 1e-3 --eps 1e-2 --forward_passes 40 "
        "--readout_rows 40 --results results.jsonl",
        table("workload", "embedded LoRA float32"),
        r"Adam, .*: \d",
        r"^\| embedded LoRA float32 \| readout, rows 40 \| 3 \| 0\.\d",
        r"^guided against MeZO: geometric mean (\d|inf)",
    ),
    form(
        "bench_memory",
        "--shape embedded --modes scales --batch_size 2 --length 8 --candidates 2 --steps 2",
        table("what", "scales"),
    ),
    form(
        "bench_plan",
        "--shape embedded --rows 'float32, 4 x 32'",
        table("run", "embedded, float32, 4 x 32, 32 scored"),
    ),
    form(
        "bench_plan",
        "--shape embedded --rows 'float32, 4 x 48, 1 scored, guided, exact_layers=2'",
        r"guided, exact_layers=2 \| \d",
    ),
    form(
        "bench_ranks",
        "--turns 2 --seconds 0.2 --batch_size 4 --candidates 4",
        table("processes 1, s", r"\d+\.\d+"),
    ),
    form(
        "bench_step",
        "--rows 'embedded, float32' --steps 1",
        table("work", "embedded, float32, 4 x 26, M=16"),
    ),
    form(
        "bench_tasks",
        f"--data_dir {DATA} --tasks cb --max_length 16 --max_forward_passes 40",
        table("task", "cb"),
        r"^\| cb +\| encoder .*0\.\d+ -> 0\.\d+",
    ),
    form(
        "bench_tune", "--rows 'scales, NF4' --max_forward_passes 40", table("what", "scales, NF4")
    ),
    form(
        "black_box",
        "--url URL --max_forward_passes 8 --texts 2 --zo_eps 0.03 --output_dir tuned",
        r"^loss \d.* -> \d",
    ),
    form(
        "fuzz",
        "--inputs 20",
        *(
            rf"^{kind}: 20 inputs .*\d re"
            for kind in ["journal", "config", "data", "rows", "settings"]
        ),
        "^no findings$",
    ),
    form("golden", "--runs subzero", r"^[0-9a-f]{16} subzero zo_journal$"),
    form("kill_test", "--runs 1 --steps 8", "^run 0: killed after .*: same$", "^1 of 1 the same"),
    form(
        "make_demo_model",
        "--documents 200 --output_dir made",
        r"^loss \d\.\d+, 689,280 parameters",
    ),
    form(
        "reward_tuning",
        "--adapters TinyLoRA --max_forward_passes 60 --points 1 --pairs 2 --out rewards",
        table("adapter", "TinyLoRA, float32"),
    ),
    form(
        "reward_tuning",
        "--adapters LoRA --engine llamacpp --max_forward_passes 24 --points 1 --pairs 1 --out both",
        r"^\| LoRA, llamacpp q4_0 \|.*\d.*\|$",
    ),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a server for `black_box`."""
    server = StandIn(AutoModelForCausalLM.from_pretrained(MODEL).eval(), MODEL)
    yield server.url
    server.stop()


def test_every_script_is_run_here() -> None:
    scripts = {path.stem for path in SCRIPTS.glob("*.py")}
    assert scripts == {one.values[0] for one in SMALLEST} | MODULES


@pytest.fixture(scope="module")
def runner() -> Iterator[subprocess.Popen[str]]:
    alike = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, Path(__file__).with_name("forked.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, env=os.environ | alike, **pipes) as process:
        yield process


@pytest.mark.parametrize(("name", "options", "patterns"), SMALLEST)
def test_a_script_prints_its_figures(
    name: str,
    options: str,
    patterns: Sequence[str],
    url: str,
    runner: subprocess.Popen[str],
    tmp_path: Path,
) -> None:
    argv = [url if option == "URL" else option for option in shlex.split(options)]
    assert runner.stdin is not None
    assert runner.stdout is not None
    print(json.dumps([str(tmp_path), str(SCRIPTS / f"{name}.py"), argv]), file=runner.stdin)
    code = runner.stdout.readline().strip()
    printed, errors = ((tmp_path / stream).read_text() for stream in ("stdout", "stderr"))
    assert code == "0", printed + errors
    for pattern in patterns:
        assert re.search(pattern, printed, re.MULTILINE), printed + errors
