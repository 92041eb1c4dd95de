"""Parameter spaces: the numbers that are tuned, and the model evaluated beside them."""

from zo_peft.spaces.adapter import AdapterSpace
from zo_peft.spaces.lanes import NotInLanes, find_replacements

__all__ = ["AdapterSpace", "NotInLanes", "find_replacements"]
