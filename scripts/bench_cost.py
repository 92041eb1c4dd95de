"""What a step costs beside the model's forward passes: time outside them, and peak memory.

Times whole training steps of ZOTrainer on an OPT shape with random weights and a LoRA, and, within
the same steps, the time inside the model's forward. Peak memory above the weights is measured in a
process of its own, as the largest resident set during steps and during plain forwards (no adapter
machinery, full logits, `torch.no_grad`) of the same batch; it needs Linux's /proc.

    python scripts/bench_cost.py
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
from peft import LoraConfig
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from zo_peft import ZOConfig, ZOTrainer
from zo_peft.train.config import StrategyName

VOCABULARY = 50272
BATCH_SIZE, LENGTH, STEPS = 16, 48, 6
OPTION_TOKENS = (100, 200)


def opt_125m() -> OPTForCausalLM:
    """OPT-125M's shape with random weights, float32."""
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY)).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in name only: the examples of this benchmark are token ids already."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 1, "</s>": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def rows() -> list[dict[str, Any]]:
    """One batch of prompts of random tokens, each followed by one labelled token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (BATCH_SIZE, LENGTH), generator=generator).tolist()
    return [{"input_ids": row, "labels": [-100] * (LENGTH - 1) + row[-1:]} for row in ids]


class StepClock(TrainerCallback):
    """Seconds of each step, and those of them inside the model's forward."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.steps: list[float] = []
        self.forwards: list[float] = []
        self.inside = 0.0
        forward = model.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = forward(*args, **kwargs)
            self.inside += time.perf_counter() - start
            return output

        model.forward = timed

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the step's clock."""
        self.inside, self.start = 0.0, time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.steps.append(time.perf_counter() - self.start)
        self.forwards.append(self.inside)


def trainer(strategy: StrategyName, folder: str) -> ZOTrainer:
    """A trainer on the OPT shape, LoRA r=8 on query and value."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    args = ZOConfig(
        folder,
        strategy=strategy,
        zo_eps=1e-3,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return ZOTrainer(
        opt_125m(), args, train_dataset=rows(), processing_class=tokenizer(), peft_config=lora
    )


def measure_time(strategy: StrategyName) -> dict[str, float]:
    """Median seconds of a step and of its forwards; the first step, a warm-up, is left out."""
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(strategy, folder)
        clock = StepClock(run.model)
        run.add_callback(clock)
        run.train()
    shares = [1 - f / s for s, f in zip(clock.steps[1:], clock.forwards[1:])]
    return {
        "step_seconds": statistics.median(clock.steps[1:]),
        "outside_share": statistics.median(shares),
        "passes": run.evaluator.forward_passes / STEPS,
    }


def adam_steps(run: ZOTrainer) -> None:
    """The same adapter on the same batch with gradients, for comparison."""
    tuned = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned)
    batch = run.data_collator([run.train_dataset[index] for index in range(BATCH_SIZE)])
    for _ in range(STEPS):
        run.objective.losses(run.model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def measure_memory(what: str) -> dict[str, int]:
    """Peak resident set of the steps above what the process held with the weights, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        run = trainer("gv", folder)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        loaded = psutil.Process().memory_info().rss
        if what == "train":
            run.train()
        elif what == "adam":
            adam_steps(run)
        else:
            base = run.model.unload()
            batch = torch.tensor([row["input_ids"] for row in rows()])
            with torch.no_grad():
                for _ in range(STEPS):
                    base(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return {"bytes": peak - loaded}


def in_a_process(what: str) -> int:
    """`measure_memory` in a fresh process."""
    command = [sys.executable, __file__, "--memory", what]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])["bytes"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory", choices=["train", "forward", "adam"], help="for its own use")
    given = parser.parse_args()
    if given.memory:
        print(json.dumps(measure_memory(given.memory)))
        return
    print(f"OPT-125M shape, LoRA r=8, float32, batch {BATCH_SIZE} x {LENGTH} tokens, {STEPS} steps")
    print("| strategy | forward passes a step | seconds a step | outside the forward |")
    print("| --- | --- | --- | --- |")
    for strategy in get_args(StrategyName):
        row = measure_time(strategy)
        print(
            f"| {strategy} | {row['passes']:.0f} | {row['step_seconds']:.2f} "
            f"| {row['outside_share']:.1%} |",
            flush=True,
        )
    print("\n| what | peak memory above the weights, MiB | against a plain forward |")
    print("| --- | --- | --- |")
    forward = in_a_process("forward")
    for name, what in (("plain forward", forward), ("zo_peft, gv", in_a_process("train"))):
        print(f"| {name} | {what / 2**20:.0f} | {what / forward:.2f} |")
    adam = in_a_process("adam")
    print(f"| the same adapter with gradients (Adam) | {adam / 2**20:.0f} | {adam / forward:.2f} |")


if __name__ == "__main__":
    main()
