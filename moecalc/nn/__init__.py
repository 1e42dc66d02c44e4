"""Reference model in plain PyTorch: training, packaging and the oracle of every faster path."""

from moecalc.keys import POSITIONS
from moecalc.nn.config import (
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
