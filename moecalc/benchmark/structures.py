"""Structures to time: water, a random alloy, and copies of any structure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from ase import Atoms

from moecalc.errors import StructureError


def water(n: int = 4, seed: int = 1) -> Atoms:
    """n^3 molecules of water at 1 g/cm3, on a grid in random orientations.

    Neighbor counts are those of the liquid.
    """
    from ase.build import molecule

    rng = np.random.default_rng(seed)
    length = (n**3 * 18.015 / 0.602214) ** (1 / 3)
    atoms = Atoms(cell=[length] * 3, pbc=True)
    for site in np.ndindex(n, n, n):
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.translate((np.array(site) + 0.5) * length / n - one.get_center_of_mass())
        atoms += one
    return atoms


def alloy(elements: Sequence[str], n: int = 4, seed: int = 1) -> Atoms:
    """2 n^3 atoms of a bcc crystal, elements in random places, at the mean of their covalent radii."""
    from ase.build import bulk
    from ase.data import atomic_numbers, covalent_radii

    rng = np.random.default_rng(seed)
    radius = float(np.mean([covalent_radii[atomic_numbers[e]] for e in elements]))
    atoms = bulk(elements[0], "bcc", a=4 * radius / math.sqrt(3), cubic=True) * (n, n, n)
    symbols = [elements[k % len(elements)] for k in range(len(atoms))]
    atoms.symbols[:] = rng.permutation(symbols)
    atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
    return atoms


def default_structure(elements: Sequence[str]) -> Atoms:
    """192 atoms of water for a model of H and O only, else a 128-atom alloy of all elements of the model."""
    return water() if set(elements) == {"H", "O"} else alloy(elements)


def repeated(atoms: Atoms, copies: int) -> Atoms:
    """Copies of a structure, stacked along its periodic directions as compactly as the factors allow.

    Raises:
        StructureError: fewer than one copy, or more than one of a structure without periodic directions.
    """
    if copies < 1:
        raise StructureError(f"expected a number of copies of at least 1, got {copies}")
    if copies == 1:
        return atoms.copy()
    if not atoms.pbc.any():
        raise StructureError(
            f"{copies} copies of a structure without periodic directions, expected 1: use a periodic one to "
            "see scaling"
        )
    counts = np.ones(3, dtype=int)
    lengths = np.where(atoms.pbc, atoms.cell.lengths(), np.inf)
    for factor in sorted(_prime_factors(copies), reverse=True):
        counts[int(np.argmin(lengths * counts))] *= factor
    return atoms.repeat(tuple(int(n) for n in counts))


def _prime_factors(n: int) -> list[int]:
    factors = []
    for p in range(2, n + 1):
        while n % p == 0:
            factors.append(p)
            n //= p
    return factors
