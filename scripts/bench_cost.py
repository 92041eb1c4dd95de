"""What a step costs beside the model's forward passes: time outside them, and peak memory.

Whole training steps of ZOTrainer are timed on a shape with random weights and a LoRA, and within
the same steps the time inside the model's forward. After each step a plain forward pass is timed:
the losses of the same batch, with the adapter and the logits of scored positions alone. Peak memory
above the weights is measured in a process of its own: during steps, during plain forwards of the
same batch (no adapter, all logits, `torch.no_grad`), and during steps of Adam with gradients, with
and without activation checkpoints.

Small peaks are hidden by memory that glibc keeps; MALLOC_MMAP_THRESHOLD_=65536 in the environment
shows them.

    python scripts/bench_cost.py
    python scripts/bench_cost.py --strategies guided --steps 20
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from measuring import (
    DEVICE,
    SHAPES,
    SILENT,
    StepClock,
    add_shape_option,
    in_a_process,
    peak_above,
    print_header,
    print_row,
    quiet,
    random_rows,
    tokenizer,
)
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from zo_peft import GradientTrainer, ZOConfig, ZOTrainer
from zo_peft.core.strategies import STRATEGIES

BATCH_SIZE, LENGTH = 16, 48


def make_trainer(
    shape: str, strategy: str, steps: int, folder: str, exact_layers: int = 0
) -> ZOTrainer | GradientTrainer:
    """A trainer of the shape with random weights in float32, LoRA r=8 on query and value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    args = ZOConfig(
        folder,
        strategy=strategy,
        exact_layers=exact_layers,
        zo_eps=None if strategy == "adam" else 1e-3,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        **SILENT,
    )
    kind = GradientTrainer if strategy == "adam" else ZOTrainer
    return kind(
        model.eval(),
        args,
        train_dataset=random_rows(BATCH_SIZE, LENGTH),
        processing_class=tokenizer(),
        peft_config=lora,
    )


class PlainClock(StepClock):
    """A `StepClock` that times a plain forward pass after each step, too.

    Attributes:
        ratios: the seconds of each step for each of its forward passes, over those of a plain one.
    """

    def __init__(self, trainer: ZOTrainer) -> None:
        super().__init__(trainer.model)
        self.trainer, self.passes, self.ratios = trainer, 0, list[float]()
        (self.batch,) = trainer.get_train_dataloader()

    @torch.no_grad()
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the step's clock, and make the plain forward pass."""
        super().on_step_end()
        before, self.passes = self.passes, self.trainer.forward_passes
        start = time.perf_counter()
        self.trainer.objective.losses(self.trainer.model, self.batch)
        plain = time.perf_counter() - start
        self.ratios.append(self.steps[-1] / (self.passes - before) / plain)


def measure_time(shape: str, strategy: str, steps: int) -> tuple[float, float, float, float]:
    """Forward passes and median seconds of a step, and its median share outside the forward.

    The last is the median of `PlainClock.ratios`. The first step is a warm-up and left out.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        trainer = make_trainer(shape, strategy, steps, folder)
        assert isinstance(trainer, ZOTrainer)
        clock = PlainClock(trainer)
        trainer.add_callback(clock)
        trainer.train()
    taken, inside = clock.steps[1:], clock.forwards[1:]
    outside = statistics.median(1 - f / s for s, f in zip(taken, inside))
    ratio = statistics.median(clock.ratios[1:])
    return trainer.forward_passes / steps, statistics.median(taken), outside, ratio


def take_adam_steps(trainer: ZOTrainer, steps: int) -> None:
    """Train the same adapter on the same batch with gradients, for comparison."""
    tuned = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned)
    (batch,) = trainer.get_train_dataloader()
    for _ in range(steps):
        trainer.objective.losses(trainer.model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def run_forwards(trainer: ZOTrainer, steps: int) -> None:
    """Run the base without its adapter on the same batch, with the logits of all positions."""
    base = trainer.model.unload()
    rows = random_rows(BATCH_SIZE, LENGTH)
    ids = torch.tensor([row["input_ids"] for row in rows], device=DEVICE)
    for _ in range(steps):
        base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def measure_memory(shape: str, what: str, steps: int) -> float:
    """Peak above what the process held with the weights, MiB."""
    with tempfile.TemporaryDirectory() as folder:
        strategy = {"checkpointed": "adam", "guided": "guided"}.get(what, "gv")
        trainer = make_trainer(shape, strategy, steps, folder)
        actions = {
            "adam": lambda: take_adam_steps(trainer, steps),
            "forward": lambda: run_forwards(trainer, steps),
        }
        return peak_above(actions.get(what, trainer.train))


def main() -> None:
    """Print a table of times and one of memory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_shape_option(parser, "OPT-125M", "the model; its weights are random")
    parser.add_argument("--steps", type=int, default=6, help="at least 2; the first is a warm-up")
    strategies = [*STRATEGIES, "guided"]
    parser.add_argument("--strategies", nargs="*", default=strategies, choices=strategies)
    given = parser.parse_args()
    quiet()
    print(
        f"{given.shape} shape, LoRA r=8, float32, batch {BATCH_SIZE} x {LENGTH} tokens, "
        f"{given.steps} steps"
    )
    print_header(
        "strategy",
        "forward passes a step",
        "seconds a step",
        "outside the forward",
        "a forward pass against a plain one",
    )
    for strategy in given.strategies:
        passes, seconds, outside, ratio = measure_time(given.shape, strategy, given.steps)
        print_row(strategy, f"{passes:.1f}", f"{seconds:.2f}", f"{outside:.1%}", f"{ratio:.2f}")
    print()
    print_header("what", "peak memory above the weights, MiB", "against a plain forward")
    names = {
        "forward": "plain forward",
        "gv": "zo_peft, gv",
        "guided": "zo_peft, guided",
        "checkpointed": "the same adapter with gradients (Adam), activations checkpointed",
        "adam": "the same without checkpoints",
    }
    peaks = {what: in_a_process(measure_memory, given.shape, what, given.steps) for what in names}
    for what, name in names.items():
        print_row(name, f"{peaks[what]:.0f}", f"{peaks[what] / peaks['forward']:.2f}")


if __name__ == "__main__":
    main()
