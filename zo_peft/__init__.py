"""Forward-only (zeroth-order) tuning of PEFT adapters."""

# ruff: noqa: E402

import logging

# bitsandbytes warns on import, on some CPUs, that an optional kernel is not installed, and on every
# int8 matmul that it quantizes float32 inputs by way of float16. Neither asks anything of a user.
# transformers and PEFT import bitsandbytes themselves, so this has to come before them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

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
