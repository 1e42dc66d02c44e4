"""What the composition of frames explains: values per atom as a sum over elements, by least squares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from moecalc.typing import Bools, Floats


def shares(frames: Sequence[Atoms], elements: Sequence[str]) -> Floats:
    """(n_frames, n_elements) share of every element in the atoms of a frame."""
    symbols = [np.array(atoms.get_chemical_symbols()) for atoms in frames]
    return np.array([[(of_frame == element).mean() for element in elements] for of_frame in symbols])


def contributions(of_elements: Floats, values: Floats) -> tuple[Floats, Bools]:
    """The contribution of every element to values per atom.

    Args:
        of_elements: (n_frames, n_elements) from `shares`.
        values: (n_frames,) per atom.

    Returns:
        (n_elements,) contributions in the unit of the values, and (n_elements,) whether the compositions
        determine them.
    """
    found, _, rank, _ = np.linalg.lstsq(of_elements, values, rcond=1e-8)
    solution: Floats = np.asarray(found, dtype=np.float64)
    if rank == of_elements.shape[1]:
        return solution, np.ones(solution.shape, dtype=np.bool_)
    null = np.linalg.svd(of_elements)[2][rank:]
    determined: Bools = np.abs(null).max(axis=0) < 1e-8
    return solution, determined
