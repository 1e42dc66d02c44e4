"""What a run is to do: checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from ase import Atoms

from moecalc.errors import MoecalcError, StructureError

ENSEMBLES: Final = ("nve", "nvt", "npt")
CELLS: Final = ("isotropic", "full")
_LIGHT_STEP: Final = 0.5  # fs, with hydrogen
_STEP: Final = 1.0  # fs


@dataclass(frozen=True)
class MDSettings:
    """Settings of a run of molecular dynamics.

    Attributes:
        ensemble: "nve" (velocity Verlet), "nvt" (stochastic velocity rescaling) or "npt" (Langevin dynamics
            with a barostat).
        temperature: K, of the thermostat and of new velocities; the motion of all atoms together, which nve
            and nvt leave at zero, has no part in it.
        pressure: GPa, of the barostat.
        steps: of the whole run.
        timestep: fs; None: 1, and 0.5 for structures with hydrogen.
        cell: what the barostat changes: "isotropic", the volume; "full", the shape as well.
        thermostat_time, barostat_time: fs.
        every: steps between frames of the trajectory.
        log_every: steps between lines of the log.
        seed: of new velocities and of the thermostat.
    """

    ensemble: str = "nvt"
    temperature: float = 300.0
    pressure: float = 0.0
    steps: int = 10_000
    timestep: float | None = None
    cell: str = "isotropic"
    thermostat_time: float = 100.0
    barostat_time: float = 1000.0
    every: int = 100
    log_every: int = 10
    seed: int = 1

    def __post_init__(self) -> None:
        _check_choice("ensemble", self.ensemble, ENSEMBLES)
        _check_choice("cell", self.cell, CELLS)
        for name in ("temperature", "thermostat_time", "barostat_time"):
            check_positive(name, getattr(self, name))
        if self.timestep is not None:
            check_positive("timestep", self.timestep)
        if not math.isfinite(self.pressure):
            raise MoecalcError(f"expected a finite pressure, got {self.pressure}")
        if self.seed < 0:
            raise MoecalcError(f"expected a seed of 0 or more, got {self.seed}")
        for name in ("steps", "every", "log_every"):
            if getattr(self, name) < 1:
                raise MoecalcError(f"expected {name} of at least 1, got {getattr(self, name)}")

    def timestep_of(self, atoms: Atoms) -> float:
        """The time step for a structure, fs."""
        if self.timestep is not None:
            return self.timestep
        return _LIGHT_STEP if 1 in atoms.numbers else _STEP


def check_positive(name: str, value: float) -> None:
    """Raise MoecalcError unless a number is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise MoecalcError(f"expected a {name.replace('_', ' ')} above 0, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise MoecalcError(f"expected {name} {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")


def check_cell(atoms: Atoms, what: str) -> None:
    """Refuse a structure whose cell cannot change.

    Raises:
        StructureError: it is not periodic in all directions.
    """
    if not atoms.pbc.all() or atoms.cell.rank < 3:
        raise StructureError(
            f"{what} needs a structure that is periodic in all directions, got pbc {atoms.pbc.tolist()}: "
            "keep the cell fixed"
        )
