"""Short-range guard: the repulsion of screened nuclei (ZBL) between atoms closer than in training data.

Simulations in ASE and in LAMMPS have the same guard, because this is the function of `pair_style zbl`:

    E(r) = ke Zi Zj / r phi(r / a) + S(r),  a = 0.46850 A / (Zi^0.23 + Zj^0.23)

with the universal screening function phi of Ziegler, Biersack and Littmark, The Stopping and Range of Ions in
Matter (1985), and a polynomial S that leaves the forces alone below an inner radius and takes energy, force
and its slope to zero at an outer radius (https://docs.lammps.org/pair_zbl.html). It is zero beyond,
and leaves structures without such pairs as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.mixing import SumCalculator
from ase.data import atomic_numbers, chemical_symbols, covalent_radii

from moecalc.ase_conditions import same_info
from moecalc.errors import ElementError, MoecalcError
from moecalc.keys import VOIGT
from moecalc.neighbors import SkinNeighborList
from moecalc.typing import Floats, Ints

Pair = tuple[str, str]
Radii = Mapping[Pair, tuple[float, float]]

COULOMB: Final = 14.399645
"""ke e^2 in eV A, with the digits that LAMMPS has in `units metal`."""

MARGIN: Final = 0.95
"""Outer radius over the shortest distance in the data: training data do not feel the guard."""

OF_COVALENT: Final = 0.6
"""Outer radius over the sum of the covalent radii, for pairs without data.

The radii are those of Cordero et al., Dalton Trans. 2832 (2008).
"""

INNER: Final = 0.7
"""Inner over outer radius."""

_GRID: Final = 0.1  # outer radii are rounded down to this (A): few styles of LAMMPS serve all pairs
_SMALLEST: Final = 0.6  # outer radius (A): below, moecalc refuses the structure anyway
_SCREENING: Final = np.array([[0.18175, 3.19980], [0.50986, 0.94229], [0.28022, 0.40290], [0.02817, 0.20162]])


def pair_of(a: str, b: str) -> Pair:
    """Two elements as a key of `Radii`: in the order of their atomic numbers."""
    return (a, b) if _number(a) <= _number(b) else (b, a)


def shortest_distances(frames: Iterable[Atoms], reach: float = 4.0) -> dict[Pair, float]:
    """Shortest distance of every pair of elements that comes closer than `reach`, in Angstrom.

    Raises:
        StructureError: a structure that moecalc cannot evaluate: positions that are not finite, atoms closer
            than 0.5 A.
    """
    found: dict[int, float] = {}
    for atoms in frames:
        z = atoms.numbers
        pairs, positions = SkinNeighborList(reach, skin=0.0).pairs(atoms)
        i, j = pairs.edge_index
        distance = np.linalg.norm(pairs.vectors(positions, atoms.cell.array[None]), axis=1)
        code = 200 * np.minimum(z[i], z[j]) + np.maximum(z[i], z[j])
        # the first of each code after sorting by distance is its shortest
        order = np.argsort(distance)
        codes, first = np.unique(code[order], return_index=True)
        for key, value in zip(codes.tolist(), distance[order][first].tolist(), strict=True):
            found[key] = min(value, found.get(key, np.inf))
    return {
        (chemical_symbols[key // 200], chemical_symbols[key % 200]): value
        for key, value in sorted(found.items())
    }


def guard_radii(
    elements: Sequence[str], shortest: Mapping[Pair, float] | None = None
) -> dict[Pair, tuple[float, float]]:
    """Inner and outer radius for all pairs of some elements.

    The outer one is 95 % of the shortest distance in the data where the pair occurs there, or 60 % of the sum
    of the covalent radii, whichever is less, rounded down to 0.1 A; the inner one is 70 % of the outer.

    Args:
        elements: chemical symbols.
        shortest: from `shortest_distances`; None where the data are not at hand.

    Returns:
        (inner, outer) in Angstrom for every `pair_of` the elements.

    Raises:
        ElementError: an element that does not exist.
    """
    radii = {}
    for k, a in enumerate(elements):
        for b in elements[k:]:
            pair = pair_of(a, b)
            outer = OF_COVALENT * float(covalent_radii[_number(a)] + covalent_radii[_number(b)])
            if shortest is not None and pair in shortest:
                outer = min(outer, MARGIN * shortest[pair])
            outer = max(_SMALLEST, round(math.floor(outer / _GRID + 1e-9) * _GRID, 6))
            radii[pair] = (round(INNER * outer, 6), outer)
    return radii


def lammps_commands(
    elements: Sequence[str], radii: Radii, package: str | Path = "default", options: str = ""
) -> str:
    """`pair_style` and `pair_coeff` lines of LAMMPS for a model with the guard.

    `pair_style zbl` has one pair of radii for all, so there is one zbl sub-style for every pair of radii that
    occurs.

    Args:
        elements: chemical symbol of every atom type.
        radii: from `guard_radii`.
        package: as in `pair_coeff` of `pair_style moe`.
        options: keywords of `pair_style moe`.

    Returns:
        Lines that end with a newline.
    """
    classes = sorted({_radii_of(radii, a, b) for a in elements for b in elements})
    styles = " ".join(f"zbl {inner:g} {outer:g}" for inner, outer in classes)
    moe = " ".join(["moe", *options.split()])
    lines = [
        f"pair_style hybrid/overlay {moe} {styles}",
        f"pair_coeff * * moe {package} {' '.join(elements)}",
    ]
    for i, a in enumerate(elements):
        for j, b in enumerate(elements[i:], start=i):
            index = classes.index(_radii_of(radii, a, b)) + 1
            # LAMMPS wants the number only if there are several
            style = f"zbl {index}" if len(classes) > 1 else "zbl"
            lines.append(f"pair_coeff {i + 1} {j + 1} {style} {_number(a)} {_number(b)} # {a}-{b}")
    return "\n".join(lines) + "\n"


class ZBL(Calculator):
    """The guard as an ASE calculator, to be added to a model: see `guarded`.

    Args:
        radii: (inner, outer) in Angstrom of every pair of elements, from `guard_radii`.
        skin: extra reach of the neighbor list in Angstrom.

    Raises:
        MoecalcError: radii that are not 0 < inner < outer.
        ElementError: (on use) an element without radii.
        StructureError: (on use) as for `MoECalculator`, atoms closer than 0.5 A included.
    """

    # ASE's base class wants exactly these types
    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012

    def __init__(self, radii: Radii, skin: float = 1.0) -> None:
        super().__init__()
        for (a, b), (inner, outer) in radii.items():
            if not 0 < inner < outer < np.inf:
                raise MoecalcError(
                    f"expected 0 < inner < outer radius for {a}-{b}, got {inner:g} and {outer:g} A"
                )
        self.radii = {pair_of(*pair): (float(inner), float(outer)) for pair, (inner, outer) in radii.items()}
        self.elements = sorted({e for pair in self.radii for e in pair}, key=_number)
        n = len(self.elements)
        # the numbers of a pair without radii mean nothing: `calculate` refuses it
        self._known = np.zeros((n, n), dtype=bool)
        self._inner, self._outer = np.ones((n, n)), np.full((n, n), 2.0)
        self._charge, self._length = np.ones((n, n)), np.ones((n, n))
        for i, a in enumerate(self.elements):
            for j, b in enumerate(self.elements):
                if pair_of(a, b) not in self.radii:
                    continue
                self._known[i, j] = True
                self._inner[i, j], self._outer[i, j] = self.radii[pair_of(a, b)]
                self._charge[i, j], self._length[i, j] = charge_and_length(_number(a), _number(b))
        self._a, self._b, self._c = self._switch()
        self.neighbor_list = SkinNeighborList(max(outer for _, outer in self.radii.values()), skin)

    def _get_name(self) -> str:
        return "zbl"

    def _switch(self) -> tuple[Floats, Floats, Floats]:
        """Coefficients of S(r) = A/3 (r - inner)^3 + B/4 (r - inner)^4 + C between the radii, C below."""
        t = self._outer - self._inner
        e, e1, e2 = screened_coulomb(self._outer, self._charge, self._length)
        return (
            (-3 * e1 + t * e2) / t**2,
            (2 * e1 - t * e2) / t**3,
            -e + t * e1 / 2 - t**2 * e2 / 12,
        )

    def pair(self, a: str, b: str, distance: Floats) -> tuple[Floats, Floats]:
        """Energy (eV) and its derivative (eV/A) of one pair at distances (n,) in Angstrom."""
        for symbol in (a, b):
            if symbol not in self.elements:
                raise self._unknown([symbol])
        i, j = (np.full(np.shape(distance), self.elements.index(x)) for x in (a, b))
        return self._pairs(i, j, np.asarray(distance, dtype=float))

    def _pairs(self, i: Ints, j: Ints, r: Floats) -> tuple[Floats, Floats]:
        energy, slope, _ = screened_coulomb(r, self._charge[i, j], self._length[i, j])
        t = np.maximum(r - self._inner[i, j], 0.0)
        a, b, c = self._a[i, j], self._b[i, j], self._c[i, j]
        inside = r < self._outer[i, j]
        return (
            np.where(inside, energy + a / 3 * t**3 + b / 4 * t**4 + c, 0.0),
            np.where(inside, slope + a * t**2 + b * t**3, 0.0),
        )

    def _unknown(self, symbols: Iterable[str]) -> ElementError:
        return ElementError(
            f"the guard has no radii for {' '.join(symbols)}, expected {' '.join(self.elements)}: give "
            "guard_radii all elements"
        )

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Fill `results`; called by ASE."""
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        if atoms is None:
            raise MoecalcError("expected a structure, got none: use atoms.calc = calculator, or pass atoms")
        if missing := sorted(set(atoms.symbols) - set(self.elements)):
            raise self._unknown(missing)
        types = np.array([self.elements.index(s) for s in atoms.symbols], dtype=np.int64)
        present = np.unique(types)
        if not self._known[np.ix_(present, present)].all():
            raise self._unknown(
                f"{self.elements[i]}-{self.elements[j]}"
                for i in present
                for j in present
                if i <= j and not self._known[i, j]
            )
        pairs, positions = self.neighbor_list.pairs(atoms)
        i, j = pairs.edge_index
        vector = pairs.vectors(positions, atoms.cell.array[None])
        distance = np.linalg.norm(vector, axis=1)
        near = distance < self.neighbor_list.cutoff
        i, j, vector, distance = i[near], j[near], vector[near], distance[near]
        energy, slope = self._pairs(types[i], types[j], distance)
        gradient = (slope / distance)[:, None] * vector  # of the pair's energy; every pair is here twice
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, gradient)
        energies = np.bincount(i, energy / 2, len(atoms))
        total = float(energies.sum())
        self.results = {"energy": total, "free_energy": total, "energies": energies, "forces": forces}
        volume = abs(float(np.linalg.det(atoms.cell.array)))
        if atoms.pbc.all() and volume > 0:
            self.results["stress"] = (vector.T @ gradient)[VOIGT] / (2 * volume)


def guarded(model: Any, shortest: Mapping[Pair, float] | None = None) -> SumCalculator:
    """A model with the guard for its elements, as one ASE calculator.

    Args:
        model: a `MoECalculator`, or any calculator with `elements`.
        shortest: shortest distances in the training data, from `shortest_distances`.
    """
    return _Guarded([model, ZBL(guard_radii(model.elements, shortest))])


class _Guarded(SumCalculator):
    """ASE's sum, which forgets results when the charge, spin or frame parameters of the structure change."""

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What differs between the structure and the one that the results are of."""
        changes: list[str] = super().check_state(atoms, tol)
        if self.atoms is not None and not changes and not same_info(self.atoms, atoms):
            changes.append("info")
        return changes


def charge_and_length(a: Any, b: Any) -> tuple[Any, Any]:
    """Prefactor (eV A) and screening length (A) of pairs of atomic numbers, or of arrays of these."""
    return COULOMB * a * b, 0.46850 / (a**0.23 + b**0.23)


def screened_coulomb(r: Floats, charge: Floats, length: Floats) -> tuple[Floats, Floats, Floats]:
    """Screened repulsion and its first two derivatives with respect to the distance."""
    weight, rate = _SCREENING[:, 0], _SCREENING[:, 1] / length[..., None]
    terms = weight * np.exp(-rate * r[..., None])
    phi, phi1, phi2 = terms.sum(-1), -(terms * rate).sum(-1), (terms * rate**2).sum(-1)
    return (
        charge * phi / r,
        charge * (phi1 - phi / r) / r,
        charge * (phi2 - 2 * phi1 / r + 2 * phi / r**2) / r,
    )


def _number(symbol: str) -> int:
    number = atomic_numbers.get(symbol, 0)
    if number == 0:
        raise ElementError(f"expected a chemical element, got {symbol!r}")
    return int(number)


def _radii_of(radii: Radii, a: str, b: str) -> tuple[float, float]:
    pair = pair_of(a, b)
    if pair not in radii:
        raise ElementError(f"no radii for {pair[0]}-{pair[1]}: give guard_radii all elements")
    return radii[pair]
