"""Forward-only (zeroth-order) tuning of PEFT adapters."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

# bitsandbytes warns on import, on some CPUs, that an optional kernel is not installed, and on every
# int8 matmul that it quantizes float32 inputs by way of float16. Neither asks anything of a user.
# transformers and PEFT import bitsandbytes themselves, so this has to come before them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from zo_peft.core.direction import Direction as Direction
    from zo_peft.errors import NonFiniteLossError as NonFiniteLossError
    from zo_peft.errors import UserError as UserError
    from zo_peft.objectives.rewards import RewardObjective as RewardObjective
    from zo_peft.objectives.scoring import BlackBoxObjective as BlackBoxObjective
    from zo_peft.train.config import ZOConfig as ZOConfig
    from zo_peft.train.gradient import GradientTrainer as GradientTrainer
    from zo_peft.train.trainer import ZOTrainer as ZOTrainer

__version__ = "0.1.0"

#: The module of each public name. It is imported when the name is first used, because torch and
#: transformers take seconds.
_HOMES = {
    "BlackBoxObjective": "zo_peft.objectives.scoring",
    "Direction": "zo_peft.core.direction",
    "GradientTrainer": "zo_peft.train.gradient",
    "NonFiniteLossError": "zo_peft.errors",
    "RewardObjective": "zo_peft.objectives.rewards",
    "UserError": "zo_peft.errors",
    "ZOConfig": "zo_peft.train.config",
    "ZOTrainer": "zo_peft.train.trainer",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
