"""Small models and values that several tests use."""

from typing import Any

from torch import Tensor

from zo_peft.core.noise import noise_blocks


def noise_block(seed: int, *args: Any) -> Tensor:
    """The noise of one seed, flat; the arguments are those of `noise_blocks`."""
    return noise_blocks([seed], *args)[0]
