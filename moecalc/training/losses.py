"""What errors count."""

from __future__ import annotations

import torch
from torch import Tensor


def huber(x: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Value and derivative of the Huber function of x."""
    size = x.abs()
    inside = size <= delta
    return torch.where(inside, 0.5 * x * x, delta * (size - 0.5 * delta)), x.clamp(-delta, delta)
