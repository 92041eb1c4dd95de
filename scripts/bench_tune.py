"""What to tune, at equal forward passes: adapters, scales or weights of the embedded model.

Each row is a run of `zo-peft train --strategy gv` with its defaults, in a process of its own.

    python scripts/bench_tune.py
    python scripts/bench_tune.py --rows "LoRA, int8"    # only these rows
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import print_header, print_row

from zo_peft.runs.jobs import flags
from zo_peft.scales import SCALES_NAME
from zo_peft.tools.demo import EMBEDDED, LABEL_WORDS, TEMPLATE

LORA = ["--lora_target_modules", "q_proj", "v_proj"]
ROWS: dict[str, list[str]] = {
    "LoRA, int8": ["--load_in_8bit", *LORA],
    "LoRA, NF4": ["--load_in_4bit", *LORA],
    "prefix, int8": ["--load_in_8bit", "--peft_type", "PREFIX_TUNING"],
    "scales, int8": ["--load_in_8bit", "--tune", "scales"],
    "scales, NF4": ["--load_in_4bit", "--tune", "scales"],
    "weights, int8": ["--load_in_8bit", "--tune", "weights"],
    "weights, int8, full noise": ["--load_in_8bit", "--tune", "weights", "--noise_rank", "0"],
    "weights, float32": ["--tune", "weights"],
    "weights, bfloat16": ["--tune", "weights", "--dtype", "bfloat16"],
}


def result_bytes(folder: Path) -> int:
    """The bytes of the smallest file that carries the result."""
    names = ("adapter_model.safetensors", SCALES_NAME, "model.safetensors")
    return next(path.stat().st_size for name in names if (path := folder / name).is_file())


def row(name: str, forward_passes: int, seed: int) -> list[str]:
    """Train and evaluate; the cells of the row."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "model_name_or_path": EMBEDDED / "model",
            "train_file": EMBEDDED / "train.jsonl",
            "eval_file": EMBEDDED / "test.jsonl",
            "prompt_template": TEMPLATE,
            "label_words": LABEL_WORDS,
            "strategy": "gv",
            "max_forward_passes": forward_passes,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 50,
            "seed": seed,
            "save_strategy": "no",
            "output_dir": folder,
        }
        command = [sys.executable, "-m", "zo_peft", "train", "--json"]
        done = subprocess.run(
            [*command, *flags(options), *ROWS[name]], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{name}: {done.stderr}")
        found = json.loads(done.stdout)
        return [
            name,
            f"{found['tuned_parameters']:,}",
            f"{found['metric_after']:.4f}",
            f"{found['eval_loss_after']:.4f}",
            f"{found['peak_memory_bytes'] / 2**20:.0f}",
            f"{found['wall_seconds']:.0f}",
            f"{result_bytes(Path(folder)):,}",
        ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max_forward_passes", type=int, default=2000)
    parser.add_argument("--rows", nargs="*", default=[*ROWS], choices=[*ROWS])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print_header(
        "what", "numbers", "accuracy", "loss", "peak MiB", "seconds", "bytes of the result"
    )
    for name in given.rows:
        print_row(*row(name, given.max_forward_passes, given.seed))


if __name__ == "__main__":
    main()
