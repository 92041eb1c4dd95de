"""Importing the package prints nothing, also on a CPU on which bitsandbytes would warn."""

import subprocess
import sys

import pytest

#: bitsandbytes asks its native library whether the CPU has AVX512-BF16. This answers for any CPU.
AVX512_BF16 = "import ctypes; ctypes.CDLL.has_avx512bf16_cpu = lambda library: True\n"


@pytest.mark.parametrize(
    ("modules", "warnings"), [("bitsandbytes", 1), ("zo_peft, bitsandbytes", 0)]
)
def test_bitsandbytes_warns_of_a_missing_kernel_only_without_zo_peft(
    modules: str, warnings: int
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", f"{AVX512_BF16}import {modules}"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("Failed to load CPU gemm_4bit_forward") == warnings
    assert len(process.stderr.splitlines()) == warnings
