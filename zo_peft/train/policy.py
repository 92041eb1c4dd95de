"""The guide of rewards: policy gradients, read off completions that the model has drawn.

A reward has no gradient, but the likelihood of a completion has one. Weighted with how much more
than the others of its prompt a completion earned, it is the gradient of the expected reward:
REINFORCE with the baseline of GRPO (arXiv:2402.03300) and RLOO (arXiv:2402.14740).
"""

import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor, nn

from zo_peft.core.batch import Batch
from zo_peft.core.guide import Gradients
from zo_peft.core.noise import derive_seed
from zo_peft.data.collate import drawn_batch
from zo_peft.errors import Notice, UserError
from zo_peft.models.guide import ResidualGuide
from zo_peft.objectives.rewards import RewardObjective
from zo_peft.objectives.scoring import PolicyObjective, SequenceObjective
from zo_peft.train.checks import FIRST_GUIDED
from zo_peft.train.config import ZOConfig

#: The completions of each prompt, which are compared with each other.
COMPLETIONS = 4
#: A run is told to have lost its reward after so many steps in a row with nothing to compare.
LOST = 16


def may_draw(temperature: float, config: ZOConfig) -> bool:
    """Whether completions of a prompt differ, and the budget has room for a first guided step."""
    # They are drawn before they are read.
    first = COMPLETIONS * (FIRST_GUIDED + 1) * config.gradient_accumulation_steps
    budget = config.max_forward_passes
    return temperature > 0 and (budget is None or budget >= first)


class PolicyGuide(ResidualGuide):
    """Draws completions of a step's prompts, has them rewarded, and reads policy gradients.

    Its losses are minus the rewards. A batch has a completion of each prompt. A UserError says that
    the completions of a prompt would all be the same.
    """

    def __init__(
        self,
        model: PeftModel,
        tuned: Mapping[str, nn.Parameter],
        rewards: RewardObjective,
        exact_layers: int = 0,
    ) -> None:
        if not rewards.temperature:
            why = "strategy='guided' compares sampled completions; at temperature=0 they are alike"
            raise UserError(f"{why}; give another temperature, or strategy='gv'")
        super().__init__(model, tuned, PolicyObjective(rewards.temperature), exact_layers)
        self.rewards, self.in_nats, self.draws = rewards, SequenceObjective(), COMPLETIONS
        self.most, self.alike, self.told = -math.inf, 0, False
        self.earned = deque[float](maxlen=LOST)
        # Completions of a batch count as one forward pass, as those of a candidate do.
        self.passes += 1

    def drawn(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The prompts with completions, their `losses` [B] and `advantages` [B]."""
        drawn = [completed for batch in batches for completed in self._drawn(batch)]
        self._notice_lost(drawn)
        return drawn

    def read(self, batch: Batch, parts: int = 1) -> tuple[Tensor, list[Gradients]]:
        """The losses [B] of a batch that was drawn, and policy gradients by name."""
        return batch["losses"], super().read(batch, parts)[1]

    def _notice_lost(self, drawn: Sequence[Batch]) -> None:
        """Say it once where all completions have earned the same for long, and less than before."""
        self.earned.append(-torch.cat([batch["losses"] for batch in drawn]).mean().item())
        mean = sum(self.earned) / len(self.earned)
        # Of means of many steps: the best one of single steps is above what was ever reached.
        self.most = max(self.most, mean) if len(self.earned) == LOST else self.most
        alike = not any(batch["advantages"].any() for batch in drawn)
        self.alike = self.alike + 1 if alike else 0
        lost = self.alike >= LOST and max(self.earned) < self.most
        if lost and not math.isclose(max(self.earned), self.most, rel_tol=1e-5) and not self.told:
            self.told = True
            warnings.warn(
                f"for {LOST} steps all completions of a prompt have earned the same, {mean:.3g} "
                f"in the mean after {self.most:.3g} before, and nothing is learned from that; "
                "resume from an earlier checkpoint or start again, with a smaller learning_rate",
                Notice,
                stacklevel=2,
            )

    def _drawn(self, batch: Batch) -> list[Batch]:
        completed, losses = [], []
        for index in range(COMPLETIONS):
            sampler = replace(self.rewards, seed=derive_seed(self.rewards.seed, index))
            ids = sampler.drawn(self.model, batch)
            completed.append(drawn_batch(batch, ids, sampler.tokenizer.pad_token_id))
            losses.append(sampler.losses_of(self.model, batch, ids))
        usual = torch.stack(losses).mean(dim=0)
        return [
            Batch({**drawn, "losses": own, "advantages": usual - own})
            for drawn, own in zip(completed, losses)
        ]
