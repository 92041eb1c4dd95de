"""Parameter spaces: the numbers that are tuned, and the model evaluated beside them."""

from zo_peft.spaces.adapter import AdapterSpace
from zo_peft.spaces.base import BaseSpace
from zo_peft.spaces.find import choose, find_scales, find_weights
from zo_peft.spaces.lanes import NotInLanes

#: What a strategy's directions move.
Space = AdapterSpace | BaseSpace

__all__ = [
    "AdapterSpace",
    "BaseSpace",
    "NotInLanes",
    "Space",
    "choose",
    "find_scales",
    "find_weights",
]
