"""Settings of a fit: the section `fit` of its input."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Settings of a fit.

    The loss of a batch is the mean of Huber functions of errors over their scales: of the energy per atom
    (eV), of force components (eV/A), of virials per atom (eV). Below `huber` scales they are squares, above
    linear. The weights of energies and virials against forces grow from the first value to the second over
    the steps, the learning rate falls along a cosine.
    """

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(default=200_000, gt=0)
    batch_atoms: int = Field(
        default=96, gt=0, description="frames are added to a batch until it has as many atoms"
    )
    learning_rate: float = Field(default=2e-3, gt=0)
    last_learning_rate: float = Field(default=1e-5, gt=0)
    warm_up: int = Field(
        default=500, gt=0, description="steps over which the learning rate rises at the start"
    )
    energy_scale: float = Field(default=0.004, gt=0)
    force_scale: float = Field(default=0.06, gt=0)
    virial_scale: float = Field(default=0.02, gt=0)
    energy_weight: tuple[float, float] = (0.05, 1.0)
    virial_weight: tuple[float, float] = (0.02, 0.1)
    huber: float = Field(default=2.0, gt=0)
    displacement: float = Field(
        default=0.01, gt=0, description="largest displacement h v of the differences, Angstrom"
    )
    average: float = Field(
        default=0.999, ge=0, lt=1, description="decay of the running average of the weights"
    )
    clip: float = Field(default=100.0, gt=0, description="largest norm of the gradient")
    repulsion: float = Field(
        default=0.3,
        ge=0,
        description="weight of the repulsion of close pairs, see `moecalc.training.repulsion`",
    )
    repulsion_every: int = Field(
        default=4, gt=0, description="steps from one batch of close pairs to the next"
    )
    seed: int = 1
    group_weights: dict[str, float] = Field(
        default_factory=dict, description="how often the frames of a group come in an epoch, against 1"
    )
