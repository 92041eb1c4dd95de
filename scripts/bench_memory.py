"""Memory and time of tuning a base's own numbers, on shapes with random weights.

Each row is measured in a process of its own. It builds the quantized model layer by layer, never as
a whole in floating point, runs plain inference with the logits of all positions, then takes
training steps, and reports the peak of the resident set during each (Linux only). The row `plain,
alone` is of a process that only infers, without a trainer and what its libraries hold. The seconds
of a step stand beside those of as many plain forwards as the step has candidates.

    python scripts/bench_memory.py    # OPT-1.3B, int8, batch 16 x 48
    python scripts/bench_memory.py --shape opt-13b --batch_size 2 --steps 1
    python scripts/bench_memory.py --shape opt-13b --base nf4 --batch_size 2 --steps 1
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.functional import QuantState, get_4bit_type
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from measuring import (
    SHAPES,
    SILENT,
    StepClock,
    add_shape_option,
    in_a_process,
    peak_mib,
    print_header,
    print_row,
    quiet,
    random_rows,
    reset_peak,
    tokenizer,
)
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from zo_peft import ZOConfig, ZOTrainer

#: What is tuned, by settings of `ZOConfig`.
MODES: dict[str, dict[str, Any]] = {
    "adapter": {},
    "scales": {"tune": "scales"},
    "weights": {"tune": "weights"},
    "dense": {"tune": "weights", "noise_rank": 0, "per_example_noise": False},
}
#: The mode of a process that only infers.
ALONE = "plain"


@dataclass(frozen=True)
class Work:
    """The model, the batch and the steps of all rows of a table."""

    shape: str
    base: str
    batch_size: int
    length: int
    candidates: int
    steps: int

    def rows(self) -> list[dict[str, Any]]:
        """The batch: each prompt has one labelled token."""
        return random_rows(self.batch_size, self.length)


def int8_layer(layer: nn.Linear, device: str) -> Linear8bitLt:
    """A layer of that shape with random int8 codes."""
    quantized = Linear8bitLt(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
        device="meta",
    )
    codes = torch.randint(-127, 128, layer.weight.shape, dtype=torch.int8, device=device)
    scales = torch.full((layer.out_features,), 0.05, device=device)
    quantized.weight = Int8Params(
        codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
    )
    return quantized


def nf4_layer(layer: nn.Linear, device: str) -> Linear4bit:
    """A layer of that shape with random NF4 codes."""
    quantized = Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    count = layer.weight.numel()
    state = QuantState(
        absmax=torch.full((count // 64,), 0.05, device=device),
        shape=layer.weight.shape,
        code=get_4bit_type("nf4", device),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    quantized.weight = Params4bit(
        torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, device=device),
        quant_state=state,
        quant_type="nf4",
        bnb_quantized=True,
        module=quantized,
    )
    return quantized


def build(shape: str, base: str, device: str = "cpu") -> PreTrainedModel:
    """The model with random weights: its layers are quantized, the rest is bfloat16."""
    torch.manual_seed(0)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=torch.bfloat16)
    quantize = {"int8": int8_layer, "nf4": nf4_layer}[base]
    for module in model.base_model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, quantize(child, device))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                values.normal_(0, 0.02)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def plain_peak(model: PreTrainedModel, rows: list[dict[str, Any]]) -> float:
    """The peak of the process during inference on the batch with all logits, MiB."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    reset_peak()
    model(input_ids=ids, use_cache=False)
    return peak_mib()


def measure_alone(work: Work) -> float:
    """The peak of a process that only infers, MiB."""
    return plain_peak(build(work.shape, work.base), work.rows())


def make_trainer(work: Work, mode: str, folder: str) -> ZOTrainer:
    """A trainer of what the mode tunes."""
    adapter: PeftConfig | None = None
    if mode == "adapter":
        adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    args = ZOConfig(
        folder,
        strategy="gv",
        per_device_train_batch_size=work.batch_size,
        num_candidates=work.candidates,
        max_steps=work.steps,
        zo_eps=1e-3,
        **SILENT,
        **MODES[mode],
    )
    return ZOTrainer(
        build(work.shape, work.base),
        args,
        train_dataset=work.rows(),
        processing_class=tokenizer(),
        peft_config=adapter,
    )


def measure(work: Work, mode: str) -> dict[str, float]:
    """Peaks (MiB) of steps and of inference, and seconds of a step and of its forwards alone.

    The forwards are those of the trained positions, timed before and after the steps. Where there
    is only one step they are not timed, and take 0 seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(work, mode, folder)
        (batch,) = trainer.get_train_dataloader()

        @torch.no_grad()
        def forwards() -> float:
            start = time.perf_counter()
            for _ in range(work.candidates):
                trainer.objective.losses(trainer.model, batch)
            return time.perf_counter() - start

        timed = work.steps > 1
        before = forwards() if timed else 0.0
        clock = StepClock(trainer.model)
        trainer.add_callback(clock)
        plain = plain_peak(trainer.model, work.rows())
        reset_peak()
        trainer.train()
        return {
            "peak": peak_mib(),
            "plain": plain,
            "step": median(clock.steps[1:] or clock.steps),
            "forwards": (before + forwards()) / 2 if timed else 0.0,
        }


def cells(found: dict[str, float]) -> list[str]:
    """The cells of what `measure` found."""
    peak, plain, step, forwards = found.values()
    made = [f"{peak:,.0f}", f"{plain:,.0f}", f"{peak / plain:.2f}", f"{step:.1f}"]
    return made + ([f"{forwards:.1f}", f"{step / forwards:.2f}"] if forwards else ["", ""])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_shape_option(parser, "OPT-1.3B", "the model; its weights are random")
    parser.add_argument("--base", choices=["int8", "nf4"], default="int8")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    modes = [ALONE, *MODES]
    parser.add_argument("--modes", nargs="*", choices=modes, default=modes, help="rows to measure")
    given = parser.parse_args()
    quiet()
    settings = {name: value for name, value in vars(given).items() if name != "modes"}
    work = Work(**settings)
    print_header(
        "what", "peak MiB", "plain inference, MiB", "ratio", "step, s", "its forwards, s", "ratio"
    )
    for name in given.modes:
        if name == ALONE:
            peak = in_a_process(measure_alone, work)
            print_row("plain, alone", "", f"{peak:,.0f}", "", "", "", "")
        elif given.base == "int8" or MODES[name].get("tune") != "weights":  # NF4 codes stay
            print_row(name, *cells(in_a_process(measure, work, name)))


if __name__ == "__main__":
    main()
