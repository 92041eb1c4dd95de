"""`zo-peft doctor`: what works is said to work; what raises, dies or hangs is survived."""

import json
import os
import platform
import time

import pytest

from zo_peft.cli import main
from zo_peft.tools.doctor import CHECKS, attempts, doctor_text, public


def works() -> None:
    print("nothing of this is seen")


def raises() -> None:
    raise ValueError("first line\nno such thing")


def dies() -> None:
    os._exit(3)


def hangs() -> None:
    time.sleep(600)


def test_what_raises_dies_or_hangs_is_said_and_the_rest_still_tried(
    capfd: pytest.CaptureFixture[str],
) -> None:
    checks = {"a": works, "b": raises, "c": dies, "d": works, "e": hangs}
    assert dict(attempts(checks, timeout=2)) == {
        "a": None,
        "b": "ValueError: no such thing",
        "c": "the process died with exit code 3",
        "d": None,
        "e": "no answer within 2 s",
    }
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [f"trying {name} ..." for name in checks]


def test_what_works_here(capfd: pytest.CaptureFixture[str]) -> None:
    """All but the compiler, which this machine need not have."""
    assert main(["doctor", "--json"]) == 0
    out = capfd.readouterr().out
    result = json.loads(out)
    assert result["checks"].keys() == CHECKS.keys()
    for name, check in result["checks"].items():
        assert check == {"works": True} or (name == "compile" and check["fix"]), check
    assert result["versions"]["torch"].startswith("2.")
    assert result["devices"][0].startswith("CPU")
    assert platform.node() not in out


def test_the_table_says_the_error_and_the_fix_of_what_does_not_work() -> None:
    checks = {
        "int8": {"works": True},
        "NF4": {"works": False, "error": "RuntimeError: no kernel", "fix": "Get one."},
    }
    text = doctor_text({"versions": {"torch": "2"}, "devices": ["CPU"], "checks": checks})
    assert "| int8            | works         |" in text
    assert "| NF4             | does not work |" in text
    assert text.endswith("NF4: RuntimeError: no kernel\n  Get one.")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("cannot open /home/bob/lib/x.so: no", "cannot open x.so: no"),
        ("in '/usr/lib/y'", "in 'y'"),
        (r"C:\Users\bob\z.dll is missing", "z.dll is missing"),
        ("see https://pytorch.org/docs", "see https://pytorch.org/docs"),
        ("8 and/or 4 bits, 1 / 2", "8 and/or 4 bits, 1 / 2"),
        (f"{platform.node()} is not known", "this machine is not known"),
    ],
)
def test_messages_name_no_folder_and_no_machine(message: str, shown: str) -> None:
    assert public(message) == shown
