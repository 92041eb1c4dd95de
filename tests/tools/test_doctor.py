"""`zo-peft doctor`: what works is said to work; a check that raises, dies or hangs has failed."""

import json
import platform

import pytest

from zo_peft.cli import main
from zo_peft.runs.texts import text
from zo_peft.tools import doctor
from zo_peft.tools.doctor import CHECKS, attempt, public


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import sys; print('seen by'); print('nobody', file=sys.stderr)", None),
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import sys; print('zo-peft: no', file=sys.stderr); sys.exit(2)", "zo-peft: no"),
        ("import os; os._exit(3)", "the process died with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "the process died with exit code -9"),
    ],
)
def test_a_check_that_raises_or_dies_has_failed(
    code: str, error: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert attempt(["-c", code]) == error
    assert capfd.readouterr() == ("", "")


def test_a_check_that_hangs_has_failed() -> None:
    assert attempt(["-c", "import time; time.sleep(600)"], timeout=1) == "no answer within 1 s"


def test_what_fails_is_reported_with_its_fix_and_the_rest_is_tried(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    monkeypatch.setattr(doctor, "CHECKS", {name: CHECKS[name] for name in ("distributed", "NF4")})
    checks = doctor.doctor()["checks"]
    assert checks["NF4"] == {"works": True}
    assert checks["distributed"]["works"] is False
    assert "nowhere0" in checks["distributed"]["error"]
    assert "GLOO_SOCKET_IFNAME" in checks["distributed"]["fix"]
    out, err = capfd.readouterr()
    assert (out, err.splitlines()) == ("", ["trying distributed ...", "trying NF4 ..."])


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
    found = {"versions": {"torch": "2"}, "engines": {"llamacpp": None}, "devices": ["CPU"]}
    shown = text("doctor", found | {"checks": checks})
    assert "| int8            | works         |" in shown
    assert "| NF4             | does not work |" in shown
    assert shown.endswith("NF4: RuntimeError: no kernel\n  Get one.")


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
