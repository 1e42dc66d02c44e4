"""Activation functions of DeePMD-kit models, by name."""

import math
from typing import Final

import torch
from torch import Tensor, nn

_PLAIN = ("silu", "tanh", "relu", "gelu", "relu6", "softplus", "sigmoid", "linear")


def check_activation(name: str) -> tuple[str, float]:
    """Split an activation name into kind and threshold.

    Args:
        name: `silu`, `tanh`, ..., `none`, or `silut[:T]` / `custom_silu[:T]` (T defaults to 3).

    Returns:
        Kind and threshold (0 where there is none).

    Raises:
        ValueError: unknown name or a threshold that is not a number.
    """
    lower = str(name).lower()
    if lower == "none":
        return "linear", 0.0
    if lower == "gelu_tf":
        return "gelu", 0.0
    if lower in _PLAIN:
        return lower, 0.0
    kind, _, threshold = lower.partition(":")
    if kind in ("silut", "custom_silu"):
        try:
            return "silut", float(threshold) if threshold else 3.0
        except ValueError:
            pass
    raise ValueError(f"activation_function {name!r}, expected one of {', '.join(_PLAIN)}, none, silut[:T]")


class Activation(nn.Module):
    """phi(x), elementwise, any shape. `silut:T` is silu below T and a tanh that joins it smoothly above."""

    kind: Final[str]
    threshold: Final[float]
    slope: Final[float]
    offset: Final[float]

    def __init__(self, name: str) -> None:
        super().__init__()
        self.kind, self.threshold = check_activation(name)
        s = 1.0 / (1.0 + math.exp(-self.threshold))
        self.slope = s + self.threshold * s * (1.0 - s)
        self.offset = self.threshold * s

    def forward(self, x: Tensor) -> Tensor:
        """Map x to phi(x), any shape."""
        if self.kind == "silut":
            tail = torch.tanh(self.slope * (x - self.threshold)) + self.offset
            return torch.where(x < self.threshold, nn.functional.silu(x), tail)
        if self.kind == "silu":
            return nn.functional.silu(x)
        if self.kind == "tanh":
            return torch.tanh(x)
        if self.kind == "relu":
            return torch.relu(x)
        if self.kind == "gelu":
            return nn.functional.gelu(x, approximate="tanh")
        if self.kind == "relu6":
            return nn.functional.relu6(x)
        if self.kind == "softplus":
            return nn.functional.softplus(x)
        if self.kind == "sigmoid":
            return torch.sigmoid(x)
        return x
