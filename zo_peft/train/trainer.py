"""`ZOTrainer`: transformers' Trainer, with a `Tuner` that makes the steps."""

import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, TrainOutput, has_length

from zo_peft.core.batch import Batch
from zo_peft.core.direction import Direction
from zo_peft.core.eps import EpsChoice
from zo_peft.core.evaluator import Evaluator
from zo_peft.core.flat_space import FlatSpace
from zo_peft.core.journal import INITIAL_NAME, JOURNAL_NAME, Follower, Journal, read
from zo_peft.core.lanes import replaced
from zo_peft.core.noise import GENERATOR, derive_seed
from zo_peft.core.ranks import Ranks
from zo_peft.core.tuner import Tuner
from zo_peft.core.updates import AUTOMATIC, UpdateRule
from zo_peft.data.collate import Collator, drawn_batch
from zo_peft.engines.check import check_answers
from zo_peft.engines.served import evaluator_of
from zo_peft.errors import NonFiniteLossError, UserError, explained
from zo_peft.models import recipe
from zo_peft.models.adapters import peft_config_of
from zo_peft.models.agreement import check
from zo_peft.models.guide import ResidualGuide, may_read
from zo_peft.models.in_place_space import InPlaceSpace
from zo_peft.models.loading import base_hash, identity
from zo_peft.models.trunk import compile_frozen_parts
from zo_peft.objectives import scoring
from zo_peft.objectives.rewards import RewardObjective
from zo_peft.train import checkpoint
from zo_peft.train.checkpoint import CheckpointTrainer
from zo_peft.train.checks import GRADIENT, GUIDED, check_first_guided, default_budget
from zo_peft.train.config import ZOConfig
from zo_peft.train.policy import PolicyGuide, may_draw

#: How far a random walk of all steps would move the loss of an example, in nats, with the automatic
#: learning rate (docs/efficiency.md).
WALK = 0.87


#: Learning rates of plain SGD by adapter type (docs/efficiency.md), LORA's for any other type; and
#: those of scales and weights.
SGD_LEARNING_RATES: dict[str, float] = {
    PeftType.LORA: 1e-3,
    PeftType.PREFIX_TUNING: 1.0,
    PeftType.PROMPT_TUNING: 1.0,
    PeftType.IA3: 1e-1,
    "scales": 1e-3,
    "weights": 1e-6,
}


class ZOTrainer(CheckpointTrainer):
    """Tunes a PEFT adapter or the base with forward passes only; else a `transformers.Trainer`.

    See `BaseTrainer` for the arguments.

    Attributes:
        tuner: makes the steps (`zo_peft.core.tuner`).
        space, tuned_numel: the numbers that are tuned, and how many they are.
        evaluator: gives losses at displacements of the space, and counts forward passes.
        faults, calibrations: what was dropped, and the choices of eps so far.
    """

    trains = True

    def ready(self) -> None:
        """Make the space, the evaluator and the tuner."""
        model, args = self.model, self.args
        if args.strategy in GRADIENT:
            raise UserError(f"strategy={args.strategy!r} needs gradients; use a GradientTrainer")
        for name in ("compute_loss", "create_optimizer"):
            if getattr(type(self), name) is not getattr(ZOTrainer, name):
                raise UserError(f"{name} would not be asked; give an objective or an update_rule")
        recipe.check_in_place(model, args.tune)
        # The hash comes before the space, which takes nested scales of NF4 apart.
        self.base_hash = None if args.tune == "adapter" else base_hash(model)
        self.space = recipe.space_of(model, **self._space_settings())
        self.tuned_numel = self.space.numel
        if args.strategy == GUIDED and args.strategy_is_default and not self._guide_reads():
            self.args = args = args.with_candidates()
        self.ranks = Ranks(args.parallel if args.world_size > 1 else None, args.device)
        self._train_batch_size *= self.ranks.batches
        if self.ranks.count > 1 and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise UserError("a base on several devices is tuned by one process; drop device_map")
        limit = args.candidates_per_forward
        self._evaluator_of = recipe.evaluator_of if self.engine is None else evaluator_of
        self.evaluator = self._evaluator_of(model, self.space, self.objective, limit, self.ranks)
        self.spent = self.evaluator
        if args.torch_compile:
            options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            compile_frozen_parts(model, self.space.parameters.values(), **options)
        rewarded = isinstance(self.objective, RewardObjective)
        self.tuner = Tuner(
            self.evaluator,
            self._update_rule(),
            "gv" if args.strategy == GUIDED else args.strategy,
            args.strategy_options,
            args.seed,
            EpsChoice(args.zo_eps, self._smooth if rewarded else None),
            args.per_example_noise,
            self._say,
            self._trained,
            self._guide() if args.strategy == GUIDED else None,
        )
        self.faults, self.calibrations = self.tuner.faults, self.tuner.eps.calibrations
        if args.chooses_budget and has_length(self.train_dataset):
            steps = len(self.train_dataset) / self.get_total_train_batch_size(args)
            budget = default_budget(args, steps, self._step_passes)
            self.args = args = args.changed(max_forward_passes=budget)
        if self.tuner.guided is not None:
            check_first_guided(args, self.tuner.passes(0))

    @property
    def guide(self) -> str | None:
        """What the guide reads and how far it is followed, in one line; None without one."""
        return None if self.tuner.guided is None else self.tuner.guided.told

    @property
    def _step_passes(self) -> int:
        """Forward passes of a step without checks, also of one that draws completions."""
        guided, passes = self.tuner.guided, self.args.forward_passes_per_step
        return passes * guided.guide.draws * guided.guide.passes if guided is not None else passes

    def _guide_reads(self) -> bool:
        objective = self.objective
        known = isinstance(objective, scoring.DIFFERENTIABLE)
        if isinstance(objective, RewardObjective):
            known = may_draw(objective.temperature, self.args)
        return known and may_read(self.model, self.space.parameters)

    def _guide(self) -> ResidualGuide:
        args, objective = self.args, self.objective
        settings = self.model, self.space.parameters
        if args.tune == "adapter" and isinstance(objective, RewardObjective):
            return PolicyGuide(*settings, objective, args.exact_layers)
        if args.tune == "adapter" and isinstance(objective, scoring.DIFFERENTIABLE):
            return ResidualGuide(*settings, objective, args.exact_layers)
        needs = "needs tune='adapter', and an objective with a gradient or rewards"
        raise UserError(f"strategy='guided' {needs}; use 'gv'")

    def _smooth(self, batches: Sequence[Batch]) -> tuple[Evaluator, Sequence[Batch]]:
        """The likelihood of drawn completions, by which eps is chosen in the place of rewards."""
        assert isinstance(self.objective, RewardObjective)
        given = self.model, self.space, scoring.SequenceObjective()
        evaluator = self._evaluator_of(*given, ranks=self.ranks)
        draw, pad = self.objective.drawn, self.objective.tokenizer.pad_token_id
        return evaluator, [drawn_batch(batch, draw(self.model, batch), pad) for batch in batches]

    def _say(self, message: str) -> None:
        if self.is_world_process_zero():
            tqdm.write(f"step {self.state.global_step}: {message}", file=sys.stderr)

    # ---- The run and its journal ----------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As in Trainer; every update is in the journal before it is made.

        With `resume_from_checkpoint=True`, go on from the end of the journal in `output_dir`, if
        there is one; steps behind the last checkpoint are made again from the journal, without
        forward passes. With the folder of a checkpoint, go on from there; what the journal has
        behind it is dropped (`zo_journal.old` keeps it). A UserError says that the journal or the
        checkpoint is damaged, or of another run.
        """
        if isinstance(self.space, FlatSpace) and not resume_from_checkpoint:
            self.space.check()
        self._check_lanes()
        if isinstance(self.space, FlatSpace):
            # A forward may have put other tensors in the place of parameters.
            self.space.check()
        resumed = self._open_journal(resume_from_checkpoint)
        try:
            with self.engine.training() if self.engine else nullcontext():
                result = super().train(resumed, *args, **kwargs)
            self.tuner.compare_ranks(self.state.global_step)
            return result
        finally:
            self.tuner.journal.close()

    def _check_lanes(self) -> None:
        """See `zo_peft.models.agreement`; before any step, so a resumed run decides the same."""
        if not getattr(self.objective, "repeatable", False) or self.check_passes:
            return
        self.model.eval()
        some = sorted(islice(self.train_dataset or (), 32), key=lambda row: row["length"])
        if not some:
            return
        chosen = some[-1:] if len(some) == 1 or self._train_batch_size == 1 else [some[0], some[-1]]
        collate = self.data_collator
        plain = replace(collate, shares_prompts=False) if isinstance(collate, Collator) else collate
        alone = [self._prepare_inputs(plain([features])) for features in chosen]
        batch = self._prepare_inputs(collate(chosen))
        objective = self.objective
        if isinstance(objective, RewardObjective):
            # Sampled completions differ from batch to batch; the likelihood of given ones does not.
            objective = scoring.CompletionObjective()
            pad = self.processing_class.pad_token_id
            batch, *alone = (drawn_batch(b, [[0, 0]] * b.rows, pad) for b in (batch, *alone))
        if self.engine is not None:
            check_answers(self.model, batch, self.args.engine_reference)
        with replaced([(self.evaluator, "objective", objective)]):
            self.check_passes = check(self.evaluator, batch, alone)

    def _open_journal(self, resume: str | bool | None) -> str | None:
        """Start a journal or take one up; returns the checkpoint to go on from."""
        folder, header = Path(self.args.output_dir).resolve(), self._header()
        last = resume is True
        whose = folder if last or not resume else Path(str(resume)).resolve().parent
        path = whose / JOURNAL_NAME
        self.ranks.check("the base, the adapter or the settings", header, *self._trained().values())
        if self.tuner.guided is not None:
            header["guide"] = True
        if self.ranks.least(not resume or (last and not path.exists())):
            self.tuner.journal = Follower()
            if self.is_world_process_zero():
                folder.mkdir(parents=True, exist_ok=True)
                # Weights start as the base itself has them.
                values = {} if self.args.tune == "weights" else self._trained()
                checkpoint.save_tensors(folder / INITIAL_NAME, values)
                self.tuner.journal = Journal(folder / JOURNAL_NAME, header)
            return None
        found, records = read(path)
        if found | {"data": found.get("data", header["data"])} != header:
            why = f"{whose.name}/{path.name} is of another base, adapter or noise, or other data"
            raise UserError(f"{why}; resume with those of that run, or give another output_dir")
        checksums = [record.checksum for record in records]
        start = checkpoint.last_whole(folder, checksums) if last else str(resume)
        step = 0 if start is None else checkpoint.step_of(start, checksums)
        # What the guide read is not in the journal; the steps are made again with the data.
        keep = None if last and self.tuner.guided is None else step
        initial = path.with_name(INITIAL_NAME)
        if self.is_world_process_zero():
            self.tuner.journal = Journal.resumed(path, folder / JOURNAL_NAME, keep)
            if whose != folder:
                shutil.copyfile(initial, folder / INITIAL_NAME)
        else:
            # Rank 0 goes on writing what is read here.
            self.tuner.journal = Follower(islice(read(path)[1], keep))
        if start is None:
            self._load_trained(checkpoint.load_tensors(initial))
        return start

    def _header(self) -> dict[str, Any]:
        """What a journal says of its run, by which it is told from others; but for the guide."""
        config = peft_config_of(self.model)
        some = json.dumps([*islice(self.train_dataset or (), 100)], default=str)
        return {
            "base": identity(self.model),
            "num_labels": self.tokenization.num_labels,
            "adapter": config and json.loads(json.dumps(config.to_dict(), default=sorted)),
            "seed": self.args.seed,
            "generator": GENERATOR,
            "space": self._space_settings(),
            "rule": self._rule_settings(),
            "data": zlib.crc32(some.encode()),
        }

    # ---- The step -------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """The micro-batches of one step, kept for its candidates: each of them sees them all."""
        self._micro_batches = list(islice(epoch_iterator, num_batches))
        return self._micro_batches, None

    def training_step(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> Tensor:
        """Make the whole step on its last micro-batch; returns the loss.

        After ten skipped updates in a row, a checkpoint is saved, and NonFiniteLossError raised.
        """
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        model.eval()
        step = self.state.global_step
        if isinstance(self.objective, RewardObjective):
            self.objective.seed = derive_seed(self.args.seed, step, -3)
        batches = [self._prepare_inputs(batch) for batch in self._micro_batches]
        if isinstance(self.space, FlatSpace):
            self.space.check()
        try:
            estimate = self.tuner.step(batches, step)
        except NonFiniteLossError as error:
            advice = self._advice(batches)
            self._save_checkpoint(self.model, trial=None)
            last = f"The last good state is in checkpoint-{step}"
            raise NonFiniteLossError(f"{error}; {advice}. {last}") from None
        self.totals.add(estimate.loss)
        if self._spent(step + 1):
            # As Trainer ends a run at its last step.
            self.control.should_training_stop = True
            self.control.should_save |= self.args.save_strategy == SaveStrategy.STEPS
            self.control.should_evaluate |= self.args.eval_strategy == IntervalStrategy.STEPS
        return torch.tensor(estimate.loss, device=self.args.device)

    @property
    def _budget(self) -> float:
        return self.args.max_forward_passes or math.inf

    def over(self) -> bool:
        """As in `BaseTrainer`; or another step would go beyond the budget of forward passes."""
        return super().over() or self._spent(self.state.global_step)

    def _spent(self, step: int) -> bool:
        """Whether the budget leaves too few forward passes for this step."""
        next_one = self.tuner.passes(step) * self.args.gradient_accumulation_steps
        return self._budget - self.forward_passes < next_one

    def _advice(self, batches: Sequence[Batch]) -> str:
        """What to do where losses are not finite."""
        here = self.evaluator([Direction()], batches)[0]
        if math.isfinite(here):
            return f"undisturbed the loss is {here:.4g}: lower zo_eps"
        if any(parameter.dtype == torch.float16 for parameter in self.model.parameters()):
            return "float16 overflows: load the model in bfloat16 or float32"
        return "the loss has diverged: lower learning_rate"

    def floating_point_ops(self, inputs: Batch) -> int:
        """Operations of all candidates on a micro-batch; transformers counts a backward as two."""
        passes = self.args.forward_passes_per_step / self.args.gradient_accumulation_steps
        return int(super().floating_point_ops(inputs) / 3 * passes / self.ranks.divided)

    # ---- The update rule, as the Trainer's optimizer --------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The update rule. The Trainer schedules it; the tuner has moved it when Trainer steps."""
        self.tuner.rule = self.optimizer = self._update_rule()
        return self.optimizer

    def _update_rule(self) -> UpdateRule:
        config = peft_config_of(self.model)
        kind = config.peft_type if config else self.args.tune
        rate = SGD_LEARNING_RATES.get(kind, SGD_LEARNING_RATES[PeftType.LORA])
        if self.args.update_rule == "momentum":
            rate *= 1 - self.args.momentum
        rate = self.args.learning_rate or rate
        return recipe.rule_of(self.space, **self._rule_settings(), learning_rate=rate)

    def _space_settings(self) -> dict[str, Any]:
        return {name: getattr(self.args, name) for name in recipe.SPACE_FIELDS}

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

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """As in Trainer; an automatic learning rate depends on the number of steps."""
        guided = self.tuner.guided
        if guided is not None and guided.jumps:
            # `ZOConfig` took steps for ones of a single pass; these take several.
            num_training_steps = int(min(num_training_steps, self._budget // self._step_passes))
        self.tuner.total_steps = num_training_steps
        rule = self.tuner.rule
        if rule.automatic:
            # Momentum makes steps alike: they go further than as many independent ones.
            kept = rule.momentum if rule.BUFFERS else 0.0
            independent = num_training_steps * (1 + kept) / (1 - kept)
            rule.param_groups[0]["lr"] = WALK / math.sqrt(independent)
        with explained("lr_scheduler_kwargs do not fit", TypeError, ValueError):
            scheduler = super().create_scheduler(num_training_steps, optimizer)
        if guided is not None and math.isfinite(self._budget):
            # Steps take one forward pass or several; the schedule follows the passes.
            scheduler.lr_lambdas = [
                lambda _, own=own: own(num_training_steps * self.forward_passes / self._budget)
                for own in scheduler.lr_lambdas
            ]
        return scheduler

    def create_accelerator_and_postprocess(self) -> None:
        """Accelerate prepares data and optimizer; the model stays as it is (no DDP, no buckets)."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = lambda model, **_: model

    def get_train_dataloader(self) -> DataLoader:
        """Whole batches in the same order on every rank, each of which takes its share of them."""
        if self.ranks.count == 1:
            return super().get_train_dataloader()
        if not has_length(self.train_dataset) or self.accelerator.dispatch_batches:
            raise UserError("a streamed data set is read by one process; load it, or start one")
        with replaced([(self, "data_collator", self.ranks.collator(self.data_collator))]):
            loader = super().get_train_dataloader()
        # Accelerate would have each rank skip what the others take, but all need every batch.
        for name, value in {"num_processes": 1, "process_index": 0, "even_batches": False}.items():
            setattr(loader.batch_sampler, name, value)
        return loader

    def get_total_train_batch_size(self, args: ZOConfig) -> int:
        """Examples of a step, all ranks together."""
        return self._train_batch_size * args.gradient_accumulation_steps

    def _wrap_model(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return model

    def _no_norm(self, *_: Any, **__: Any) -> None:
        """There are no gradients to measure."""

    _clip_grad_norm = _get_grad_norm = _no_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `BaseTrainer`; training logs also say the slope and what goes with it."""
        if "learning_rate" in logs:
            tuner = self.tuner
            assert tuner.estimate is not None
            logs["slope"], logs["spread"] = tuner.estimate.slope, tuner.estimate.spread
            logs["zo_eps"] = tuner.eps.eps
            logs["non_finite"], logs["skipped"] = self.faults.non_finite, self.faults.skipped
            logs["step_size"] = tuner.rule.step_size
            if isinstance(self.space, InPlaceSpace):
                logs |= self.space.shares()
            if self.ranks.count > 1:
                logs["wire_bytes"] = self.ranks.wire_bytes
        super().log(logs, start_time)
