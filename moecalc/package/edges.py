"""Neighbors by brute force, and an evaluator asked about edges instead of positions.

Plain NumPy, with nothing of the production lists.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms

from moecalc.typing import Floats, Ints

if TYPE_CHECKING:
    from moecalc._C import Evaluation, Evaluator, GhostExchange


def brute_force_edges(atoms: Atoms, cutoff: float) -> tuple[Ints, Ints, Floats]:
    """All ordered pairs within `cutoff` by trying every image that can matter.

    Returns:
        Centres (n_edge,), neighbors (n_edge,) and vectors (n_edge, 3) in Angstrom, sorted by centre.
    """
    positions, periodic = atoms.positions, atoms.cell.array[atoms.pbc]
    difference = positions[None, :] - positions[:, None]
    reach = cutoff + np.sqrt((difference**2).sum(axis=-1)).max(initial=0.0)
    # S h = d - (r_j - r_i): |S_k| is at most (cutoff + largest distance) times the reciprocal vector's length
    limits = (
        [int(np.ceil(reach * np.linalg.norm(v))) for v in np.linalg.pinv(periodic).T] if len(periodic) else []
    )
    combinations = list(itertools.product(*(range(-n, n + 1) for n in limits)))
    shifts = np.array(combinations, dtype=float).reshape(len(combinations), len(limits)) @ periodic
    shifts = shifts[(shifts**2).sum(axis=1) <= reach**2]
    own = int((shifts**2).sum(axis=1).argmin())
    found: list[tuple[Ints, Ints, Floats]] = []
    for i in range(len(positions)):
        vectors = difference[i] + shifts[:, None, :]
        inside = (vectors**2).sum(axis=-1) <= cutoff**2
        inside[own, i] = False
        j = np.nonzero(inside)[1]
        found.append((np.full_like(j, i), j, vectors[inside]))
    if not found:
        none = np.zeros(0, dtype=np.int64)
        return none, none, np.zeros((0, 3))
    centres, neighbors, edges = (np.concatenate(part) for part in zip(*found, strict=True))
    return centres, neighbors, edges


def evaluate_edges(
    evaluator: Evaluator,
    types: Ints,
    edge_index: Ints,
    edge_vec: Floats,
    system_index: Ints | None = None,
    n_systems: int = 1,
    *,
    forces: bool = True,
    virial: bool = True,
    atom_virial: bool = False,
    exchange: GhostExchange | None = None,
) -> Evaluation:
    """Energies, forces and virials of a graph whose edges are given as vectors.

    Every edge begins at the origin and ends at a position of its own: the vectors are taken as they are.

    Args:
        evaluator: with `set_list` and `evaluate`; its list is lost.
        types: (n_node,) element indices, owned atoms first.
        edge_index: (2, n_edge) centres and neighbors.
        edge_vec: (n_edge, 3) Angstrom.
        system_index: (n_local,) structure of every owned atom; None: all are owned, of one structure.
        n_systems: number of structures.
        forces, virial, atom_virial: what to compute besides energies.
        exchange: of ghosts.

    Returns:
        Keys, shapes and units as in `moecalc.keys`.
    """
    n_edge = len(edge_vec)
    evaluator.set_list(
        types=types,
        edge_index=edge_index,
        edge_shift=None,
        system_index=np.zeros(len(types), dtype=np.int64) if system_index is None else system_index,
        n_systems=n_systems,
        edge_from=np.zeros(n_edge, dtype=np.int64),
        edge_to=np.arange(1, n_edge + 1),
    )
    positions = np.concatenate([np.zeros((1, 3)), np.asarray(edge_vec, dtype=np.float64).reshape(-1, 3)])
    return evaluator.evaluate(
        positions, None, forces=forces, virial=virial, atom_virial=atom_virial, exchange=exchange
    )
