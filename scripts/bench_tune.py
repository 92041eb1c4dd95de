"""What to tune, at equal forward passes: adapters, scales or weights of the embedded model.

Each row is `zo-peft train` with defaults, in a process of its own.

    python scripts/bench_tune.py
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

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
    """Bytes of the smallest file that carries the result."""
    names = ("adapter_model.safetensors", SCALES_NAME, "model.safetensors")
    return next(path.stat().st_size for name in names if (path := folder / name).is_file())


def row(name: str, options: list[str], forward_passes: int, seed: int) -> list[str]:
    """Train and evaluate."""
    with tempfile.TemporaryDirectory() as folder:
        argv = {
            "model_name_or_path": EMBEDDED / "model",
            "train_file": EMBEDDED / "train.jsonl",
            "eval_file": EMBEDDED / "test.jsonl",
            "prompt_template": TEMPLATE,
            "label_words": LABEL_WORDS,
            "max_forward_passes": forward_passes,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 50,
            "seed": seed,
            "save_strategy": "no",
            "output_dir": folder,
        }
        given = [part for key, value in argv.items() for part in (f"--{key}", str(value))]
        main = "import sys; from zo_peft.cli import main; sys.exit(main())"
        command = [sys.executable, "-W", "ignore", "-c", main, "train", "--json", *given, *options]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
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
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("| what | numbers | accuracy | loss | peak MiB | seconds | bytes of the result |")
    print("|" + " --- |" * 7)
    for name, options in ROWS.items():
        print(f"| {' | '.join(row(name, options, given.max_forward_passes, given.seed))} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
