"""Reward tuning of tiny adapters: teach the embedded model to praise, by a rule that checks it.

A prompt is the first sentence of a bad review, followed by ` This was a`. The reward of a
completion is 1 where it has a word of praise and no word of blame, else 0. Each adapter is tuned
with the defaults of a strategy, gv unless another is named, and its greedy completions of held-out
prompts are rewarded as training goes on. The last column says how many times larger the variance of
the difference of two candidates' rewards would be without common random numbers, at the run's first
eps (where a run has chosen one). With an engine, an adapter is tuned in PyTorch on the float base,
and beside it with the engine.

    python scripts/reward_tuning.py
    python scripts/reward_tuning.py --engine llamacpp --adapters LoRA
    python scripts/reward_tuning.py --engine vllm --engine_url http://a:8000 --adapters LoRA
    python scripts/reward_tuning.py --strategy guided --max_forward_passes 600 --points 60 --to_goal
"""

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import peft
import torch
from datasets import disable_progress_bars
from peft import IA3Config, LoraConfig, PeftConfig, VeraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from zo_peft import Direction, ZOConfig, ZOTrainer
from zo_peft.core.noise import derive_seed
from zo_peft.data import read_rows
from zo_peft.models.loading import load_tokenizer
from zo_peft.objectives.rewards import RewardObjective
from zo_peft.tools.demo import EMBEDDED

MODEL = str(EMBEDDED / "model")
COMPLETION_TOKENS = 6
HELD_OUT = 128
#: The reward that the table counts the forward passes to.
GOAL = 0.9
QUERY_VALUE = ["q_proj", "v_proj"]
WRITERS = ["v_proj", "o_proj", "down_proj"]
ALL_LINEAR = [*QUERY_VALUE, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
}

#: Of each adapter: the base, and what makes its configuration.
ADAPTERS: dict[str, tuple[str, Callable[[], PeftConfig]]] = {
    "LoRA": (
        "float32",
        lambda: LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=QUERY_VALUE),
    ),
    "LoRA on writers": (
        "float32",
        lambda: LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=WRITERS),
    ),
    "TinyLoRA": (
        "float32",
        lambda: peft.TinyLoraConfig(
            task_type="CAUSAL_LM", r=2, u=13, weight_tying=1.0, target_modules=ALL_LINEAR
        ),
    ),
    "IA3": (
        "int8",
        lambda: IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], feedforward_modules=[]
        ),
    ),
    "VeRA": (
        "int8",
        lambda: VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=QUERY_VALUE),
    ),
}


PRAISE = re.compile(
    r"\b(wonderful|lovely|delightful|excellent|superb|charming|pleasant|brilliant|splendid|fantastic"
    r"|perfect|impressive|beautiful|enjoyable|marvellous|outstanding|fine|nice|good|memorable"
    r"|remarkable|amazing|delicious|tasty|fresh|crisp|creamy|gripping|touching|clever|funny|witty"
    r"|clean|cosy|quiet|spacious|comfortable|moving|elegant|thoughtful|vivid|exciting|lively"
    r"|thrilling|harmonious|energetic|magical)\b"
)
BLAME = re.compile(
    r"\b(awful|dreadful|horrible|poor|bad|disappointing|unpleasant|dull|miserable|weak|shabby"
    r"|annoying|disgusting|mediocre|lousy|nasty|hopeless|forgettable|unbearable|ugly|appalling"
    r"|wretched|stale|greasy|bland|burnt|soggy|predictable|tedious|silly|clumsy|pointless|dirty"
    r"|noisy|cramped|mouldy|smelly|confusing|shallow|long-winded|clichéd|lifeless|shrill|chaotic"
    r"|lame|monotonous|deafening)\b"
)


def praises(completions: Sequence[str], **columns: Any) -> list[float]:
    """1 for a completion with a word of praise and none of blame, else 0."""
    return [float(bool(PRAISE.search(c)) and not BLAME.search(c)) for c in completions]


def prompts(part: str) -> list[dict[str, str]]:
    """Prompts from the embedded texts: of `train`, or of `test` without those of `train`."""
    rows = {name: read_rows(EMBEDDED / f"{name}.jsonl") for name in {"train", part}}
    bad = {
        name: [row["text"].split(". ")[0].rstrip(".") for row in own if row["label"] == 0]
        for name, own in rows.items()
    }
    known = set(bad["train"]) if part != "train" else set()
    chosen = [text for text in dict.fromkeys(bad[part]) if text not in known]
    return [{"prompt": f"{text}. This was a"} for text in chosen]


class Counted:
    """A reward that counts the tokens of the completions that it is given."""

    __name__ = "praises"

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, completion_ids: Sequence[Sequence[int]], **given: Any) -> list[float]:
        """The rewards of `praises`."""
        self.tokens += sum(map(len, completion_ids))
        return praises(**given)


def engine_settings(
    engine: str, kind: str | None, urls: list[str] | None, folder: Path
) -> dict[str, Any]:
    """The settings of a run with an engine, whose base of this kind is written to the folder."""
    if engine == "vllm":
        return {"engine": engine, "engine_url": urls}
    convert, path = import_module("convert"), folder / f"base.{engine}"
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    if engine == "llamacpp":
        convert.write_gguf(model, path, kind or "Q4_0")
    else:
        convert.write_openvino(model, path, kind or "int4")
    return {"base": str(path), "engine": engine, "tokenizer_name": MODEL}


def make(
    adapter: str, output_dir: Path, reward: Any = praises, base: str = MODEL, **settings: Any
) -> ZOTrainer:
    """A trainer of one of the `ADAPTERS`; evaluations reward greedy completions."""
    kind, config = ADAPTERS[adapter]
    tokenizer = load_tokenizer(MODEL)
    return ZOTrainer(
        base,
        ZOConfig(
            str(output_dir),
            model_init_kwargs=BASES[kind],
            max_completion_length=COMPLETION_TOKENS,
            **{
                "strategy": "gv",
                "per_device_train_batch_size": 16,
                "per_device_eval_batch_size": HELD_OUT,
                "save_strategy": "no",
                "disable_tqdm": True,
                "use_cpu": True,
                "report_to": "none",
                **settings,
            },
        ),
        train_dataset=prompts("train"),
        eval_dataset=prompts("test")[:HELD_OUT],
        processing_class=tokenizer,
        peft_config=config(),
        reward_funcs=[reward],
        eval_objective=RewardObjective(
            [praises], tokenizer, max_completion_length=COMPLETION_TOKENS
        ),
    )


@torch.no_grad()
def variance_ratio(
    trainer: ZOTrainer, eps: float, pairs: int = 8, examples: int = 128
) -> float | None:
    """How much larger the variance of candidates' difference is if each samples on its own.

    The difference is that of an example's rewards, and the variance a mean over pairs of
    candidates. It is compared with that of candidates which sample with common random numbers; None
    where these do not differ.
    """
    features = [trainer.train_dataset[index] for index in range(examples)]
    batch = trainer.data_collator(features)
    objective = trainer.objective
    assert isinstance(objective, RewardObjective)

    def losses(candidate: int, seed: int) -> Tensor:
        objective.seed = seed
        with trainer.space.displaced(eps * Direction.of(derive_seed(candidate, -9))):
            return objective.losses(trainer.model, batch)

    shared, own = 0.0, 0.0
    for pair in range(pairs):
        first = losses(2 * pair, pair)
        shared += float((first - losses(2 * pair + 1, pair)).var())
        own += float((first - losses(2 * pair + 1, pairs + pair)).var())
    return round(own / shared, 2) if shared else None


class Curve(TrainerCallback):
    """Measures the held-out reward after every so many forward passes; may stop at `GOAL`.

    `seconds` are the CPU seconds that this has taken.
    """

    def __init__(self, every: int, reward: Counted, to_goal: bool) -> None:
        self.every, self.reward, self.to_goal = every, reward, to_goal
        self.trainer: ZOTrainer | None = None
        self.seconds = 0.0
        self.points: list[dict[str, float]] = []

    def add(self) -> None:
        """Measure one more point."""
        assert self.trainer is not None
        start = time.process_time()
        self.points.append(
            {
                "forward_passes": self.trainer.forward_passes,
                "generated_tokens": self.reward.tokens,
                "reward": self.trainer.evaluate()["eval_praises"],
            }
        )
        self.seconds += time.process_time() - start

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where so many forward passes have been made since the last point."""
        assert self.trainer is not None
        if self.trainer.forward_passes >= self.points[-1]["forward_passes"] + self.every:
            self.add()
        control.should_training_stop |= self.to_goal and self.points[-1]["reward"] >= GOAL


def row(
    adapter: str, folder: Path, points: int, pairs: int, to_goal: bool, **settings: Any
) -> dict[str, Any]:
    """Train an adapter and measure it as it goes; what is written of it."""
    # Rewards differ most where they are neither all 0 nor all 1: before training. It is made first,
    # because a server may be gone in the end.
    names = {"base", "engine", "tokenizer_name", "engine_url"} & {*settings}
    fresh = make(
        adapter,
        folder,
        seed=settings["seed"],
        max_steps=1,
        **{name: settings[name] for name in names},
    )
    reward = Counted()
    trainer = make(adapter, folder, reward, **settings)
    curve = Curve(settings["max_forward_passes"] // points, reward, to_goal)
    curve.trainer = trainer
    trainer.add_callback(curve)
    curve.add()
    start = time.process_time() - curve.seconds
    trainer.train()
    seconds = time.process_time() - start - curve.seconds
    curve.add()
    eps = [calibration.zo_eps for calibration in trainer.calibrations]
    ratio = variance_ratio(fresh, eps[0], pairs) if eps else None
    reached = (point for point in curve.points if point["reward"] >= GOAL)
    return {
        "adapter": adapter,
        "strategy": trainer.args.strategy,
        "base": trainer.engine.identity["loaded"] if trainer.engine else ADAPTERS[adapter][0],
        "numbers": trainer.tuned_numel,
        "seed": trainer.args.seed,
        "learning_rate": trainer.args.learning_rate,
        "zo_eps": eps,
        "cpu_seconds": round(seconds, 1),
        "tokens_per_cpu_second": round(reward.tokens / seconds),
        "variance_ratio": ratio,
        "goal": next(reached, None),
        "curve": curve.points,
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw rewards over forward passes and over generated tokens."""
    figure, both = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, over in zip(both, ("forward_passes", "generated_tokens")):
        for found in rows:
            label = f"{found['adapter']}, {found['base']}, {found['strategy']}, "
            label += f"{found['numbers']:,} numbers"
            curve = found["curve"]
            axes.plot([p[over] for p in curve], [p["reward"] for p in curve], "o-", label=label)
        axes.set(xlabel=over.replace("_", " "))
    both[0].set(ylabel="reward of held-out prompts, greedy")
    both[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the table, and write its rows and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", nargs="*", default=[*ADAPTERS], choices=[*ADAPTERS])
    parser.add_argument("--strategy", default="gv", help="gv, guided or another of ZOConfig")
    parser.add_argument("--max_forward_passes", type=int, default=1200)
    parser.add_argument("--learning_rate", type=float, help="the default is automatic")
    parser.add_argument("--points", type=int, default=6, help="how many each curve has")
    parser.add_argument("--pairs", type=int, default=8, help="of candidates, for the variance")
    parser.add_argument("--to_goal", action="store_true", help=f"stop at a reward of {GOAL}")
    parser.add_argument("--engine", choices=["llamacpp", "openvino", "vllm"], help="LoRA alone")
    parser.add_argument("--type", help="of the engine's base: F32, f32 ...; default: 4 bits")
    parser.add_argument("--engine_url", nargs="+", help="for vllm: servers of the embedded model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/reward_tuning"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    disable_progress_bars()
    torch.set_num_threads(1)  # more only wait for each other on models this small
    print(
        f"| adapter | numbers | forward passes: reward | passes (tokens) to {GOAL} | tokens "
        "| CPU s | tokens per CPU s | variance ratio |"
    )
    print("|" + " --- |" * 8)
    bases: list[dict[str, Any]] = [{}]
    if given.engine:
        with contextlib.redirect_stdout(sys.stderr):
            bases.append(engine_settings(given.engine, given.type, given.engine_url, given.out))
    rows = []
    for adapter, base in product(given.adapters, bases):
        with contextlib.redirect_stdout(sys.stderr):
            found = row(
                adapter,
                given.out,
                given.points,
                given.pairs,
                given.to_goal,
                strategy=given.strategy,
                max_forward_passes=given.max_forward_passes,
                learning_rate=given.learning_rate,
                seed=given.seed,
                **base,
            )
        rows.append(found)
        curve = ", ".join(f"{p['forward_passes']:,}: {p['reward']:.2f}" for p in found["curve"])
        goal = "not reached"
        if found["goal"]:
            goal = "{forward_passes:,} ({generated_tokens:,})".format(**found["goal"])
        print(
            f"| {adapter}, {found['base']} | {found['numbers']:,} | {curve} | {goal} "
            f"| {found['curve'][-1]['generated_tokens']:,} | {found['cpu_seconds']:.0f} "
            f"| {found['tokens_per_cpu_second']:,} | {found['variance_ratio'] or ''} |"
        )
        sys.stdout.flush()
        (given.out / "rewards.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot(rows, given.out / "rewards.png")
    print(f"\nThe curves are in {given.out / 'rewards.png'}.")


if __name__ == "__main__":
    main()
