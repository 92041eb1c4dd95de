"""`ZOConfig`: transformers' TrainingArguments plus the fields of forward-only tuning."""

import copy
import os
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from zo_peft.core import eps
from zo_peft.core.low_rank import Structure
from zo_peft.core.noise import Distribution
from zo_peft.core.ranks import Parallel
from zo_peft.core.strategies import STRATEGIES, Options, Probe, Weighting
from zo_peft.engines.engine import EngineName
from zo_peft.errors import UserError
from zo_peft.train import checks
from zo_peft.train.checks import GRADIENT_PASSES, GUIDED, ObjectiveName, Preset, Tune


@dataclass
class ZOConfig(TrainingArguments):
    """Arguments of a `ZOTrainer`: those of `transformers.TrainingArguments`, and these.

    Raises:
        UserError: values that make no sense together; nothing has been loaded or written by then.
    """

    learning_rate: float | None = HfArg(
        default=None,
        help="Step size, as the update rule defines it. Default: from the losses, so that all "
        "steps, were they random, would move a loss by 0.87 nats; for sgd, momentum by adapter.",
    )
    preset: Preset | None = HfArg(
        default=None,
        help="paper-gv, paper-greedy, mezo, subzero or lozo. A published algorithm, exactly; "
        "paper-mezo is another name of mezo.",
    )
    tune: Tune = HfArg(
        default="adapter",
        help="adapter, scales or weights. Scales are those of an int8 or NF4 base; weights those "
        "of one that is int8 or not quantized.",
    )
    tune_unquantized: bool = HfArg(
        default=False,
        help="With tune=scales or weights on a quantized base: also the tensors that are "
        "not quantized (embeddings, norms, biases, head).",
    )
    strategy: str = HfArg(
        default=None,
        help="guided, gv, greedy, mezo, n-spsa, adam or sgd. guided reads a direction off each "
        f"forward pass, and checks it with candidates; {', '.join(STRATEGIES)} find it from "
        "candidates alone; adam and sgd are baselines that back-propagate. Default: guided for an "
        "adapter of which it can read something and a loss that has a gradient; gv for all else, "
        "and where options of candidates are given.",
    )
    exact_layers: int = HfArg(
        default=0,
        help="guided: back-propagate through so many of the uppermost layers. It takes memory.",
    )
    num_candidates: int | None = HfArg(
        default=None,
        help="Candidates a step (M in the paper); for n-spsa, directions a step. Default: 4 "
        "where each example has its own noise and a batch at least 4 examples, else 8.",
    )
    per_example_noise: bool = HfArg(
        default=True,
        help="Each example of a batch has candidates of its own, so that a forward tries as many "
        "perturbations as there are examples. Where a model cannot work so, they share them.",
    )
    update_rule: str | None = HfArg(
        default=None,
        help="How the estimate moves what is tuned: sgd, momentum, normalized (momentum, "
        "each tensor's step at unit length), spectral (the same, orthogonalized), adam or fzoo "
        "(steps of like length, no memory). Default: normalized; fzoo for tune=weights; for "
        "strategy=guided guided (adam for what is read, normalized for candidates).",
    )
    momentum: float = HfArg(default=0.9, help="Of all update rules but sgd and fzoo; in [0, 1).")
    objective: ObjectiveName | None = HfArg(
        default=None,
        help="accuracy, f1 or exact_match: no gradient needed. The last two, as SQuAD's, are of "
        "generated completions. Default: cross entropy.",
    )
    reward_weights: list[float] | None = HfArg(
        default=None, help="Weights of the reward functions. Default: 1 each."
    )
    max_completion_length: int = HfArg(default=64, help="The most tokens of a generated text.")
    temperature: float = HfArg(
        default=1.0,
        help="At which completions are sampled in training, with random numbers that all "
        "candidates of a step share; 0: greedy, as in evaluation.",
    )
    top_p: float = HfArg(default=1.0, help="Sample from the likeliest tokens of this probability.")
    elite_fraction: float = HfArg(
        default=0.5, help="gv with weighting=split: share of the low-loss candidates (alpha)."
    )
    weighting: Weighting = HfArg(
        default="loss",
        help="gv: 'split' (mean of the low-loss minus mean of the high-loss candidates, as "
        "published) or 'loss' (each candidate by the mean loss minus its own).",
    )
    probe: Probe = HfArg(
        default="reuse",
        help="greedy, gv: 'central' (two more forward passes along the direction, as "
        "published) or 'reuse' (the slope from losses that are already known).",
    )
    carry_best: bool = HfArg(
        default=False, help="greedy, gv: evaluate the last step's best candidate again."
    )
    candidates_per_forward: int | None = HfArg(
        default=None,
        help="The most candidates in one forward. Default: as many as keep the peak memory "
        "within 1.05 of plain inference on the same batch, from shapes.",
    )
    parallel: Parallel = HfArg(
        default="data",
        help="With several processes, what each evaluates: data (all candidates on its own "
        "part of the batch, per_device_train_batch_size examples) or candidates (its own "
        "candidates on the same batch).",
    )
    zo_eps: float | None = HfArg(
        default=None,
        help="Scale of the perturbations (epsilon). Default: the largest for which losses "
        "are near a line and above rounding, measured at the start and as training goes on.",
    )
    noise: Distribution = HfArg(
        default="rademacher",
        help="Distribution of the candidates: gaussian, or rademacher (signs; cheaper).",
    )
    noise_rank: int | None = HfArg(
        default=None,
        help="Rank of the noise of matrices; 0: full noise. Default: full, and for "
        "tune=weights 1 (24 for subzero, 2 for lozo).",
    )
    low_rank_noise: Structure | None = HfArg(
        default=None,
        help="Kind of low-rank noise: eggroll (two factors for each seed), subzero or lozo "
        "(a basis that is kept for 1000 or 100 steps).",
    )
    warmup_steps: float = HfArg(
        default=0.02, help="As in transformers: steps, or below 1 their share of the run."
    )
    tunable: str | None = HfArg(
        default=None,
        help="Regular expression, searched in parameter names: tune only these of the "
        "adapter's parameters, e.g. 'lora_B'. Default: all that PEFT made trainable.",
    )
    num_train_epochs: float | None = HfArg(
        default=None,
        help="Times over the data. Default: 3 with gradients, else max_forward_passes.",
    )
    max_forward_passes: int | None = HfArg(
        default=None,
        help="The budget, chosen from the data unless it, max_steps or num_train_epochs is given. "
        "The run stops after so many forward passes, each of one candidate through one "
        "micro-batch. With max_steps, the smaller budget counts.",
    )
    max_length: int | None = HfArg(
        default=None,
        help="Cut prompts from the left to fit this many tokens. Default: prompts that do "
        "not fit the model's context are an error.",
    )
    model_init_kwargs: dict[str, Any] | str | None = HfArg(
        default=None, help="Keyword arguments for from_pretrained when the model is a name."
    )
    engine: EngineName | None = HfArg(
        default=None,
        help="Who computes the base, for which a LoRA is tuned then: llamacpp (the model is a GGUF "
        "file) or openvino (a folder that optimum-intel exported). Default: PyTorch.",
    )
    tokenizer_name: str | None = HfArg(
        default=None,
        help="With an engine: the folder or Hub id of the model that was converted, for its "
        "configuration and its tokenizer. Default: what the file or the folder says.",
    )
    engine_reference: str | None = HfArg(
        default=None,
        help="With an engine: the float model, a folder or Hub id. Before the first step it is "
        "loaded in PyTorch, and adapters must act there as in the engine. Default: none.",
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = HfArg(
        default="group_by_length",
        help="As in transformers; examples of like length share a batch by default.",
    )
    logging_steps: float = HfArg(
        default=0.025, help="Log every so many steps. Below 1: a share of the run."
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
    ]

    def __post_init__(self) -> None:
        checks.check_fields(self)
        checks.apply_preset(self)
        # Where nothing says when the run ends, or where it writes to, it is chosen later.
        if self.max_forward_passes is not None and self.num_train_epochs is not None:
            raise UserError("give num_train_epochs or max_forward_passes, not both")
        ends = self.max_steps > 0 or self.num_train_epochs is not None
        self.chooses_budget = self.max_forward_passes is None and not ends
        self.chooses_folder = self.output_dir is None
        if self.num_train_epochs is None:
            self.num_train_epochs = checks.EPOCHS
        evaluates_by_logs = self.save_strategy == "steps" and self.eval_steps is None
        if self.load_best_model_at_end and evaluates_by_logs:
            # transformers takes `logging_steps`, which as a share fits no number of steps.
            self.eval_steps: float | None = self.save_steps
        # Exact layers are only read by a guide, and it reads all that is in them.
        self.strategy_is_default = self.strategy is None and not self.exact_layers
        if self.strategy is None:
            self.strategy = checks.default_strategy(self)
        checks.choose_noise(self)
        if self.update_rule is None:
            guided = "guided" if self.strategy == GUIDED else "normalized"
            self.update_rule = "fzoo" if self.tune == "weights" else guided
        checks.check_values(self)
        if self.num_candidates is None:
            self.num_candidates = 4 if self.per_example_noise and self._examples >= 4 else 8
        checks.check_candidates(self)
        if self.max_forward_passes is not None:
            self._limit_steps(self.max_forward_passes)
        if (_processes() > 1 and not torch.accelerator.is_available()) or self.engine is not None:
            # Else accelerate takes processes for unrelated ones, and all would write the same
            # files. And of an engine's model, nothing but the LoRA is here.
            self.use_cpu = True
        try:
            super().__post_init__()
        except Exception as error:
            raise UserError(f"transformers refuses the settings: {error}") from error
        for name in ("lr_scheduler_kwargs", "model_init_kwargs"):
            if isinstance(value := getattr(self, name), str):
                raise UserError(f"{name}={value!r}; give a JSON object")

    def with_candidates(self) -> "ZOConfig":
        """The same with `gv`, for a model or a goal of which a guide can read nothing."""
        rule = "normalized" if self.update_rule == "guided" else self.update_rule
        return self.changed(strategy="gv", update_rule=rule)

    def changed(self, **settings: Any) -> "ZOConfig":
        """The same with other settings, and the steps that its budget then allows."""
        changed = copy.copy(self)
        for name, value in settings.items():
            setattr(changed, name, value)
        if changed.max_forward_passes is not None:
            changed._limit_steps(changed.max_forward_passes)
        return changed

    @property
    def strategy_options(self) -> Options:
        """What the strategy depends on beside seeds and eps."""
        return Options(**{f.name: getattr(self, f.name) for f in fields(Options)})

    @property
    def forward_passes_per_step(self) -> int:
        """Forward passes of one step (candidates and probes, times micro-batches).

        A step with gradients counts three for a micro-batch, for a backward pass counts as two.
        """
        passes = {GUIDED: 1}.get(self.strategy, GRADIENT_PASSES)
        if self.strategy in STRATEGIES:
            passes = sum(STRATEGIES[self.strategy].asks(self.strategy_options))
        return passes * self.gradient_accumulation_steps

    @property
    def _examples(self) -> int:
        """Of a micro-batch, all processes together."""
        return self.per_device_train_batch_size * (_processes() if self.parallel == "data" else 1)

    def _limit_steps(self, budget: int) -> None:
        per_step = self.forward_passes_per_step
        chooses = self.zo_eps is None and self.strategy in STRATEGIES
        parts = self._examples if self.per_example_noise else 1
        chosen = eps.forward_passes(parts, budget // per_step) if chooses else 0
        steps = (budget - chosen * self.gradient_accumulation_steps) // per_step
        if self.strategy == GUIDED:
            checks.check_first_guided(self, checks.FIRST_GUIDED)
        if steps < 1:
            raise UserError(
                f"max_forward_passes={budget} is less than one step of {self.strategy}, which "
                f"takes {per_step}{', and the choice of zo_eps' if chooses else ''}; raise it"
                f"{', give zo_eps' if chooses else ''} or lower num_candidates"
            )
        self.max_steps: int = min(steps, self.max_steps) if self.max_steps > 0 else steps


#: Arguments of transformers that belong to a run's settings, beside those of zo_peft.
RUN_FIELDS = {"gradient_accumulation_steps", "lr_scheduler_type", "max_steps", "num_train_epochs"}
RUN_FIELDS |= {"per_device_train_batch_size", "seed", "weight_decay"}

#: What decides about completions, where none are generated.
GENERATION = {"reward_weights", "max_completion_length", "temperature", "top_p"}


def run_settings(config: ZOConfig, generates: bool) -> dict[str, Any]:
    """What of a configuration decides about a run's result, by name, as given or chosen.

    Args:
        generates: the run has generated completions.
    """
    # These may contain paths or tokens.
    told = RUN_FIELDS | ZOConfig.__annotations__.keys()
    told -= {"model_init_kwargs", "tokenizer_name", "engine_reference"}
    told.remove("num_train_epochs" if config.max_steps > 0 else "max_steps")
    told -= checks.CANDIDATES if config.strategy in checks.GRADIENT else set()
    told -= set() if generates else GENERATION
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name in told}


def _processes() -> int:
    """How many torchrun or accelerate have started; the process group is not there yet."""
    return int(os.environ.get("WORLD_SIZE", 1))
