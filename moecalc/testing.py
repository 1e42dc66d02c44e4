"""Tolerances, small structures and reference computations for the tests of moecalc and of those who build on it.

Everything here is plain numpy and ASE, so that it can serve as an oracle: it shares no code with what it checks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from ase import Atoms
from ase.build import bcc100, bulk
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FINITE_DIFFERENCE: Final = 1e-6
"""Forces (eV/A) and stress (eV/A^3) against finite differences of the energy, float64."""

ORACLE_ENERGY: Final = 1e-8
"""Energy (eV, total and per atom) against the code that trained the checkpoint, float64."""

ORACLE_FORCES: Final = 1e-8
"""Forces (eV/A) against the code that trained the checkpoint, float64."""

ORACLE_VIRIAL: Final = 1e-7
"""Virial (eV) against the code that trained the checkpoint, float64."""

ORACLE_FLOAT32: Final = 2e-6
"""Relative deviation of everything from a float32 reference."""

SAME_MODEL: Final = 1e-12
"""Two float64 evaluations that differ in nothing but the order of sums (eV, eV/A), for structures of a few atoms."""

ROUNDING: Final = 1e-9
"""Quantities that are equal up to the rounding of coordinates: translation, wrapping, cells repeated (eV, eV/A, A)."""


def bulk_alloy(
    symbols: Sequence[str] = ("Nb", "Mo", "Ta", "W"), a: float = 3.24, amplitude: float = 0.1, seed: int = 0
) -> Atoms:
    """Strained and rattled bcc supercell, 16 atoms, periodic in all directions, cell shorter than twice a usual cutoff."""
    atoms = bulk(symbols[0], "bcc", a=a, cubic=True) * 2
    return _disturb(atoms, symbols, amplitude, seed)


def slab(
    symbols: Sequence[str] = ("Nb", "Mo", "Ta", "W"), a: float = 3.24, amplitude: float = 0.1, seed: int = 1
) -> Atoms:
    """Rattled bcc (100) slab, 16 atoms, periodic in x and y, without a third cell vector."""
    atoms = bcc100(symbols[0], (2, 2, 4), a=a, periodic=False)
    return _disturb(atoms, symbols, amplitude, seed)


def molecule(
    symbols: Sequence[str] = ("Nb", "Mo", "Ta", "W"),
    distance: float = 2.5,
    amplitude: float = 0.2,
    seed: int = 2,
) -> Atoms:
    """Cluster of 8 atoms, not periodic, without a cell."""
    corners = np.array(list(itertools.product((0.0, distance), repeat=3)))
    return _disturb(Atoms([symbols[0]] * 8, corners), symbols, amplitude, seed)


def one_atom_cell(symbol: str = "W", a: float = 3.17) -> Atoms:
    """Primitive bcc cell, sheared: every neighbour of the atom is its own image."""
    atoms = bulk(symbol, "bcc", a=a)
    atoms.set_cell(
        atoms.cell.array @ ([*np.eye(3), [0.01, 0.03, 0.0], [0.0, -0.02, 0.02], [0.015, 0.0, 0.01]]),
        scale_atoms=True,
    )
    return atoms


def _disturb(atoms: Atoms, symbols: Sequence[str], amplitude: float, seed: int) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms.symbols[:] = [symbols[k % len(symbols)] for k in rng.permutation(len(atoms))]
    strain = np.eye(3) + 0.02 * rng.standard_normal((3, 3))
    strain[2, :2] = strain[:2, 2] = 0  # a slab stays across its normal
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=False)
    atoms.positions = atoms.positions @ strain + amplitude * rng.uniform(-1, 1, atoms.positions.shape)
    return atoms


def brute_force_edges(atoms: Atoms, cutoff: float) -> tuple[Ints, Ints, Floats]:
    """All ordered pairs within `cutoff` by trying every image that can matter.

    Returns:
        Centres (n_edge,), neighbours (n_edge,) and vectors (n_edge, 3) in Angstrom, sorted by centre.
    """
    positions, periodic = atoms.positions, atoms.cell.array[atoms.pbc]
    difference = positions[None, :] - positions[:, None]
    reach = cutoff + np.sqrt((difference**2).sum(axis=-1)).max(initial=0.0)
    # S h = d - (r_j - r_i), so each |S_k| is at most (cutoff + largest distance) times the length of the reciprocal vector
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


_STENCIL: Final = ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12))
"""Offsets and weights of the five-point first derivative: error of fourth order in the step."""


def finite_difference_forces(
    energy: Callable[[Atoms], float], atoms: Atoms, step: float = 2e-3, indices: Sequence[int] | None = None
) -> Floats:
    """Minus the derivative of `energy(atoms)` with respect to positions.

    Args:
        energy: eV of a structure.
        atoms: the structure; not changed.
        step: displacement in Angstrom.
        indices: atoms to move, all by default.

    Returns:
        (len(indices), 3) forces in eV/A.
    """
    moved = atoms.copy()
    chosen = range(len(atoms)) if indices is None else indices
    forces = np.zeros((len(chosen), 3))
    for row, index in enumerate(chosen):
        for axis in range(3):
            start = moved.positions[index, axis]
            for offset, weight in _STENCIL:
                moved.positions[index, axis] = start + offset * step
                forces[row, axis] -= weight * energy(moved) / step
            moved.positions[index, axis] = start
    return forces


def finite_difference_stress(energy: Callable[[Atoms], float], atoms: Atoms, step: float = 1e-3) -> Floats:
    """Derivative of `energy(atoms)` with respect to symmetric strain, over the volume, in ASE's Voigt order (6,), eV/A^3."""
    stress = np.zeros((3, 3))
    for a, b in itertools.combinations_with_replacement(range(3), 2):
        for offset, weight in _STENCIL:
            strain = np.eye(3)
            strain[a, b] += offset * step / 2
            strain[b, a] += offset * step / 2
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ strain, scale_atoms=False)
            strained.positions = atoms.positions @ strain
            stress[a, b] += weight * energy(strained) / step
        stress[b, a] = stress[a, b]
    voigt: Floats = full_3x3_to_voigt_6_stress(stress / atoms.get_volume())
    return voigt


class PairEvaluator:
    """Stand-in for the compiled evaluator: a smooth pair energy between types, with the same attributes and the same `evaluate`.

    `E = 1/2 sum_ij k(t_i, t_j) (1/r^2 - 1/4) (1 - (r/cutoff)^2)^3 + sum_i t_i`, with k(s, t) = 1 + (s + t) / 10.
    """

    dtype = "float64"
    device = "cpu"
    n_layers = 1
    angle_cutoff = 0.0
    metadata = "{}"

    def __init__(self, elements: Sequence[str], cutoff: float = 5.0) -> None:
        self.elements = list(elements)
        self.cutoff = cutoff
        self.n_calls = 0

    def evaluate(
        self,
        types: Ints,
        edge_index: Ints,
        edge_vec: Floats,
        system_index: Ints,
        n_systems: int = 1,
        *,
        forces: bool = True,
        virial: bool = True,
        atom_virial: bool = False,
    ) -> dict[str, Any]:
        """Energies, forces and virials of a batch: keys, shapes and units as in `moecalc.keys`."""
        self.n_calls += 1
        length2 = (edge_vec**2).sum(axis=1)
        inside = length2 <= self.cutoff**2
        (i, j), vec, length2 = edge_index[:, inside], edge_vec[inside], length2[inside]
        strength = 1 + (types[i] + types[j]) / 10
        core, tail = 1 / length2 - 0.25, 1 - length2 / self.cutoff**2
        pair = 0.5 * strength * core * tail**3
        slope = 0.5 * strength * (-(tail**3) / length2**2 - 3 * core * tail**2 / self.cutoff**2)  # dE/d(r^2)
        gradient = 2 * slope[:, None] * vec
        energies = types.astype(float)
        np.add.at(energies, i, pair)
        n = len(types)
        atom = np.zeros((n, 3, 3))
        np.add.at(atom, j, -vec[:, :, None] * gradient[:, None, :])
        total = np.zeros((n_systems, 3, 3))
        np.add.at(total, system_index, atom)
        result: dict[str, Any] = {
            "energy": np.bincount(system_index, energies, n_systems),
            "energies": energies,
            "n_edge": len(vec),
            "n_angle": 0,
            "max_neighbors": int(np.bincount(i).max(initial=0)),
            "max_angle_neighbors": 0,
        }
        if forces:
            result["forces"] = np.zeros((n, 3))
            np.add.at(result["forces"], i, gradient)
            np.subtract.at(result["forces"], j, gradient)
        if virial:
            result["virial"] = total
        if atom_virial:
            result["atom_virial"] = atom
        return result
