"""Terms of the loss: errors of energies, forces and virials, and how a missing force counts."""

from __future__ import annotations

import torch
from torch import Tensor


def huber(x: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Value and derivative of the Huber function of x, any shape: x^2 / 2 up to `delta`, linear beyond."""
    size = x.abs()
    inside = size <= delta
    return torch.where(inside, 0.5 * x * x, delta * (size - 0.5 * delta)), x.clamp(-delta, delta)
