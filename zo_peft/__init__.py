"""Forward-only (zeroth-order) tuning of PEFT adapters."""

from zo_peft.config import ZOConfig
from zo_peft.direction import Direction
from zo_peft.errors import NonFiniteLossError, UserError
from zo_peft.gradient import GradientTrainer
from zo_peft.objectives import BlackBoxObjective
from zo_peft.rewards import RewardObjective
from zo_peft.trainer import ZOTrainer

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
