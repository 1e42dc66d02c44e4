"""Relax positions and cell of a distorted NbMoTaW crystal.

A random bcc alloy is strained, sheared and rattled, then all forces and stresses are relaxed away with ASE's BFGS.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from ase.filters import FrechetCellFilter
from ase.io import Trajectory
from ase.optimize import BFGS
from common import BLUE, GREEN, ORANGE, alloy, figure, largest_force, options, pressure, save

from moecalc import MoECalculator

FORCE_THRESHOLD = 0.01  # eV/A, for the forces and for the stress times the volume per atom


def main(output: Path, fast: bool = False) -> dict[str, float]:
    """Relax, write the trajectory, draw the convergence.

    Returns:
        Energy gain (eV/atom), largest force (eV/A) and pressure (GPa) at the end, and number of steps.
    """
    output.mkdir(parents=True, exist_ok=True)
    atoms = alloy(2 if fast else 3)
    distortion = np.eye(3) + np.array([[0.03, 0.04, 0.0], [0.0, -0.02, 0.03], [0.0, 0.0, 0.02]])
    atoms.set_cell(atoms.cell.array @ distortion, scale_atoms=True)
    atoms.rattle(0.15, seed=3)
    atoms.calc = MoECalculator(dtype="float64")

    # the filter takes the logarithm of the deformation; scipy reports errors as small as 1e-13
    warnings.filterwarnings("ignore", message="logm result may be inaccurate")
    history = []

    def record() -> None:
        history.append((atoms.get_potential_energy() / len(atoms), largest_force(atoms), pressure(atoms)))

    with Trajectory(output / "relax_alloy.traj", "w", atoms) as trajectory:
        optimizer = BFGS(FrechetCellFilter(atoms), logfile=None, trajectory=trajectory)
        optimizer.attach(record)
        converged = optimizer.run(fmax=0.05 if fast else FORCE_THRESHOLD, steps=200)
    if not converged:
        raise RuntimeError(
            f"not relaxed after {optimizer.nsteps} steps, expected fewer: largest force {history[-1][1]:.3f} eV/A"
        )

    energy, force, stress = np.array(history).T
    print(f"{atoms.get_chemical_formula()}: {optimizer.nsteps} steps")
    print(
        f"{'':10}{'energy (eV/atom)':>18}{'max force (eV/A)':>18}{'pressure (GPa)':>16}{'volume (A^3/atom)':>19}"
    )
    volumes = (abs(np.linalg.det(distortion)) * 3.24**3 / 2, atoms.get_volume() / len(atoms))
    for name, row, volume in zip(("before", "after"), (0, -1), volumes, strict=True):
        print(f"{name:10}{energy[row]:18.4f}{force[row]:18.4f}{stress[row]:16.3f}{volume:19.3f}")

    fig, (left, middle, right) = figure(3)
    steps = np.arange(len(energy))
    left.semilogy(steps[:-1], 1000 * (energy[:-1] - energy.min()).clip(1e-6), color=BLUE)
    left.set(title="energy above the end", ylabel="meV/atom")
    middle.semilogy(steps, force, color=ORANGE)
    middle.set(title="largest force", ylabel="eV/Å")
    right.plot(steps, stress, color=GREEN)
    right.axhline(0, color="0.6", lw=0.8)
    right.set(title="pressure", ylabel="GPa")
    for panel in (left, middle, right):
        panel.set_xlabel("BFGS step")
    save(fig, output / "relax_alloy.png")
    return {
        "energy gain (eV/atom)": float(energy[0] - energy[-1]),
        "max force (eV/A)": float(force[-1]),
        "pressure (GPa)": float(stress[-1]),
        "steps": float(optimizer.nsteps),
    }


if __name__ == "__main__":
    main(**options(__doc__))
