"""Neighbor list with a Verlet skin, of an ASE structure.

The pair search is matscipy's; this module decides when a search can be spared, handles the inputs matscipy
does not take (no cell, zero atoms, slabs with an arbitrary or zero third vector), and refuses structures that
cannot be evaluated.

**When a list may be kept.** A list is built with radius R = cutoff + skin from positions r0 and cell h0.
Later, with positions r and cell h, let F be a linear map that takes every periodic cell vector of h0 to that
of h (row vectors: h0 F = h), and u_i = r_i - r0_i F - c the displacement that is left when the homogeneous
deformation and a common translation c are taken out. A pair (i, j, S) then has

    d = r_j - r_i + S h = d0 F + u_j - u_i,    so    |d| >= s |d0| - |u_i| - |u_j|

with s the smallest singular value of F.

Every pair with |d| <= cutoff was therefore in the list (|d0| <= R) as long as

    cutoff + |u_i| + |u_j| <= s R    for the two largest |u|,

for all images S, however far. With an unchanged cell this is the usual rule (two atoms may move by half of
the skin), and drift, rotation of the cell or a small strain do not count as displacements. The choice of c
and F changes only how soon a list is rebuilt, never its correctness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from matscipy.neighbours import neighbour_list

from moecalc.errors import StructureError
from moecalc.keys import MAX_COORDINATE, MIN_DISTANCE
from moecalc.typing import Bools, Floats, Ints

_PAD = 1e-8
"""Added to the search radius (Angstrom): matscipy keeps r < radius, edges have r <= cutoff."""

_MAX_BINS = 1 << 18
"""Search bins matscipy may allocate in a box without periodicity; it bins the whole box, however empty."""


@dataclass(frozen=True, slots=True, eq=False)
class PairList:
    """Pairs of structures for many positions: `edge_vec = positions[j] - positions[i] + edge_shift @ cell`.

    Attributes:
        edge_index: (2, n_edge) centre i and neighbor j.
        edge_shift: (n_edge, 3) cells between them.
        system_index: (n_node,) structure of each atom.
        n_systems: number of structures.
    """

    edge_index: Ints
    edge_shift: Ints
    system_index: Ints
    n_systems: int = 1

    def vectors(self, positions: Floats, cells: Floats) -> Floats:
        """`edge_vec` (n_edge, 3) in Angstrom.

        Args:
            positions: (n_node, 3) Angstrom.
            cells: (n_systems, 3, 3) Angstrom, a vector per row.
        """
        centre, neighbor = self.edge_index
        if self.n_systems == 1:
            shift: Floats = self.edge_shift.astype(np.float64) @ cells[0]
        else:
            shift = np.einsum("na,nab->nb", self.edge_shift, cells[self.system_index[centre]])
        return positions[neighbor] - positions[centre] + shift

    @staticmethod
    def concatenate(lists: Sequence[PairList]) -> PairList:
        """Join structures into one batch: atoms, edges and systems keep their order, indices are shifted."""
        if not lists:
            none = np.zeros(0, dtype=np.int64)
            return PairList(none.reshape(2, 0), none.reshape(0, 3), none, 0)
        first_node = np.cumsum([0] + [len(pairs.system_index) for pairs in lists])
        first_system = np.cumsum([0] + [pairs.n_systems for pairs in lists])
        return PairList(
            edge_index=np.concatenate(
                [pairs.edge_index + n for pairs, n in zip(lists, first_node, strict=False)], axis=1
            ),
            edge_shift=np.concatenate([pairs.edge_shift for pairs in lists]),
            system_index=np.concatenate(
                [pairs.system_index + n for pairs, n in zip(lists, first_system, strict=False)]
            ),
            n_systems=int(first_system[-1]),
        )


class SkinNeighborList:
    """Full neighbor list of one ASE structure, reused while no pair can have entered the cutoff.

    Args:
        cutoff: largest edge length in Angstrom.
        skin: how much farther the list reaches, in Angstrom; 0 searches anew at every call.

    Attributes:
        n_calls: number of lists asked for.
        n_rebuilds: number of pair searches; the other calls gave the list that was there.
    """

    def __init__(self, cutoff: float, skin: float = 1.0) -> None:
        if not (np.isfinite(cutoff) and cutoff > 0):
            raise ValueError(f"expected a positive cutoff in Angstrom, got {cutoff!r}")
        if not (np.isfinite(skin) and skin >= 0):
            raise ValueError(
                f"expected skin >= 0 in Angstrom, got {skin!r}: 0 rebuilds the list at every step, 1.0 suits "
                "MD of solids"
            )
        self.cutoff = float(cutoff)
        self.skin = float(skin)
        self.n_calls = 0
        self.n_rebuilds = 0
        self.reset()

    def reset(self) -> None:
        """Forget the list: the next call searches."""
        none = np.zeros(0, dtype=np.int64)
        self._pairs = PairList(none.reshape(2, 0), none.reshape(0, 3), none)
        self._shift: Floats = np.zeros((0, 3))
        self._near: Ints = none
        self._near_reach = 0.0
        self._positions: Floats | None = None
        self._cell: Floats = np.zeros((3, 3))
        self._pbc: Bools = np.zeros(3, dtype=bool)

    def pairs(self, atoms: Atoms) -> tuple[PairList, Floats]:
        """The list for `atoms` as they are now, and the positions (n_atoms, 3) to use with it.

        The list is the same object until a search makes a new one, and a call without a search costs nothing
        per pair. It holds the pairs up to `cutoff + skin`, of which the model drops those beyond its cutoff.
        The positions are those of `atoms` but for whole lattice vectors: atoms may lie anywhere, also outside
        of the cell, and may jump by lattice vectors between calls.

        Raises:
            StructureError: positions or cell are not finite or absurdly large, a periodic direction has no
                cell vector, or two atoms are closer than 0.5 Angstrom.
        """
        current = self._update(atoms)
        near = self._near_edges(atoms.cell.array)
        centre, neighbor = self._pairs.edge_index[:, near]
        vectors = current[neighbor] - current[centre] + self._shift[near] @ atoms.cell.array
        _check_overlap(atoms, self._pairs.edge_index[:, near], self._shift[near], vectors)
        return self._pairs, current

    def _update(self, atoms: Atoms) -> Floats:
        """Search if the list does not serve any more; returns the positions to use with it."""
        positions: Floats = atoms.positions
        cell: Floats = atoms.cell.array
        pbc: Bools = atoms.pbc
        _check_finite(atoms, positions, cell)
        self.n_calls += 1
        current = self._keep(positions, cell, pbc) if self.skin > 0 else None
        if current is not None:
            return current
        self._rebuild(atoms, positions, cell, pbc)
        return positions

    def _near_edges(self, cell: Floats) -> Ints:
        """Edges that may be shorter than `MIN_DISTANCE` by now: those that were close when the list was made.

        With the inequality of this module, |d| >= s |d0| - |u_i| - |u_j| >= s |d0| - (s R - cutoff) for any
        list that is kept.
        """
        scale = self._scale(cell)
        reach = self.cutoff + self.skin - (self.cutoff - MIN_DISTANCE) / scale
        if self._positions is not None and reach > self._near_reach:
            self._near_reach = 1.1 * reach  # a growing cell would ask for it at every step
            centre, neighbor = self._pairs.edge_index
            vectors = self._positions[neighbor] - self._positions[centre] + self._shift @ self._cell
            self._near = np.flatnonzero(np.einsum("ij,ij->i", vectors, vectors) <= self._near_reach**2)
        return self._near

    def _keep(self, positions: Floats, cell: Floats, pbc: Bools) -> Floats | None:
        """Positions to use with the list, lattice jumps undone; None when a pair might be missing from it."""
        if (
            self._positions is None
            or len(positions) != len(self._positions)
            or not np.array_equal(pbc, self._pbc)
        ):
            return None
        if len(positions) == 0:
            return positions
        expected = self._positions
        if not np.array_equal(cell, self._cell):
            expected = self._positions @ self._deformation(cell)
        scale = self._scale(cell)
        room = scale * (self.cutoff + self.skin) - self.cutoff
        if room < 0:
            return None
        displacement = positions - expected
        if _spread(displacement) <= room:
            return positions
        if not pbc.any():
            return None
        # somebody may have wrapped the atoms: undo whole lattice vectors, counted relative to the first atom,
        # where drift is none
        jumps = np.rint((displacement - displacement[0]) @ np.linalg.pinv(cell[pbc]))
        if not jumps.any():
            return None
        unwrap = jumps @ cell[pbc]
        return positions - unwrap if _spread(displacement - unwrap) <= room else None

    def _deformation(self, cell: Floats) -> Floats:
        """F: the smallest change that takes the periodic vectors of the list to the present ones.

        Directions across them stay.
        """
        pbc = self._pbc
        deformation: Floats = np.eye(3) + np.linalg.pinv(self._cell[pbc]) @ (cell - self._cell)[pbc]
        return deformation

    def _scale(self, cell: Floats) -> float:
        """s: the smallest singular value of F."""
        if np.array_equal(cell, self._cell):
            return 1.0
        return float(np.linalg.svd(self._deformation(cell), compute_uv=False)[-1])

    def _rebuild(self, atoms: Atoms, positions: Floats, cell: Floats, pbc: Bools) -> None:
        self.reset()  # a search that fails must not leave the list of another structure
        if len(positions):
            _check_cell(cell, pbc)
            radius = self.cutoff + self.skin + _PAD
            box, origin = _search_box(positions, cell, pbc, radius)
            centre, neighbor, shift = neighbour_list(
                "ijS", positions=positions, cell=box, pbc=pbc, cutoff=radius, cell_origin=origin
            )
            self._pairs = PairList(
                edge_index=np.array([centre, neighbor], dtype=np.int64),
                edge_shift=shift.astype(np.int64),
                system_index=np.zeros(len(positions), dtype=np.int64),
            )
            self._shift = shift.astype(np.float64)
        self._positions = positions.copy()
        self._cell = cell.copy()
        self._pbc = pbc.copy()
        self.n_rebuilds += 1


def _spread(displacement: Floats) -> float:
    """Bound on |u_i - u_j| over all pairs of rows (n, 3): the two largest lengths without the mean."""
    u = displacement - displacement.mean(axis=0)
    length2 = np.einsum("ij,ij->i", u, u)
    if len(length2) < 2:
        return 0.0
    return float(np.sqrt(np.partition(length2, -2)[-2:]).sum())


def _search_box(positions: Floats, cell: Floats, pbc: Bools, radius: float) -> tuple[Floats, Floats]:
    """Cell and origin for the pair search.

    Directions without periodicity get vectors across the periodic ones that just hold the atoms.

    matscipy inverts the cell, so it cannot take missing vectors, and bins it, so empty space costs memory.
    Atoms outside of such a direction are still found, only more slowly: a box that needs too many bins is cut
    around the median atom.
    """
    if pbc.all():
        return cell, np.zeros(3)
    periodic = cell[pbc]
    across = np.linalg.svd(periodic)[2][len(periodic) :] if len(periodic) else np.eye(3)
    coordinates = positions @ across.T
    length = np.ptp(coordinates, axis=0) + 1.0
    low = coordinates.min(axis=0) - 0.5
    bins = float(np.prod(np.maximum(1.0, np.linalg.norm(periodic, axis=1) / radius)))
    limit = max(_MAX_BINS, 8 * len(positions))
    while bins * np.prod(np.maximum(1.0, length / radius)) > limit and length.max() > radius:
        longest = int(length.argmax())
        length[longest] /= 2
        low[longest] = np.median(coordinates[:, longest]) - length[longest] / 2
    box = cell.copy()
    box[~pbc] = length[:, None] * across
    return box, low @ across


def _check_finite(atoms: Atoms, positions: Floats, cell: Floats) -> None:
    # one pass decides; NaN compares false, so it is caught as well
    if not (np.abs(positions) < MAX_COORDINATE).all():
        index = int(np.argmin((np.abs(positions) < MAX_COORDINATE).all(axis=1)))
        value = positions[index].tolist()
        who = f"position of atom {index} ({atoms.symbols[index]}) is {value}"
        if not np.isfinite(positions[index]).all():
            raise StructureError(
                f"{who}, expected finite numbers: check the input or, in dynamics, shorten the time step"
            )
        raise StructureError(
            f"{who}, expected coordinates below {MAX_COORDINATE:g} A: atoms flew apart or the unit is not "
            "Angstrom"
        )
    if not (np.abs(cell) < MAX_COORDINATE).all():
        index = int(np.argmin((np.abs(cell) < MAX_COORDINATE).all(axis=1)))
        raise StructureError(
            f"cell vector {index} is {cell[index].tolist()}, expected finite numbers below "
            f"{MAX_COORDINATE:g} A: check the input or the barostat"
        )


def _check_cell(cell: Floats, pbc: Bools) -> None:
    """Refuse periodic vectors that are missing, parallel, or so dense that an atom overlaps with its image.

    A lattice of k dimensions and k-volume V has a vector no longer than sqrt(g_k) V^(1/k), g = 1, 2/sqrt(3),
    2^(1/3) (Hermite's constants).
    """
    periodic = cell[pbc]
    k = len(periodic)
    if k == 0:
        return
    volume = float(np.prod(np.linalg.svd(periodic, compute_uv=False)))
    hermite = (1.0, 2 / 3**0.5, 2 ** (1 / 3))[k - 1]
    smallest = float(MIN_DISTANCE / hermite**0.5) ** k
    if volume < smallest:
        what = ("length", "area", "volume")[k - 1]
        unit = ("A", "A^2", "A^3")[k - 1]
        raise StructureError(
            f"periodic directions {np.flatnonzero(pbc).tolist()} have cell vectors {periodic.tolist()} of "
            f"{what} {volume:.3g} {unit}, expected at least {smallest:.3g} {unit}: set the cell, or "
            "pbc=False where the structure does not repeat"
        )


def _check_overlap(atoms: Atoms, edge_index: Ints, shift: Floats, edge_vec: Floats) -> None:
    if len(edge_vec) == 0:
        return
    distance2 = np.einsum("ij,ij->i", edge_vec, edge_vec)
    edge = int(distance2.argmin())
    if distance2[edge] >= MIN_DISTANCE**2:
        return
    i, j = (int(k) for k in edge_index[:, edge])
    first = f"{i} ({atoms.symbols[i]})"
    if i == j:
        pair, remedy = f"atom {first} and its own periodic image", "check the cell"
    else:
        image = " (a periodic image)" if shift[edge].any() else ""
        pair = f"atoms {first} and {j} ({atoms.symbols[j]}){image}"
        remedy = "move or remove one of them, and check the cell and the units"
    raise StructureError(
        f"{pair} are {distance2[edge] ** 0.5:.3f} A apart, expected at least {MIN_DISTANCE} A: {remedy}"
    )
