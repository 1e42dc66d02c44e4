"""Frames with energies, forces and stresses, as graphs that never change: positions of training data stay where they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from matscipy.neighbours import neighbour_list


@dataclass
class Frame:
    """One structure: types (n,) int64, edges (2, E), edge vectors (E, 3) in Angstrom; energy in eV, forces (n, 3) in eV/Angstrom.

    `virial` (3, 3) is -stress * volume in eV, None where the frame has no stress.
    """

    types: np.ndarray
    edge_index: np.ndarray
    edge_vec: np.ndarray
    energy: float
    forces: np.ndarray
    virial: np.ndarray | None
    group: str


def to_frame(atoms: Atoms, elements: list[str], cutoff: float) -> Frame:
    """Read the results that a frame carries and list its neighbours within `cutoff` (Angstrom).

    Args:
        atoms: a frame that `moecalc.dataset.check_frames` accepts.
        elements: the model's, the position is the type.
    """
    results = atoms.calc.results
    i, j, d = neighbour_list("ijD", atoms, cutoff)
    virial = None
    if "stress" in results:
        xx, yy, zz, yz, xz, xy = results["stress"]
        virial = -atoms.get_volume() * np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    return Frame(
        np.array([elements.index(s) for s in atoms.get_chemical_symbols()], dtype=np.int64),
        np.stack([i, j]).astype(np.int64),
        np.ascontiguousarray(d, dtype=np.float64),
        float(results["energy"]),
        np.asarray(results["forces"], dtype=np.float64),
        virial,
        str(atoms.info.get("dataset", "all")),
    )


def repetitions(atoms: Atoms, tolerance: float = 0.02) -> list[int]:
    """How often the contents of a periodic cell repeat along each of its axes (3,), at most six times.

    Args:
        atoms: with forces.
        tolerance: largest difference of positions (Angstrom) and of force components (eV/Angstrom).
    """
    scaled, numbers, forces = atoms.get_scaled_positions(), atoms.numbers, atoms.get_forces()
    found = []
    for axis in range(3):

        def repeats(n: int, axis: int = axis) -> bool:
            shifted = scaled.copy()
            shifted[:, axis] += 1.0 / n
            difference = shifted[:, None, :] - scaled[None, :, :]
            distance = np.linalg.norm((difference - np.round(difference)) @ atoms.cell.array, axis=2)
            image = distance.argmin(axis=1)
            return bool(
                distance.min(axis=1).max() < tolerance
                and (numbers[image] == numbers).all()
                and np.abs(forces[image] - forces).max() < tolerance
            )

        candidates = [n for n in range(6, 1, -1) if len(atoms) % n == 0]
        found.append(next((n for n in candidates if repeats(n)), 1))
    return found


def smallest_cell(atoms: Atoms) -> Atoms:
    """The repeated part of a frame that is a supercell, with its share of the energy; the frame itself if it is none.

    A strained crystal of 108 atoms says no more than its unit cell of 4, and takes 27 times as long. The group gets `_cell` appended.
    """
    n = np.array(repetitions(atoms))
    if n.prod() == 1:
        return atoms
    cell, scaled = atoms.cell.array / n[:, None], (atoms.get_scaled_positions() * n) % 1.0
    difference = scaled[:, None, :] - scaled[None, :, :]
    same = np.linalg.norm((difference - np.round(difference)) @ cell, axis=2) < 0.1
    kept = np.flatnonzero(same.argmax(axis=1) == np.arange(len(atoms)))
    if len(kept) * n.prod() != len(atoms):
        return atoms
    part = Atoms(atoms.numbers[kept], scaled_positions=scaled[kept], cell=cell, pbc=True)
    part.info = {**atoms.info, "dataset": f"{atoms.info.get('dataset', 'all')}_cell"}
    results = atoms.calc.results
    kept_results = {"energy": results["energy"] / n.prod(), "forces": results["forces"][kept]}
    if "stress" in results:
        kept_results["stress"] = results["stress"]
    part.calc = SinglePointCalculator(part, **kept_results)
    return part


@dataclass
class Batch:
    """Frames side by side in one graph."""

    types: np.ndarray
    edge_index: np.ndarray
    edge_vec: np.ndarray
    system: np.ndarray
    energy: np.ndarray
    forces: np.ndarray
    virial: np.ndarray
    has_virial: np.ndarray
    sizes: np.ndarray


def collate(frames: list[Frame]) -> Batch:
    """Concatenate frames; atoms of frame k have system index k."""
    sizes = np.array([len(f.types) for f in frames])
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return Batch(
        np.concatenate([f.types for f in frames]),
        np.concatenate([f.edge_index + start for f, start in zip(frames, first, strict=True)], axis=1),
        np.concatenate([f.edge_vec for f in frames]),
        np.repeat(np.arange(len(frames)), sizes),
        np.array([f.energy for f in frames]),
        np.concatenate([f.forces for f in frames]),
        np.stack([np.zeros((3, 3)) if f.virial is None else f.virial for f in frames]),
        np.array([f.virial is not None for f in frames]),
        sizes,
    )
