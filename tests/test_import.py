"""Importing the package prints nothing, also on a CPU on which bitsandbytes would warn."""

import subprocess
import sys
from pathlib import Path

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


#: Packages that `zo_peft[all]` adds.
OPTIONAL = ["bitsandbytes", "datasets", "matplotlib", "pandas", "pyarrow"]

LIGHT = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
from peft import LoraConfig
from zo_peft import ZOConfig, ZOTrainer
from zo_peft.cli import main
from zo_peft.tools.demo import EMBEDDED
rows = [{{"prompt": f"{{word}}. It was", "options": ["bad", "good"], "label": label}}
        for label, word in enumerate(["Awful and slow", "Fun"])] * 4
args = ZOConfig(sys.argv[1], max_steps=2, per_device_train_batch_size=4, report_to="none")
lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
trainer = ZOTrainer(
    str(EMBEDDED / "model"), args, train_dataset=rows, eval_dataset=rows, peft_config=lora
)
lengths = [row["length"] for row in trainer.train_dataset]
assert trainer._get_train_sampler().sampler.lengths == lengths
assert trainer.train().training_loss > 0
asked = [{{"prompt": "Fun. It was", "options": ["bad", "good"]}}]
assert trainer.predict(asked).predictions.shape == (1, 2)
assert main(["report", sys.argv[1]]) == 2
assert main(["demo", "--output_dir", sys.argv[1] + "/demo"]) == 2
"""


def test_a_trainer_works_without_the_optional_packages(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tmp_path)], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert 'needs the package pandas; pip install "zo_peft[all]"' in process.stderr
    assert 'need bitsandbytes; pip install "zo_peft[quantized]"' in process.stderr
