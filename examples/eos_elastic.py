"""Equation of state and elastic constants of Cu and W, against the DFT calculations in the training data.

`data/cu_w_dft.extxyz` holds the strained unit cells of the training data with their DFT energies and stresses. The model is evaluated
on the same cells and both sets of stresses are fitted in the same way, so that the difference is the model's. Beside it: the equation of
state (ASE) and the elastic constants at the model's own equilibrium (matscipy), and measured values.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.eos import EquationOfState
from ase.io import read
from common import BLUE, DATA, GREEN, GREY, ORANGE, figure, options, save
from matscipy.elasticity import Voigt_6x6_to_cubic, fit_elastic_constants
from rich.console import Console
from rich.table import Table

from moecalc import MoECalculator

GPA = units.GPa
LATTICES = {"Cu": ("fcc", 3.62), "W": ("bcc", 3.19)}
# single crystals at 300 K, GPa: Overton and Gaffney, Phys. Rev. 98, 969 (1955); Featherston and Neighbours, Phys. Rev. 130, 1324 (1963)
EXPERIMENT = {"Cu": (168.4, 121.4, 75.4), "W": (522.4, 204.4, 160.6)}
NAMES = ("C11", "C12", "C44", "B")


def strains(frames: list[Atoms]) -> np.ndarray:
    """(n, 3, 3) deformation of each cell against the cubic one, minus the unit matrix."""
    cells = np.array([atoms.cell.array for atoms in frames])
    diagonal = [c for c in cells if np.allclose(c, c[0, 0] * np.eye(3), atol=1e-6)]
    return np.linalg.inv(diagonal[0]) @ cells - np.eye(3)


def split(deformation: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Frames under uniaxial strain and their axes, frames under shear and the Voigt index of their plane."""
    diagonal = np.abs(deformation[:, range(3), range(3)])
    shear = np.abs(deformation + deformation.transpose(0, 2, 1))[:, [1, 0, 0], [2, 2, 1]]
    uniaxial = np.flatnonzero(shear.max(axis=1) < 1e-6)
    sheared = np.flatnonzero(shear.max(axis=1) >= 1e-6)
    return uniaxial, diagonal[uniaxial].argmax(axis=1), sheared, 3 + shear[sheared].argmax(axis=1)


def stress_curves(deformation: np.ndarray, stress: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Strain and stress (GPa) along and across a uniaxial strain, and under shear."""
    uniaxial, axis, sheared, plane = split(deformation)
    e = deformation[uniaxial, axis, axis]
    other = np.array(
        [(stress[u, [k for k in range(3) if k != a]]).mean() for u, a in zip(uniaxial, axis, strict=True)]
    )
    gamma = deformation + deformation.transpose(0, 2, 1)
    rows, columns = np.array([1, 0, 0]), np.array([2, 2, 1])
    shear = gamma[sheared, rows[plane - 3], columns[plane - 3]]
    curves = {"C11": (e, stress[uniaxial, axis]), "C12": (e, other), "C44": (shear, stress[sheared, plane])}
    return {name: (x[np.argsort(x)], y[np.argsort(x)] / GPA) for name, (x, y) in curves.items()}


def constants(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """C11, C12, C44 and the bulk modulus in GPa: slopes at zero of cubic fits to strains up to 6 %."""
    values = []
    for name in ("C11", "C12", "C44"):
        strain, stress = curves[name]
        small = np.abs(strain) < 0.061
        values.append(float(np.polyfit(strain[small], stress[small], 3)[2]))
    return [*values, (values[0] + 2 * values[1]) / 3]


def equilibrium(calculator: MoECalculator, symbol: str) -> tuple[EquationOfState, list[float]]:
    """Equation of state, and the elastic constants in GPa at its minimum."""
    lattice, a = LATTICES[symbol]

    def scan(a: float, widest: float) -> tuple[list[Atoms], list[float]]:
        cells = [
            bulk(symbol, lattice, a=a * s ** (1 / 3), cubic=True)
            for s in np.linspace(1 - widest, 1 + widest, 13)
        ]
        return cells, [r["energy"] / len(cells[0]) for r in calculator.calculate_batch(cells, ["energy"])]

    # the model's minimum may be far from the crystal's: find it, then fit close to it
    cells, energies = scan(a, 0.15)
    cells, energies = scan(float(cells[int(np.argmin(energies))].cell[0, 0]), 0.05)
    eos = EquationOfState([c.get_volume() / len(c) for c in cells], energies, eos="birchmurnaghan")
    volume, _, modulus = eos.fit()
    relaxed = bulk(symbol, lattice, a=(volume * len(cells[0])) ** (1 / 3), cubic=True)
    relaxed.calc = calculator
    tensor, _ = fit_elastic_constants(
        relaxed, symmetry="cubic", N_steps=5, delta=5e-3, verbose=False, graphics=False
    )
    return eos, [*(float(c) / GPA for c in Voigt_6x6_to_cubic(tensor)), modulus / GPA]


def main(output: Path, fast: bool = False) -> dict[str, float]:  # noqa: ARG001 - short as it is
    """Compute, print the tables, draw energies and stresses.

    Returns:
        Elastic constants in GPa: "Cu C11 DFT", "Cu C11 model" (same cells, same fit), ...
    """
    output.mkdir(parents=True, exist_ok=True)
    calculator = MoECalculator(dtype="float64")
    frames = read(DATA / "cu_w_dft.extxyz", ":")
    fig, panels = figure(4)
    fig.set_size_inches(15, 3.6)
    table = Table(
        "GPa", "DFT", "model, same cells", "model, equilibrium", "measured, 300 K", box=None, padding=(0, 2)
    )
    for column in table.columns[1:]:
        column.justify = "right"
    results: dict[str, float] = {}
    for (energy_panel, stress_panel), symbol in zip(panels.reshape(2, 2), LATTICES, strict=True):
        cells = [atoms for atoms in frames if atoms.symbols[0] == symbol]
        answers = calculator.calculate_batch(cells, ["energy", "stress"])
        n = len(cells[0])
        volume = np.array([c.get_volume() for c in cells]) / n
        energies = {
            "DFT": np.array([c.get_potential_energy() for c in cells]) / n,
            "model": np.array([a["energy"] for a in answers]) / n,
        }
        deformation = strains(cells)
        curves = {
            "DFT": stress_curves(deformation, np.array([c.get_stress() for c in cells])),
            "model": stress_curves(deformation, np.array([a["stress"] for a in answers])),
        }
        eos, own = equilibrium(calculator, symbol)
        c11, c12, c44 = EXPERIMENT[symbol]
        columns = [
            constants(curves["DFT"]),
            constants(curves["model"]),
            own,
            [c11, c12, c44, (c11 + 2 * c12) / 3],
        ]
        for name, *values in zip(NAMES, *columns, strict=True):
            table.add_row(f"{symbol} {name}", *(f"{v:.0f}" for v in values))
            results[f"{symbol} {name} DFT"], results[f"{symbol} {name} model"] = values[:2]
        lattice_constant = (eos.v0 * n) ** (1 / 3)
        uniaxial = split(deformation)[0]
        shifted = {k: 1000 * (e - e.min()) for k, e in energies.items()}
        error = np.abs(shifted["model"] - shifted["DFT"])
        results[f"{symbol} energy MAE (meV/atom)"] = float(error.mean())
        stress_error = np.abs(
            np.array([a["stress"] for a in answers]) - np.array([c.get_stress() for c in cells])
        ).mean()
        print(
            f"{symbol}: {len(cells)} DFT cells, mean error {error.mean():.1f} meV/atom (energy above the lowest) and {stress_error / GPA:.2f} GPa; "
            f"model's own lattice constant {lattice_constant:.3f} A"
        )
        order = uniaxial[np.argsort(volume[uniaxial])]
        grid = np.linspace(volume.min(), volume.max(), 40)
        energy_panel.plot(
            volume[order], shifted["DFT"][order], "o", ms=5, mfc="none", color=GREY, label="DFT, uniaxial"
        )
        energy_panel.plot(volume[order], shifted["model"][order], color=BLUE, label="model, uniaxial")
        lattice = LATTICES[symbol][0]
        isotropic = [bulk(symbol, lattice, a=(v * n) ** (1 / 3), cubic=True) for v in grid]
        curve = np.array([r["energy"] for r in calculator.calculate_batch(isotropic, ["energy"])]) / n
        energy_panel.plot(
            grid, 1000 * (curve - energies["model"].min()), ls="--", color=GREEN, label="model, isotropic"
        )
        energy_panel.set(title=f"{symbol}: energy", xlabel="volume (Å³/atom)", ylabel="meV/atom")
        energy_panel.legend(fontsize=8)
        for name, colour, label in (
            ("C11", BLUE, "along"),
            ("C12", GREEN, "across"),
            ("C44", ORANGE, "shear"),
        ):
            stress_panel.plot(*curves["DFT"][name], "o", ms=5, mfc="none", color=colour)
            stress_panel.plot(*curves["model"][name], color=colour, label=label)
        stress_panel.set(title=f"{symbol}: stress (circles: DFT)", xlabel="strain", ylabel="GPa")
        stress_panel.legend(fontsize=8)
    print()
    Console(highlight=False).print(table)
    print()
    save(fig, output / "eos_elastic.png")
    return results


if __name__ == "__main__":
    main(**options(__doc__))
