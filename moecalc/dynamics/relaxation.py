"""Relaxation by ASE: atoms, and where asked the cell, to the nearest minimum of energy or enthalpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from ase import Atoms, units
from ase.filters import FrechetCellFilter
from ase.io import write
from ase.optimize import BFGS, FIRE, LBFGS

from moecalc.calculator import MoECalculator
from moecalc.data import read_structure
from moecalc.dynamics.figures import draw_relaxation
from moecalc.dynamics.records import (
    LOG,
    SETTINGS,
    TRAJECTORY,
    frame_text,
    has_volume,
    open_records,
    pressure_of,
    read_log,
    refuse_results,
)
from moecalc.dynamics.settings import check_cell, check_positive
from moecalc.errors import MoecalcError, StructureError
from moecalc.files import check_outputs, make_folder, replacing, write_bytes, write_text

OPTIMIZERS: Final = {"fire": FIRE, "lbfgs": LBFGS, "bfgs": BFGS}
CELLS: Final = ("fixed", "isotropic", "full")
RELAXED: Final = "relaxed.extxyz"
CRYSTAL: Final = "relaxed.cif"
PICTURE: Final = "relax.png"
COLUMNS: Final = ("step", "energy_eV", "force_eV_A", "pressure_GPa", "volume_A3")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RelaxSettings:
    """Settings of a relaxation.

    Attributes:
        cell: "fixed"; "isotropic", the volume relaxes; "full", the shape as well.
        pressure: GPa, for a cell that relaxes.
        fmax: largest force on an atom (and force on the cell, in ASE's measure) at the end, eV/A.
        steps: most steps.
        optimizer: "fire", "lbfgs" or "bfgs".
    """

    cell: str = "fixed"
    pressure: float = 0.0
    fmax: float = 0.01
    steps: int = 500
    optimizer: str = "fire"

    def __post_init__(self) -> None:
        for name, choices in (("cell", CELLS), ("optimizer", tuple(OPTIMIZERS))):
            value = getattr(self, name)
            if value not in choices:
                raise MoecalcError(
                    f"expected {name} {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}"
                )
        check_positive("fmax", self.fmax)
        if self.steps < 1:
            raise MoecalcError(f"expected steps of at least 1, got {self.steps}")
        if not np.isfinite(self.pressure):
            raise MoecalcError(f"expected a finite pressure, got {self.pressure}")
        if self.pressure and self.cell == "fixed":
            raise MoecalcError("a pressure needs a cell that relaxes: give --cell isotropic or --cell full")


@dataclass(frozen=True)
class RelaxResult:
    """What a relaxation left."""

    folder: Path
    converged: bool
    steps: int
    energy: float  # eV
    lowered: float  # by so much, eV/atom
    force: float  # the largest, eV/A
    pressure: float | None  # GPa


def relax(
    package: str | Path | None,
    structure: str | Path,
    folder: str | Path,
    settings: RelaxSettings,
    *,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> RelaxResult:
    """Relax a structure.

    Writes to `folder`: `log.csv`, `trajectory.extxyz` with every step, `relax.png`, `relaxed.extxyz`, and
    `relaxed.cif` where the structure is periodic. To go on, relax `relaxed.extxyz`.

    Args:
        package: file, or None for the default model.
        structure: file that ASE reads; atoms that it fixes stay.
        folder: made where it does not exist.
        settings: of the relaxation.
        device: as for `MoECalculator`.
        dtype: as for `MoECalculator`, but None is float64: forces of float32 are too coarse to converge far.
        threads: as for `MoECalculator`.
        force: overwrite an earlier relaxation.
        progress: called with what happens, the step, and the most steps.

    Raises:
        MoecalcError: the folder has other results; a file cannot be written.
        StructureError: no such structure, the model cannot evaluate it, or its cell cannot relax.
    """
    out = Path(folder)
    names = (LOG, TRAJECTORY, RELAXED, CRYSTAL, PICTURE)
    check_outputs([("the relaxation's file", out / name) for name in names], [("structure", structure)])
    if (out / SETTINGS).exists():  # which would go on with our log
        raise MoecalcError(f"{out} has a run of molecular dynamics: choose another folder with -o")
    if not force:
        refuse_results(out)
    progress("reading", 0, settings.steps)
    atoms = read_structure(structure)
    if settings.cell != "fixed":
        check_cell(atoms, f"--cell {settings.cell}")
    atoms.calc = MoECalculator(package, device=device, dtype=dtype or "float64", threads=threads)
    atoms.get_potential_energy()  # what the model refuses leaves no folder behind
    make_folder(out)
    converged, steps = _optimize(atoms, out, settings, progress)
    write_text(out / RELAXED, frame_text(atoms))
    if has_volume(atoms):
        with replacing(out / CRYSTAL) as temporary:
            write(temporary, atoms, format="cif")
    log = read_log(out)
    write_bytes(out / PICTURE, draw_relaxation(log, len(atoms), settings.fmax))
    return RelaxResult(
        folder=out,
        converged=converged,
        steps=steps,
        energy=float(log["energy_eV"][-1]),
        lowered=float(log["energy_eV"][0] - log["energy_eV"][-1]) / len(atoms),
        force=float(log["force_eV_A"][-1]),
        pressure=pressure_of(atoms),
    )


def _optimize(atoms: Atoms, folder: Path, settings: RelaxSettings, progress: Progress) -> tuple[bool, int]:
    """Relax in place; whether it converged, and the number of steps."""
    target: Any = atoms
    if settings.cell != "fixed":
        target = FrechetCellFilter(
            atoms,
            hydrostatic_strain=settings.cell == "isotropic",
            scalar_pressure=settings.pressure * units.GPa,
        )
    optimizer = OPTIMIZERS[settings.optimizer](target, logfile=None)
    step, largest = 0, np.inf
    with open_records(folder, COLUMNS) as records:
        try:
            for step, _ in enumerate(optimizer.irun(fmax=settings.fmax, steps=settings.steps)):
                largest = float(np.linalg.norm(target.get_forces(), axis=1).max())
                records.add_row(
                    {
                        "step": step,
                        "energy_eV": atoms.get_potential_energy(),
                        "force_eV_A": largest,
                        "pressure_GPa": pressure_of(atoms),
                        "volume_A3": atoms.get_volume() if has_volume(atoms) else None,
                    }
                )
                records.add_frame(atoms, step=step)
                progress(f"largest force {largest:.3g} eV/A", step, settings.steps)
        except StructureError as error:
            raise StructureError(
                f"step {step + 1}: {error}: see the last frames of the trajectory, and docs/short_range.md"
            ) from error
    return largest < settings.fmax, step
