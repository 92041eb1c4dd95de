"""`ZOConfig`: transformers' TrainingArguments plus the fields of forward-only tuning."""

import copy
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import yaml
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from zo_peft.core import eps
from zo_peft.core.low_rank import Structure
from zo_peft.core.noise import Distribution
from zo_peft.core.ranks import Parallel
from zo_peft.core.strategies import STRATEGIES, Options, Probe, Weighting
from zo_peft.engines.engine import EngineName
from zo_peft.errors import UserError, explained
from zo_peft.train import checks
from zo_peft.train.checks import GRADIENT_PASSES, GUIDED, ObjectiveName, Preset, Tune

#: What each setting means, by name.
HELP: dict[str, str] = yaml.safe_load(Path(__file__).with_name("settings.yaml").read_bytes())


@dataclass
class ZOConfig(TrainingArguments):
    """Arguments of a `ZOTrainer`: those of `transformers.TrainingArguments`, and these.

    A UserError refuses values that make no sense together, before anything is loaded or written.
    """

    learning_rate: float | None = HfArg(default=None, help=HELP["learning_rate"])
    preset: Preset | None = HfArg(default=None, help=HELP["preset"])
    tune: Tune = HfArg(default="adapter", help=HELP["tune"])
    tune_unquantized: bool = HfArg(default=False, help=HELP["tune_unquantized"])
    strategy: str = HfArg(default=None, help=HELP["strategy"])
    exact_layers: int = HfArg(default=0, help=HELP["exact_layers"])
    num_candidates: int | None = HfArg(default=None, help=HELP["num_candidates"])
    per_example_noise: bool = HfArg(default=True, help=HELP["per_example_noise"])
    update_rule: str | None = HfArg(default=None, help=HELP["update_rule"])
    momentum: float = HfArg(default=0.9, help=HELP["momentum"])
    objective: ObjectiveName | None = HfArg(default=None, help=HELP["objective"])
    reward_weights: list[float] | None = HfArg(default=None, help=HELP["reward_weights"])
    max_completion_length: int = HfArg(default=64, help=HELP["max_completion_length"])
    temperature: float = HfArg(default=1.0, help=HELP["temperature"])
    top_p: float = HfArg(default=1.0, help=HELP["top_p"])
    elite_fraction: float = HfArg(default=0.5, help=HELP["elite_fraction"])
    weighting: Weighting = HfArg(default="loss", help=HELP["weighting"])
    probe: Probe = HfArg(default="reuse", help=HELP["probe"])
    carry_best: bool = HfArg(default=False, help=HELP["carry_best"])
    candidates_per_forward: int | None = HfArg(default=None, help=HELP["candidates_per_forward"])
    parallel: Parallel = HfArg(default="data", help=HELP["parallel"])
    zo_eps: float | None = HfArg(default=None, help=HELP["zo_eps"])
    noise: Distribution = HfArg(default="rademacher", help=HELP["noise"])
    noise_rank: int | None = HfArg(default=None, help=HELP["noise_rank"])
    low_rank_noise: Structure | None = HfArg(default=None, help=HELP["low_rank_noise"])
    warmup_steps: float = HfArg(default=0.02, help=HELP["warmup_steps"])
    tunable: str | None = HfArg(default=None, help=HELP["tunable"])
    num_train_epochs: float | None = HfArg(default=None, help=HELP["num_train_epochs"])
    max_forward_passes: int | None = HfArg(default=None, help=HELP["max_forward_passes"])
    max_length: int | None = HfArg(default=None, help=HELP["max_length"])
    model_init_kwargs: dict[str, Any] | str | None = HfArg(
        default=None, help=HELP["model_init_kwargs"]
    )
    engine: EngineName | None = HfArg(default=None, help=HELP["engine"])
    engine_url: list[str] | None = HfArg(default=None, help=HELP["engine_url"])
    engine_folder: str | None = HfArg(default=None, help=HELP["engine_folder"])
    engine_timeout: float = HfArg(default=120.0, help=HELP["engine_timeout"])
    tokenizer_name: str | None = HfArg(default=None, help=HELP["tokenizer_name"])
    engine_reference: str | None = HfArg(default=None, help=HELP["engine_reference"])
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = HfArg(
        default="group_by_length", help=HELP["train_sampling_strategy"]
    )
    logging_steps: float = HfArg(default=0.025, help=HELP["logging_steps"])

    _VALID_DICT_FIELDS: ClassVar = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

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
        with explained("the settings are refused", Exception):
            super().__post_init__()
            # What transformers does not check, PyTorch says where it gets it.
            DataLoader(
                Dataset[Any](),
                num_workers=self.dataloader_num_workers,
                prefetch_factor=self.dataloader_prefetch_factor,
                persistent_workers=self.dataloader_persistent_workers,
                # Not all versions of transformers that are accepted have this setting.
                multiprocessing_context=getattr(self, "dataloader_multiprocessing_context", None),
            )
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
    def servers(self) -> dict[str, Any]:
        """What `load_served` takes of the servers of vllm."""
        settings = {"folder": self.engine_folder, "timeout": self.engine_timeout}
        return settings | {"urls": self.engine_url}

    @property
    def strategy_options(self) -> Options:
        """What the strategy depends on beside seeds and eps."""
        return Options(**{f.name: getattr(self, f.name) for f in fields(Options)})

    @property
    def forward_passes_per_step(self) -> int:
        """Of one step: candidates and probes (with gradients three), times micro-batches."""
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


#: Settings that a trainer is built with; those that are taken away are read when it trains.
BUILT = {*ZOConfig.__annotations__, "seed", "per_device_train_batch_size"}
BUILT -= {"learning_rate", "update_rule", "momentum", "warmup_steps", "logging_steps"}
BUILT -= {"num_train_epochs", "train_sampling_strategy"}

#: Arguments of transformers that belong to a run's settings, beside those of zo_peft.
RUN_FIELDS = {"gradient_accumulation_steps", "lr_scheduler_type", "max_steps", "num_train_epochs"}
RUN_FIELDS |= {"per_device_train_batch_size", "seed", "weight_decay"}

#: What decides about completions, where none are generated.
GENERATION = {"reward_weights", "max_completion_length", "temperature", "top_p"}


def run_settings(config: ZOConfig, generates: bool) -> dict[str, Any]:
    """What of a configuration decides about the result of a run, which `generates` texts or not."""
    # These may contain paths or tokens.
    told = RUN_FIELDS | ZOConfig.__annotations__.keys()
    told -= {"model_init_kwargs", "tokenizer_name", "engine_reference"}
    told -= {"engine_url", "engine_folder", "engine_timeout"}
    told.remove("num_train_epochs" if config.max_steps > 0 else "max_steps")
    told -= checks.CANDIDATES if config.strategy in checks.GRADIENT else set()
    told -= set() if generates else GENERATION
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name in told}


def _processes() -> int:
    """How many torchrun or accelerate have started; the process group is not there yet."""
    return int(os.environ.get("WORLD_SIZE", 1))
