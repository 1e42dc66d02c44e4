"""Virials of other programs as ASE's stress: stress = -virial / volume."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from ase import Atoms

from moecalc.errors import DatasetError
from moecalc.keys import VOIGT
from moecalc.typing import Floats

VIRIAL_KEYS: Final = ("virial", "virials")
"""Names in `atoms.info` under which GAP, NEP and MACE write -dE/d(strain) in eV.

The value is (3, 3), 9 numbers, or 6 in ASE's Voigt order.
"""

# of virials (relative, and in eV) where a frame has both: they are written with few digits
_SAME_VIRIAL: Final = 1e-3


def adopt_virials(frames: list[Atoms]) -> list[Atoms]:
    """Give frames with a virial in `atoms.info` the stress that it means.

    Args:
        frames: changed where they have a virial, results, and no stress yet.

    Raises:
        DatasetError: a virial that is no tensor, or that contradicts the frame's stress or its other virial.
    """
    unread: set[str] = set()
    for index, atoms in enumerate(frames):
        results = None if atoms.calc is None else atoms.calc.results
        if results is None or not atoms.pbc.all() or atoms.cell.rank < 3:
            continue
        for key in VIRIAL_KEYS:
            if key in atoms.info:
                _adopt(results, atoms.info[key], atoms.get_volume(), f"frame {index}: {key}")
        if "stress" not in results:
            unread |= {key for key in atoms.info if key.lower().endswith(("virial", "virials", "stress"))}
    if unread:
        warnings.warn(
            f"{', '.join(sorted(unread))}: not read, frames with it count as frames without stress; expected "
            f"the name stress (eV/A^3, ASE's sign) or virial (eV)",
            stacklevel=2,
        )
    return frames


def with_virials(frames: Sequence[Atoms]) -> list[Atoms]:
    """`adopt_virials` for frames that must not change: those with a virial are copied."""
    kept = []
    for atoms in frames:
        chosen = atoms
        if atoms.calc is not None and not set(VIRIAL_KEYS).isdisjoint(atoms.info):
            chosen = atoms.copy()
            chosen.calc = copy.copy(atoms.calc)
            chosen.calc.results = dict(atoms.calc.results)
        kept.append(chosen)
    return adopt_virials(kept)


def stress_of_virial(value: Any, volume: float, where: str) -> Floats:
    """Stress (6,) in eV/A^3, ASE's order and sign.

    Args:
        value: virial in eV: (3, 3), 9 numbers, or 6 in ASE's Voigt order.
        volume: of the cell in A^3.
        where: names the virial in the message.

    Raises:
        DatasetError: another number of values.
    """
    try:
        virial = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        virial = np.zeros(0)
    if virial.size == 9:
        virial = virial.reshape(3, 3)
        virial = (0.5 * (virial + virial.T))[VOIGT]
    if virial.shape != (6,):
        raise DatasetError(
            f"{where} has {np.size(value)} values, expected 9 (xx xy xz yx ...) or 6 (xx yy zz yz xz xy)"
        )
    return np.asarray(virial / -volume)


def _adopt(results: dict[str, Any], virial: Any, volume: float, where: str) -> None:
    stress = stress_of_virial(virial, volume, where)
    if "stress" in results:
        _compare_stress(results["stress"], stress, volume, where)
    else:
        results["stress"] = stress


def _compare_stress(given: Any, stress: Floats, volume: float, where: str) -> None:
    """Refuse a frame whose stress is not that of its virial."""
    present = np.asarray(given, dtype=float)
    if present.size == 9:
        present = present.reshape(3, 3)[VOIGT]
    difference = np.abs(present - stress).max() * volume
    scale = max(1.0, float(np.abs(stress).max()) * volume)
    if difference <= _SAME_VIRIAL * scale:
        return
    opposite = np.abs(present + stress).max() * volume <= _SAME_VIRIAL * scale
    signs = " (their signs are opposite)" if opposite else ""
    raise DatasetError(
        f"{where} and stress contradict each other by {difference:.3g} eV{signs}, expected "
        f"virial = -stress * volume with ASE's stress: correct or remove one of them"
    )
