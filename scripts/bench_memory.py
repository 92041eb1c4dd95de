"""Memory and time of tuning a base's own numbers: OPT shapes, random weights, batches of tokens.

Each row is a process of its own: it builds the quantized model layer by layer (never in float),
runs plain inference (all logits) and then training steps, and reports the peak resident set during
each (VmHWM, Linux); `plain, alone` is a process without a trainer and its libraries' memory.
A step's time stands beside that of as many plain forwards as it has candidates, in one process.

    python scripts/bench_memory.py    # OPT-1.3B, int8, batch 16 x 48
    python scripts/bench_memory.py --shape opt-13b --batch_size 2 --steps 1
    python scripts/bench_memory.py --shape opt-13b --base nf4 --batch_size 2 --steps 1
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_cost import StepClock, tokenizer
from bitsandbytes.functional import QuantState, get_4bit_type
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from zo_peft import ZOConfig, ZOTrainer

VOCABULARY = 50272
SHAPES: dict[str, dict[str, int]] = {
    "opt-125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "opt-1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32},
    "opt-13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40},
}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapter": {},
    "scales": {"tune": "scales"},
    "weights": {"tune": "weights"},
    "dense": {"tune": "weights", "noise_rank": 0, "per_example_noise": False},
}


def int8_layer(layer: nn.Linear) -> Linear8bitLt:
    """A layer of that shape with random codes."""
    quantized = Linear8bitLt(
        layer.in_features, layer.out_features, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    codes = torch.randint(-127, 128, layer.weight.shape, dtype=torch.int8)
    scales = torch.full((layer.out_features,), 0.05)
    quantized.weight = Int8Params(
        codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
    )
    return quantized


def nf4_layer(layer: nn.Linear) -> Linear4bit:
    """The same in NF4."""
    quantized = Linear4bit(
        layer.in_features,
        layer.out_features,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    count = layer.weight.numel()
    state = QuantState(
        absmax=torch.full((count // 64,), 0.05),
        shape=layer.weight.shape,
        code=get_4bit_type("nf4", "cpu"),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
    )
    quantized.weight = Params4bit(
        torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8),
        quant_state=state,
        quant_type="nf4",
        bnb_quantized=True,
        module=quantized,
    )
    return quantized


def build(shape: str, base: str) -> OPTForCausalLM:
    """The model, its layers quantized and the rest in bfloat16."""
    torch.manual_seed(0)
    sizes = SHAPES[shape]
    config = OPTConfig(
        vocab_size=VOCABULARY,
        ffn_dim=4 * sizes["hidden_size"],
        word_embed_proj_dim=sizes["hidden_size"],
        dtype="bfloat16",
        **sizes,
    )
    with torch.device("meta"):
        model = OPTForCausalLM(config).to(torch.bfloat16)
    quantize = {"int8": int8_layer, "nf4": nf4_layer}[base]
    for module in model.model.decoder.layers.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, quantize(child))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    return model.eval()


def rows(batch_size: int, length: int) -> list[dict[str, Any]]:
    """One batch of prompts of random tokens, each followed by one labelled token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (batch_size, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": [-100] * (length - 1) + row[-1:]} for row in ids]


def reset_peak() -> None:
    """Forget the peak of the resident set so far."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The peak of the resident set since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def plain(model: OPTForCausalLM, examples: list[dict[str, Any]]) -> dict[str, float]:
    """Inference on the batch: all logits."""
    ids = torch.tensor([row["input_ids"] for row in examples])
    reset_peak()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return {"peak": peak_mib()}


def trained(
    model: OPTForCausalLM, examples: list[dict[str, Any]], mode: str, steps: int, candidates: int
) -> dict[str, float]:
    """Training steps, with plain forwards of the trained positions before and behind them."""
    adapter: PeftConfig | None = None
    if mode == "adapter":
        adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(
            folder,
            per_device_train_batch_size=len(examples),
            num_candidates=candidates,
            max_steps=steps,
            zo_eps=1e-3,
            save_strategy="no",
            report_to=[],
            **MODES[mode],
        )
        trainer = ZOTrainer(
            model,
            args,
            train_dataset=examples * steps,
            processing_class=tokenizer(),
            peft_config=adapter,
        )
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(examples))])

        def forwards() -> float:
            start = time.perf_counter()
            with torch.no_grad():
                for _ in range(candidates):
                    trainer.objective.losses(trainer.model, batch)
            return time.perf_counter() - start

        forwards_before = forwards() if steps > 1 else 0.0
        clock = StepClock(model)
        trainer.add_callback(clock)
        base = plain(model, examples)["peak"]
        reset_peak()
        trainer.train()
        peak = peak_mib()
        after = forwards() if steps > 1 else 0.0
    return {
        "peak": peak,
        "plain": base,
        "step": median(clock.steps[1:] or clock.steps),
        "forwards": (forwards_before + after) / 2,
    }


def measure(given: argparse.Namespace, mode: str) -> dict[str, float]:
    """A row, in a process of its own."""
    settings = {**vars(given), "modes": None, "mode": mode}
    argv = [part for k, v in settings.items() if v is not None for part in (f"--{k}", str(v))]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *argv], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table; with `--mode`, measure one row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=[*SHAPES], default="opt-1.3b")
    parser.add_argument("--base", choices=["int8", "nf4"], default="int8")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--modes", nargs="*", choices=[*MODES], default=None)
    parser.add_argument("--mode", choices=[*MODES], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.mode is not None:
        model, examples = build(given.shape, given.base), rows(given.batch_size, given.length)
        if given.mode == "plain":
            print(json.dumps(plain(model, examples)))
        else:
            found = trained(model, examples, given.mode, given.steps, given.candidates)
            print(json.dumps(found))
        return
    modes = given.modes or [m for m in MODES if given.base == "int8" or MODES[m] != "weights"]
    if given.base == "nf4":
        modes = [mode for mode in modes if MODES[mode].get("tune") != "weights"]
    print("| what | peak MiB | plain inference, MiB | ratio | step, s | its forwards, s | ratio |")
    print("|" + " --- |" * 7)
    base = measure(given, "plain")["peak"]
    print(f"| plain, alone | | {base:,.0f} | | | | |", flush=True)
    for mode in (mode for mode in modes if mode != "plain"):
        row = measure(given, mode)
        cells = [mode, f"{row['peak']:,.0f}", f"{row['plain']:,.0f}"]
        cells += [f"{row['peak'] / row['plain']:.2f}", f"{row['step']:.1f}"]
        if row["forwards"]:
            cells += [f"{row['forwards']:.1f}", f"{row['step'] / row['forwards']:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
