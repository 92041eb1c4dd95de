"""`ZOTrainer`: transformers' Trainer with a forward-only step."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy

from zo_peft import calibrate, checkpoint, strategies
from zo_peft.base_trainer import BaseTrainer
from zo_peft.config import ZOConfig
from zo_peft.direction import Direction
from zo_peft.errors import NonFiniteLossError, UserError
from zo_peft.evaluators import Evaluation, Evaluator
from zo_peft.loading import peft_config_of, tuned_parameters
from zo_peft.low_rank import LowRank
from zo_peft.noise import derive_seed
from zo_peft.objectives import Batch, SequenceObjective
from zo_peft.rewards import RewardObjective
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


@dataclass(frozen=True)
class Calibration:
    """An automatic choice of eps: at which forward pass, and how far losses were from a line."""

    forward_passes: int
    zo_eps: float
    error: float


class ZOTrainer(BaseTrainer):
    """Tunes a PEFT adapter or the base with forward passes only; else a `transformers.Trainer`.

    See `BaseTrainer` for the arguments.
    """

    trains = True

    def ready(self) -> None:
        """The space, the evaluator and the state of the steps."""
        model, args = self.model, self.args
        self.base_hash = None if args.tune == "adapter" else base_hash(model)
        self.space = _space(model, args)
        self.evaluator = Evaluator(model, self.space, self.objective, args.candidates_per_forward)
        if args.torch_compile:
            options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            compile_frozen_parts(model, self.space.parameters.values(), **options)
        self._micro_batches: list[Batch] = []
        self._eps = args.zo_eps or 0.0
        self._elite: int | None = None
        self._slope = 0.0
        self._backoff = Backoff()
        self.calibrations: list[Calibration] = []

    @property
    def forward_passes(self) -> int:
        """So far; one is one candidate through one micro-batch."""
        return self.evaluator.forward_passes

    @property
    def examples_forwarded(self) -> int:
        """So far; candidates times examples."""
        return self.evaluator.examples_forwarded

    @property
    def tuned_numel(self) -> int:
        """How many numbers are tuned."""
        return self.space.numel

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
        if isinstance(self.objective, RewardObjective):
            self.objective.seed = derive_seed(self.args.seed, self.state.global_step, -3)
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
        evaluator, tolerance = self.evaluator, calibrate.TOLERANCE
        if isinstance(self.objective, RewardObjective):
            # Rewards jump, and where all are alike they say nothing; likelihoods have a slope.
            evaluator = Evaluator(self.model, self.space, SequenceObjective())
            batches = [self.objective.drawn(self.model, batch) for batch in batches]
            tolerance = calibrate.COMPLETIONS_TOLERANCE
        found = calibrate.errors(
            lambda points: evaluator.evaluate(points, batches).losses, seeds, ladder
        )
        if evaluator is not self.evaluator:
            self.evaluator.forward_passes += evaluator.forward_passes
            self.evaluator.examples_forwarded += evaluator.examples_forwarded
        before = self._eps
        self._eps, error = calibrate.choose(ladder, found, tolerance)
        if evaluator is not self.evaluator and 0 < error < tolerance:
            # The error grows with eps. So does what a jump says of the slope, over its own noise.
            grown = min(tolerance / error, calibrate.NEIGHBOURS[-1])
            self._eps, error = self._eps * grown, error * grown
        if self._eps != before:
            # Losses are those of the candidates: further away they are others.
            self._backoff = Backoff()
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

    # ---- Saving and resuming: safetensors and JSON ----------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter, or the tuned base, with tokenizer and card; see `Trainer.save_model`.

        A checkpoint gets no copy of a whole base: its state holds the tensors that are tuned.
        """
        if isinstance(self.space, AdapterSpace) or not _internal_call:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if isinstance(self.space, BaseSpace) and self.args.tune == "scales":
            assert self.base_hash is not None
            save_scales(output_dir or self.args.output_dir, self.space, self.base_hash)

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
