"""`zo-peft plan`: a run's memory from the base's configuration alone, before anything is loaded.

The base and its adapter are built on the meta device, as `zo-peft train` would build them, so that
every tensor has its shape and dtype and no bytes. Formulas: `zo_peft.models.memory`, and below.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.quantizers import AutoHfQuantizer

from zo_peft.core import eps
from zo_peft.core.batch import Batch
from zo_peft.core.evaluator import wave_size
from zo_peft.core.lanes import NotInLanes
from zo_peft.core.noise import CHUNK
from zo_peft.core.strategies import STRATEGIES
from zo_peft.core.updates import RULES
from zo_peft.errors import UserError
from zo_peft.models.adapters import add_adapter, check_4bit_width
from zo_peft.models.hub import LOAD_ERRORS, public_name, reason
from zo_peft.models.loading import load_config, quantization_config
from zo_peft.models.memory import Fit, layer_bytes, weight_bytes
from zo_peft.models.recipe import SPACE_FIELDS, replacements_of, space_of
from zo_peft.objectives.rewards import METRICS
from zo_peft.runs import jobs
from zo_peft.runs.arguments import DataArguments, ModelArguments
from zo_peft.train.config import ZOConfig

#: Of a GPU: what CUDA's context takes, and what the allocator cannot use of what it holds.
RESERVED = 1 << 30

#: Scratch bytes of each number of noise that is made at a time.
NOISE_BYTES = 60

#: A backward pass through a layer holds so many times what its forward holds at its peak.
BACKWARD = 2

#: No batch, length or number of candidates is looked for beyond this.
MOST = 1 << 20


@dataclass
class PlanArguments:
    """What a plan needs to know beside the options of a run."""

    gpu_memory: str | None = field(
        default=None,
        metadata={
            "help": "A GPU's memory, e.g. 24GB or 24GiB: plan for it, and say what fits. Default: "
            "plan for this machine."
        },
    )
    completion_length: int = field(
        default=1,
        metadata={"help": "Tokens of an example that are scored; 1: label words of one token."},
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of a run.

    Attributes:
        weights: of the base, as stored.
        adapter: what is tuned, and what the update rule or the optimizer keeps beside it.
        candidates: the adapters of all candidates of one forward.
        activations: of one layer, with the copies that quantized layers make.
        checkpoints: the inputs of all layers, kept for a backward pass.
        logits: of the scored positions, with those of the loss.
        load, step, update, evaluate: all that is held at the peak of each phase. A run evaluates
            before its first step, too.
    """

    weights: int
    adapter: int
    candidates: int
    activations: int
    checkpoints: int
    logits: int
    load: int
    step: int
    update: int
    evaluate: int

    @property
    def peak(self) -> int:
        """The most that is held at any time."""
        return max(self.load, self.step, self.update, self.evaluate)


class Planner:
    """The memory of runs that differ in batch, length and candidates, of one base and adapter.

    Args:
        completion_length: scored tokens of each example.
        generates: completions are generated, of `args.max_completion_length` tokens.
        device: cpu or cuda.

    Attributes:
        positions: the longest sequence that the base takes; None where its configuration does not
            say.
        tuned: how many numbers are tuned.

    Raises:
        UserError: the base is not found, or cannot be tuned so.
    """

    def __init__(
        self,
        model: ModelArguments,
        args: ZOConfig,
        completion_length: int = 1,
        generates: bool = False,
        device: str = "cpu",
    ) -> None:
        self.args, self.device, self.completion_length = args, device, completion_length
        self.classifies = model.task_type == "SEQ_CLS"
        with torch.device("meta"):
            base = _base(model)
            quantize(base, model)
            self.weights = weight_bytes(base)
            tuned = add_adapter(base, _peft_config(model)) if args.tune == "adapter" else base
        settings = {name: getattr(args, name) for name in SPACE_FIELDS}
        self.space = space_of(tuned, **settings)
        new_tokens = args.max_completion_length if generates else 0
        self.fit = Fit(tuned, self.space.lane_numel, new_tokens, device)
        self.tuned = self.space.numel
        self.positions: int | None = getattr(self.fit.config, "max_position_embeddings", None)
        self.in_lanes = not isinstance(replacements_of(tuned, self.space), NotInLanes)
        self._measure_layers(base)

    def _measure_layers(self, base: PreTrainedModel) -> None:
        """What quantized layers need beside their codes."""
        if self.device == "cpu":
            for name, module in base.named_modules():
                if isinstance(module, Linear4bit):
                    check_4bit_width(name, module)
        layers = [m for m in base.modules() if isinstance(m, Linear8bitLt | Linear4bit)]
        self.quantized = bool(layers)
        self.largest = max((m.in_features * m.out_features for m in layers), default=0)
        # PEFT's preparation for gradients makes float32 of what is not quantized.
        floats = [p for p in base.parameters() if p.is_floating_point()]
        self.upcast = sum(4 * p.numel() - p.nbytes for p in floats) if layers else 0
        self.scratch = 0
        if any(isinstance(m, Linear4bit) for m in layers):
            dtype = next(m.compute_dtype for m in layers if isinstance(m, Linear4bit))
            self.scratch = self.largest * (dtype or base.dtype).itemsize
        elif self.device == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
            # Without AVX-512 an int8 matmul is one of float32.
            self.scratch = 4 * self.largest

    def candidates(self, batch: int, length: int, limit: int | None = None) -> list[int]:
        """How many candidates share a forward: in a step, and while zo_eps is chosen.

        Args:
            limit: `candidates_per_forward`; None: as `zo_peft.models.memory.Fit` chooses.
        """
        if limit is None:
            limit = self.fit(self._batch(batch, length), self._parts(batch))
        limit = limit if self.in_lanes else 1
        return [wave_size(count, limit) for count in self.evaluated(batch)]

    def evaluated(self, batch: int) -> list[int]:
        """How many candidates are evaluated at once: in a step, and while zo_eps is chosen."""
        args = self.args
        counts = [max(STRATEGIES[args.strategy].asks(args.strategy_options))]
        if args.zo_eps is None:
            counts.append(eps.points(self._parts(batch)))
        return counts

    def forward_only(
        self, batch: int, length: int, limit: int | None = None, eval_batch: int | None = None
    ) -> Memory:
        """Of a run with forward passes; arguments as in `candidates`.

        Args:
            eval_batch: examples of an evaluation's forward; None: as the run's options say.
        """
        fit, own, is_adapter = self.fit, 4 * self.tuned, self.args.tune == "adapter"
        count, parts = max(self.candidates(batch, length, limit)), self._parts(batch)
        # An adapter is there twice: as it is, and as the model reads it.
        adapter = own * (2 * is_adapter + len(RULES[self.args.update_rule or ""].BUFFERS))
        alone = is_adapter and count * parts == 1
        candidates = 0 if alone else count * parts * fit.adapter
        activations = self.scratch + fit.layer(count * batch, length, fit.held)
        logits = count * fit.logits(self._scored(batch, length))
        noise = NOISE_BYTES * min(CHUNK, self.tuned)
        held = self.weights + adapter
        return Memory(
            self.weights,
            adapter,
            candidates,
            activations,
            0,
            logits,
            self._loading(),
            held + candidates + max(activations, logits, noise),
            held + fit.adapter + noise,
            held + self._evaluation(eval_batch, length, fit.size),
        )

    def with_gradients(self, batch: int, length: int) -> Memory:
        """Of the same adapter with back-propagation: Adam, checkpointed layers, a quantized base
        prepared by PEFT (QLoRA).
        """
        fit = self.fit
        size = 4 if self.quantized else fit.size
        weights = self.weights + self.upcast
        adapter = 4 * 4 * self.tuned  # itself, its gradient, and Adam's two moments
        tokens = batch * length
        checkpoints = fit.config.num_hidden_layers * tokens * fit.config.hidden_size * size
        layer = batch * layer_bytes(fit.config, length, size)
        activations = int(BACKWARD * fit.held * layer) + 2 * self.largest * size
        # In float32: the logits' gradient, beside the loss and its gradient.
        logits = fit.logits(self._scored(batch, length)) * 3 // 2
        return Memory(
            weights,
            adapter,
            0,
            activations,
            checkpoints,
            logits,
            self._loading(),
            weights + adapter + checkpoints + max(activations, logits),
            weights + adapter + 4 * self.tuned,
            weights + adapter + self._evaluation(None, length, size),
        )

    def _evaluation(self, batch: int | None, length: int, size: int) -> int:
        """Of an evaluation's forward, beside weights and adapter; `size`: bytes of a number."""
        rows, fit = batch or self.args.per_device_eval_batch_size, self.fit
        layer = self.scratch + fit.layer(rows, length, fit.held * size / fit.size)
        return max(layer, fit.logits(self._scored(rows, length)))

    def _loading(self) -> int:
        """With the layer that is quantized, as it was saved."""
        return self.weights + self.largest * self.fit.size

    def _parts(self, batch: int) -> int:
        return batch if self.args.per_example_noise and self.in_lanes else 1

    def _scored(self, batch: int, length: int) -> int:
        return 0 if self.classifies else batch * min(self.completion_length, length)

    def _batch(self, batch: int, length: int) -> Batch:
        shapes = {"input_ids": torch.empty(batch, length, device="meta")}
        scored = {} if self.classifies else {"rows": range(self._scored(batch, length))}
        return Batch(shapes | scored)


def _base(model: ModelArguments) -> PreTrainedModel:
    """The base in floating point, as it was saved."""
    config = load_config(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=model.trust_remote_code,
    )
    dtype = (config.dtype or "float32") if model.dtype == "auto" else model.dtype
    classes = AutoModelForSequenceClassification
    auto = classes if model.task_type == "SEQ_CLS" else AutoModelForCausalLM
    try:
        base = auto.from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code)
    except LOAD_ERRORS as error:
        name = public_name(model.model_name_or_path)
        raise UserError(f"{name} cannot be planned: {reason(error)}") from error
    return base.requires_grad_(False)


def quantize(base: PreTrainedModel, model: ModelArguments) -> None:
    """Quantize a base on the meta device as `from_pretrained` does, in place.

    Raises:
        UserError: it was saved in a form that is not bitsandbytes'.
    """
    compute_dtype = torch.float32 if model.dtype == "auto" else base.dtype
    given = quantization_config(
        model.load_in_8bit, model.load_in_4bit, compute_dtype, model.task_type == "SEQ_CLS"
    )
    saved = getattr(base.config, "quantization_config", None)
    if given is None and saved is None:
        return
    method = (saved or {}).get("quant_method", "bitsandbytes")
    if not method.startswith("bitsandbytes"):
        raise UserError(
            f"{public_name(model.model_name_or_path)} was saved quantized by {method}, which is "
            "not planned; give its base in floating point, with load_in_8bit or load_in_4bit, or "
            "one that bitsandbytes quantized"
        )
    # As if it had been saved so: codes in place of numbers that are still to be quantized.
    quantizer = AutoHfQuantizer.from_config(given or saved, pre_quantized=True)
    quantizer.preprocess_model(base, dtype=base.dtype, device_map=None)
    quantizer.postprocess_model(base)
    base.tie_weights()
    for module in base.modules():
        if isinstance(module, Linear8bitLt | Linear4bit):
            _fill(module, base.dtype)


def _fill(layer: Linear8bitLt | Linear4bit, dtype: torch.dtype) -> None:
    """Shapes and dtypes that a quantized layer gets when its weights are loaded."""
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    if isinstance(layer, Linear8bitLt):
        layer.state.SCB = torch.empty(layer.out_features)
        return
    numbers = layer.in_features * layer.out_features
    layer.weight.data = torch.empty(numbers // 2, 1, dtype=torch.uint8)
    nested = layer.weight.compress_statistics
    inner = QuantState(torch.empty(numbers // 64 // 256)) if nested else None
    absmax = torch.empty(numbers // 64, dtype=torch.uint8 if nested else torch.float32)
    layer.weight.quant_state = QuantState(absmax, state2=inner)


def _peft_config(model: ModelArguments) -> PeftConfig:
    if model.adapter_name_or_path is None:
        return model.peft_config()
    try:
        return PeftConfig.from_pretrained(model.adapter_name_or_path)
    except LOAD_ERRORS as error:
        name = public_name(model.adapter_name_or_path)
        raise UserError(f"adapter {name!r} cannot be read: {reason(error)}") from error


def plan(
    given: PlanArguments, model: ModelArguments, data: DataArguments, args: ZOConfig
) -> dict[str, Any]:
    """The memory of a run, by parts and phases; with `gpu_memory` also what fits, and what would.

    Returns:
        Bytes, in `forward_only` and `gradients` (None where the base itself is tuned), as in
        `Memory` with its `peak`. `fits`, `largest`, `proposal` and `least` are of forward passes;
        `proposal` has the options with which they fit: empty if they do as asked, None if none was
        found. Then `least`, else None, tells of one example by itself in the fewest bits: their
        `options`, its `peak`, that of one of its tokens (`peak_of_a_token`), and the `max_length`
        that fits, 0 where none does.

    Raises:
        UserError: the base is not found or not planned, or an option makes no sense.
    """
    if given.completion_length < 1:
        raise UserError(f"completion_length={given.completion_length}; it must be 1 or more")
    generates = bool(data.reward_funcs) or args.objective in METRICS
    limit = None if given.gpu_memory is None else _bytes(given.gpu_memory)
    device = args.device.type if limit is None else "cuda"

    def planner(model: ModelArguments) -> Planner:
        return Planner(model, args, given.completion_length, generates, device)

    asked = planner(model)
    batch, length = args.per_device_train_batch_size, _length(asked, model, args)
    per_forward = args.candidates_per_forward
    memory = asked.forward_only(batch, length, per_forward)
    gradients = asked.with_gradients(batch, length) if args.tune == "adapter" else None
    result: dict[str, Any] = {
        "model": public_name(model.model_name_or_path),
        "device": device,
        "per_device_train_batch_size": batch,
        "max_length": length,
        "candidates_per_forward": asked.candidates(batch, length, per_forward)[0],
        "tuned_parameters": asked.tuned,
        "forward_only": _told(memory),
        "gradients": gradients and _told(gradients),
    }
    if limit is None:
        return result
    room = limit - RESERVED
    proposal = _proposal(asked, planner, model, args, batch, length, room)
    return result | {
        "gpu_memory": limit,
        "reserved": RESERVED,
        "fits": memory.peak <= room,
        "gradients_fit": gradients and gradients.peak <= room,
        "largest": _largest(asked, batch, length, room),
        "proposal": proposal,
        "least": _least(asked, planner, model, args, length, room) if proposal is None else None,
    }


def _length(planner: Planner, model: ModelArguments, args: ZOConfig) -> int:
    """Tokens of an example: as asked for, or all that the base takes."""
    name, positions = public_name(model.model_name_or_path), planner.positions
    length = args.max_length or positions
    if length is None:
        raise UserError(f"{name} does not say how many tokens it takes; give --max_length")
    if positions is not None and length > positions:
        raise UserError(f"max_length={length}, but {name} takes at most {positions} tokens")
    return length


def _told(memory: Memory) -> dict[str, int]:
    return {**asdict(memory), "peak": memory.peak}


def _bytes(size: str) -> int:
    try:
        found = convert_file_size_to_int(size.replace(" ", ""))
    except ValueError:
        found = 0
    if found <= RESERVED:
        raise UserError(f"gpu_memory={size!r} is not a size above 1GiB; write it as 24GB or 24GiB")
    return found


def _largest(planner: Planner, batch: int, length: int, room: int) -> dict[str, int]:
    """The largest of each, the others as asked for; all but the last with one candidate at once."""

    def fits(batch: int, length: int, limit: int, eval_batch: int | None = None) -> bool:
        return planner.forward_only(batch, length, limit, eval_batch).peak <= room

    return {
        "per_device_train_batch_size": largest(lambda n: fits(n, length, 1), MOST),
        "per_device_eval_batch_size": largest(lambda n: fits(batch, length, 1, n), MOST),
        "max_length": largest(lambda n: fits(batch, n, 1), planner.positions or MOST),
        "candidates_per_forward": largest(
            lambda n: fits(batch, length, n), max(planner.evaluated(batch))
        ),
    }


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where all below fit too; 0 where 1 does not."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _proposal(
    asked: Planner,
    planner: Callable[[ModelArguments], Planner],
    model: ModelArguments,
    args: ZOConfig,
    batch: int,
    length: int,
    room: int,
) -> dict[str, Any] | None:
    """The first options that fit, of those that change a run's result least."""
    for bits in _fewer_bits(model, args, asked.quantized):
        smaller = planner(replace(model, **bits)) if bits else asked
        for parts in (parts for parts in range(1, batch + 1) if batch % parts == 0):
            micro = _micro_batches(args, batch, parts)
            for limit, rows in product((args.candidates_per_forward, 1), (None, 1)):
                if smaller.forward_only(batch // parts, length, limit, rows).peak <= room:
                    one = {"candidates_per_forward": limit, "per_device_eval_batch_size": rows}
                    return bits | micro | {name: 1 for name, value in one.items() if value == 1}
    return None


def _least(
    asked: Planner,
    planner: Callable[[ModelArguments], Planner],
    model: ModelArguments,
    args: ZOConfig,
    length: int,
    room: int,
) -> dict[str, Any]:
    """One example by itself in the fewest bits, and how much shorter it would have to be."""
    *_, bits = _fewer_bits(model, args, asked.quantized)
    smallest = planner(replace(model, **bits)) if bits else asked

    def peak(length: int) -> int:
        return smallest.forward_only(1, length, 1, 1).peak

    return {
        "options": bits,
        "peak": peak(length),
        "peak_of_a_token": peak(1),
        "max_length": largest(lambda n: peak(n) <= room, length),
    }


def _fewer_bits(model: ModelArguments, args: ZOConfig, quantized: bool) -> Iterator[dict[str, Any]]:
    """Options of the base: as asked for, then in 8 and in 4 bits if these are fewer."""
    yield {}
    if not quantized:
        yield {"load_in_8bit": True}
    if args.tune != "weights":
        if model.load_in_8bit:
            yield {"load_in_8bit": False, "load_in_4bit": True}
        elif not quantized:
            yield {"load_in_4bit": True}


def _micro_batches(args: ZOConfig, batch: int, parts: int) -> dict[str, int]:
    """A batch in parts that are accumulated."""
    if parts == 1:
        return {}
    return {
        "per_device_train_batch_size": batch // parts,
        "gradient_accumulation_steps": args.gradient_accumulation_steps * parts,
    }


#: What a plan's table calls the parts of a `Memory`.
PARTS = {
    "weights": "weights",
    "adapter": "adapter and optimizer",
    "candidates": "candidates of a forward",
    "activations": "activations of a layer",
    "checkpoints": "inputs of all layers",
    "logits": "logits and loss",
    "load": "peak while loading",
    "step": "peak of a step's passes",
    "update": "peak of the update",
    "evaluate": "peak of an evaluation",
    "peak": "peak",
}


def plan_text(result: dict[str, Any]) -> str:
    """A plan as a table, and what fits."""
    columns = {"forward only": result["forward_only"], "with gradients": result["gradients"]}
    columns = {name: column for name, column in columns.items() if column}
    rows = [[title, *(_mib(c[part]) for c in columns.values())] for part, title in PARTS.items()]
    lines = [
        f"{result['model']}, {result['device']}, batch {result['per_device_train_batch_size']} x "
        f"{result['max_length']}, {_candidates(result['candidates_per_forward'])} a forward, "
        f"{result['tuned_parameters']:,} numbers tuned",
        "",
        jobs.table(["MiB", *columns], rows),
    ]
    return "\n".join([*lines, *(_fit_lines(result) if "gpu_memory" in result else [])])


def _fit_lines(result: dict[str, Any]) -> list[str]:
    memory = f"{_mib(result['gpu_memory'])} MiB less {_mib(result['reserved'])} for CUDA"
    largest = ", ".join(f"{name} {value:,}" for name, value in result["largest"].items())
    lines = ["", f"Largest that fits into {memory}, the rest as given: {largest}."]
    if result["gradients"]:
        lines += [f"Gradients {'fit' if result['gradients_fit'] else 'do not fit'}."]
    if result["fits"]:
        return [*lines, "Forward passes fit."]
    if result["proposal"] is None:
        return [*lines, _least_line(result["least"])]
    return [*lines, f"Forward passes do not fit. They do with {_options(result['proposal'])}"]


def _least_line(least: dict[str, Any]) -> str:
    """Why nothing fits, and what would help."""
    alone = f" with {_options(least['options'])}" if least["options"] else ""
    if least["max_length"]:
        return (
            f"Forward passes do not fit: one example by itself{alone} takes {_mib(least['peak'])} "
            f"MiB. One of {least['max_length']:,} tokens fits; lower max_length."
        )
    return (
        f"Forward passes do not fit at any max_length: one token{alone} takes "
        f"{_mib(least['peak_of_a_token'])} MiB. Take a smaller base, or more memory."
    )


def _candidates(count: int) -> str:
    return f"{count} candidate{'s' if count > 1 else ''}"


def _options(options: dict[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in options.items())


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
