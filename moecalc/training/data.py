"""Frames with energies, forces and stresses, as graphs that never change: positions of training data stay where they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms
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
