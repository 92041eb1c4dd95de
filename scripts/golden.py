"""Hashes of what short runs write, to compare them before and after a change to the code.

    python scripts/golden.py --model_dir zo_peft/embedded/model > before.txt

Run it on one machine at both versions of the code: floating point differs between CPUs, so the
hashes of one machine say nothing on another. The runs start through the command line alone, which
works the same at every version.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

EMBEDDED = Path(__file__).parents[1] / "zo_peft" / "embedded"

#: What each run adds to the options that all have in common.
RUNS = {
    "lora": "--max_steps 104 --lora_target_modules q_proj v_proj",
    "scales": "--max_steps 12 --tune scales --load_in_8bit --tune_unquantized",
    "weights": "--max_steps 8 --tune weights --load_in_8bit",
    "greedy": "--max_steps 12 --strategy greedy --carry_best --per_example_noise False "
    "--gradient_accumulation_steps 2",
    "paper-gv": "--max_steps 12 --preset paper-gv --num_candidates 4",
    "subzero": "--max_steps 12 --preset subzero --noise_rank 4 --zo_eps 0.01",
    "n-spsa": "--max_steps 12 --strategy n-spsa --num_candidates 2 --update_rule adam",
    "prefix": "--max_forward_passes 150 --peft_type PREFIX_TUNING --load_in_8bit",
    "accuracy": "--max_steps 12 --objective accuracy --update_rule spectral",
    "f1": "--max_steps 6 --objective f1 --max_completion_length 3 --num_candidates 4",
}
#: The files of a run that must not change. `zo_scales.safetensors` is none of them: safetensors
#: writes its two entries of metadata in a random order, and the model has the same tensors.
WRITTEN = ("zo_journal", "zo_initial.safetensors", "*model.safetensors")


def run(name: str, options: str, model_dir: Path, data_dir: Path, folder: Path) -> None:
    """Train with one of `RUNS` in a process of its own."""
    command = [sys.executable, "-m", "zo_peft", "train"]
    command += ["--model_name_or_path", str(model_dir), "--output_dir", str(folder / name)]
    command += ["--train_file", str(data_dir / "train.jsonl"), "--save_strategy", "no"]
    command += ["--prompt_template", "{text} It was", "--per_device_train_batch_size", "4"]
    command += ["--report_to", "none", "--disable_tqdm", "True", *options.split()]
    command += [] if name == "f1" else ["--label_words", "terrible,great"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")


def main() -> None:
    """Print one line for each file of each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, default=EMBEDDED / "model")
    parser.add_argument("--data_dir", type=Path, default=EMBEDDED)
    parser.add_argument("--runs", nargs="+", default=[*RUNS], choices=[*RUNS])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in given.runs:
            run(name, RUNS[name], given.model_dir, given.data_dir, Path(folder))
            for path in sorted(p for form in WRITTEN for p in Path(folder, name).glob(form)):
                print(
                    hashlib.sha256(path.read_bytes()).hexdigest()[:16], name, path.name, flush=True
                )


if __name__ == "__main__":
    main()
