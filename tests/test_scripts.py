"""Every script runs in its smallest form and prints the figures that it is for."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from safetensors.torch import load

SCRIPTS = Path(__file__).parents[1] / "scripts"
DATA = Path(__file__).parents[2] / "shared" / "data"
#: Other scripts import these; they are no commands.
MODULES = {"measuring", "workloads"}
TABLE = r"^\| {header}.*\|\n\|( -+ \|)+\n\| {row} *\|.*\d.*\|$"


def table(header: str, row: str) -> str:
    """A pattern of a Markdown table with these first columns, whose row has a number."""
    return TABLE.format(header=header, row=row)


#: The options of each script's smallest form, and patterns of what it prints.
SMALLEST: dict[str, tuple[str, list[str]]] = {
    "bench_cost": (
        "--shape embedded --steps 2",
        [table("strategy", "mezo"), table("what", "plain forward"), r"^\| zo_peft, gv \| \d+"],
    ),
    "bench_defaults": (
        "--seeds 1 --passes 30 --rows IA3 'rank 2' --data_dir none",
        [table("work", "IA3, float32"), table("setting", "rank 2"), table("adapter", "IA3")],
    ),
    "bench_estimators": (
        "--draws 2 --batch_size 2",
        [table("strategy", "mezo"), r"^\| gv, M=16, loss, reuse, by example \| 16 \| \d"],
    ),
    "bench_learning": (
        "--workloads 'embedded LoRA float32' --methods MeZO defaults Adam --seeds 0 --shares 1 "
        "--learning_rates 1e-3 --eps 1e-2 --forward_passes 40 --results results.jsonl",
        [table("workload", "embedded LoRA float32"), r"Adam, .*: \d", r"geometric mean (\d|inf)"],
    ),
    "bench_memory": (
        "--shape embedded --modes scales --batch_size 2 --length 8 --candidates 2 --steps 2",
        [table("what", "scales")],
    ),
    "bench_plan": (
        "--shape embedded --rows 'float32, 4 x 32'",
        [table("run", "embedded, float32, 4 x 32, 32 scored")],
    ),
    "bench_ranks": (
        "--turns 2 --seconds 0.2 --batch_size 4 --candidates 4",
        [table("processes 1, s", r"0\.\d+")],
    ),
    "bench_step": (
        "--rows 'embedded, float32' --steps 1",
        [table("work", r"embedded, float32, 4 x 26, M=16")],
    ),
    "bench_tasks": (
        f"--data_dir {DATA} --tasks cb --max_length 16 --max_forward_passes 40",
        [table("task", "cb"), r"^\| cb +\| encoder .*0\.\d+ -> 0\.\d+"],
    ),
    "bench_tune": (
        "--rows 'scales, NF4' --max_forward_passes 40",
        [table("what", "scales, NF4")],
    ),
    "black_box": ("--url URL --max_forward_passes 60 --output_dir tuned", [r"^loss \d.* -> \d"]),
    "fuzz": (
        "--inputs 20",
        [*(rf"^{kind}: 20 inputs .*\d re" for kind in ("journal", "config", "data"))],
    ),
    "golden": ("--runs subzero", [r"^[0-9a-f]{16} subzero zo_journal$"]),
    "kill_test": ("--runs 1 --steps 8", [r"^run 0: killed after .*: same$", "^1 of 1 the same"]),
    "make_demo_model": ("--documents 200 --output_dir made", [r"^loss \d\.\d+, 689,280 param"]),
    "reward_tuning": (
        "--adapters TinyLoRA --max_forward_passes 60 --points 1 --pairs 2 --out rewards",
        [table("adapter", "TinyLoRA, float32")],
    ),
}


class Handler(BaseHTTPRequestHandler):
    """Serves any adapter; its loss is the sum of the adapter's squares."""

    loss = 0.0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/load_lora_adapter":
            type(self).loss = float(sum(tensor.square().sum() for tensor in load(body).values()))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"loss": self.loss}).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """The address of a server for `black_box`."""
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_every_script_is_run_here() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == SMALLEST.keys() | MODULES


@pytest.mark.parametrize("name", SMALLEST)
def test_a_script_prints_its_figures(name: str, url: str, tmp_path: Path) -> None:
    options, patterns = SMALLEST[name]
    if str(DATA) in options and not DATA.is_dir():
        pytest.skip("needs the data sets of shared/data")
    argv = [url if option == "URL" else option for option in shlex.split(options)]
    done = subprocess.run(
        [sys.executable, SCRIPTS / f"{name}.py", *argv],
        cwd=tmp_path,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for pattern in patterns:
        assert re.search(pattern, done.stdout, re.MULTILINE), done.stdout + done.stderr
