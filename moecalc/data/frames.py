"""The one reader of frames: files that ASE reads and folders of DeePMD-kit, checked and split.

Energies in eV, forces in eV/A, stress in eV/A^3 with ASE's sign and order.
"""

from __future__ import annotations

import gzip
import io
import lzma
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from ase import Atoms

from moecalc.conditions import ConditionError
from moecalc.data.conditions import given_conditions
from moecalc.data.systems import read_systems
from moecalc.data.virials import adopt_virials
from moecalc.errors import DatasetError, MoecalcError, StructureError
from moecalc.files import describe

GROUP: Final = "dataset"
"""Name in `atoms.info` of the group that a frame belongs to."""

_EXPECTED: Final = (
    "reference data: extended XYZ, another file that ASE reads, or a folder of DeePMD-kit systems"
)
_BINARY: Final = {".gz", ".xz", ".traj", ".db"}  # formats of ASE that are no text
_MAX_LISTED: Final = 5  # problems shown before the rest is only counted


def read_frames(source: str | Path) -> list[Atoms]:
    """All frames of a file or folder.

    Args:
        source: a file that ASE reads, also compressed extended XYZ (`.gz`, `.xz`), or a folder that is a
            system of DeePMD-kit or has such systems below it (`deepmd/npy`, plain or mixed). A frame of a
            folder of several systems belongs to the group of its system: `info["dataset"]` is the path of the
            system in the folder.

    Returns:
        Frames with the energy, forces and stress that they have in `calc.results`, not empty. A virial of
        extended XYZ (`virial=`, `virials=`) or of DeePMD-kit is read as the stress that it means.

    Raises:
        DatasetError: missing, empty or unreadable file; a folder without systems, or with a broken one.
    """
    path = Path(source)
    if path.is_dir():
        return read_systems(path, GROUP)
    if not path.is_file():
        raise DatasetError(f"{path}: {describe(path)}, expected {_EXPECTED}")
    try:
        frames = adopt_virials(_parse(path, ":"))
    except MoecalcError as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001 - ASE's readers raise whatever they meet
        raise _unreadable(path, error) from None
    if not frames:
        raise DatasetError(f"{path}: no frames in it, expected {_EXPECTED}")
    return frames


def read_structure(source: str | Path) -> Atoms:
    """One structure: the last one of a file or folder (see `read_frames`), whatever results it has.

    Raises:
        StructureError: unreadable or without atoms.
        DatasetError: a broken folder.
    """
    path = Path(source)
    if path.is_dir():
        found = read_systems(path, GROUP)[-1:]
    elif path.is_file():
        found = _read_last(path)
    else:
        raise StructureError(f"{path}: no such file, expected a structure that ASE reads")
    if not found or len(found[-1]) == 0:
        raise StructureError(f"{path}: expected a structure with atoms, got none")
    return found[-1]


def _read_last(path: Path) -> list[Atoms]:
    try:
        return _parse(path, "-1:")
    except Exception as error:  # noqa: BLE001 - ASE's readers raise whatever they meet
        raise StructureError(f"{path}: not a structure that ASE reads ({_reason(error)})") from None


def _unreadable(path: Path, error: Exception) -> DatasetError:
    """What to say of a file that made a reader of ASE fail."""
    what = describe(path)
    if what is not None and "text" not in what and path.suffix not in _BINARY:
        return DatasetError(f"{path}: {what}, expected {_EXPECTED}")
    return DatasetError(
        f"{path}: not readable, ASE cannot read it as structures ({_reason(error)}): expected {_EXPECTED}"
    )


def _reason(error: Exception) -> str:
    """What a reader of ASE met, in one line; its assertions have no text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _parse(path: Path, index: str) -> list[Atoms]:
    """Frames of a file; raises whatever ASE's readers raise.

    Extended XYZ is read from memory: ASE jumps between frames, and every jump back in a compressed file would
    read it from its beginning.
    """
    from ase.io import read

    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix)
    name = path.stem if unpack is not None else path.name
    if not name.endswith((".xyz", ".extxyz")):
        return list(read(path, index=index))
    content = path.read_bytes()
    text = (content if unpack is None else unpack(content)).decode("utf-8")
    # ASE knows `virial` as a matrix only
    text = _SIX_NUMBERS.sub(lambda found: f'virial="{_as_matrix(found[1].split())}"', text)
    return list(read(io.StringIO(text), index=index, format="extxyz"))


_SIX_NUMBERS: Final = re.compile(r'\bvirial="\s*((?:[-+.\deE]+\s+){5}[-+.\deE]+)\s*"')


def _as_matrix(voigt: Sequence[str]) -> str:
    xx, yy, zz, yz, xz, xy = voigt
    return f"{xx} {xy} {xz} {xy} {yy} {yz} {xz} {yz} {zz}"


def group_of(atoms: Atoms, key: str = GROUP) -> str:
    """Name of the group that a frame belongs to, "all" without one."""
    return str(atoms.info.get(key, "all"))


def check_frames(frames: Sequence[Atoms], type_map: Sequence[str]) -> None:
    """Refuse frames that cannot be trained on.

    Raises:
        DatasetError: names the frames without energy or forces, not periodic, with other elements or with
            values that are not finite.
    """
    problems = [(i, problem) for i, atoms in enumerate(frames) if (problem := _problem(atoms, type_map))]
    if not problems:
        return
    listed = "; ".join(f"frame {i}: {problem}" for i, problem in problems[:_MAX_LISTED])
    more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
    raise DatasetError(
        f"{len(problems)} of {len(frames)} frames cannot be used: {listed}{more}. Remove or repair them"
    )


def _problem(atoms: Atoms, type_map: Sequence[str]) -> str | None:
    """Why a frame cannot be used, or None."""
    if len(atoms) == 0:
        return "no atoms"
    results: dict[str, Any] = {} if atoms.calc is None else atoms.calc.results
    missing = [name for name in ("energy", "forces") if name not in results]
    if missing:
        return f"no {' and no '.join(missing)} (expected by the names energy and forces)"
    if not atoms.pbc.all() or atoms.cell.rank < 3:
        return f"not periodic in all three directions (pbc {atoms.pbc.tolist()})"
    unknown = sorted(set(atoms.get_chemical_symbols()) - set(type_map))
    if unknown:
        return f"elements {', '.join(unknown)}, expected {', '.join(type_map)}"
    values = [
        atoms.positions,
        atoms.cell.array,
        results["energy"],
        results["forces"],
        results.get("stress", 0.0),
    ]
    if not all(np.isfinite(value).all() for value in values):
        return "values that are not finite"
    try:
        given_conditions(atoms)
    except ConditionError as error:
        return str(error)
    return None


def split_frames(frames: Sequence[Atoms], validation: float, seed: int) -> list[int]:
    """Indices of the held-out frames.

    Each group (`info["dataset"]`) gives a share of `validation`, drawn with `seed`.

    The draw is stratified: a group's frames are put in the order of their mean absolute force and cut into as
    many parts of equal size as frames are wanted, and each part gives one at random. A few frames then stand
    for their group; drawn freely, they may happen to be all near a crystal, or all from a melt. A group with
    two frames or more keeps at least one for training and gives at least one, unless `validation` is 0.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, atoms in enumerate(frames):
        groups[group_of(atoms)].append(i)
    held_out: list[int] = []
    for number, name in enumerate(sorted(groups)):
        members = groups[name]
        n = 0
        if validation > 0 and len(members) > 1:
            n = min(max(1, round(validation * len(members))), len(members) - 1)
        random = np.random.default_rng([seed, number])
        members.sort(key=lambda i: float(np.abs(frames[i].calc.results["forces"]).mean()))
        edges = np.linspace(0, len(members), n + 1).round().astype(int)
        held_out += [members[random.integers(a, b)] for a, b in pairwise(edges)]
    return sorted(held_out)
