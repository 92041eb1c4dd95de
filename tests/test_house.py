"""The shape of the package: floors, lines, a quick start, and a core that needs PyTorch alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "zo_peft"
MODULES = sorted(PACKAGE.rglob("*.py"))

#: A module may import what stands before it here, and its own floor.
FLOORS = [
    "errors",
    "core",
    "objectives",
    "models",
    "engines",
    "scales",
    "data",
    "train",
    "runs",
    "tools",
    "cli",
]

#: What a reader of the algorithm reads, from top to bottom.
NAMES = "tuner strategies eps updates faults direction space flat_space batch evaluator"
STORY = [PACKAGE / "core" / f"{name}.py" for name in NAMES.split()]

#: What takes seconds to import.
SLOW = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"}


def floor(name: str) -> int:
    """The floor of `zo_peft.<name>...`; the package itself opens onto the top floor."""
    parts = name.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else len(FLOORS)


def imported(source: str) -> Iterator[str]:
    """The modules of zo_peft that a source imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not read here"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            names = named if node.module == "zo_peft" else [str(node.module)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        # The version is no floor: it is there before anything is imported.
        yield from (n for n in names if n.split(".")[0] == "zo_peft" and n != "zo_peft.__version__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = floor(".".join(path.relative_to(ROOT).with_suffix("").parts))
    above = [name for name in imported(path.read_text()) if floor(name) > own]
    assert not above


def test_an_arrow_back_up_is_seen() -> None:
    source = (
        "def f():\n    import zo_peft.train.base\n    from zo_peft import __version__, ZOConfig"
    )
    assert [*imported(source)] == ["zo_peft.train.base", "zo_peft.ZOConfig"]
    assert floor("zo_peft.core.eps") < floor("zo_peft.train.base") < floor("zo_peft.ZOConfig")


def lines(*paths: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


@pytest.mark.parametrize(
    ("what", "paths", "most"),
    [
        ("the story of a step", STORY, 1_495),
        ("the core", [*(PACKAGE / "core").glob("*.py")], 3_010),
        ("the package", MODULES, 16_100),
    ],
)
def test_it_stays_small(what: str, paths: list[Path], most: int) -> None:
    assert lines(*paths) <= most, what


def test_no_file_is_long() -> None:
    assert {path.name: lines(path) for path in MODULES if lines(path) > 450} == {}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("start", "status"),
    [
        ("zo_peft", 0),
        ("zo_peft.cli; status = zo_peft.cli.main(['--help'])", 0),
        ("zo_peft.cli; status = zo_peft.cli.main(['--version'])", 0),
        ("zo_peft.cli; status = zo_peft.cli.main(['trian'])", 2),
    ],
)
def test_nothing_slow_is_loaded_before_a_command_runs(start: str, status: int) -> None:
    loaded = f"[name for name in {sorted(SLOW)} if name in sys.modules]"
    done = python("-c", f"import sys; status = 0; import {start}; print(status, {loaded})")
    assert done.stdout.splitlines()[-1] == f"{status} []", done.stderr


def test_the_core_trains_without_other_libraries_than_pytorch() -> None:
    done = python(str(ROOT / "tests" / "core_alone.py"))
    assert done.returncode == 0, done.stderr
