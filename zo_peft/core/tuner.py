"""THE STEP of forward-only tuning, and what a run carries from step to step.

    ask        seeds are drawn; the strategy says at which points it wants losses   strategies
    evaluate   every example's loss at every point, in as few forwards as fit       evaluator, space
    judge      is the estimate sound, and does the loss still fall?                 faults, updates
    record     the step is written to the journal: seeds and numbers                journal
    move       theta follows the estimate                                           updates, space

A few steps begin with a choice of eps (`eps`). A step that the journal already holds is taken from
there, without a forward pass, and goes through the same code from `judge` on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from zo_peft.core.batch import Batch
from zo_peft.core.direction import Direction
from zo_peft.core.eps import Calibration, EpsChoice
from zo_peft.core.evaluator import Evaluation, Evaluator
from zo_peft.core.faults import IN_A_ROW, Faults
from zo_peft.core.journal import Follower, Journal, Record
from zo_peft.core.low_rank import LowRank
from zo_peft.core.noise import derive_seed
from zo_peft.core.ranks import CHECK_STEPS
from zo_peft.core.strategies import STRATEGIES, Asking, Estimate, Options, combine, run_steps
from zo_peft.core.updates import Backoff, UpdateRule
from zo_peft.errors import NonFiniteLossError, UserError

#: Batches in; in the place of an objective whose losses jump, an evaluator of a smooth one with its
#: batches out.
Smooth = Callable[[Sequence[Batch]], tuple[Evaluator, Sequence[Batch]]]


class Tuner:
    """Makes the steps of a run.

    Args:
        evaluator: gives losses at displacements of its space.
        rule: moves the space.
        strategy: a name of `STRATEGIES`.
        options: of the strategy.
        seed: from which all seeds of the run are derived.
        eps: size of the perturbations; None: it is chosen from the losses.
        per_example_noise: each example has candidates of its own, where the evaluator can do that.
        smooth: what eps is chosen by where losses jump (rewards).
        say: is told what a user should know, in one line.
        trained: all tensors that steps change, which several processes compare.

    Attributes:
        journal: what records are written to and past steps are read from.
        total_steps: of the run, which decides when eps is chosen again.
        faults, backoff, eps: see there.
        estimate: of the last step; None before the first.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        rule: UpdateRule,
        strategy: str = "gv",
        options: Options | None = None,
        seed: int = 0,
        eps: float | None = None,
        per_example_noise: bool = True,
        smooth: Smooth | None = None,
        say: Callable[[str], None] = print,
        trained: Callable[[], dict[str, Tensor]] | None = None,
    ) -> None:
        self.evaluator, self.rule, self.space = evaluator, rule, evaluator.space
        self.strategy, self.options, self.seed = STRATEGIES[strategy], options or Options(), seed
        self.per_example_noise, self.smooth, self.say = per_example_noise, smooth, say
        self.trained = trained or self.space.tensors
        self.eps = EpsChoice(eps)
        self.faults, self.backoff = Faults(), Backoff()
        self.journal: Journal | Follower = Follower()
        self.total_steps = 0
        self.estimate: Estimate | None = None
        self._elite: int | None = None
        self._compared = False

    def step(self, batches: Sequence[Batch], number: int) -> Estimate:
        """Make step `number` of the run, counted from 0, on its micro-batches.

        Raises:
            NonFiniteLossError: ten updates in a row were skipped.
            UserError: the journal holds this step with other numbers, or processes differ.
        """
        if number % CHECK_STEPS == 0 or not self._compared:
            self.compare_ranks(number)
        self._set_basis(number)
        known = self.journal.past(number)
        estimate, chosen = self._measure(batches, number) if known is None else self._recall(known)
        record = self._judge(estimate, chosen, number)
        self._write(record, known)
        move(self.rule, record)
        if self.faults.in_a_row >= IN_A_ROW:
            raise self._broken(batches, record)
        return estimate

    # ---- Ask and evaluate -----------------------------------------------------------------------

    def _measure(self, batches: Sequence[Batch], number: int) -> tuple[Estimate, dict[str, Any]]:
        """What the candidates' losses say, and what was chosen or found to be wrong."""
        parts = self.evaluator.parts(batches) if self.per_example_noise else 1
        chosen: dict[str, Any] = {}
        if self.eps.due(number, self.total_steps):
            chosen["calibration"] = asdict(self._choose_eps(batches, parts, number))
            self._adopt(chosen)
        evaluations: list[Evaluation] = []

        def evaluate(points: Sequence[Sequence[Direction]]) -> Sequence[Sequence[float]]:
            evaluations.append(self.evaluator.evaluate(points, batches))
            return evaluations[-1].losses

        asking = [self._ask(number, *((part,) if parts > 1 else ())) for part in range(parts)]
        estimate = combine(run_steps(asking, evaluate))
        losses = [loss for found in evaluations for part in found.losses for loss in part]
        chosen |= self.faults.found(estimate, losses)
        if "skipped" in chosen:
            return Estimate(Direction(), 0.0, estimate.losses), chosen
        spreads = (evaluations[0].spread, evaluations[0].example_spread)
        spread, sensitivity = (value / self.eps.eps for value in spreads)
        return replace(estimate, spread=spread, sensitivity=sensitivity), chosen

    def _ask(self, number: int, *part: int) -> Asking:
        """Begin the strategy's step, for a part of the batch if it has candidates of its own."""
        candidates = range(self.options.num_candidates)
        seeds = [derive_seed(self.seed, number, index, *part) for index in candidates]
        if self.options.carry_best and self._elite is not None:
            seeds[0] = self._elite
        return self.strategy.start(seeds, self.eps.eps, self.options)

    def _set_basis(self, number: int) -> None:
        noise = self.space.noise
        if isinstance(noise, LowRank):
            noise.basis_seed = derive_seed(self.seed, number // noise.basis_steps, -2)

    def _choose_eps(self, batches: Sequence[Batch], parts: int, number: int) -> Calibration:
        evaluator = self.evaluator
        if self.smooth is not None:
            evaluator, batches = self.smooth(batches)
        eps, error, message = self.eps.choose(
            lambda points: evaluator.evaluate(points, batches).losses,
            derive_seed(self.seed, number, -1),
            parts,
            of_completions=self.smooth is not None,
        )
        if evaluator is not self.evaluator:
            self.evaluator.forward_passes += evaluator.forward_passes
            self.evaluator.examples_forwarded += evaluator.examples_forwarded
        self.say(message)
        return Calibration(self.evaluator.forward_passes, eps, error)

    def _recall(self, known: Record) -> tuple[Estimate, dict[str, Any]]:
        """The same as `_measure` from the journal, without a forward pass."""
        self.evaluator.forward_passes = known.forward_passes
        self.evaluator.examples_forwarded = known.examples_forwarded
        self._adopt(known.chosen)
        return known.estimate, known.chosen

    def _adopt(self, chosen: dict[str, Any]) -> None:
        if "calibration" in chosen and self.eps.adopt(Calibration(**chosen["calibration"])):
            # The backoff compares losses of candidates, and at another distance they are others.
            self.backoff = Backoff()

    # ---- Judge, record, move --------------------------------------------------------------------

    def _judge(self, estimate: Estimate, chosen: dict[str, Any], number: int) -> Record:
        """Count faults, shorten the steps where the loss rises, and note all of it."""
        self._elite, self.estimate = estimate.elite, estimate
        self.faults.take(estimate, chosen)
        follows = "skipped" not in chosen
        if follows and self.rule.automatic and self.backoff(estimate.loss) < 1:
            self.rule.backoff *= 0.5
            self.say(f"the loss rises: steps are {self.rule.backoff:g} times as long now")
        noise = self.space.noise
        return Record(
            number,
            self.rule.param_groups[0]["lr"],
            self.rule.backoff,
            estimate.slope,
            estimate.spread,
            estimate.sensitivity,
            estimate.loss,
            self.eps.eps,
            self.evaluator.forward_passes,
            self.evaluator.examples_forwarded,
            estimate.direction,
            estimate.elite,
            noise.basis_seed if isinstance(noise, LowRank) else 0,
            chosen,
        )

    def _write(self, record: Record, known: Record | None) -> None:
        if known is None:
            self.journal.append(record)
        elif record != known:
            raise UserError(
                f"step {record.step} of the journal was made with other settings; resume with "
                "those of the run, or from a checkpoint by its name"
            )
        if record.skipped:
            self.say(f"skipped: {record.skipped}")

    def _broken(self, batches: Sequence[Batch], record: Record) -> NonFiniteLossError:
        """The error that ends a run of skipped updates."""
        here = self.evaluator([Direction()], batches)[0]
        if math.isfinite(here):
            advice = f"undisturbed the loss is {here:.4g}: lower zo_eps"
        elif any(p.dtype == torch.float16 for p in self.evaluator.model.parameters()):
            advice = "float16 overflows: load the model in bfloat16 or float32"
        else:
            advice = "the loss has diverged: lower learning_rate"
        return NonFiniteLossError(
            f"{self.faults.in_a_row} updates in a row were skipped, the last one at step "
            f"{record.step} with zo_eps={self.eps.eps:g}: {record.skipped}; {advice}"
        )

    def compare_ranks(self, number: int) -> None:
        """Stop all processes where one holds other numbers than most.

        Raises:
            UserError: it names the processes that differ.
        """
        self._compared = True
        self.evaluator.ranks.check(f"at step {number}, what is tuned", *self.trained().values())

    # ---- State ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on, beside the tensors: plain JSON."""
        return {
            "elite": self._elite,
            "zo_eps": self.eps.eps,
            "calibrations": [asdict(calibration) for calibration in self.eps.calibrations],
            "update_rule": self.rule.scalars(),
            "backoff": vars(self.backoff),
            "faults": asdict(self.faults),
            "candidates_per_forward": self.evaluator.candidates_per_forward,
            "forward_passes": self.evaluator.forward_passes,
            "examples_forwarded": self.evaluator.examples_forwarded,
        }

    def load_state(self, state: dict[str, Any], remembered: dict[str, Tensor]) -> None:
        """Take up what `state` gave, and the tensors that the update rule remembered."""
        self._elite, self.eps.eps = state["elite"], state["zo_eps"]
        self.eps.calibrations = [Calibration(**fields) for fields in state["calibrations"]]
        self.rule.load(state["update_rule"], remembered)
        vars(self.backoff).update(state["backoff"])
        self.faults = Faults(**state["faults"])
        if self.evaluator.candidates_per_forward is None:
            self.evaluator.candidates_per_forward = state["candidates_per_forward"]
        self.evaluator.forward_passes = state["forward_passes"]
        self.evaluator.examples_forwarded = state["examples_forwarded"]


def move(rule: UpdateRule, record: Record) -> None:
    """Move `theta` as a record says: the end of every step, and all that a replay does."""
    noise = rule.space.noise
    if isinstance(noise, LowRank):
        noise.basis_seed = record.basis_seed
    rule.param_groups[0]["lr"], rule.backoff = record.learning_rate, record.backoff
    if not record.skipped:
        rule.estimate = record.estimate
        rule.step()
