"""Parameter spaces: the numbers that are tuned, and the model evaluated beside them."""

from zo_peft.spaces.adapter import AdapterSpace

__all__ = ["AdapterSpace"]
