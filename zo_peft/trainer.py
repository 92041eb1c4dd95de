"""`ZOTrainer`: transformers' Trainer with a forward-only step."""

import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.trainer_utils import TrainOutput, has_length

from zo_peft import calibrate, checkpoint, strategies
from zo_peft.base_trainer import BaseTrainer
from zo_peft.config import ZOConfig
from zo_peft.direction import Direction
from zo_peft.errors import NonFiniteLossError, UserError
from zo_peft.evaluators import Evaluation, Evaluator
from zo_peft.faults import IN_A_ROW, Faults
from zo_peft.journal import INITIAL_NAME, JOURNAL_NAME, Follower, Journal, Record, read
from zo_peft.loading import classifies, peft_config_of
from zo_peft.low_rank import LowRank
from zo_peft.method import (
    adapter_settings,
    check_in_place,
    estimate_of,
    identity,
    load_trained,
    rule_of,
    space_of,
    trained,
)
from zo_peft.noise import GENERATOR, derive_seed
from zo_peft.objectives import Batch, SequenceObjective
from zo_peft.ranks import Ranks
from zo_peft.replace import replaced
from zo_peft.rewards import RewardObjective
from zo_peft.scales import base_hash, save_scales
from zo_peft.spaces import AdapterSpace, BaseSpace
from zo_peft.strategies import Estimate
from zo_peft.trunk import compile_frozen_parts
from zo_peft.updates import AUTOMATIC, Backoff

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

    Attributes:
        faults: losses and updates so far that were dropped.
    """

    trains = True

    def ready(self) -> None:
        """The space, the evaluator and the state of the steps."""
        model, args = self.model, self.args
        check_in_place(model, args.tune)
        # Before the space, which takes nested scales of NF4 apart.
        self.base_hash = None if args.tune == "adapter" else base_hash(model)
        self.space = space_of(model, **self._space_settings())
        self.ranks = Ranks(args.parallel, args.device) if args.world_size > 1 else None
        if self.ranks and args.parallel == "data":
            self._train_batch_size *= self.ranks.count
        if self.ranks and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise UserError("a base on several devices is tuned by one process; drop device_map")
        limit = args.candidates_per_forward
        self.evaluator = Evaluator(model, self.space, self.objective, limit, self.ranks)
        if args.torch_compile:
            options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            compile_frozen_parts(model, self.space.parameters.values(), **options)
        self._micro_batches: list[Batch] = []
        self._eps = args.zo_eps or 0.0
        self._elite: int | None = None
        self._slope = self._spread = 0.0
        self._checked = False
        self.faults = Faults()
        self._backoff = Backoff()
        self.calibrations: list[Calibration] = []
        self._journal: Journal | Follower

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

    # ---- The journal ----------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in Trainer; every update is in the journal before it is made.

        Args:
            resume_from_checkpoint: True: go on from the end of the journal in `output_dir`, if
                there is one; steps behind the last checkpoint are made again from the journal,
                without forward passes. The folder of a checkpoint: go on from there; what the
                journal has behind it is dropped (`zo_journal.old` keeps it).

        Raises:
            UserError: the journal or the checkpoint is damaged, or of another run.
        """
        resumed = self._open_journal(resume_from_checkpoint)
        try:
            result = super().train(resumed, trial, ignore_keys_for_eval)
            self._compare_ranks()
            return result
        finally:
            self._journal.close()

    def _open_journal(self, resume: str | bool | None) -> str | None:
        """Start or take up the journal; returns the checkpoint to go on from."""
        folder = Path(self.args.output_dir).resolve()
        header = {
            "base": identity(self.model),
            "num_labels": self.model.config.num_labels if classifies(self.model) else None,
            "adapter": adapter_settings(self.model),
            "seed": self.args.seed,
            "generator": GENERATOR,
            "space": self._space_settings(),
            "rule": self._rule_settings(),
        }
        last = resume is True
        whose = folder if last or not resume else Path(str(resume)).resolve().parent
        path = whose / JOURNAL_NAME
        new = not resume or (last and not path.exists())
        if self.ranks is not None:
            values = self._trained().values()
            self.ranks.check("the base, the adapter or the settings", header, *values)
            new = bool(self.ranks.least(new))
        if new:
            self._start_journal(folder, header)
            return None
        if read(path)[0] != header:
            raise UserError(
                f"{path.parent.name}/{JOURNAL_NAME} is of another base, adapter or noise; resume "
                "with the model and the settings of that run, or give another output_dir"
            )
        start = checkpoint.last_whole(folder) if last else str(resume)
        step = 0 if start is None else checkpoint.step_of(start)
        keep, initial = None if last else step, path.with_name(INITIAL_NAME)
        if self.is_world_process_zero():
            self._journal = Journal.resumed(path, folder / JOURNAL_NAME, keep)
            if whose != folder:
                shutil.copyfile(initial, folder / INITIAL_NAME)
        else:
            self._journal = Follower(path, keep)
        if start is None:
            self._load_trained(checkpoint.load_tensors(initial))
        return start

    def _start_journal(self, folder: Path, header: dict[str, Any]) -> None:
        if not self.is_world_process_zero():
            self._journal = Follower()
            return
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_tensors(folder / INITIAL_NAME, self._starting_values())
        self._journal = Journal(folder / JOURNAL_NAME, header)

    def _starting_values(self) -> dict[str, Tensor]:
        """All that is trained; of weights nothing, for these the base itself holds."""
        return {} if self.args.tune == "weights" else self._trained()

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
            NonFiniteLossError: ten updates in a row were skipped.
        """
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.eval()
        step = self.state.global_step
        self._check_ranks()
        if isinstance(self.space.noise, LowRank):
            drawn = step // (self.args.basis_steps or 1)
            self.space.noise.basis_seed = derive_seed(self.args.seed, drawn, -2)
        known = self._journal.past(step)
        estimate, chosen = self._measured() if known is None else self._known(known)
        skipped = "skipped" in chosen
        self._elite = estimate.elite
        self._slope, self._spread = estimate.slope, estimate.spread
        self.faults.take(estimate, chosen)
        self.update_rule.estimate = None if skipped else estimate
        if not skipped:
            self._shorten(estimate.loss)
        record = self._record(estimate, chosen)
        if known is None:
            self._journal.append(record)
        elif record != known:
            raise UserError(
                f"step {step} of the journal was made with other settings; resume with those of "
                "the run, or from a checkpoint by its name"
            )
        if skipped:
            self._say(f"skipped: {chosen['skipped']}")
        if self.faults.in_a_row >= IN_A_ROW:
            raise self._broken(chosen["skipped"])
        self._end_in_time()
        return torch.tensor(estimate.loss, device=self.args.device)

    def _measured(self) -> tuple[Estimate, dict[str, Any]]:
        """What the candidates' losses say, and what was chosen before."""
        if isinstance(self.objective, RewardObjective):
            self.objective.seed = derive_seed(self.args.seed, self.state.global_step, -3)
        batches = [self._prepare_inputs(batch) for batch in self._micro_batches]
        parts = self.evaluator.parts(batches) if self.args.per_example_noise else 1
        chosen: dict[str, Any] = {}
        if self.args.zo_eps is None and self.state.global_step in calibrate.steps(
            self.state.max_steps
        ):
            chosen["calibration"] = asdict(self._calibrated(batches, parts))
            self._adopt(chosen)
        steps = [self._strategy_step(*((part,) if parts > 1 else ())) for part in range(parts)]
        evaluations: list[Evaluation] = []

        def evaluate(points: Sequence[Sequence[Direction]]) -> Sequence[Sequence[float]]:
            evaluations.append(self.evaluator.evaluate(points, batches))
            return evaluations[-1].losses

        estimate = strategies.combine(strategies.run_steps(steps, evaluate))
        losses = [loss for found in evaluations for part in found.losses for loss in part]
        chosen |= self.faults.found(estimate, losses, self.args.max_slope)
        if "skipped" in chosen:
            return Estimate(Direction(), 0.0, estimate.losses), chosen
        spreads = (evaluations[0].spread, evaluations[0].example_spread)
        spread, sensitivity = (value / self._eps for value in spreads)
        return replace(estimate, spread=spread, sensitivity=sensitivity), chosen

    def _check_ranks(self) -> None:
        """All ranks hold the same: at the first step of this process, and from time to time."""
        if self.state.global_step % self.args.rank_check_steps == 0 or not self._checked:
            self._compare_ranks()
            self._checked = True

    def _compare_ranks(self) -> None:
        if self.ranks is not None:
            what = f"at step {self.state.global_step}, what is tuned"
            self.ranks.check(what, *self._trained().values())

    def _known(self, record: Record) -> tuple[Estimate, dict[str, Any]]:
        """The same from the journal, without a forward."""
        self.evaluator.forward_passes = record.forward_passes
        self.evaluator.examples_forwarded = record.examples_forwarded
        self._adopt(record.chosen)
        return estimate_of(record), record.chosen

    def _adopt(self, chosen: dict[str, Any]) -> None:
        if "calibration" not in chosen:
            return
        calibration = Calibration(**chosen["calibration"])
        self.calibrations.append(calibration)
        if self._eps != calibration.zo_eps:
            # Losses are those of the candidates: further away they are others.
            self._backoff = Backoff()
        self._eps = calibration.zo_eps

    def _record(self, estimate: Estimate, chosen: dict[str, Any]) -> Record:
        noise = self.space.noise
        return Record(
            self.state.global_step,
            self.update_rule.param_groups[0]["lr"],
            self.update_rule.backoff,
            estimate.slope,
            estimate.spread,
            estimate.sensitivity,
            estimate.loss,
            self._eps,
            self.evaluator.forward_passes,
            self.evaluator.examples_forwarded,
            estimate.direction,
            estimate.elite,
            noise.basis_seed if isinstance(noise, LowRank) else 0,
            chosen,
        )

    def _shorten(self, loss: float) -> None:
        """Shorter steps where the loss rises."""
        if self.update_rule.automatic and self._backoff(loss) < 1:
            self.update_rule.backoff *= 0.5
            self._say(f"the loss rises: steps are {self.update_rule.backoff:g} times as long now")

    def _end_in_time(self) -> None:
        """Stop where another step would go beyond the budget."""
        budget = self.args.max_forward_passes
        if budget is not None:
            left = budget - self.evaluator.forward_passes
            self.control.should_training_stop |= left < self.args.forward_passes_per_step

    def _say(self, message: str) -> None:
        if self.is_world_process_zero():
            tqdm.write(f"step {self.state.global_step}: {message}", file=sys.stderr)

    def _calibrated(self, batches: Sequence[Batch], parts: int) -> Calibration:
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
            evaluator = Evaluator(self.model, self.space, SequenceObjective(), ranks=self.ranks)
            batches = [self.objective.drawn(self.model, batch) for batch in batches]
            tolerance = calibrate.COMPLETIONS_TOLERANCE
        found = calibrate.errors(
            lambda points: evaluator.evaluate(points, batches).losses, seeds, ladder
        )
        if evaluator is not self.evaluator:
            self.evaluator.forward_passes += evaluator.forward_passes
            self.evaluator.examples_forwarded += evaluator.examples_forwarded
        eps, error = calibrate.choose(ladder, found, tolerance)
        if evaluator is not self.evaluator and 0 < error < tolerance:
            # The error grows with eps. So does what a jump says of the slope, over its own noise.
            grown = min(tolerance / error, calibrate.NEIGHBOURS[-1])
            eps, error = eps * grown, error * grown
        tried = f"of {len(ladder)} from {ladder[0]:.0e} to {ladder[-1]:.0e}"
        self._say(
            f"zo_eps={eps:.1e}, the largest {tried} where losses are within {error:.0%} of a line"
        )
        return Calibration(self.evaluator.forward_passes, eps, error)

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

    def _broken(self, why: str) -> NonFiniteLossError:
        """The error that ends a run of skipped updates; the last good state is saved first."""
        step = self.state.global_step
        batches = [self._prepare_inputs(batch) for batch in self._micro_batches]
        here = self.evaluator([Direction()], batches)[0]
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if math.isfinite(here):
            advice = f"undisturbed the loss is {here:.4g}: lower zo_eps"
        elif base.dtype == torch.float16:
            advice = "float16 overflows: load the model in bfloat16 or float32"
        else:
            advice = "the loss has diverged: lower learning_rate"
        self._save_checkpoint(self.model, trial=None)
        return NonFiniteLossError(
            f"{self.faults.in_a_row} updates in a row were skipped, the last one at step {step} "
            f"with zo_eps={self._eps:g}: {why}; {advice}. The last good state is in "
            f"checkpoint-{step}"
        )

    def floating_point_ops(self, inputs: Batch) -> int:
        """Operations of all candidates on a micro-batch; transformers counts a backward as two."""
        passes = self.args.forward_passes_per_step / self.args.gradient_accumulation_steps
        if self.ranks is not None and self.args.parallel == "candidates":
            passes /= self.ranks.count
        return int(super().floating_point_ops(inputs) / 3 * passes)

    def _space_settings(self) -> dict[str, Any]:
        names = ("tune", "tune_unquantized", "tunable", "noise", "noise_rank", "low_rank_noise")
        return {name: getattr(self.args, name) for name in names}

    def _rule_settings(self) -> dict[str, Any]:
        args = self.args
        decayed = set(self.get_decay_parameter_names(self.model)) & self.space.tensors().keys()
        return {
            "update_rule": args.update_rule,
            "weight_decay": args.weight_decay,
            "decayed": sorted(decayed),
            "automatic": args.learning_rate is None and args.update_rule in AUTOMATIC,
            "momentum": args.momentum,
            "beta2": args.adam_beta2,
        }

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The update rule, as the optimizer that the Trainer steps and schedules."""
        rate = self.args.learning_rate or self._default_learning_rate()
        self.update_rule = rule_of(self.space, **self._rule_settings(), learning_rate=rate)
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

    def get_train_dataloader(self) -> DataLoader:
        """Whole batches in the same order on every rank, each of which takes its share of them."""
        if self.ranks is None:
            return super().get_train_dataloader()
        if not has_length(self.train_dataset) or self.accelerator.dispatch_batches:
            raise UserError("a streamed data set is read by one process; load it, or start one")
        shared = self.ranks.collator(self.data_collator)
        with replaced([(self, "data_collator", shared)]):
            loader = super().get_train_dataloader()
        # What accelerate would have each rank skip, all need.
        for name, value in {"num_processes": 1, "process_index": 0, "even_batches": False}.items():
            setattr(loader.batch_sampler, name, value)
        return loader

    def get_total_train_batch_size(self, args: ZOConfig) -> int:
        """Examples of a step, all ranks together."""
        return self._train_batch_size * args.gradient_accumulation_steps

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        return model

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer; training logs also say the slope and what has been spent."""
        if "learning_rate" in logs:
            logs["slope"], logs["spread"] = self._slope, self._spread
            logs["zo_eps"] = self._eps
            logs["non_finite"], logs["skipped"] = self.faults.non_finite, self.faults.skipped
            logs["step_size"] = self.update_rule.step_size
            if isinstance(self.space, BaseSpace):
                logs |= self.space.shares()
            logs["forward_passes"] = self.evaluator.forward_passes
            logs["examples_forwarded"] = self.evaluator.examples_forwarded
            if self.ranks is not None:
                logs["wire_bytes"] = self.ranks.wire_bytes
        super().log(logs, start_time)

    # ---- Saving and resuming: safetensors and JSON ----------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter, or the tuned base, with tokenizer and card; see `Trainer.save_model`.

        A checkpoint gets no copy of a whole base: its state holds the tensors that are tuned.
        """
        if isinstance(self.space, AdapterSpace) or not _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            # transformers asks whether the best checkpoint is there.
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.args.tune == "scales":
            assert isinstance(self.space, BaseSpace)
            assert self.base_hash is not None
            save_scales(output_dir or self.args.output_dir, self.space, self.base_hash)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._compare_ranks()
        if not self.args.should_save:
            return
        state = {
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "elite": self._elite,
            "zo_eps": self._eps,
            "calibrations": [asdict(calibration) for calibration in self.calibrations],
            "update_rule": self.update_rule.scalars(),
            "backoff": vars(self._backoff),
            "faults": asdict(self.faults),
            "candidates_per_forward": self.evaluator.candidates_per_forward,
            "forward_passes": self.evaluator.forward_passes,
            "examples_forwarded": self.evaluator.examples_forwarded,
            "base": self.base_hash,
            "moves": getattr(self.space, "moves", 0),
        }
        remembered = {RULE_PREFIX + name: t for name, t in self.update_rule.tensors().items()}
        # A checkpoint is a position in the journal, so the journal is on the disk before it.
        self._journal.sync()
        checkpoint.save_state(output_dir, self._trained() | remembered, state)

    def _trained(self) -> dict[str, Tensor]:
        """All that training may have changed."""
        return trained(self.model, self.space)

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
        self.faults = Faults(**state["faults"])
        tensors = checkpoint.load_tensors(Path(checkpoint_folder) / checkpoint.TENSORS_NAME)
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
        saved = checkpoint.load_tensors(Path(resume_from_checkpoint) / checkpoint.TENSORS_NAME)
        self._load_trained({n: t for n, t in saved.items() if not n.startswith(RULE_PREFIX)})

    def _load_trained(self, tensors: dict[str, Tensor]) -> None:
        if tensors or self.args.tune != "weights":
            load_trained(self.model, self.space, tensors)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:
            checkpoint.save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            checkpoint.load_rng_state(checkpoint_folder)
