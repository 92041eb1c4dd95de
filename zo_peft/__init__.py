"""Forward-only (zeroth-order) tuning of PEFT adapters."""

from zo_peft.core.direction import Direction
from zo_peft.errors import NonFiniteLossError, UserError
from zo_peft.objectives.rewards import RewardObjective
from zo_peft.objectives.scoring import BlackBoxObjective
from zo_peft.train.config import ZOConfig
from zo_peft.train.gradient import GradientTrainer
from zo_peft.train.trainer import ZOTrainer

__all__ = [
    "BlackBoxObjective",
    "Direction",
    "GradientTrainer",
    "NonFiniteLossError",
    "RewardObjective",
    "UserError",
    "ZOConfig",
    "ZOTrainer",
]
__version__ = "0.1.0"
