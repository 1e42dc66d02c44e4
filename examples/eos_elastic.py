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
from moecalc.report.elastic import NAMES, constants, find_strained_cells

GPA = units.GPa
LATTICES = {"Cu": ("fcc", 3.62), "W": ("bcc", 3.19)}
# single crystals at 300 K, GPa: Overton and Gaffney, Phys. Rev. 98, 969 (1955); Featherston and Neighbours, Phys. Rev. 130, 1324 (1963)
EXPERIMENT = {"Cu": (168.4, 121.4, 75.4), "W": (522.4, 204.4, 160.6)}


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
        stress = {
            "DFT": np.array([c.get_stress() for c in cells]),
            "model": np.array([a["stress"] for a in answers]),
        }
        (family,) = find_strained_cells(cells, stress["DFT"])
        curves = {name: family.curves(values[family.indices]) for name, values in stress.items()}
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
        uniaxial = family.indices[family.uniaxial]
        shifted = {k: 1000 * (e - e.min()) for k, e in energies.items()}
        error = np.abs(shifted["model"] - shifted["DFT"])
        results[f"{symbol} energy MAE (meV/atom)"] = float(error.mean())
        stress_error = np.abs(stress["model"] - stress["DFT"]).mean()
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
