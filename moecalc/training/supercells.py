"""Supercells among the training data: the part that repeats is as much data as the whole."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from moecalc.data.frames import GROUP, group_of
from moecalc.typing import Floats

_MOST_REPETITIONS = 6
_SAME_SITE = 0.1
"""Atoms closer than this (Angstrom) in the smallest cell are images of one another."""


def repetitions(atoms: Atoms, tolerance: float = 0.02) -> list[int]:
    """How often the contents of a periodic cell repeat along each of its axes (3,), at most six times.

    Args:
        atoms: with forces.
        tolerance: largest difference of positions (Angstrom) and of force components (eV/Angstrom).
    """
    candidates = [n for n in range(_MOST_REPETITIONS, 1, -1) if len(atoms) % n == 0]
    return [next((n for n in candidates if _repeats(atoms, n, axis, tolerance)), 1) for axis in range(3)]


def _repeats(atoms: Atoms, n: int, axis: int, tolerance: float) -> bool:
    """Whether a shift by 1/n of the cell along `axis` leaves the structure as it is."""
    scaled, numbers, forces = atoms.get_scaled_positions(), atoms.numbers, atoms.get_forces()
    shifted = scaled.copy()
    shifted[:, axis] += 1.0 / n
    distance = _distances(shifted, scaled, atoms.cell.array)
    image = distance.argmin(axis=1)
    return bool(
        distance.min(axis=1).max() < tolerance
        and (numbers[image] == numbers).all()
        and np.abs(forces[image] - forces).max() < tolerance
    )


def _distances(a: Floats, b: Floats, cell: Floats) -> Floats:
    """Distances (len(a), len(b)) in Angstrom of scaled positions, to the nearest image in `cell`."""
    difference = a[:, None, :] - b[None, :, :]
    distance: Floats = np.linalg.norm((difference - np.round(difference)) @ cell, axis=2)
    return distance


def smallest_cell(atoms: Atoms) -> Atoms:
    """The repeated part of a frame that is a supercell, with its share of the energy; else the frame itself.

    A strained crystal of 108 atoms holds no more than its unit cell of 4, and takes 27 times as long. The
    group of the part is renamed to `<group>_cell`.
    """
    n = np.array(repetitions(atoms))
    if n.prod() == 1:
        return atoms
    cell = atoms.cell.array / n[:, None]
    scaled = (atoms.get_scaled_positions() * n) % 1.0
    same = _distances(scaled, scaled, cell) < _SAME_SITE
    kept = np.flatnonzero(same.argmax(axis=1) == np.arange(len(atoms)))
    if len(kept) * n.prod() != len(atoms):
        return atoms
    part = Atoms(atoms.numbers[kept], scaled_positions=scaled[kept], cell=cell, pbc=True)
    part.info = {**atoms.info, GROUP: f"{group_of(atoms)}_cell"}
    results = atoms.calc.results
    kept_results = {"energy": results["energy"] / n.prod(), "forces": results["forces"][kept]}
    if "stress" in results:
        kept_results["stress"] = results["stress"]
    part.calc = SinglePointCalculator(part, **kept_results)
    return part
