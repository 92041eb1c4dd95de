"""`zo-peft plan`: the memory of a run, computed before anything is loaded.

The base and its adapter are built on the meta device, as `zo-peft train` would build them: every
tensor has its shape and dtype, but holds no bytes. The formulas are here and in
`zo_peft.models.memory`.
"""

from bisect import bisect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from peft import PeftConfig
from transformers.hf_argparser import HfArg

from zo_peft.core import eps
from zo_peft.core.batch import Batch
from zo_peft.core.evaluator import wave_size
from zo_peft.core.guide import CHECK_PASSES, parts_of_check
from zo_peft.core.lanes import NotInLanes
from zo_peft.core.noise import CHUNK
from zo_peft.core.strategies import STRATEGIES
from zo_peft.core.updates import RULES
from zo_peft.errors import UserError
from zo_peft.models.adapters import add_adapter, reading_adapter
from zo_peft.models.guide import may_read, rows_at_once
from zo_peft.models.guide_memory import GuideMemory
from zo_peft.models.hub import public_name
from zo_peft.models.loading import check_4bit_widths, meta_base
from zo_peft.models.memory import Fit, layer_bytes, weight_bytes
from zo_peft.models.quantized import bitsandbytes
from zo_peft.models.recipe import SPACE_FIELDS, replacements_of, space_of
from zo_peft.objectives.rewards import generates
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.train.checks import GUIDED
from zo_peft.train.config import ZOConfig
from zo_peft.train.policy import may_draw

#: Bytes of a GPU that CUDA's context takes, or that the allocator holds and cannot use.
RESERVED = 1 << 30

#: Bytes of scratch memory for each number of noise while it is made, a chunk at a time.
NOISE_BYTES = 60

#: A backward pass through a layer holds so many times what its forward pass holds at its peak.
BACKWARD = 2

#: No batch, length or number of candidates above this is tried.
MOST = 1 << 20


@dataclass
class PlanArguments:
    """What a plan needs to know beside the options of a run."""

    gpu_memory: str | None = HfArg(
        default=None,
        help="A GPU's memory: 24GB or 24GiB. A plan says what fits. Default: this machine.",
    )
    completion_length: int = HfArg(
        default=1, help="Tokens of an example that are scored; 1: label words of one token."
    )


@dataclass(frozen=True)
class Memory:
    """The bytes of a run: its parts, all that is held at the peak of each phase, and of the run.

    `kept` is what stays of layers that a pass has left: checkpoints for gradients, or what a guide
    reads and the graph of exact layers.
    """

    weights: int
    adapter: int
    candidates: int
    activations: int
    kept: int
    logits: int
    load: int
    step: int
    update: int
    evaluate: int
    peak: int


@dataclass(eq=False)
class Planner:
    """The memory of runs on one base that differ in batch, length and candidates; or a UserError.

    Attributes:
        completion_length: the scored tokens of each example.
        generates: completions of `args.max_completion_length` tokens are generated.
        device: cpu or cuda.
        tuned: how many numbers are tuned.
        guide: the memory of a guide; None unless the strategy is `guided`.
        positions: the longest sequence that the base takes, if its configuration says so.
    """

    model: ModelArguments
    args: ZOConfig
    completion_length: int = 1
    generates: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        model, args = self.model, self.args
        if args.engine is not None:
            raise UserError("a plan is of a base in PyTorch; an engine's memory is not known")
        self.classifies = model.task_type == "SEQ_CLS"
        bits, source = model.quantization(self.classifies, self.device == "cpu"), model.source
        base = meta_base(model.model_name_or_path, model.dtype, bits, self.classifies, **source)
        self.weights = weight_bytes(base)
        with torch.device("meta"):
            tuned = add_adapter(base, _peft_config(model)) if args.tune == "adapter" else base
        self.space = space_of(tuned, **{name: getattr(args, name) for name in SPACE_FIELDS})
        # As the trainer chooses.
        if args.strategy == GUIDED and args.strategy_is_default:
            draws = not self.generates or may_draw(args.temperature, args)
            if not (draws and may_read(tuned, self.space.parameters)):
                self.args = args = args.with_candidates()
        new_tokens = args.max_completion_length if self.generates else 0
        if new_tokens:
            self.space.keep_values()
        self.fit = Fit(tuned, self.space.lane_numel, new_tokens, self.device)
        self.tuned = self.space.numel
        self.positions: int | None = getattr(self.fit.config, "max_position_embeddings", None)
        self.in_lanes = not isinstance(replacements_of(tuned, self.space), NotInLanes)
        self.quantized = self.fit.largest > 0
        # For gradients, PEFT makes float32 of what is not quantized.
        floats = [p for p in base.parameters() if p.is_floating_point()]
        self.upcast = sum(4 * p.numel() - p.nbytes for p in floats) if self.quantized else 0
        if self.device == "cpu":
            check_4bit_widths(base, "meta")
        self.guide = self._guide() if args.strategy == GUIDED else None

    def _guide(self) -> GuideMemory:
        model, args = self.model, self.args
        if args.tune != "adapter":
            raise UserError(f"tune={args.tune!r} has no guide; use strategy='gv'")
        name, source = model.model_name_or_path, model.source
        base = meta_base(name, model.dtype, False, self.classifies, **source)
        with torch.device("meta"):
            guide = GuideMemory(add_adapter(base, _peft_config(model)).eval())
        if args.exact_layers > guide.layers:
            layers = f"{public_name(name)} has {guide.layers} layers"
            raise UserError(f"exact_layers={args.exact_layers}, but {layers}")
        return guide

    def candidates(self, batch: int, length: int, limit: int | None = None) -> list[int]:
        """How many candidates share a forward pass: in a step, and while zo_eps is chosen.

        `limit` is `candidates_per_forward`; None: as `zo_peft.models.memory.Fit` chooses.
        """
        if limit is None:
            shapes = {"input_ids": torch.empty(batch, length, device="meta")}
            rows = {} if self.classifies else {"rows": range(self._scored(batch, length))}
            limit = self.fit(Batch(shapes | rows), self._parts(batch))
        limit = limit if self.in_lanes else 1
        return [wave_size(count, limit) for count in self.evaluated(batch)]

    def evaluated(self, batch: int) -> list[int]:
        """How many candidates are evaluated at once: in a step, and while zo_eps is chosen.

        The check of a guide counts as a step.
        """
        # Beside a run with gradients, a plan shows one with the default strategy.
        strategy = STRATEGIES.get(self.args.strategy, STRATEGIES["gv"])
        step = max(strategy.asks(self.args.strategy_options))
        if self.guide is not None:
            step = max(step, CHECK_PASSES)
        return [step] if self.args.zo_eps is not None else [step, eps.points(self._parts(batch))]

    def forward_only(
        self,
        batch: int,
        length: int,
        limit: int | None = None,
        eval_batch: int | None = None,
        exact_layers: int | None = None,
    ) -> Memory:
        """The memory of a run with forward passes; arguments as in `candidates`.

        `eval_batch` examples share an evaluation's forward pass, and `exact_layers` of a guided run
        are differentiated; None: as the run's options say.
        """
        fit, is_adapter = self.fit, self.args.tune == "adapter"
        count = max(self.candidates(batch, length, limit))
        lanes = count * self._parts(batch)
        # An adapter is there twice: as it is, and as the model reads it.
        copies = 2 * is_adapter + len(RULES[self.args.update_rule or ""].BUFFERS)
        candidates = 0 if is_adapter and lanes == 1 else lanes * fit.adapter
        held = fit.held if count == 1 else 1
        activations = fit.scratch + fit.layer(count * batch, length, held)
        logits = count * fit.logits(self._scored(batch, length))
        noise = NOISE_BYTES * min(CHUNK, self.tuned)
        kept, reading, read = 0, 0, 0
        if self.guide is not None:
            exact = self.args.exact_layers if exact_layers is None else exact_layers
            kept, reading = self._reading(self.guide, batch, length, exact)
            read = 4 * self.tuned
        return self._memory(
            (self.weights, 4 * self.tuned * copies, candidates, activations, kept, logits),
            # A check holds what was read of parts of the batch, too.
            read * (1 + parts_of_check(self._parts(batch), self.tuned))
            + max(candidates + max(activations, logits, noise), reading),
            read + fit.adapter + noise,
            self._evaluation(eval_batch, length, fit.size),
        )

    def _reading(
        self, guide: GuideMemory, batch: int, length: int, exact_layers: int
    ) -> tuple[int, int]:
        """What a pass that the guide reads keeps of the layers, and all that it holds."""
        fit, positions = self.fit, self._scored(batch, length) or batch * length
        single = positions == batch
        if not single:
            batch = min(batch, rows_at_once(length))
            positions = self._scored(batch, length) or batch * length
        # The errors there are twice in float32: as they are, and taken down.
        kept = guide.kept(batch, length, positions, exact_layers) + guide.graph(
            batch, length, exact_layers
        )
        kept += 2 * 4 * positions * fit.config.hidden_size
        layer = fit.scratch + fit.layer(batch, length, fit.held)
        layer = max(layer, guide.stacked(batch, length, positions, exact_layers))
        # The gradient of the logits is there in float32, too, beside the loss and its gradient.
        return kept, kept + max(layer, fit.logits(self._scored(batch, length)) * 3 // 2)

    def with_gradients(self, batch: int, length: int) -> Memory:
        """The memory of a run that tunes the same adapter with back-propagation.

        It has Adam and gradient checkpointing, and PEFT prepares a quantized base (QLoRA).
        """
        fit, size = self.fit, 4 if self.quantized else self.fit.size
        adapter = 4 * 4 * self.tuned  # the adapter, its gradient, and Adam's two moments
        checkpoints = fit.config.num_hidden_layers * batch * length * fit.config.hidden_size * size
        layer = batch * layer_bytes(fit.config, length, size)
        activations = int(BACKWARD * fit.held * layer) + 2 * fit.largest * size
        # The gradient of the logits is there in float32, too, beside the loss and its gradient.
        logits = fit.logits(self._scored(batch, length)) * 3 // 2
        return self._memory(
            (self.weights + self.upcast, adapter, 0, activations, checkpoints, logits),
            checkpoints + max(activations, logits),
            4 * self.tuned,
            self._evaluation(None, length, size),
        )

    def _memory(self, parts: tuple[int, ...], *phases: int) -> Memory:
        """A `Memory`, from what step, update and evaluation hold beside weights and adapter."""
        weights, adapter, *_ = parts
        # The layer that is being quantized is there as it was saved, too.
        load = self.weights + self.fit.largest * self.fit.size
        held = [load, *(weights + adapter + phase for phase in phases)]
        return Memory(*(*parts, *held, max(held)))

    def _evaluation(self, batch: int | None, length: int, size: int) -> int:
        """What an evaluation holds beside weights and adapter, with `size` bytes a number."""
        rows, fit = batch or self.args.per_device_eval_batch_size, self.fit
        layer = fit.scratch + fit.layer(rows, length, fit.held * size / fit.size)
        return max(layer, fit.logits(self._scored(rows, length)))

    def _parts(self, batch: int) -> int:
        return batch if self.args.per_example_noise and self.in_lanes else 1

    def _scored(self, batch: int, length: int) -> int:
        return 0 if self.classifies else batch * min(self.completion_length, length)


def _peft_config(model: ModelArguments) -> PeftConfig:
    if model.adapter_name_or_path is None:
        return model.peft_config()
    with reading_adapter(model.adapter_name_or_path):
        return PeftConfig.from_pretrained(model.adapter_name_or_path)


def plan(
    given: PlanArguments, model: ModelArguments, data: DataArguments, args: ZOConfig
) -> dict[str, Any]:
    """The memory of a run; with `gpu_memory` also what fits into it.

    Returns the bytes of a `Memory`, as `forward_only` and as `gradients` (None where the base
    itself is tuned). `gpu_memory` adds `gradients_fit` and, of forward passes, `fits`, the
    `largest` options that fit (of a guided run `exact_layers`, too), and a `proposal` of options
    that fit, None where none do. Then `least` tells of one example by itself in the fewest bits:
    the `options` of that base, the `peak`, that of a single token (`peak_of_a_token`), and the
    `max_length` that fits, or 0. A UserError says that the base is not found or cannot be planned,
    or an option makes no sense.
    """
    if given.completion_length < 1:
        raise UserError(f"completion_length={given.completion_length}; it must be 1 or more")
    total = None if given.gpu_memory is None else _bytes(given.gpu_memory)
    device = args.device.type if total is None else "cuda"
    generated = generates(data.reward_funcs, args.objective)
    planner = Planner(model, args, given.completion_length, generated, device)
    batch, length = args.per_device_train_batch_size, _length(planner)
    memory = planner.forward_only(batch, length, args.candidates_per_forward)
    gradients = planner.with_gradients(batch, length) if args.tune == "adapter" else None
    result: dict[str, Any] = {
        "model": public_name(model.model_name_or_path),
        "device": device,
        "per_device_train_batch_size": batch,
        "max_length": length,
        "candidates_per_forward": planner.candidates(batch, length, args.candidates_per_forward)[0],
        "tuned_parameters": planner.tuned,
        "forward_only": asdict(memory),
        "gradients": gradients and asdict(gradients),
    }
    if total is None:
        return result
    room = total - RESERVED
    proposal, least = _proposal(planner, length, room)
    return result | {
        "gpu_memory": total,
        "reserved": RESERVED,
        "fits": memory.peak <= room,
        "gradients_fit": gradients and gradients.peak <= room,
        "largest": _largest(planner, length, room),
        "proposal": proposal,
        "least": least,
    }


def _length(planner: Planner) -> int:
    """The tokens of an example: as asked for, or all that the base takes."""
    name, positions = public_name(planner.model.model_name_or_path), planner.positions
    length = planner.args.max_length or positions
    if length is None:
        raise UserError(f"{name} does not say how many tokens it takes; give --max_length")
    if positions is not None and length > positions:
        raise UserError(f"max_length={length}, but {name} takes at most {positions} tokens")
    return length


def _bytes(size: str) -> int:
    with suppress(ValueError):
        if (found := convert_file_size_to_int(size.replace(" ", ""))) > RESERVED:
            return found
    raise UserError(f"gpu_memory={size!r} is not a size above 1GiB; write it as 24GB or 24GiB")


def _largest(planner: Planner, length: int, room: int) -> dict[str, int]:
    """The largest value of each option that fits while the others are as asked for.

    All but the last one are tried with one candidate in a forward pass.
    """
    asked = {"batch": planner.args.per_device_train_batch_size, "length": length, "limit": 1}

    def fitting(name: str, most: int) -> int:
        return largest(lambda n: planner.forward_only(**(asked | {name: n})).peak <= room, most)

    found = {
        "per_device_train_batch_size": fitting("batch", MOST),
        "per_device_eval_batch_size": fitting("eval_batch", MOST),
        "max_length": fitting("length", planner.positions or MOST),
        "candidates_per_forward": fitting("limit", max(planner.evaluated(asked["batch"]))),
    }
    if planner.guide is not None:
        found["exact_layers"] = fitting("exact_layers", planner.guide.layers)
    return found


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, 0 where 1 does not. All below it must fit, too."""
    return bisect(range(1, most + 1), False, key=lambda number: not fits(number))


Options = dict[str, Any]


def _proposal(planner: Planner, length: int, room: int) -> tuple[Options | None, Options | None]:
    """The first options that fit, of those that change a run's result least; else what is least.

    What is least is one example by itself on the base in the fewest bits.
    """
    asked, batch = planner.args.candidates_per_forward, planner.args.per_device_train_batch_size
    accumulated = planner.args.gradient_accumulation_steps
    parts = [count for count in range(1, batch + 1) if batch % count == 0]
    for bits in _fewer_bits(planner):
        smaller = replace(planner, model=replace(planner.model, **bits)) if bits else planner
        for count, limit, eval_batch in product(parts, (asked, 1), (None, 1)):
            if smaller.forward_only(batch // count, length, limit, eval_batch).peak <= room:
                options = dict(bits)
                if count > 1:
                    options["per_device_train_batch_size"] = batch // count
                    options["gradient_accumulation_steps"] = count * accumulated
                ones = {"candidates_per_forward": limit, "per_device_eval_batch_size": eval_batch}
                return options | {name: 1 for name, value in ones.items() if value == 1}, None

    def peak(length: int) -> int:
        return smaller.forward_only(1, length, 1, 1).peak

    return None, {
        "options": bits,
        "peak": peak(length),
        "peak_of_a_token": peak(1),
        "max_length": largest(lambda n: peak(n) <= room, length),
    }


def _fewer_bits(planner: Planner) -> list[Options]:
    """Options of the base: as asked for, then in 8 and in 4 bits where these are fewer."""
    options: list[Options] = [{}]
    if bitsandbytes is None:
        return options
    if not planner.quantized:
        options += [{"load_in_8bit": True}, {"load_in_4bit": True}]
    if planner.model.load_in_8bit:
        options += [{"load_in_8bit": False, "load_in_4bit": True}]
    weights = planner.args.tune == "weights"
    return [bits for bits in options if not (weights and "load_in_4bit" in bits)]
