"""`--bnb_4bit_compute_dtype`: what it is by default, and that all commands of a run use one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import OPTConfig

from zo_peft import ZOConfig
from zo_peft.cli import main
from zo_peft.errors import UserError
from zo_peft.runs.arguments import ModelArguments
from zo_peft.tools.demo import EMBEDDED
from zo_peft.tools.plan import Planner

MODEL = str(EMBEDDED / "model")


@pytest.mark.parametrize(
    ("saved", "given", "on_cpu", "expected"),
    [
        ("float32", {}, True, "float32"),
        ("bfloat16", {}, True, "bfloat16"),
        ("bfloat16", {}, False, "bfloat16"),
        ("float16", {}, False, "float16"),
        ("float16", {}, True, "float32"),
        ("float32", {"dtype": "float16"}, True, "float32"),
        ("float32", {"dtype": "float16"}, False, "float16"),
        ("float16", {"dtype": "bfloat16"}, True, "bfloat16"),
        (None, {}, False, "float32"),
        ("float32", {"bnb_4bit_compute_dtype": "bfloat16"}, True, "bfloat16"),
        ("bfloat16", {"bnb_4bit_compute_dtype": "float16"}, True, "float16"),
    ],
)
def test_it_is_the_dtype_of_the_base_unless_one_is_given(
    saved: str | None, given: dict[str, Any], on_cpu: bool, expected: str, tmp_path: Path
) -> None:
    OPTConfig(num_hidden_layers=1, dtype=saved).save_pretrained(tmp_path)
    model = ModelArguments(str(tmp_path), load_in_4bit=True, **given)
    found = model.quantization(False, on_cpu)
    assert found is not None
    assert found.bnb_4bit_compute_dtype == getattr(torch, expected)


def test_it_is_refused_where_nothing_is_loaded_in_4_bits() -> None:
    for bits in ({}, {"load_in_8bit": True}):
        model = ModelArguments(MODEL, bnb_4bit_compute_dtype="bfloat16", **bits)
        with pytest.raises(UserError, match="is for load_in_4bit; give both, or auto"):
            model.quantization(False, True)


def test_a_plan_counts_what_weights_are_dequantized_to() -> None:
    scratch = [
        Planner(
            ModelArguments(MODEL, load_in_4bit=True, bnb_4bit_compute_dtype=dtype), ZOConfig("out")
        ).fit.scratch
        for dtype in ("auto", "float32", "bfloat16")
    ]
    assert scratch[0] == scratch[1] == 2 * scratch[2] > 0


def test_a_run_records_it_and_later_commands_take_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = set()
    forward = Linear4bit.forward

    def seen(self: Linear4bit, x: torch.Tensor) -> torch.Tensor:
        computed.add(self.compute_dtype)
        return forward(self, x)

    monkeypatch.setattr(Linear4bit, "forward", seen)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((EMBEDDED / "train.jsonl").open().readlines()[:8]))
    told = ["--prompt_template", "{text} It was", "--label_words", "terrible,great", "--use_cpu"]
    budget = ["--max_steps", "1", "--zo_eps", "1e-3", "--strategy", "gv", "--report_to", "none"]
    base = ["--model_name_or_path", MODEL, "--load_in_4bit", "True"]
    files = ["--train_file", str(rows), "--eval_file", str(rows)]
    after = {}
    for name, more in (("bfloat16", ["--bnb_4bit_compute_dtype", "bfloat16"]), ("float32", [])):
        computed.clear()
        run = tmp_path / name
        assert main(["train", *base, *files, *told, *budget, *more, "--output_dir", str(run)]) == 0
        dtype = {getattr(torch, name)}
        assert computed == dtype
        metrics = json.loads((run / "zo_metrics.json").read_text())
        assert metrics["settings"]["bnb_4bit_compute_dtype"] == name
        assert f"bnb_4bit_compute_dtype: {name}" in (run / "README.md").read_text()
        after[name] = metrics["eval_loss_after"]
        capsys.readouterr()
        computed.clear()
        assert main(["evaluate", str(run), str(rows), "--use_cpu", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["eval_loss"] == pytest.approx(after[name])
        assert main(["predict", str(run), str(rows), "--use_cpu"]) == 0
        assert computed == dtype
    assert after["bfloat16"] != after["float32"]
    other = ["--bnb_4bit_compute_dtype", "float32", "--use_cpu"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "bfloat16"), str(rows), *other]) == 0
    changed = "unlike the run: bnb_4bit_compute_dtype is 'float32' (was 'bfloat16')"
    assert changed in capsys.readouterr().err.splitlines()
