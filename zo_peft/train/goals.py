"""What a run minimises and evaluates, as its data and its settings say."""

from collections.abc import Sequence
from typing import Any

from zo_peft.core.batch import Objective
from zo_peft.data import Tokenization
from zo_peft.errors import UserError
from zo_peft.objectives import rewards, scoring
from zo_peft.train.config import ZOConfig


def kind_of(features: Any) -> str:
    """What the examples of tokenized data sets, one or several by name, are about; or a UserError.

    It is one of: generated answers, options, classes, completions.
    """
    if isinstance(features, dict):
        kinds = {name: kind_of(part) for name, part in features.items()}
        if len(set(kinds.values())) > 1:
            parts = ", ".join(f"{name} of {kind}" for name, kind in kinds.items())
            raise UserError(f"evaluation data sets must be of one kind, but there are {parts}")
        return next(iter(kinds.values()), "completions")
    first = next(iter(features)) if features is not None else {}
    if "columns" in first:
        return "generated answers"
    if "option_ids" in first:
        return "options"
    return "classes" if isinstance(first.get("labels"), int) else "completions"


def objective_of(
    tokenization: Tokenization,
    args: ZOConfig,
    reward_funcs: Sequence[rewards.RewardFunction],
    kind: str | None,
) -> Objective:
    """The objective that examples of this kind call for; a UserError where they have none."""
    if tokenization.num_labels is not None:
        return scoring.ClassificationObjective()
    if kind == "generated answers":
        if args.objective == "accuracy":
            raise UserError("objective='accuracy' needs options or completions; use 'exact_match'")
        named = (args.objective,) if args.objective in rewards.METRICS else tuple(rewards.METRICS)
        return rewards.RewardObjective(
            reward_funcs or [rewards.METRICS[name] for name in named],
            tokenization.tokenizer,
            args.reward_weights if reward_funcs else [1.0, 0.0][: len(named)],
            args.max_completion_length,
            args.temperature,
            args.top_p,
        )
    return scoring.OptionObjective() if kind == "options" else scoring.CompletionObjective()


def check_goals(
    args: ZOConfig, objective: Objective | None, reward_funcs: Sequence[rewards.RewardFunction]
) -> None:
    """Raise a UserError where several goals are given, or weights of none."""
    if (objective is not None) + bool(reward_funcs) + (args.objective is not None) > 1:
        raise UserError("give one of: an objective, reward_funcs, ZOConfig.objective")
    if args.reward_weights is not None and not reward_funcs:
        raise UserError("reward_weights are weights of reward_funcs, and there are none")
