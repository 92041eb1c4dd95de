"""THE STEP of forward-only tuning, and what a run carries from step to step.

    ask        seeds are drawn; the strategy says at which points it wants losses   strategies
    evaluate   every example's loss at every point, in as few forwards as fit       evaluator, space
    judge      is the estimate sound, and does the loss still fall?                 faults, backoff
    record     the step is written to the journal, as seeds and numbers             journal
    move       theta follows the estimate                                           updates, space

A few steps begin with a choice of eps (`eps`). A step that the journal already holds needs no
forward pass, and goes through the same code from `judge` on.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from zo_peft.core.backoff import Backoff
from zo_peft.core.batch import Batch
from zo_peft.core.direction import Direction
from zo_peft.core.eps import Calibration, EpsChoice, points
from zo_peft.core.evaluator import Evaluation, Evaluator
from zo_peft.core.faults import IN_A_ROW, Faults
from zo_peft.core.guide import EPS as guide_eps
from zo_peft.core.guide import Guide, Guided
from zo_peft.core.journal import Follower, Journal, Record
from zo_peft.core.low_rank import LowRank
from zo_peft.core.noise import derive_seed
from zo_peft.core.ranks import CHECK_STEPS
from zo_peft.core.strategies import STRATEGIES, Estimate, Options, combine, run_steps
from zo_peft.core.updates import UpdateRule
from zo_peft.errors import NonFiniteLossError, UserError


class Tuner:
    """Makes the steps of a run.

    Args:
        evaluator: gives losses at displacements of its space.
        rule: moves that space.
        strategy, options: the name of one of `STRATEGIES`, and what it may depend on.
        seed: from which all seeds of the run are derived.
        eps: the size of the perturbations, or how it is chosen; default: chosen from the losses.
        per_example_noise: each example has candidates of its own, where the evaluator can do that.
        say: is told in one line what a user should know.
        trained: all tensors that training changes, which processes compare; default: the space's.
        guide: reads gradients off forward passes; where it is not to be believed, and for numbers
            that it does not know, the strategy makes the steps.

    Attributes:
        journal: where records go to, and past steps come from.
        total_steps: of the run; it decides when eps is chosen again.
        estimate, elite: of the last step, and the seed of its best candidate; None before it.
        checksum: of the last record; None before the first.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        rule: UpdateRule,
        strategy: str = "gv",
        options: Options | None = None,
        seed: int = 0,
        eps: EpsChoice | None = None,
        per_example_noise: bool = True,
        say: Callable[[str], None] = print,
        trained: Callable[[], dict[str, Tensor]] | None = None,
        guide: Guide | None = None,
    ) -> None:
        self.evaluator, self.rule, self.space = evaluator, rule, evaluator.space
        self.strategy, self.options, self.seed = STRATEGIES[strategy], options or Options(), seed
        self.per_example_noise, self.say = per_example_noise, say
        self.trained = trained or self.space.tensors
        self.eps, self.faults, self.backoff = eps or EpsChoice(), Faults(), Backoff()
        self.guided = None
        if guide is not None:
            self.guided = Guided(guide, evaluator, seed, eps=self.eps.given or guide_eps)
        self.journal: Journal | Follower = Follower()
        self.total_steps, self._compared, self.parts = 0, False, 1
        self.estimate: Estimate | None = None
        self.elite: int | None = None
        self.checksum: int | None = None

    def step(self, batches: Sequence[Batch], number: int) -> Estimate:
        """Make step `number` of the run, counted from 0, on its micro-batches.

        Raises:
            NonFiniteLossError: ten updates in a row were skipped.
            UserError: the journal has other numbers for this step, or processes differ.
        """
        if number % CHECK_STEPS == 0 or not self._compared:
            self.compare_ranks(number)
        if isinstance(self.space.noise, LowRank):
            drawn = number // self.space.noise.basis_steps
            self.space.noise.basis_seed = derive_seed(self.seed, drawn, -2)
        known = self.journal.past(number)
        estimate, chosen = self._measure(batches, number) if known is None else self._recall(known)
        record = self._judge(estimate, chosen, number)
        if known is None:
            self.journal.append(record)
        elif record != known:
            raise UserError(
                f"step {number} of the journal was made with other settings; resume with those of "
                "the run, or from a checkpoint by its name"
            )
        move(self.rule, record, estimate if self.guided is not None else None)
        if self.faults.in_a_row >= IN_A_ROW:
            last = f"the last one at step {number} with zo_eps={record.eps:g}: {record.skipped}"
            raise NonFiniteLossError(f"{IN_A_ROW} updates in a row were skipped, {last}")
        self.checksum = record.checksum
        return estimate

    def _measure(self, batches: Sequence[Batch], number: int) -> tuple[Estimate, dict[str, Any]]:
        """Ask and evaluate: what the losses say, and what was chosen or found to be wrong."""
        self.parts = self.evaluator.parts(batches) if self.per_example_noise else 1
        guided, chosen, parts = self.guided, dict[str, Any](), self.parts
        if guided is not None and guided.asks(number):
            told = guided.told
            estimate, chosen = guided.estimate(batches, number, parts)
            if "guide" in chosen and (number == 0 or guided.told != told):
                self.say(guided.told)
            if guided.jumps and guided.followed:
                self.eps.eps = self.eps.eps or guided.eps
            return estimate, chosen | self.faults.found(estimate, estimate.losses)
        if self.eps.due(number, self.total_steps):
            start = derive_seed(self.seed, number, -1)
            calibration, message = self.eps.choose(self.evaluator, batches, parts, start)
            self.say(message)
            chosen["calibration"] = asdict(calibration)
            self._adopt(chosen)
        asking = []
        for part in range(parts):
            path = (part,) if parts > 1 else ()
            candidates = range(self.options.num_candidates)
            seeds = [derive_seed(self.seed, number, index, *path) for index in candidates]
            if self.options.carry_best and self.elite is not None:
                seeds[0] = self.elite
            asking.append(self.strategy.start(seeds, self.eps.eps, self.options))
        evaluations: list[Evaluation] = []

        def evaluate(points: Sequence[Sequence[Direction]]) -> Sequence[Sequence[float]]:
            evaluations.append(self.evaluator.evaluate(points, batches))
            return evaluations[-1].losses

        estimate = combine(run_steps(asking, evaluate))
        chosen |= self.faults.found(
            estimate, [loss for found in evaluations for part in found.losses for loss in part]
        )
        if "skipped" in chosen:
            return Estimate(Direction(), 0.0, estimate.losses), chosen
        spreads = (evaluations[0].spread, evaluations[0].example_spread)
        spread, sensitivity = (value / self.eps.eps for value in spreads)
        estimate = replace(estimate, spread=spread, sensitivity=sensitivity)
        if guided is not None and guided.mends(number):
            estimate = guided.others(estimate)
        return estimate, chosen

    def passes(self, number: int) -> int:
        """The most forward passes of a step for each micro-batch; of a choice of eps those alone
        that only a guided run cannot tell in advance.
        """
        own = sum(self.strategy.asks(self.options))
        if self.guided is None:
            return own
        if self.guided.asks(number):
            return self.guided.passes(number)
        return own + self.eps.due(number, self.total_steps) * points(self.parts)

    def _recall(self, known: Record) -> tuple[Estimate, dict[str, Any]]:
        """The same as `_measure` from the journal, without a forward pass."""
        self.evaluator.forward_passes = known.forward_passes
        self.evaluator.examples_forwarded = known.examples_forwarded
        self._adopt(known.chosen)
        return known.estimate, known.chosen

    def _adopt(self, chosen: dict[str, Any]) -> None:
        if "calibration" in chosen and self.eps.adopt(Calibration(**chosen["calibration"])):
            # The backoff compares losses of candidates, which are others at another distance.
            self.backoff = Backoff()

    def _judge(self, estimate: Estimate, chosen: dict[str, Any], number: int) -> Record:
        """Count faults, shorten the steps where the loss rises, and put all of it in a record."""
        self.elite, self.estimate = estimate.elite, estimate
        self.faults.take(estimate, chosen)
        if "skipped" in chosen:
            self.say(f"skipped: {chosen['skipped']}")
        elif self.rule.automatic and self.backoff(estimate.loss) < 1:
            self.rule.backoff *= 0.5
            if self.guided is not None:
                self.guided.doubt(number)
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

    def compare_ranks(self, number: int) -> None:
        """Stop all processes, with a UserError, where one holds other numbers than most."""
        self._compared = True
        self.evaluator.ranks.check(f"at step {number}, what is tuned", *self.trained().values())


def move(rule: UpdateRule, record: Record, estimate: Estimate | None = None) -> None:
    """Move `theta` as a record says: the end of every step, and all that a replay does.

    Args:
        estimate: in place of the record's, which holds no gradients.
    """
    noise = rule.space.noise
    if isinstance(noise, LowRank):
        noise.basis_seed = record.basis_seed
    rule.param_groups[0]["lr"], rule.backoff = record.learning_rate, record.backoff
    if record.skipped is None:
        rule.estimate = estimate or record.estimate
        rule.step()
