"""The wheel: what is in it, and that the demo runs from it in any folder."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from zo_peft import __version__

ROOT = Path(__file__).parents[1]

#: The demo, and before it where the package was found.
DEMO = """\
import sys, zo_peft
from zo_peft.cli import main
print(zo_peft.__path__[0])
sys.exit(main(["demo", "--max_forward_passes", "44"]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, *build], check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


def test_a_wheel_holds_the_package_and_its_model_and_nothing_else(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    info = f"zo_peft-{__version__}.dist-info"
    sources = {path for path in (ROOT / "zo_peft").rglob("*") if path.is_file()}
    package = {
        path.relative_to(ROOT).as_posix() for path in sources if "__pycache__" not in path.parts
    }
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    assert names == package | {f"{info}/{name}" for name in about}
    assert {"zo_peft/py.typed", "zo_peft/embedded/model/model.safetensors"} <= names
    kinds = {Path(name).suffix for name in package}
    assert kinds <= {
        ".cuh",
        ".py",
        ".typed",
        ".jinja",
        ".json",
        ".jsonl",
        ".mplstyle",
        ".safetensors",
        ".yaml",
    }


def test_the_demo_runs_from_an_installed_wheel_in_any_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, *install, str(wheel)], check=True, capture_output=True)
    elsewhere.mkdir()
    process = subprocess.run(
        [sys.executable, "-c", DEMO],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    found, *printed = process.stdout.splitlines()
    assert found == str(site / "zo_peft")
    assert printed[0].startswith("accuracy")
    assert (elsewhere / "zo_peft_demo" / "adapter" / "adapter_model.safetensors").is_file()
