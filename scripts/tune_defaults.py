"""Learning rates by adapter type on the embedded model: the grid behind zo_peft's defaults.

python scripts/tune_defaults.py
"""

import argparse
import contextlib
import sys
import tempfile
from typing import Any

import torch
from datasets import disable_progress_bars
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig

from zo_peft import NonFiniteLossError, ZOConfig, ZOTrainer
from zo_peft.data import make_examples, read_rows
from zo_peft.demo import EMBEDDED, LABEL_WORDS, TEMPLATE

#: By adapter type: its configuration, the eps and the learning rates to try.
GRID: dict[str, tuple[PeftConfig, float, list[float]]] = {
    "LORA": (
        LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        1e-2,
        [3e-4, 1e-3, 3e-3],
    ),
    "PREFIX_TUNING": (
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        1e-1,
        [1e-3, 1e-2, 1e-1],
    ),
    "PROMPT_TUNING": (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        1e-2,
        [1e-4, 1e-3, 1e-2],
    ),
    "IA3": (
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        1e-2,
        [1e-3, 1e-2, 1e-1],
    ),
}


def examples(part: str) -> list[dict[str, Any]]:
    """The embedded texts as prompts with label words."""
    rows = read_rows(EMBEDDED / f"{part}.jsonl")
    return make_examples(rows, part, TEMPLATE, label_words=LABEL_WORDS.split(","))


def run(
    peft_config: PeftConfig, eps: float, learning_rate: float, forward_passes: int
) -> dict[str, float]:
    """Held-out loss and accuracy after a run; NaN where it broke off."""
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(
            folder,
            zo_eps=eps,
            learning_rate=learning_rate,
            max_forward_passes=forward_passes,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=50,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        trainer = ZOTrainer(
            str(EMBEDDED / "model"),
            args,
            train_dataset=examples("train"),
            eval_dataset=examples("test"),
            peft_config=peft_config,
        )
        try:
            trainer.train()
        except NonFiniteLossError:
            return {"eval_loss": float("nan"), "eval_accuracy": float("nan")}
        return trainer.evaluate()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--forward_passes", type=int, default=1200)
    parser.add_argument("--adapters", nargs="*", default=[*GRID])
    parser.add_argument("--eps", type=float, help="instead of the grid's")
    parser.add_argument("--learning_rates", nargs="*", type=float, help="instead of the grid's")
    given = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)  # more only wait for each other on a model this small
    print("| adapter | eps | learning rate | held-out loss | held-out accuracy |")
    print("| --- | --- | --- | --- | --- |")
    for name in given.adapters:
        peft_config, eps, learning_rates = GRID[name]
        for learning_rate in given.learning_rates or learning_rates:
            with contextlib.redirect_stdout(sys.stderr):
                result = run(peft_config, given.eps or eps, learning_rate, given.forward_passes)
            print(
                f"| {name} | {given.eps or eps:g} | {learning_rate:g} | {result['eval_loss']:.4f} "
                f"| {result['eval_accuracy']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
