"""Elastic constants and equations of state, of the model and, from strained cells, of the reference.

Both come from the same cells by the same fit: their difference is the model's. Strained cells are found by
their geometry, not by names: frames of one composition whose atoms keep their places in the cell while the
cell changes, around a cubic one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms, units
from ase.eos import EquationOfState

from moecalc.neighbors import SkinNeighborList
from moecalc.typing import Floats, Ints

Curves = dict[str, tuple[Floats, Floats]]
Energies = Callable[[list[Atoms]], Sequence[float]]

NAMES = ("C11", "C12", "C44", "B")
LARGEST_STRAIN = 0.061
"""Strains beyond are left out of the fits (they are drawn)."""

_SAME = 1e-3  # scaled coordinates and relative cell edges that count as equal
_FEWEST = 5  # strains that a cubic fit needs to be more than an interpolation


@dataclass(frozen=True)
class StrainedCells:
    """Homogeneously strained copies of one cubic crystal.

    Attributes:
        label: formula of the cell.
        indices: (n,) positions of the frames in the list they came from.
        deformation: (n, 3, 3) against the cubic cell, minus the unit matrix; row vectors.
        uniaxial: (m,) rows of `deformation` under strain along one axis, the unstrained one included, and
            `axis` (m,) of each.
        sheared: (k,) rows under shear in one plane, and `plane` (k,), the Voigt index of each.
    """

    label: str
    indices: Ints
    deformation: Floats
    uniaxial: Ints
    axis: Ints
    sheared: Ints
    plane: Ints

    def curves(self, stress: Floats) -> Curves:
        """Strain and stress (GPa), sorted by strain, by constant.

        C11: along a uniaxial strain; C12: across it; C44: under shear.

        Args:
            stress: (n, 6) in ASE's order and units.
        """
        strain = self.deformation[self.uniaxial, self.axis, self.axis]
        along = stress[self.uniaxial, self.axis]
        across = (stress[self.uniaxial, :3].sum(axis=1) - along) / 2
        gamma = self.deformation + self.deformation.transpose(0, 2, 1)
        rows, columns = np.array([1, 0, 0]), np.array([2, 2, 1])
        shear = gamma[self.sheared, rows[self.plane - 3], columns[self.plane - 3]]
        pairs = {
            "C11": (strain, along),
            "C12": (strain, across),
            "C44": (shear, stress[self.sheared, self.plane]),
        }
        return {name: (x[np.argsort(x)], y[np.argsort(x)] / units.GPa) for name, (x, y) in pairs.items()}


def constants(curves: Curves) -> tuple[float, float, float, float]:
    """C11, C12, C44 and the bulk modulus in GPa: slopes at zero of cubic fits to strains up to 6 %."""
    values = []
    for name in NAMES[:3]:
        strain, stress = curves[name]
        small = np.abs(strain) < LARGEST_STRAIN
        values.append(float(np.polyfit(strain[small], stress[small], 3)[2]))
    c11, c12, c44 = values
    return c11, c12, c44, (c11 + 2 * c12) / 3


def find_strained_cells(frames: Sequence[Atoms], stress: Floats) -> list[StrainedCells]:
    """Families of strained cubic crystals that have enough strains of both kinds for elastic constants.

    Args:
        frames: any frames.
        stress: (n, 6) of the reference; rows that are not finite are passed over.
    """
    families: dict[tuple[str, int], list[int]] = {}
    for index, atoms in enumerate(frames):
        if atoms.pbc.all() and np.isfinite(stress[index]).all() and atoms.get_volume() > 0:
            families.setdefault((atoms.get_chemical_formula(), len(atoms)), []).append(index)
    found = []
    for (formula, _), members in families.items():
        cubic = [i for i in members if _is_cubic(frames[i])]
        if len(members) < _FEWEST or not cubic:
            continue
        # of several cubic cells, the one that is nearest to equilibrium is unstrained
        start = frames[min(cubic, key=lambda i: float(np.abs(stress[i]).max()))]
        same = np.array([i for i in members if _same_places(frames[i], start)], dtype=np.int64)
        cells = np.array([frames[i].cell.array for i in same])
        deformation = np.linalg.inv(start.cell.array) @ cells - np.eye(3)
        diagonal = deformation[:, range(3), range(3)]
        gamma = np.abs(deformation + deformation.transpose(0, 2, 1))[:, [1, 0, 0], [2, 2, 1]]
        straight, one_plane = gamma.max(axis=1) < 1e-6, np.sort(gamma, axis=1)[:, 1] < 1e-6
        one_axis = np.sort(np.abs(diagonal), axis=1)[:, 1] < 1e-6
        uniaxial = np.flatnonzero(straight & one_axis)
        # a shear may stretch a little so as to keep the volume
        sheared = np.flatnonzero(~straight & one_plane & (np.abs(diagonal).max(axis=1) < 0.02))
        family = StrainedCells(
            formula,
            same,
            deformation,
            uniaxial,
            np.abs(diagonal[uniaxial]).argmax(axis=1),
            sheared,
            3 + gamma[sheared].argmax(axis=1),
        )
        if all(_n_small(x) >= _FEWEST for x, _ in family.curves(stress[same]).values()):
            found.append(family)
    return found


@dataclass(frozen=True)
class EquationOfStateResult:
    """Energy against volume of a crystal, both per atom.

    Attributes:
        volumes: (n,) A^3/atom.
        energies: (n,) eV/atom.
        volume: at the minimum of the fit, A^3/atom; NaN if there is no minimum within the volumes.
        modulus: bulk modulus there, GPa.
    """

    volumes: Floats
    energies: Floats
    volume: float
    modulus: float


def equation_of_state(
    atoms: Atoms, energies: Energies, widest: float = 0.08, n: int = 13
) -> EquationOfStateResult:
    """Energy of a crystal that is scaled as it is, without relaxation, with a Birch-Murnaghan fit.

    Args:
        atoms: the crystal, periodic; it need not be at the model's minimum.
        energies: total energies (eV) of many structures.
        widest: largest change of the volume, as a share; scanned again around a minimum farther away.
        n: number of volumes.
    """
    start = atoms.get_volume()
    for width in (
        0.25,
        widest,
    ):  # the model's minimum may be far from the crystal's: find it, then fit close to it
        scaled = []
        for share in np.linspace(1 - width, 1 + width, n):
            copy = atoms.copy()
            copy.set_cell(atoms.cell * (share * start / atoms.get_volume()) ** (1 / 3), scale_atoms=True)
            scaled.append(copy)
        values = np.array(energies(scaled)) / len(atoms)
        volumes = np.array([c.get_volume() for c in scaled]) / len(atoms)
        if width != widest:
            start = float(volumes[values.argmin()]) * len(atoms)
    volume = modulus = float("nan")
    if 0 < values.argmin() < n - 1:
        fit = EquationOfState(volumes, values, eos="birchmurnaghan")
        volume, _, stiffness = fit.fit()
        modulus = float(stiffness) / units.GPa
    return EquationOfStateResult(volumes, values, float(volume), modulus)


def lattice_name(atoms: Atoms) -> str:
    """bcc, fcc, hcp or diamond by the shells of neighbors around the first atom, else an empty text."""
    pairs, positions = SkinNeighborList(8.0, skin=0.0).pairs(atoms)
    vectors = pairs.vectors(positions, atoms.cell.array[None])
    distance = np.sort(np.linalg.norm(vectors[pairs.edge_index[0] == 0], axis=1))
    if len(distance) == 0:
        return ""
    ratio = distance / distance[0]
    # number of neighbors up to 1.08, 1.25, 1.5 and 1.68 nearest distances
    counts = tuple(int((ratio < limit).sum()) for limit in (1.08, 1.25, 1.5, 1.68))
    known: dict[tuple[int, ...], str] = {
        (8, 14, 14, 26): "bcc",
        (12, 12, 18, 18): "fcc",
        (12, 12, 18, 20): "hcp",
        (4, 4, 4, 16): "diamond",
    }
    return known.get(counts, "")


def _is_cubic(atoms: Atoms) -> bool:
    cell = atoms.cell.array
    return bool(np.abs(cell - cell[0, 0] * np.eye(3)).max() < 1e-6 * abs(cell[0, 0]))


def _same_places(atoms: Atoms, other: Atoms) -> bool:
    if not np.array_equal(atoms.numbers, other.numbers):
        return False
    shift = atoms.get_scaled_positions(wrap=False) - other.get_scaled_positions(wrap=False)
    shift -= shift[0]
    return bool(np.abs(shift - np.round(shift)).max() < _SAME)


def _n_small(strain: Floats) -> int:
    """Number of different strains that the fit uses."""
    return len(np.unique(strain[np.abs(strain) < LARGEST_STRAIN].round(6)))
