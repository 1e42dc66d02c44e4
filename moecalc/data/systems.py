"""Folders of DeePMD-kit, `deepmd/npy` and `deepmd/npy/mixed`: read and written without DeePMD-kit.

A system is a folder of frames with the same number of atoms:

    type.raw                  type of every atom; in the mixed format only their number counts
    type_map.raw              element of every type
    nopbc                     an empty file, where the frames are not periodic
    set.*/coord.npy           (n_frames, 3 n_atoms), A
    set.*/box.npy             (n_frames, 9), rows are the cell vectors, A
    set.*/energy.npy          (n_frames,), eV
    set.*/force.npy           (n_frames, 3 n_atoms), eV/A
    set.*/virial.npy          (n_frames, 9), -stress * volume with ASE's stress, eV
    set.*/fparam.npy          (n_frames, n) frame parameters
    set.*/charge_spin.npy     (n_frames, 2) charge and multiplicity
    set.*/real_atom_types.npy (n_frames, n_atoms), mixed format: type of every atom, -1 fills up frames
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers
from numpy.typing import NDArray

from moecalc.data.conditions import given_conditions
from moecalc.data.virials import stress_of_virial
from moecalc.errors import DatasetError
from moecalc.files import describe
from moecalc.typing import Floats, Ints

_VIRTUAL: Final = -1  # type of what only fills up a frame
_MANY_TYPES: Final = 2**31
_SMALLEST_VOLUME: Final = 1e-6  # A^3; a cell below it has no volume

# --- reading -------------------------------------------------------------------------------------


def read_systems(folder: Path, group: str) -> list[Atoms]:
    """Frames of a system, or of all systems below a folder, in the order of their paths.

    Args:
        folder: a folder.
        group: name in `atoms.info` for the path of the system in the folder; absent where the folder is the
            system.

    Raises:
        DatasetError: no system or no frame; a file that is missing, or does not fit to the others; an unknown
        element.
    """
    systems = find_systems(folder)
    if not systems:
        raise DatasetError(
            f"{folder}: a folder without systems of DeePMD-kit, expected type.raw and set.*/coord.npy in it "
            "or below"
        )
    frames = []
    for system in systems:
        found = _read_system(system)
        if system != folder:
            for atoms in found:
                atoms.info[group] = system.relative_to(folder).as_posix()
        frames += found
    if not frames:
        raise DatasetError(f"{folder}: no frames in it, expected some in set.*/coord.npy")
    return frames


def find_systems(folder: Path) -> list[Path]:
    """The folder itself and those below it that are systems: they have `type.raw` or a folder `set.*`.

    Links to folders are followed; what several paths lead to counts once.
    """
    found, seen = [], set()
    for path, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if "type.raw" in files or any(name.startswith("set.") for name in folders):
            found.append(Path(path))
    return sorted(found)


@dataclass(frozen=True)
class _System:
    """What the frames of a system share.

    Attributes:
        path: the folder.
        names: element of every type.
        types: (n_atoms,) of the plain format.
        periodic: whether there is no `nopbc`.
    """

    path: Path
    names: list[str]
    types: Ints
    periodic: bool

    def numbers(self, types: Ints, file: Path) -> Ints:
        """Atomic numbers (n_atoms,) of types; `file` has the types."""
        low, high = int(types.min(initial=0)), int(types.max(initial=0))
        if low < 0 or high >= len(self.names):
            raise DatasetError(
                f"{file}: type {low if low < 0 else high}, expected 0 to {len(self.names) - 1}, the lines of "
                f"{self.path / 'type_map.raw'}"
            )
        found = np.array([atomic_numbers.get(name, 0) for name in self.names], dtype=np.int64)[types]
        if not found.all():
            name = self.names[int(types[found == 0][0])]
            raise DatasetError(
                f"{self.path / 'type_map.raw'}: {name!r} is no chemical element, expected symbols: write "
                "that of its element"
            )
        return found


def _read_system(path: Path) -> list[Atoms]:
    """All frames of a system."""
    names = _read_words(path / "type_map.raw", "the element of every type, one a line")
    words = _read_words(path / "type.raw", "the type of every atom, one a line")
    try:
        types = np.array([int(word) for word in words], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DatasetError(f"{path / 'type.raw'}: {error}, expected whole numbers") from None
    system = _System(path, names, types, not (path / "nopbc").exists())
    sets = sorted(part for part in path.glob("set.*") if part.is_dir())
    if not sets:
        raise DatasetError(f"{path}: no folder set.*, expected set.000 with coord.npy")
    return [atoms for part in sets for atoms in _read_set(system, part)]


def _read_words(path: Path, meaning: str) -> list[str]:
    if not path.is_file():
        raise DatasetError(f"{path.parent}: no {path.name}, expected a file with {meaning}")
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: not readable ({error}), expected {meaning}") from None
    if not words:
        raise DatasetError(f"{path}: empty, expected {meaning}")
    return words


def _read_set(system: _System, part: Path) -> list[Atoms]:
    """The frames of one folder `set.*`."""
    n_atoms = len(system.types)
    coord = _load(part / "coord.npy")
    if coord is None:
        raise DatasetError(f"{part}: no coord.npy, expected positions (n_frames, {3 * n_atoms})")
    n_frames = len(coord) if coord.ndim > 1 else -1
    arrays = {"coord": _fitted(coord, part / "coord.npy", n_frames, 3 * n_atoms)}
    widths = {"energy": 1, "force": 3 * n_atoms, "virial": 9, "charge_spin": 2, "fparam": None}
    if system.periodic:
        widths["box"] = 9
    for name, width in widths.items():
        found = _load(part / f"{name}.npy")
        if found is not None:
            arrays[name] = _fitted(found, part / f"{name}.npy", n_frames, width)
    if system.periodic and "box" not in arrays:
        raise DatasetError(
            f"{part}: no box.npy, expected cells (n_frames, 9), or an empty file "
            f"{system.path / 'nopbc'} where nothing is periodic"
        )
    types_file = part / "real_atom_types.npy"
    mixed = _load(types_file)
    if mixed is None:
        types = np.tile(system.types, (n_frames, 1))
        types_file = system.path / "type.raw"
    else:
        given = _fitted(mixed, types_file, n_frames, n_atoms)
        if not (np.abs(given) < _MANY_TYPES).all() or (given != np.round(given)).any():
            raise DatasetError(f"{types_file}: types that are not whole numbers, expected 0, 1, ... or -1")
        types = given.astype(np.int64)
    frames = []
    for index in range(n_frames):
        row = {name: values[index] for name, values in arrays.items()}
        frames.append(_frame(system, row, types[index], types_file, f"{part}: frame {index}"))
    return frames


def _load(path: Path) -> NDArray[Any] | None:
    """An array of numbers, None where there is no file."""
    if not path.exists():
        return None
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        what = describe(path)
        reason = " ".join(str(error).split()) if what is None or "NumPy" in what else what
        raise DatasetError(f"{path}: {reason}, expected a NumPy array of numbers") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
        raise DatasetError(
            f"{path}: expected a NumPy array of numbers, got {getattr(found, 'dtype', 'several')}"
        )
    return found


def _fitted(values: NDArray[Any], path: Path, n_frames: int, width: int | None) -> Floats:
    """(n_frames, width) of an array that may have more dimensions; None: any width."""
    fits = values.ndim > 0 and len(values) == n_frames
    columns = values.size // n_frames if fits and n_frames else width or 0
    if not fits or (width is not None and columns != width):
        expected = f"({'n_frames' if n_frames < 0 else n_frames}, {'n' if width is None else width})"
        raise DatasetError(
            f"{path}: shape {values.shape}, expected {expected} as coord.npy and type.raw have it"
        )
    return values.reshape(n_frames, columns).astype(np.float64)


def _frame(system: _System, row: dict[str, Floats], types: Ints, types_file: Path, where: str) -> Atoms:
    """One frame with its results; `row` has its numbers by the name of the file."""
    real = types != _VIRTUAL
    atoms = Atoms(
        system.numbers(types[real], types_file),
        row["coord"].reshape(-1, 3)[real],
        cell=row["box"].reshape(3, 3) if system.periodic else None,
        pbc=system.periodic,
    )
    if system.periodic and not atoms.cell.volume > _SMALLEST_VOLUME:
        raise DatasetError(
            f"{where} has a cell without volume, expected three vectors in box.npy, or an empty file "
            f"{system.path / 'nopbc'} where nothing is periodic"
        )
    results: dict[str, Any] = {}
    if "energy" in row:
        results["energy"] = float(row["energy"][0])
    if "force" in row:
        results["forces"] = row["force"].reshape(-1, 3)[real]
    if "virial" in row and system.periodic:
        results["stress"] = stress_of_virial(row["virial"], atoms.get_volume(), f"{where}: virial")
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    for name in ("charge_spin", "fparam"):
        if name in row:
            atoms.info[name] = row[name].copy()
    return atoms


# --- writing -------------------------------------------------------------------------------------


def write_systems(folder: Path, frames: Iterable[Atoms], type_map: Sequence[str]) -> None:
    """Systems in the mixed format, one per number of atoms and per what the frames have.

    Args:
        folder: for the systems; made if it is missing.
        frames: that `check_frames` accepts.
        type_map: elements.
    """
    systems: dict[str, list[Atoms]] = defaultdict(list)
    for atoms in frames:
        systems[_system_name(atoms)].append(atoms)
    for name, members in systems.items():
        _write_set(folder / name / "set.000", members, type_map)
        # the types proper are in real_atom_types; this file only tells the number of atoms
        (folder / name / "type.raw").write_text("0\n" * len(members[0]), encoding="utf-8")
        (folder / name / "type_map.raw").write_text("\n".join(type_map) + "\n", encoding="utf-8")


def _system_name(atoms: Atoms) -> str:
    """Frames of one system have as many atoms, and all or none of them a virial, a charge, ..."""
    given = given_conditions(atoms)
    name = f"{len(atoms):04d}"
    name += "" if "stress" in atoms.calc.results else "-nostress"
    name += "-charge" if "charge_spin" in given else ""
    name += f"-fparam{len(given['fparam'])}" if "fparam" in given else ""
    return name


def _write_set(target: Path, members: Sequence[Atoms], type_map: Sequence[str]) -> None:
    index = {symbol: i for i, symbol in enumerate(type_map)}
    data: dict[str, list[Any]] = defaultdict(list)
    for atoms in members:
        results = atoms.calc.results
        data["coord"].append(atoms.positions.ravel())
        data["box"].append(atoms.cell.array.ravel())
        data["energy"].append(results["energy"])
        data["force"].append(np.asarray(results["forces"]).ravel())
        data["real_atom_types"].append([index[symbol] for symbol in atoms.get_chemical_symbols()])
        for key, numbers in given_conditions(atoms).items():
            data[key].append(numbers)
        if "stress" in results:
            stress = atoms.get_stress(voigt=False)
            data["virial"].append(-(stress * atoms.get_volume()).ravel())
    target.mkdir(parents=True)
    for key, values in data.items():
        dtype = np.int32 if key == "real_atom_types" else np.float64
        np.save(target / f"{key}.npy", np.array(values, dtype=dtype))
