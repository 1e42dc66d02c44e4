"""What the examples share: where output goes, a random alloy, and the look of the figures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from ase import Atoms, units
from ase.build import bulk

mpl.use("Agg")  # before pyplot: figures go to files, no display is needed
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

DATA = Path(__file__).resolve().parent / "data"
ALLOY = ("Nb", "Mo", "Ta", "W")
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9730d", "#2e8b57", "#8a8a8a"


def options(description: str | None) -> dict[str, Any]:
    """Options of every example: `--output DIR` (demo_output) and `--fast` (small and short, what the tests run)."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the results")
    parser.add_argument("--fast", action="store_true", help="a smaller and shorter calculation")
    return vars(parser.parse_args())


def alloy(repeat: int, a: float = 3.24, seed: int = 0) -> Atoms:
    """Equimolar NbMoTaW: 2 repeat^3 atoms on a bcc lattice (lattice constant `a` in Angstrom), elements at random."""
    atoms = bulk("W", "bcc", a=a, cubic=True) * repeat
    order = np.random.default_rng(seed).permutation(len(atoms))
    atoms.symbols[:] = [ALLOY[k % len(ALLOY)] for k in order]
    return atoms


def pressure(atoms: Atoms) -> float:
    """Pressure in GPa, positive under compression, without the kinetic part."""
    return -float(atoms.get_stress()[:3].mean()) / units.GPa


def largest_force(atoms: Atoms) -> float:
    """Length of the largest force, eV/A."""
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())


def figure(n_columns: int) -> tuple[Figure, Any]:
    """A row of panels."""
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
             "font.size": 10, "axes.titlesize": 11, "lines.linewidth": 1.6, "legend.frameon": False}  # fmt: skip
    plt.rcParams.update(style)
    return plt.subplots(1, n_columns, figsize=(4.2 * n_columns, 3.4), layout="constrained")


def save(fig: Figure, path: Path) -> None:
    """Write a figure and say where it is."""
    fig.savefig(path, dpi=160)
    plt.close(fig)
    print(f"wrote {path}")
