"""Reference model in plain PyTorch: training, packaging and the oracle of every faster path."""

from moecalc.nn.config import (
    POSITIONS,
    DescriptorConfig,
    FittingConfig,
    ModelConfig,
    MoEConfig,
    PositionConfig,
    RouterConfig,
)
from moecalc.nn.model import MoEPotential, evaluate

__all__ = [
    "POSITIONS",
    "DescriptorConfig",
    "FittingConfig",
    "MoEConfig",
    "MoEPotential",
    "ModelConfig",
    "PositionConfig",
    "RouterConfig",
    "evaluate",
]
