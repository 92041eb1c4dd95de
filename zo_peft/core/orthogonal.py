"""Matrices made orthogonal, for the `spectral` update rule."""

import torch
from torch import Tensor

#: Quintic Newton-Schulz coefficients of Muon, and how often they are applied.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """About `U V^T` of a matrix `U S V^T`: its singular values brought to between 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
