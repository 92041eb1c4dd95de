"""Commands in processes of their own, whose clients of the Hub ask a local server."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

# Importing costs seconds, so that a process runs many commands; the clients of the Hub read their
# settings on import.
DRIVER = """\
import json, shutil, sys, traceback
from zo_peft.cli import main
for name, *argv in json.load(sys.stdin):
    try:
        code = 0 if name == "copy" and shutil.copytree(*argv) else main([name, *argv])
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        print(f"<end {code}>", file=stream, flush=True)
"""


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def printed(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def refusal(self) -> str:
        """The one line that says why."""
        assert self.code == 2, self.err
        assert self.out == ""
        assert "Traceback" not in self.err
        errors = [line for line in self.err.splitlines() if line.startswith("zo-peft: error: ")]
        assert errors == self.err.splitlines()[-1:]
        assert len(errors[0]) < 250
        return errors[0]


def environment(folder: Path, url: str, **settings: str) -> dict[str, str]:
    """Of a process with the Hub at `url` and its cache in `folder`."""
    unwanted = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS)_.*|.*_proxy", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if not unwanted.fullmatch(name)} | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        # Another protocol, which the stand-in does not speak.
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        # `datasets` looks up datasets-server.127.0.0.1, which does not exist.
        "RES_OPTIONS": "timeout:1 attempts:1",
        # transformers would ask a server elsewhere to convert a pickle.
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        **settings,
    }


def run(
    commands: dict[str, list[str]], folder: Path, url: str, driver: str = DRIVER, **settings: str
) -> dict[str, Result]:
    """Commands in one process, with the Hub at `url` and its cache in `folder`."""
    process = subprocess.run(
        [sys.executable, "-c", driver],
        input=json.dumps(list(commands.values())),
        capture_output=True,
        text=True,
        env=environment(folder, url, **settings),
        cwd=folder,
    )
    parts = [re.split(r"<end (\d+)>\n", text) for text in (process.stdout, process.stderr)]
    assert [len(part) for part in parts] == [2 * len(commands) + 1] * 2, process.stderr
    out, err = parts
    results = zip(err[1::2], out[::2], err[::2])
    return {name: Result(int(code), *texts) for name, (code, *texts) in zip(commands, results)}


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()
