"""How the learning rate and the weights of the loss change over a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moecalc.training.options import Options


@dataclass(frozen=True)
class Settings:
    """What holds for one step.

    Attributes:
        rate: learning rate, without the warm-up.
        energy_weight, virial_weight: weights of energies and virials against forces.
        average: decay of the running average of the weights.
    """

    rate: float
    energy_weight: float
    virial_weight: float
    average: float


def settings_at(options: Options, progress: float) -> Settings:
    """Settings at a point of a fit.

    Args:
        options: of the fit.
        progress: which part of the fit is done, from 0 to 1.
    """
    stage = options.last_stage
    begin = 1.0 if stage is None else 1.0 - stage.share
    if stage is not None and progress >= begin:
        rate = _cosine(stage.learning_rate, options.last_learning_rate, (progress - begin) / stage.share)
        return Settings(rate, stage.energy_weight, stage.virial_weight, stage.average)
    progress = min(1.0, progress / begin)
    return Settings(
        _cosine(options.learning_rate, options.last_learning_rate, progress),
        _between(options.energy_weight, progress),
        _between(options.virial_weight, progress),
        options.average,
    )


def _cosine(first: float, last: float, progress: float) -> float:
    """From the first value to the second along half a cosine."""
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def _between(ends: tuple[float, float], progress: float) -> float:
    """From the first value to the second, in equal factors (in equal steps where one is 0)."""
    first, last = ends
    return first * (last / first) ** progress if min(ends) > 0 else first + (last - first) * progress
