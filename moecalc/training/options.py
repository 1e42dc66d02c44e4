"""Settings of a fit: the section `fit` of its input."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

OptimizerName: TypeAlias = Literal["muon", "adam"]


class LastStage(BaseModel):
    """Settings of the last part of a fit, in which energies count most.

    Forces are learned first, because there are more of them. With a small learning rate, a heavy weight on
    energies and a long average, the last stage then takes the energies to what the model can do, and leaves
    the forces nearly as they are.
    """

    model_config = ConfigDict(extra="forbid")

    share: float = Field(default=0.25, gt=0, lt=1, description="which part of the fit it is, at the end")
    learning_rate: float = Field(
        default=2e-4, gt=0, description="learning rate at its start; it falls along a cosine of its own"
    )
    energy_weight: float = Field(default=20.0, ge=0, description="weight of energies against forces")
    virial_weight: float = Field(default=0.5, ge=0, description="weight of virials against forces")
    average: float = Field(
        default=0.9995, ge=0, lt=1, description="decay of the running average of the weights"
    )


class Options(BaseModel):
    """Settings of a fit.

    The loss of a batch is the mean of Huber functions of errors over their scales: of the energy per atom
    (eV), of force components (eV/A), of virials per atom (eV). Below `huber` scales they are squares, above
    linear. The weights of energies and virials against forces grow from the first value to the second over
    the steps, the learning rate falls along a cosine. `last_stage` has settings of its own.
    """

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(
        default=200_000, gt=0, description="steps in all; not used where `--hours` gives the time in all"
    )
    batch_atoms: int = Field(
        default=96,
        gt=0,
        description="frames are added to a batch until it has as many atoms; every process has a batch",
    )
    optimizer: OptimizerName = Field(
        default="muon", description="`muon`: orthogonal steps for matrices, Adam for the rest; `adam`"
    )
    learning_rate: float = Field(default=2e-3, gt=0, description="largest learning rate, after the warm-up")
    last_learning_rate: float = Field(
        default=1e-5, gt=0, description="learning rate at the last step; it falls along a cosine"
    )
    warm_up: int = Field(
        default=500, gt=0, description="steps over which the learning rate rises at the start"
    )
    energy_scale: float = Field(
        default=0.004, gt=0, description="scale of the errors of the energy per atom, eV"
    )
    force_scale: float = Field(
        default=0.06, gt=0, description="scale of the errors of force components, eV/A"
    )
    virial_scale: float = Field(
        default=0.02, gt=0, description="scale of the errors of the virial per atom, eV"
    )
    energy_weight: tuple[float, float] = Field(
        default=(0.05, 1.0), description="weight of energies against forces, at the first and the last step"
    )
    virial_weight: tuple[float, float] = Field(
        default=(0.02, 0.1), description="weight of virials against forces, at the first and the last step"
    )
    last_stage: LastStage | None = Field(
        default=None,
        description="settings of the last part, in which energies count most",
    )
    huber: float = Field(
        default=2.0, gt=0, description="errors, in scales, above which the loss is linear and not square"
    )
    displacement: float = Field(
        default=0.01, gt=0, description="largest displacement of the differences, Angstrom"
    )
    average: float = Field(
        default=0.999, ge=0, lt=1, description="decay of the running average of the weights"
    )
    clip: float = Field(default=100.0, gt=0, description="largest norm of the gradient")
    repulsion: float = Field(
        default=0.3,
        ge=0,
        description="weight of the repulsion of close pairs; 0: none",
    )
    repulsion_every: int = Field(
        default=4, gt=0, description="steps from one batch of close pairs to the next"
    )
    seed: int = Field(
        default=1,
        description="of the first weights, of the order of the frames, and of the frames that are held out",
    )
    without_pressure: list[str] = Field(
        default_factory=list,
        description="groups whose pressure is not used, because it contradicts the energies; the rest of "
        "their stress is",
    )
    group_weights: dict[str, float] = Field(
        default_factory=dict, description="how often the frames of a group come in an epoch, against 1"
    )
