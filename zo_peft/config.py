"""`ZOConfig`: transformers' TrainingArguments plus the fields of forward-only tuning."""

import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

from transformers import TrainingArguments

from zo_peft.errors import UserError
from zo_peft.noise import Distribution
from zo_peft.strategies import Probe, Weighting

StrategyName = Literal["mezo", "n-spsa", "greedy", "gv"]
Preset = Literal["paper-gv", "paper-greedy", "mezo"]

#: What each preset fixes: the algorithms exactly as published (arXiv:2601.04710, arXiv:2305.17333).
PRESETS: dict[str, dict[str, Any]] = {
    "paper-gv": {
        "strategy": "gv",
        "elite_fraction": 0.5,
        "weighting": "split",
        "probe": "central",
        "carry_best": False,
        "noise": "gaussian",
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "random",
    },
    "paper-greedy": {
        "strategy": "greedy",
        "probe": "central",
        "carry_best": False,
        "noise": "gaussian",
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "random",
    },
    "mezo": {
        "strategy": "mezo",
        "noise": "gaussian",
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "random",
    },
}

#: TrainingArguments that act through gradients, or cast the model, and why each is refused.
REFUSED = {
    "fp16": "autocast is for backward passes; load the model with dtype='float16' instead",
    "bf16": "autocast is for backward passes; load the model with dtype='bfloat16' instead",
    "fp16_full_eval": "the dtype belongs to the model; load it with dtype='float16' instead",
    "bf16_full_eval": "the dtype belongs to the model; load it with dtype='bfloat16' instead",
    "gradient_checkpointing": "without a backward pass no activation is kept",
    "activation_checkpointing": "without a backward pass no activation is kept",
    "neftune_noise_alpha": "it acts in training mode; candidates are compared in eval mode",
    "label_smoothing_factor": "the losses of zo_peft are plain cross entropies",
    "deepspeed": "there are no gradients or optimizer states to shard",
    "fsdp": "there are no gradients or optimizer states to shard; use device_map",
    "auto_find_batch_size": "lower per_device_train_batch_size, raise gradient_accumulation_steps",
    "optim": "the step is theta <- theta - learning_rate * slope * direction",
}


@dataclass
class ZOConfig(TrainingArguments):
    """Arguments of a `ZOTrainer`: those of `transformers.TrainingArguments`, and these.

    Raises:
        UserError: values that make no sense together; nothing has been loaded or written by then.
    """

    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Step size. Default: by adapter type, for zo_peft's default strategy."},
    )
    preset: Preset | None = field(
        default=None,
        metadata={"help": "A published algorithm, exactly: paper-gv, paper-greedy or mezo."},
    )
    strategy: StrategyName = field(default="gv", metadata={"help": "How a direction is found."})
    num_candidates: int = field(
        default=8,
        metadata={"help": "Candidates a step (M in the paper); for n-spsa, directions a step."},
    )
    elite_fraction: float = field(
        default=0.5,
        metadata={"help": "gv with weighting=split: share of the low-loss candidates (alpha)."},
    )
    weighting: Weighting = field(
        default="loss",
        metadata={
            "help": "gv: 'split' (mean of the low-loss minus mean of the high-loss candidates, as "
            "published) or 'loss' (each candidate by the mean loss minus its own).",
        },
    )
    probe: Probe = field(
        default="reuse",
        metadata={
            "help": "greedy, gv: 'central' (two more forward passes along the direction, as "
            "published) or 'reuse' (the slope from losses that are already known).",
        },
    )
    carry_best: bool = field(
        default=False,
        metadata={"help": "greedy, gv: evaluate the last step's best candidate again."},
    )
    candidates_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "The most candidates in one forward. Default: as many as keep the peak memory "
            "within 1.05 of plain inference on the same batch, from shapes."
        },
    )
    zo_eps: float | None = field(
        default=None,
        metadata={"help": "Scale of the perturbations (epsilon). Default: by adapter type."},
    )
    noise: Distribution = field(
        default="gaussian",
        metadata={
            "help": "Distribution of the candidates.",
        },
    )
    tunable: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression, searched in parameter names: tune only these of the "
            "adapter's parameters, e.g. 'lora_B'. Default: all that PEFT made trainable."
        },
    )
    max_forward_passes: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many forward passes (one: one candidate through one "
            "micro-batch). With max_steps, the smaller budget counts."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Cut prompts from the left to fit this many tokens. Default: prompts that do "
            "not fit the model's context are an error."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for from_pretrained when the model is a name."},
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "As in transformers; examples of like length share a batch by default."},
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps (below 1: a share of the run)."}
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
    ]

    def __post_init__(self) -> None:
        _check_choices(self)
        _apply_preset(self)
        _check(self)
        if self.max_forward_passes is not None:
            self._limit_steps(self.max_forward_passes)
        super().__post_init__()

    @property
    def forward_passes_per_step(self) -> int:
        """Forward passes of one step: candidates and probes, times micro-batches."""
        candidates = self.num_candidates
        extra = {"central": 2, "reuse": 1 if self.strategy == "greedy" else 0}[self.probe]
        points = {"mezo": 2, "n-spsa": 2 * candidates}.get(self.strategy, candidates + extra)
        return points * self.gradient_accumulation_steps

    def _limit_steps(self, budget: int) -> None:
        steps = budget // self.forward_passes_per_step
        if steps < 1:
            raise UserError(
                f"max_forward_passes={budget} is less than one step of {self.strategy}, which "
                f"takes {self.forward_passes_per_step}; raise it or lower num_candidates"
            )
        self.max_steps: int = min(steps, self.max_steps) if self.max_steps > 0 else steps


CHOICES: dict[str, tuple[str | None, ...]] = {
    "preset": (None, *get_args(Preset)),
    "strategy": get_args(StrategyName),
    "weighting": get_args(Weighting),
    "probe": get_args(Probe),
    "noise": get_args(Distribution),
}


def _check_choices(config: ZOConfig) -> None:
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            known = ", ".join(filter(None, choices))
            raise UserError(f"{name}={getattr(config, name)!r} is not known; use one of {known}")


def _apply_preset(config: ZOConfig) -> None:
    if config.preset is None:
        return
    defaults = {f.name: f.default for f in fields(config)}
    for name, value in PRESETS[config.preset].items():
        given = getattr(config, name)
        if given not in (value, defaults[name]):
            raise UserError(
                f"preset={config.preset!r} fixes {name}={value!r}, but {given!r} was given"
            )
        setattr(config, name, value)


def _check(config: ZOConfig) -> None:
    """Refuse single values and combinations that make no sense."""
    for name, default in ((f.name, f.default) for f in fields(config) if f.name in REFUSED):
        if getattr(config, name) not in (None, False, default):
            raise UserError(f"{name} is not for forward-only tuning: {REFUSED[name]}")
    for name in (
        "zo_eps",
        "learning_rate",
        "max_forward_passes",
        "max_length",
        "candidates_per_forward",
    ):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name}={value}; it must be positive and finite")
    _check_candidates(config)
    if config.load_best_model_at_end and config.save_only_model:
        raise UserError("load_best_model_at_end needs whole checkpoints; drop save_only_model")


def _check_candidates(config: ZOConfig) -> None:
    selects = config.strategy in ("greedy", "gv")
    if config.num_candidates < (2 if selects else 1):
        raise UserError(
            f"num_candidates={config.num_candidates} leaves {config.strategy} nothing to compare; "
            "use 4 or more"
        )
    if config.carry_best and not selects:
        raise UserError(f"carry_best=True has no meaning for strategy={config.strategy!r}")
    if config.strategy == "gv" and config.weighting == "split":
        top = int(config.elite_fraction * config.num_candidates)
        if not 0 < top < config.num_candidates:
            raise UserError(
                f"elite_fraction={config.elite_fraction} of {config.num_candidates} candidates "
                "leaves one side of the split empty"
            )
    if selects and config.num_candidates == 2:
        warnings.warn(
            f"{config.strategy} with num_candidates=2 learns no more than MeZO per step and spends "
            "more forward passes: with two candidates the direction is +-(z1 - z2), whichever is "
            "better (docs/how-it-works.md). Use num_candidates of 4 or more.",
            UserWarning,
            stacklevel=5,
        )
