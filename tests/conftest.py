"""What all tests share."""

import torch

# The models of the tests are tiny: more threads than one only wait for each other.
torch.set_num_threads(1)
