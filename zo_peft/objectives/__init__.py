"""What is minimised: scores of labelled text, and rewards of generated text."""

from zo_peft.core.batch import Batch, Objective
from zo_peft.objectives.rewards import RewardObjective
from zo_peft.objectives.scoring import (
    AccuracyObjective,
    BlackBoxObjective,
    ClassificationObjective,
    CompletionObjective,
    OptionObjective,
    SequenceObjective,
)

__all__ = [
    "AccuracyObjective",
    "Batch",
    "BlackBoxObjective",
    "ClassificationObjective",
    "CompletionObjective",
    "Objective",
    "OptionObjective",
    "RewardObjective",
    "SequenceObjective",
]
