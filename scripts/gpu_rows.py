"""Every figure that needs a GPU, in one command: tables for docs/benchmarks.md, most telling first.

Each row is printed as soon as it is known, and kept in a file of JSON: the command goes on behind
the rows that the file has, and makes those again that failed (its exit code is 1 where one did). It
needs one card of 24 to 140 GB, and no network: weights are random, and made on the card layer by
layer. `--dry_run` makes all rows with tiny shapes, on a CPU too.

    python scripts/gpu_rows.py --minutes 9
    python scripts/gpu_rows.py --tables lanes demo
    python scripts/gpu_rows.py --dry_run
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_memory import build
from bench_step import deviation, perturb, seconds
from measuring import (
    DEVICE,
    SHAPES,
    SILENT,
    StepClock,
    peak_mib,
    print_header,
    print_row,
    quiet,
    random_rows,
    reset_peak,
    tokenizer,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel
from workloads import BASES, embedded, lora

from zo_peft import GradientTrainer, ZOConfig, ZOTrainer
from zo_peft.core.batch import Batch
from zo_peft.core.lanes import replaced
from zo_peft.core.noise import noise_blocks, philox
from zo_peft.tools.demo import EMBEDDED, DemoArguments, demo
from zo_peft.train import trainer as trainers

#: The columns of each table.
TABLES = {
    "numbers": ["on the card against the CPU", "found"],
    "large": [
        "work",
        "peak, GB",
        "a step, s",
        "its forward passes",
        "a pass against a plain forward",
        "throughput against bare inference",
        "waits of the host in a step",
    ],
    "lanes": ["base", "largest relative deviation of a loss", "of the candidates' spread"],
    "demo": ["run", "accuracy before and after", "seconds"],
    "compiled": ["frozen parts", "a step, s"],
    "processes": ["processes on the card", "a step, s"],
}
#: What waits for the card.
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
CANDIDATES = 4
EPS = 1e-3

Cells = Sequence[str]


@dataclass(frozen=True)
class Work:
    """A base with random weights and a batch, of which the last tokens of each row are scored."""

    shape: str
    base: str
    batch: int
    length: int
    scored: int = 1

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.shape}, {self.base}, {self.batch} x {self.length}"

    def rows(self) -> list[dict[str, list[int]]]:
        """The batch."""
        return random_rows(self.batch, self.length, self.scored)

    @property
    def ids(self) -> torch.Tensor:
        """The tokens of the batch."""
        return torch.tensor([row["input_ids"] for row in self.rows()], device=DEVICE)


LARGE = [
    Work("OPT-13B", "int8", 16, 48),
    Work("OPT-13B", "nf4", 16, 48),
    Work("Llama 7B, 128k vocabulary", "nf4", 4, 512, scored=64),
    Work("Llama 7B, 128k vocabulary", "nf4", 16, 48),
    Work("OPT-13B", "nf4", 4, 512, scored=64),
    Work("OPT-13B", "int8", 4, 512, scored=64),
    Work("OPT-1.3B", "int8", 16, 48),
    Work("OPT-1.3B", "nf4", 16, 48),
    Work("Llama 7B, 128k vocabulary", "int8", 16, 48),
]
TINY = [Work("embedded", base, 2, 12, scored) for base, scored in (("int8", 1), ("nf4", 4))]


class Bases:
    """The base of the last work, which is kept for the works behind it that have the same."""

    def __init__(self) -> None:
        self.key, self.model = ("", ""), None
        self._plain: dict[Work, tuple[float, float]] = {}

    def __call__(self, work: Work) -> PreTrainedModel:
        """The base of a work."""
        if self.key != (work.shape, work.base):
            self.model = None
            collect()
            self.key, self.model = (work.shape, work.base), build(work.shape, work.base, DEVICE)
        assert self.model is not None
        return self.model

    def plain(self, work: Work) -> tuple[float, float]:
        """Seconds of a plain forward of the batch, and of one row of bare inference at its best.

        Both give the logits of scored tokens alone. Bare inference takes the rows of all candidates
        at once, where that is faster.
        """
        if work not in self._plain:
            forward = partial(self(work), logits_to_keep=work.scored + 1, use_cache=False)
            many = work.ids.repeat(CANDIDATES, 1)
            with torch.no_grad():
                one, every = (timed(partial(forward, input_ids=x), {}) for x in (work.ids, many))
            self._plain[work] = one, min(one / work.batch, every / len(many))
        return self._plain[work]


def collect() -> None:
    """Give back the memory of what is not held any more."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def waits(action: Callable[[], object]) -> int:
    """How often the host waits for the card in an action."""
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (DEVICE == "cuda")]
    with profile(activities=kinds) as profiler:
        action()
    return sum(event.count for event in profiler.key_averages() if event.key in WAITS)


@contextmanager
def peak(found: dict[str, float]) -> Iterator[None]:
    """Take the peak in GB of what is done within, weights included; of a CPU the process's."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield
        found["peak"] = torch.cuda.max_memory_allocated() / 1e9
    else:
        reset_peak()
        yield
        found["peak"] = peak_mib() * 2**20 / 1e9


def timed(action: Callable[[], object], found: dict[str, float], times: int = 3) -> float:
    """The median seconds of an action after a first one, and the peak of them all."""
    with peak(found):
        action()
        taken = [seconds(action) for _ in range(times)]
    return statistics.median(taken)


def told(work: Work, bases: Bases, found: dict[str, float]) -> Cells:
    """The cells of a step of which seconds, passes, peak and waits were found.

    A plain forward is of the same batch, with the adapter and the logits of scored tokens alone;
    for bare inference without an adapter.
    """
    plain, row = bases.plain(work)
    share = found["passes"] * work.batch * row / found["seconds"]
    against = found["seconds"] / found["passes"] / found.get("plain", plain)
    return [
        f"{found['peak']:.2f}",
        f"{found['seconds']:.3f}",
        f"{found['passes']:.0f}",
        f"{against:.2f}",
        f"{share:.2f}",
        f"{found['waits']:.0f}" if "waits" in found else "",
    ]


def plain_inference(work: Work, bases: Bases) -> Cells:
    """Inference of the base alone, with the logits of all positions."""
    base, found = bases(work), dict[str, float](passes=1)
    with torch.no_grad():
        forward = partial(base, input_ids=work.ids, use_cache=False)
        found["seconds"] = timed(forward, found)
        found["waits"] = waits(forward)
    return told(work, bases, found)


@torch.no_grad()
def plain_forward(trainer: ZOTrainer, batch: Batch) -> float:
    """Seconds of a forward pass of what is trained."""
    return timed(lambda: trainer.objective.losses(trainer.model, batch), {})


@contextmanager
def trainer_on(work: Work, base: PreTrainedModel, **settings: Any) -> Iterator[Any]:
    """A trainer with a new LoRA r=8 on query and value; afterwards the base is as it was."""
    adapter = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
    kind = GradientTrainer if settings["strategy"] == "adam" else ZOTrainer
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(
            folder,
            per_device_train_batch_size=work.batch,
            **(SILENT | {"max_steps": 100, "use_cpu": DEVICE == "cpu"} | settings),
        )
        tunes_base = "tune" in settings
        # The hash of a base is no part of a step, and takes longer than all of them.
        with replaced([(trainers, "base_hash", lambda model: "")]):
            trainer = kind(
                base,
                args,
                train_dataset=work.rows(),
                processing_class=tokenizer(),
                peft_config=None if tunes_base else adapter,
            )
        yield trainer
        if not tunes_base:
            trainer.model.unload()


def our_step(work: Work, bases: Bases, **settings: Any) -> Cells:
    """A step with candidates."""
    base = bases(work)
    settings = {"strategy": "gv", "num_candidates": CANDIDATES, "zo_eps": EPS} | settings
    found = dict[str, float]()
    with trainer_on(work, base, **settings) as trainer:
        (batch,) = trainer.get_train_dataloader()
        step = partial(next, (trainer.tuner.step([batch], n) for n in itertools.count()))
        found["plain"] = plain_forward(trainer, batch)
        found["seconds"] = timed(step, found, times=2)
        passes = trainer.forward_passes
        if "tune" in settings:
            # A profile of the noise of a whole base would take minutes.
            step()
        else:
            found["waits"] = waits(step)
        found["passes"] = trainer.forward_passes - passes
    return told(work, bases, found)


def guided_step(work: Work, bases: Bases) -> Cells:
    """A guided step that is no check; the peak is that of checks, too.

    The guide is followed whatever the check says, because the weights are random.
    """
    base, found = bases(work), dict[str, float]()
    with trainer_on(work, base, strategy="guided", zo_eps=EPS) as trainer:
        (batch,) = trainer.get_train_dataloader()
        step = partial(next, (trainer.tuner.step([batch], n) for n in itertools.count()))
        with peak(checking := dict[str, float]()):
            step()
        guided = trainer.tuner.guided
        guided.followed = sorted({guided.guide.part(name) for name in guided.known})
        guided.due = 1 << 30
        found["plain"] = plain_forward(trainer, batch)
        found["seconds"] = timed(step, found)
        passes = trainer.forward_passes
        found["waits"] = waits(step)
        found["passes"] = trainer.forward_passes - passes
        found["peak"] = max(found["peak"], checking["peak"])
    return told(work, bases, found)


def mezo_loop(work: Work, bases: Bases) -> Cells:
    """A step as the MeZO paper has it: noise in place, and the logits of every position."""
    base, found = bases(work), dict[str, float](passes=2)
    labels = torch.tensor([row["labels"] for row in work.rows()], device=DEVICE)[:, 1:]
    with trainer_on(work, base, strategy="gv", zo_eps=EPS) as trainer, torch.no_grad():
        tuned = [p for p in trainer.model.parameters() if p.requires_grad]

        def loss() -> float:
            logits = trainer.model(input_ids=work.ids, use_cache=False).logits[:, :-1]
            return cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).item()

        def step() -> None:
            perturb(tuned, 0, EPS)
            plus = loss()
            perturb(tuned, 0, -2 * EPS)
            slope = (plus - loss()) / (2 * EPS)
            perturb(tuned, 0, EPS - 1e-6 * slope)

        (batch,) = trainer.get_train_dataloader()
        found["plain"] = plain_forward(trainer, batch)
        found["seconds"] = timed(step, found)
    return told(work, bases, found)


def qlora(work: Work, bases: Bases) -> Cells:
    """A step of Adam with gradients, activations checkpointed; a pass is a third of it."""
    base, found = bases(work), dict[str, float](passes=3)
    with trainer_on(work, base, strategy="adam", max_steps=4) as trainer:
        (batch,) = trainer.get_train_dataloader()
        found["plain"] = plain_forward(trainer, batch)
        clock = StepClock(trainer.model)
        trainer.add_callback(clock)
        with peak(found):
            trainer.train()
        found["seconds"] = statistics.median(clock.steps[1:])
    return told(work, bases, found)


def integers(_: Bases) -> Cells:
    """Whether Philox gives the same integers."""
    index = torch.arange(1 << 16)

    def words(device: str) -> torch.Tensor:
        on = index.to(device)
        return torch.stack(philox((on, on * 0, on + 7, on * 3), [1, 1 << 40])).cpu()

    different = (words("cpu") != words(DEVICE)).sum().item()
    return [f"{different} of {words('cpu').numel():,} integers differ"]


def numbers(distribution: Any, _: Bases) -> Cells:
    """How far noise differs."""
    here, there = (
        noise_blocks([3, 1 << 50], "weight", 5, 1 << 18, distribution, device)
        for device in ("cpu", DEVICE)
    )
    return [f"largest difference {(here - there.cpu()).abs().max():.1e}"]


def replayed(_: Bases) -> Cells:
    """How far an adapter that was trained on the card is from one that the CPU makes again."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = {"output_dir": str(run), "max_steps": 20, "strategy": "gv", "zo_eps": 1e-2}
        trainer = embedded(lora(), **SILENT | settings | {"use_cpu": DEVICE == "cpu"})
        trainer.train()
        journal = str(run / "zo_journal")
        rebuilt = str(Path(folder) / "rebuilt")
        command = [sys.executable, "-m", "zo_peft", "replay", "--journal", journal]
        command += ["--model_name_or_path", str(EMBEDDED / "model"), "--output_dir", rebuilt]
        subprocess.run(command, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        found = load_file(f"{rebuilt}/adapter_model.safetensors")
        trained = get_peft_model_state_dict(trainer.model)
    apart = max((trained[name].cpu() - found[name]).abs().max().item() for name in found)
    return [f"largest difference {apart:.1e} after 20 steps"]


def demo_run(strategy: str, passes: int, _: Bases) -> Cells:
    """What `zo-peft demo` does, on the card."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = demo(DemoArguments(folder, strategy=strategy, max_forward_passes=passes))
    before, after = result["metric_before"], result["metric_after"]
    return [f"{before:.4f} -> {after:.4f}", f"{time.perf_counter() - start:.1f}"]


def compiled_step(shape: str, settings: dict[str, Any], _: Bases) -> Cells:
    """A step with candidates on a bfloat16 base, whose frozen parts may be compiled."""
    work = Work(shape, "bfloat16", 4, 48)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        base = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=torch.bfloat16).eval()
    options = {"strategy": "gv", "num_candidates": CANDIDATES, "zo_eps": EPS} | settings
    with trainer_on(work, base, **options) as trainer:
        (batch,) = trainer.get_train_dataloader()
        step = partial(next, (trainer.tuner.step([batch], n) for n in itertools.count()))
        step()
        return [f"{timed(step, {}, times=5):.4f}"]


def ranks_run(count: int, steps: int, _: Bases) -> Cells:
    """Steps of so many processes that share one card; NCCL refuses that, so they use gloo."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", str(steps)]
    names = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    single = {"LOCAL_RANK": "0"} | names if count > 1 else {}
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | single | ({"RANK": str(rank)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    for process, (_out, errors) in zip(processes, answers):
        if process.returncode:
            raise RuntimeError(errors.strip().splitlines()[-1])
    taken, adapters = zip(*(json.loads(out.splitlines()[-1]) for out, _ in answers))
    same = "" if count == 1 else f"; adapters {'equal' if len({*adapters}) == 1 else 'DIFFER'}"
    return [f"{max(taken):.4f}{same}"]


def child(steps: int) -> None:
    """Train as one of the processes; print the median seconds of a step, and the adapter."""
    settings: dict[str, Any] = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = embedded(
            lora(),
            output_dir=folder,
            max_steps=steps,
            strategy="gv",
            num_candidates=16,
            zo_eps=1e-2,
            parallel="candidates",
            use_cpu=DEVICE == "cpu",
            **settings,
        )
        clock = StepClock(trainer.model)
        trainer.add_callback(clock)
        trainer.train()
    total = sum(tensor.double().sum().item() for tensor in trainer.space.tensors().values())
    print(json.dumps([statistics.median(clock.steps[1:]), total]))


Row = tuple[str, str, Callable[[Bases], Cells]]


def large_rows(work: Work) -> Iterator[Row]:
    """What is done with a base, the harmless first: the last ones change it."""
    kinds: dict[str, Callable[[Work, Bases], Cells]] = {
        "inference, all logits": plain_inference,
        "guided": guided_step,
        f"gv, {CANDIDATES} candidates": our_step,
        "plain MeZO loop": mezo_loop,
        "tune=scales": partial(our_step, tune="scales"),
    }
    if work.base == "int8":
        kinds["tune=weights"] = partial(our_step, tune="weights")
    kinds["QLoRA, checkpointed"] = qlora
    for what, kind in kinds.items():
        yield "large", f"{work.name}: {what}", partial(kind, work)


def all_rows(dry: bool) -> list[Row]:
    """Every row: its table, its name and what makes it; tiny ones if `dry`."""
    works = TINY if dry else LARGE
    shapes = ["embedded"] if dry else ["OPT-1.3B", "Llama, 128k vocabulary"]
    compilers: dict[str, dict[str, Any]] = {
        "as they are": {},
        "compiled": {"torch_compile": True},
        "as CUDA graphs": {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
    }
    ranks = [2] if dry else [1, 2]
    bases = BASES | {"float16": {"dtype": "float16"}}
    rows: list[Row] = [
        ("numbers", "integers of Philox", integers),
        ("numbers", "gaussian noise", partial(numbers, "gaussian")),
        ("numbers", "signs", partial(numbers, "rademacher")),
        ("numbers", "a replayed run", replayed),
        *(row for work in works[:2] for row in large_rows(work)),
        *(("lanes", base, partial(lanes, base, how)) for base, how in bases.items()),
        ("demo", "guided, int8", partial(demo_run, "guided", 20 if dry else 200)),
        ("demo", "gv, int8", partial(demo_run, "gv", 40 if dry else 600)),
        *(row for work in works[2:5] for row in large_rows(work)),
        *(
            ("processes", f"{count}, gloo", partial(ranks_run, count, 5 if dry else 40))
            for count in ranks
        ),
        *(
            ("compiled", f"{shape}, 4 x 48, {name}", partial(compiled_step, shape, options))
            for shape in shapes
            for name, options in compilers.items()
            if not dry or not options
        ),
        *(row for work in works[5:] for row in large_rows(work)),
    ]
    return rows


def lanes(base: str, loading: dict[str, Any], _: Bases) -> Cells:
    """How far losses of a shared forward are from those one by one."""
    return deviation(base, **loading)


def main() -> None:
    """Make the rows that the file lacks, for so many minutes, and print all tables at the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_rows.json"))
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no row after these")
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=[*TABLES])
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes, also on a CPU")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet()
    if given.child:
        child(given.child)
        return
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    device += ", dry run" if given.dry_run else ""
    known = json.loads(given.output.read_text()) if given.output.exists() else {}
    if known.get("device", device) != device:
        parser.error(f"{given.output} has rows of {known['device']}; give another --output")
    stop, bases = time.monotonic() + 60 * given.minutes, Bases()
    rows = [row for row in all_rows(given.dry_run) if row[0] in given.tables]
    for table, name, make in rows:
        cells = known.get(f"{table}: {name}", ["failed"])
        if time.monotonic() > stop or not cells[0].startswith("failed"):
            continue
        start = time.monotonic()
        try:
            cells = [*make(bases)]
        except Exception as error:
            traceback.print_exc()
            cells = [f"failed: {type(error).__name__}: {error}".splitlines()[0]]
        collect()
        known[f"{table}: {name}"] = cells
        given.output.write_text(json.dumps({"device": device} | known, indent=1))
        print(f"{time.monotonic() - start:.0f} s  {table}: ", end="")
        print_row(name, *cells)
    print_tables(device, known, rows)
    if any(cells[0].startswith("failed") for name, cells in known.items() if name != "device"):
        raise SystemExit(1)


def print_tables(device: str, known: dict[str, list[str]], rows: Sequence[Row]) -> None:
    """Print the rows that are known as tables."""
    print(f"\n{device}, torch {torch.__version__}")
    for table, columns in TABLES.items():
        names = [name for kind, name, _ in rows if kind == table and f"{table}: {name}" in known]
        if names:
            print()
            print_header(*columns)
        for name in names:
            print_row(name, *known[f"{table}: {name}"])


if __name__ == "__main__":
    main()
