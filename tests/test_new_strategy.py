"""A strategy that is added to `zo_peft/core/strategies.py` alone works in every command."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from tiny import command_line

from zo_peft.tools.demo import EMBEDDED

ROOT = Path(__file__).parents[1]


def documented() -> str:
    """The strategy that docs/contributing.md shows: the one function there that yields."""
    page = MarkdownIt().parse((ROOT / "docs" / "contributing.md").read_text())
    found = []
    for token in page:
        if token.type == "fence" and token.info == "python":
            functions = (n for n in ast.parse(token.content).body if isinstance(n, ast.FunctionDef))
            found += [
                str(ast.get_source_segment(token.content, function))
                for function in functions
                if any(isinstance(node, ast.Yield) for node in ast.walk(function))
            ]
    (source,) = found
    return source


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package that knows one more strategy, `forward`."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(
        ROOT / "zo_peft", folder / "zo_peft", ignore=shutil.ignore_patterns("__pycache__")
    )
    source = documented()
    name = source.split("(")[0].removeprefix("def ")
    added = f'{source}\n\n\nSTRATEGIES["forward"] = Strategy(lambda s, eps, o: {name}(s[0], eps))\n'
    assert len(added.splitlines()) < 20
    with (folder / "zo_peft" / "core" / "strategies.py").open("a") as file:
        file.write(f"\n\n{added}")
    return folder


def run(package: Path, tmp_path: Path, command: str, **options: Any) -> dict[str, Any]:
    """The JSON result of a command, on the embedded model, with the package in that folder."""
    given = {"lora_target_modules": "q_proj", "per_device_train_batch_size": 2, "eval_file": None}
    argv = command_line(tmp_path / command, **{**given, **options})
    done = subprocess.run(
        [sys.executable, "-m", "zo_peft", command, "--json", *argv],
        env={**os.environ, "PYTHONPATH": str(package)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_trains(package: Path, tmp_path: Path) -> None:
    accumulated = {"gradient_accumulation_steps": 2, "max_steps": 3}
    result = run(package, tmp_path, "train", strategy="forward", **accumulated)
    assert result["strategy"] == "forward"
    assert (result["steps"], result["forward_passes"]) == (3, 3 * 2 * 2)
    assert result["examples_forwarded"] == 3 * 2 * 2 * 2


def test_it_is_planned(package: Path, tmp_path: Path) -> None:
    """Both points of a step fit into one forward pass."""
    result = run(package, tmp_path, "plan", strategy="forward", max_length=16)
    assert result["candidates_per_forward"] == 2


def test_it_is_compared(package: Path, tmp_path: Path) -> None:
    budget = {"strategies": ["forward", "mezo"], "max_forward_passes": 6}
    result = run(package, tmp_path, "compare", eval_file=EMBEDDED / "test.jsonl", **budget)
    assert list(result) == ["forward", "mezo"]
    assert [run["forward_passes"] for run in result.values()] == [6, 6]
    assert [run["steps"] for run in result.values()] == [3, 3]
