"""Training data as graphs, whose neighbors are listed once: positions never change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from matscipy.neighbours import neighbour_list

from moecalc.data.frames import group_of
from moecalc.typing import Bools, Floats, Ints


@dataclass
class Frame:
    """One structure, its edges and its labels.

    Attributes:
        types: (n,) index of every atom's element.
        edge_index: (2, E) centre and neighbor of every edge.
        edge_vec: (E, 3) from centre to neighbor, Angstrom.
        energy: eV.
        forces: (n, 3), eV/Angstrom.
        virial: (3, 3), -stress * volume in eV; None where the frame has no stress.
        group: name of the data set it belongs to.
        with_pressure: whether the trace of the virial counts.
    """

    types: Ints
    edge_index: Ints
    edge_vec: Floats
    energy: float
    forces: Floats
    virial: Floats | None
    group: str
    with_pressure: bool = True


def to_frame(atoms: Atoms, elements: list[str], cutoff: float, with_pressure: bool = True) -> Frame:
    """Read the results that a frame carries and list its neighbors within `cutoff` (Angstrom).

    Args:
        atoms: a frame that `check_frames` accepts.
        elements: the model's, the position is the type.
        with_pressure: as in `Frame`.
    """
    results = atoms.calc.results
    virial = None
    if "stress" in results:
        xx, yy, zz, yz, xz, xy = results["stress"]
        virial = -atoms.get_volume() * np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    edge_index, edge_vec = edges_of(atoms, cutoff)
    return Frame(
        types=np.array([elements.index(symbol) for symbol in atoms.get_chemical_symbols()], dtype=np.int64),
        edge_index=edge_index,
        edge_vec=edge_vec,
        energy=float(results["energy"]),
        forces=np.asarray(results["forces"], dtype=np.float64),
        virial=virial,
        group=group_of(atoms),
        with_pressure=with_pressure,
    )


def edges_of(atoms: Atoms, cutoff: float) -> tuple[Ints, Floats]:
    """Edges within `cutoff` (Angstrom): centre and neighbor (2, E), and the vector between them (E, 3)."""
    centre, neighbor, vector = neighbour_list("ijD", atoms, cutoff)
    edge_index = np.stack([centre, neighbor]).astype(np.int64)
    return edge_index, np.ascontiguousarray(vector, dtype=np.float64)


@dataclass
class Batch:
    """Frames side by side in one graph.

    Attributes:
        types: (n,) index of every atom's element.
        edge_index: (2, E) centre and neighbor, rows of the batch.
        edge_vec: (E, 3), Angstrom.
        system: (n,) frame of every atom.
        energy: (S,), eV.
        forces: (n, 3), eV/Angstrom.
        virial: (S, 3, 3), eV; zeros where there is none.
        has_virial, has_pressure: (S,) whether the virial counts, and its trace.
        sizes: (S,) atoms of every frame.
    """

    types: Ints
    edge_index: Ints
    edge_vec: Floats
    system: Ints
    energy: Floats
    forces: Floats
    virial: Floats
    has_virial: Bools
    has_pressure: Bools
    sizes: Ints


def collate(frames: list[Frame]) -> Batch:
    """Concatenate frames; atoms of frame k have system index k."""
    sizes = np.array([len(frame.types) for frame in frames])
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    shifted = [frame.edge_index + start for frame, start in zip(frames, first, strict=True)]
    return Batch(
        types=np.concatenate([frame.types for frame in frames]),
        edge_index=np.concatenate(shifted, axis=1),
        edge_vec=np.concatenate([frame.edge_vec for frame in frames]),
        system=np.repeat(np.arange(len(frames)), sizes),
        energy=np.array([frame.energy for frame in frames]),
        forces=np.concatenate([frame.forces for frame in frames]),
        virial=np.stack([np.zeros((3, 3)) if frame.virial is None else frame.virial for frame in frames]),
        has_virial=np.array([frame.virial is not None for frame in frames]),
        has_pressure=np.array([frame.with_pressure for frame in frames]),
        sizes=sizes,
    )
