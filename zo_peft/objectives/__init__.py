"""What is minimised: scores of labelled text, and rewards of generated text."""

from zo_peft.objectives.rewards import RewardObjective
from zo_peft.objectives.scoring import (
    AccuracyObjective,
    BlackBoxObjective,
    ClassificationObjective,
    CompletionObjective,
    OptionObjective,
    SequenceObjective,
)

__all__ = ["AccuracyObjective", "BlackBoxObjective", "ClassificationObjective"]
__all__ += ["CompletionObjective", "OptionObjective", "RewardObjective", "SequenceObjective"]
