"""`ZOTrainer`: transformers' Trainer with a forward-only step."""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from tqdm.auto import tqdm
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import HubStrategy, has_length

from zo_peft import calibrate, checkpoint, strategies
from zo_peft.card import write_model_card
from zo_peft.config import ZOConfig
from zo_peft.data import Collator, Tokenization, collator_for, tokenize_dataset
from zo_peft.direction import Direction
from zo_peft.errors import NonFiniteLossError, UserError
from zo_peft.evaluators import Evaluation, Evaluator
from zo_peft.loading import (
    add_adapter,
    check_quantization,
    classifies,
    context_length,
    load_base,
    load_tokenizer,
    peft_config_of,
    prepare,
    start_prefix_from_tokens,
    tuned_parameters,
)
from zo_peft.low_rank import LowRank
from zo_peft.noise import derive_seed
from zo_peft.objectives import (
    IGNORE_INDEX,
    Batch,
    ClassificationObjective,
    CompletionObjective,
    Objective,
    OptionObjective,
)
from zo_peft.scales import base_hash, save_scales
from zo_peft.spaces import AdapterSpace, BaseSpace, Space, choose, find_scales, find_weights
from zo_peft.trunk import compile_frozen_parts
from zo_peft.updates import AUTOMATIC, RULES, Backoff

#: Learning rates of plain SGD by adapter type (docs/efficiency.md), LORA's for any other; and of
#: scales and weights.
SGD_LEARNING_RATES: dict[str, float] = {
    PeftType.LORA: 1e-3,
    PeftType.PREFIX_TUNING: 1.0,
    PeftType.PROMPT_TUNING: 1.0,
    PeftType.IA3: 1e-1,
    "scales": 1e-3,
    "weights": 1e-6,
}

#: How far a random walk of all steps would move the loss of an example, in nats, with the automatic
#: learning rate (docs/efficiency.md).
WALK = 0.87

#: Before the names of the update rule's tensors in a checkpoint.
RULE_PREFIX = "update_rule."

#: The columns that `tokenize_dataset` makes, all of which the collator needs.
FEATURES = ["input_ids", "labels", "prompt_ids", "option_ids", "label", "length"]


@dataclass(frozen=True)
class Calibration:
    """An automatic choice of eps: at which forward pass, and how far losses were from a line."""

    forward_passes: int
    zo_eps: float
    error: float


class ZOTrainer(Trainer):
    """Tunes a PEFT adapter or the base with forward passes only; else a `transformers.Trainer`.

    Args:
        model: name (Hub id or folder), `PreTrainedModel`, or `PeftModel` whose adapter is tuned.
        args: settings; default `ZOConfig("<model>-zo")`.
        train_dataset, eval_dataset: examples in one of the forms of `zo_peft.data`.
        processing_class: the tokenizer; default: the model's own.
        peft_config: the new adapter; None exactly when `model` is a `PeftModel`, or when the base
            itself is tuned (`args.tune`).
        objective: what is minimised; default: by the model's class and the data set's columns.
        data_collator, compute_metrics, callbacks: as in `Trainer`. The default metric is
            `accuracy`, of options, classes or completion tokens.

    Raises:
        UserError: settings, data and model do not go together.
    """

    args: ZOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: ZOConfig | None = None,
        data_collator: Callable[..., Batch] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        objective: Objective | None = None,
    ) -> None:
        name = model if isinstance(model, str) else model.config.name_or_path
        args = args or ZOConfig(f"{Path(name).name}-zo")
        if args.tune != "adapter" and (peft_config or isinstance(model, PeftModel)):
            raise UserError(
                f"tune={args.tune!r} tunes the base itself: give no adapter, no peft_config"
            )
        if args.tune == "adapter" and (peft_config is None) != isinstance(model, PeftModel):
            raise UserError("give a peft_config for a new adapter or a PeftModel: one of the two")
        if args.world_size > 1:
            raise UserError("several processes are not supported yet; start one")
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False
        tokenizer = processing_class or load_tokenizer(name)
        # Trainer seeds too late for this: a new adapter's values are part of the run.
        set_seed(args.seed)
        if isinstance(model, str):
            model = _load_base(model, args, peft_config, train_dataset)
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        prepare(model, tokenizer)
        tokenization = _tokenization(model, tokenizer, args)
        train, evaluation = (_tokenize(d, tokenization) for d in (train_dataset, eval_dataset))
        self.objective = objective or _objective(tokenization, train, evaluation)
        with _not_quantized(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator or Collator(tokenizer.pad_token_id),
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=tokenizer,
                compute_metrics=compute_metrics or accuracy,
                callbacks=callbacks,
            )
        self._signature_columns = FEATURES
        if data_collator is None:
            model.eval()
            self.data_collator = collator_for(model, tokenizer.pad_token_id, self.objective)
        if peft_config is not None and peft_config.peft_type == PeftType.PREFIX_TUNING and train:
            self._start_prefix(train)
        self.base_hash = None if args.tune == "adapter" else base_hash(model)
        self.space = _space(model, args)
        self.evaluator = Evaluator(model, self.space, self.objective, args.candidates_per_forward)
        if args.torch_compile:
            options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            compile_frozen_parts(model, self.space.parameters.values(), **options)
        self.summary: dict[str, Any] = {}
        self._micro_batches: list[Batch] = []
        self._eps = args.zo_eps or 0.0
        self._elite: int | None = None
        self._slope = 0.0
        self._backoff = Backoff()
        self.calibrations: list[Calibration] = []

    def _start_prefix(self, train: Any) -> None:
        config = self.model.active_peft_config
        if config.prefix_projection:
            return
        first = next(iter(train))
        pool = torch.tensor(first.get("prompt_ids") or first["input_ids"])
        choice = torch.randint(len(pool), (config.num_virtual_tokens,))
        start_prefix_from_tokens(self.model, pool[choice])

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return EpochSampler(sampler, self.args.data_seed or self.args.seed)
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """In order, also where training groups by length: predictions come back row by row."""
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    # ---- The step -------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """The micro-batches of one step, kept for its candidates: each of them sees them all."""
        self._micro_batches = list(islice(epoch_iterator, num_batches))
        return self._micro_batches, None

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Estimate the step's direction and slope, on its last micro-batch; returns the loss.

        Raises:
            NonFiniteLossError: a candidate's loss is NaN or infinite.
        """
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.eval()
        if isinstance(self.space.noise, LowRank):
            drawn = self.state.global_step // (self.args.basis_steps or 1)
            self.space.noise.basis_seed = derive_seed(self.args.seed, drawn, -2)
        batches = [self._prepare_inputs(batch) for batch in self._micro_batches]
        parts = self.evaluator.parts(batches) if self.args.per_example_noise else 1
        if self.args.zo_eps is None and self.state.global_step in calibrate.steps(
            self.state.max_steps
        ):
            self._calibrate(batches, parts)
        steps = [self._strategy_step(*((part,) if parts > 1 else ())) for part in range(parts)]
        evaluations: list[Evaluation] = []

        def evaluate(points: Sequence[Sequence[Direction]]) -> Sequence[Sequence[float]]:
            evaluations.append(self._evaluated(points, batches))
            return evaluations[-1].losses

        estimate = strategies.combine(strategies.run_steps(steps, evaluate))
        self._elite, self._slope = estimate.elite, estimate.slope
        self.update_rule.estimate = replace(
            estimate,
            spread=evaluations[0].spread / self._eps,
            sensitivity=evaluations[0].example_spread / self._eps,
        )
        self._watch(estimate.loss)
        return torch.tensor(estimate.loss, device=self.args.device)

    def _watch(self, loss: float) -> None:
        """Shorter steps where the loss rises, and an end where the budget would be passed."""
        if self.update_rule.automatic and self._backoff(loss) < 1:
            self.update_rule.backoff *= 0.5
            self._say(f"the loss rises: steps are {self.update_rule.backoff:g} times as long now")
        budget = self.args.max_forward_passes
        if budget is not None:
            left = budget - self.evaluator.forward_passes
            self.control.should_training_stop |= left < self.args.forward_passes_per_step

    def _say(self, message: str) -> None:
        tqdm.write(f"step {self.state.global_step}: {message}", file=sys.stderr)

    def _calibrate(self, batches: Sequence[Batch], parts: int) -> None:
        """Choose eps by `zo_peft.calibrate`, from the whole ladder or around what it is."""
        ladder = [self._eps * factor for factor in calibrate.NEIGHBOURS]
        if not self._eps:
            ladder = list(calibrate.LADDER)
        directions = calibrate.directions(parts)
        start = derive_seed(self.args.seed, self.state.global_step, -1)
        seeds = [[derive_seed(start, p, d) for d in range(directions)] for p in range(parts)]
        found = calibrate.errors(
            lambda points: self.evaluator.evaluate(points, batches).losses, seeds, ladder
        )
        self._eps, error = calibrate.choose(ladder, found)
        spent = self.evaluator.forward_passes
        self.calibrations.append(Calibration(spent, self._eps, error))
        tried = f"of {len(ladder)} from {ladder[0]:.0e} to {ladder[-1]:.0e}"
        self._say(
            f"zo_eps={self._eps:.1e}, the largest {tried} where losses are within "
            f"{error:.0%} of a line"
        )

    def _strategy_step(self, *part: int) -> strategies.Step:
        args, eps, step = self.args, self._eps, self.state.global_step
        candidates = range(args.num_candidates or 0)
        seeds = [derive_seed(args.seed, step, index, *part) for index in candidates]
        if args.carry_best and self._elite is not None:
            seeds[0] = self._elite
        if args.strategy == "mezo":
            return strategies.mezo(seeds[0], eps)
        if args.strategy == "n-spsa":
            return strategies.n_spsa(seeds, eps)
        if args.strategy == "greedy":
            return strategies.greedy(seeds, eps, args.probe)
        return strategies.gv(seeds, eps, args.elite_fraction, args.weighting, args.probe)

    def _evaluated(
        self, points: Sequence[Sequence[Direction]], batches: Sequence[Batch]
    ) -> Evaluation:
        evaluation = self.evaluator.evaluate(points, batches)
        for losses in evaluation.losses:
            for number, loss in enumerate(losses, start=1):
                if not math.isfinite(loss):
                    what = f"candidate {number} of {len(losses)} has the loss {loss}"
                    raise self._non_finite(what)
        return evaluation

    def _non_finite(self, what: str) -> NonFiniteLossError:
        """The error to raise; the adapter before this step is saved as a checkpoint first."""
        step, kept = self.state.global_step, "the adapter is as it was at the start"
        if step > 0:
            self._save_checkpoint(self.model, trial=None)
            kept = f"the last good adapter is in checkpoint-{step}"
        return NonFiniteLossError(
            f"{what} at step {step} with zo_eps={self._eps:g}; {kept}. Lower learning_rate or "
            "zo_eps; load a float16 model as bfloat16 or float32"
        )

    def floating_point_ops(self, inputs: Batch) -> int:
        """Operations of all candidates on a micro-batch; transformers counts a backward as two."""
        passes = self.args.forward_passes_per_step / self.args.gradient_accumulation_steps
        return int(super().floating_point_ops(inputs) / 3 * passes)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The update rule, as the optimizer that the Trainer steps and schedules."""
        args = self.args
        decayed = set(self.get_decay_parameter_names(self.model)) & self.space.tensors().keys()
        assert args.update_rule is not None
        automatic = args.learning_rate is None and args.update_rule in AUTOMATIC
        self.update_rule = RULES[args.update_rule](
            self.space,
            args.learning_rate or self._default_learning_rate(),
            args.weight_decay,
            tuple(sorted(decayed)),
            automatic,
            args.momentum,
            args.adam_beta2,
        )
        self.optimizer = self.update_rule
        return self.optimizer

    def _default_learning_rate(self) -> float:
        config = peft_config_of(self.model)
        kind = self.args.tune if config is None else config.peft_type
        rate = SGD_LEARNING_RATES.get(kind, SGD_LEARNING_RATES[PeftType.LORA])
        return rate * (1 - self.args.momentum) if self.args.update_rule == "momentum" else rate

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """As in Trainer; an automatic learning rate depends on the number of steps."""
        if self.update_rule.automatic:
            # Momentum makes steps alike: they go further than as many independent ones.
            kept = self.update_rule.momentum if self.update_rule.BUFFERS else 0.0
            independent = num_training_steps * (1 + kept) / (1 - kept)
            self.update_rule.param_groups[0]["lr"] = WALK / math.sqrt(independent)
        return super().create_scheduler(num_training_steps, optimizer)

    def create_accelerator_and_postprocess(self) -> None:
        """Accelerate prepares data and optimizer; the model stays as it is (no DDP, no buckets)."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = lambda model, **_: model

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        return model

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; training logs also say the slope and what has been spent."""
        if "learning_rate" in logs:
            logs["slope"] = self._slope
            logs["zo_eps"] = self._eps
            logs["step_size"] = self.update_rule.step_size
            if isinstance(self.space, BaseSpace):
                logs |= self.space.shares()
            logs["forward_passes"] = self.evaluator.forward_passes
            logs["examples_forwarded"] = self.evaluator.examples_forwarded
        super().log(logs, start_time)

    # ---- Evaluation -----------------------------------------------------------------------------

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The objective's mean loss, predictions and references of a batch."""
        losses, predictions, references = self.objective.predict(
            model, self._prepare_inputs(inputs)
        )
        if prediction_loss_only:
            return losses.mean(), None, None
        return losses.mean(), predictions, references

    # ---- Saving and resuming: safetensors and JSON ----------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter, or the tuned base, with tokenizer and card; see `Trainer.save_model`.

        A checkpoint gets no copy of a whole base: its state holds the tensors that are tuned.
        """
        if isinstance(self.space, AdapterSpace) or not _internal_call:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        os.makedirs(folder, exist_ok=True)
        if isinstance(self.space, AdapterSpace):
            # The base is never written, so its embeddings never need saving either.
            self.model.save_pretrained(folder, save_embedding_layers=False)
        else:
            self.model.save_pretrained(folder)
        if isinstance(self.space, BaseSpace) and self.args.tune == "scales":
            assert self.base_hash is not None
            save_scales(folder, self.space, self.base_hash)
        self.processing_class.save_pretrained(folder)
        write_model_card(folder, self.model, self.args.tune, self.summary)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of `zo_peft.card`, written with every save as well."""
        write_model_card(self.args.output_dir, self.model, self.args.tune, self.summary)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy != HubStrategy.END:
            message = f"Training in progress, step {self.state.global_step}"
            self.push_to_hub(commit_message=message, blocking=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = {
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "elite": self._elite,
            "zo_eps": self._eps,
            "calibrations": [asdict(calibration) for calibration in self.calibrations],
            "update_rule": self.update_rule.scalars(),
            "backoff": vars(self._backoff),
            "candidates_per_forward": self.evaluator.candidates_per_forward,
            "forward_passes": self.evaluator.forward_passes,
            "examples_forwarded": self.evaluator.examples_forwarded,
            "base": self.base_hash,
            "moves": getattr(self.space, "moves", 0),
        }
        remembered = {RULE_PREFIX + name: t for name, t in self.update_rule.tensors().items()}
        checkpoint.save_state(output_dir, self._trained() | remembered, state)

    def _trained(self) -> dict[str, Tensor]:
        """All that training may have changed: what is tuned, and what PEFT made trainable."""
        trainable = tuned_parameters(self.model) if isinstance(self.model, PeftModel) else {}
        return trainable | self.space.tensors()

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        state = checkpoint.load_state(checkpoint_folder)
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr()):
            group["lr"] = lr
        self._elite, self._eps = state["elite"], state["zo_eps"]
        self.calibrations = [Calibration(**fields) for fields in state["calibrations"]]
        vars(self._backoff).update(state["backoff"])
        tensors = checkpoint.load_tensors(checkpoint_folder)
        remembered = {n.removeprefix(RULE_PREFIX): t for n, t in tensors.items()}
        self.update_rule.load(state["update_rule"], remembered)
        if self.args.candidates_per_forward is None:
            self.evaluator.candidates_per_forward = state["candidates_per_forward"]
        self.evaluator.forward_passes = state["forward_passes"]
        self.evaluator.examples_forwarded = state["examples_forwarded"]
        if isinstance(self.space, BaseSpace):
            self.space.moves = state["moves"]

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if checkpoint.load_state(resume_from_checkpoint)["base"] != self.base_hash:
            raise UserError(
                f"{Path(resume_from_checkpoint).name} is of another base or another tune; load the "
                "model that the run started with, quantized in the same way"
            )
        saved = checkpoint.load_tensors(resume_from_checkpoint)
        tensors = {name: t for name, t in saved.items() if not name.startswith(RULE_PREFIX)}
        tuned = self.space.tensors().keys()
        for name, parameter in self._trained().items():
            if name not in tuned and name in tensors:
                parameter.data.copy_(tensors.pop(name))
        self.space.load(tensors)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoint.save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            checkpoint.load_rng_state(checkpoint_folder)


class EpochSampler(Sampler[int]):
    """Batches of like length, in an order that depends on seed and epoch alone.

    So a resumed epoch has it too. The sampler's own order runs from long to short batches, over and
    over, which losses and momentum would follow; here batches come in random order.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        self.sampler.generator = generator
        indices, size = list(self.sampler), self.sampler.batch_size
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        # A batch that is not full stays last.
        full = len(indices) // size
        order = [*torch.randperm(full, generator=generator).tolist(), *range(full, len(batches))]
        return chain.from_iterable(batches[index] for index in order)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of predictions that equal their reference, where there is one."""
    counted = prediction.label_ids != IGNORE_INDEX
    right = (prediction.predictions == prediction.label_ids)[counted]
    return {"accuracy": float(np.mean(right))}


@contextlib.contextmanager
def _not_quantized(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within the context Trainer takes a quantized base, which backward passes could not train."""
    quantized = getattr(model, "is_quantized", False) and not isinstance(model, PeftModel)
    try:
        if quantized:
            model.is_quantized = False
        yield
    finally:
        if quantized:
            model.is_quantized = True


def _space(model: PreTrainedModel | PeftModel, args: ZOConfig) -> Space:
    noise: Any = args.noise
    if args.noise_rank:
        assert args.low_rank_noise is not None
        noise = LowRank(args.noise_rank, args.low_rank_noise, args.noise)
    if args.tune == "adapter":
        return AdapterSpace(tuned_parameters(model, args.tunable), noise)
    model.requires_grad_(False)
    find = find_scales if args.tune == "scales" else find_weights
    return BaseSpace(choose(find(model, args.tune_unquantized), args.tunable), noise)


def _load_base(
    name: str, args: ZOConfig, peft_config: PeftConfig | None, train_dataset: Any
) -> PreTrainedModel:
    num_labels = None
    if peft_config is not None and peft_config.task_type == TaskType.SEQ_CLS:
        num_labels = 1 + max((row["label"] for row in train_dataset or ()), default=1)
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    check_quantization(name, args.tune, kwargs.get("quantization_config"))
    return load_base(name, num_labels, **kwargs)


def _tokenization(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, args: ZOConfig
) -> Tokenization:
    return Tokenization(
        tokenizer,
        context_length(model, tokenizer),
        args.max_length,
        model.config.num_labels if classifies(model) else None,
    )


def _tokenize(dataset: Any, tokenization: Tokenization) -> Any:
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: tokenize_dataset(part, tokenization) for name, part in dataset.items()}
    return tokenize_dataset(dataset, tokenization)


def _objective(tokenization: Tokenization, train: Any, evaluation: Any) -> Objective:
    """The objective that the features call for."""
    if tokenization.num_labels is not None:
        return ClassificationObjective()
    dataset = train if train is not None else evaluation
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    if dataset is not None and "option_ids" in next(iter(dataset)):
        return OptionObjective()
    return CompletionObjective()
