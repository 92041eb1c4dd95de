"""What all tests share."""

import torch
from hypothesis import settings

# The models of the tests are tiny: more threads than one only wait for each other.
torch.set_num_threads(1)

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
