"""Training data: from extended XYZ (or anything else that ASE reads) to DeePMD-kit's mixed-type NumPy folders, with a held-out split.

Layout of a data set:

    train/<atoms>/, valid/<atoms>/   DeePMD-kit systems, one per number of atoms (format deepmd/npy/mixed)
    valid.extxyz                     the held-out frames once more, for `moecalc report` and for other programs
    split.json                       where every frame went, and the table of the groups

Energies in eV, forces in eV/A, virials in eV: virial = -stress * volume with ASE's stress, so positive when the structure wants to expand.
Elements are numbered by the data set's type_map; DeePMD-kit matches it with that of input.json by name.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moecalc.conditions import (
    CHARGE_RANGE,
    SPIN_RANGE,
    ConditionError,
    charge_and_spin,
    frame_parameters,
    whole_number,
)
from moecalc.errors import MoecalcError
from moecalc.files import check_outputs, describe, display_text, temporary_folder
from moecalc.keys import VOIGT

# problems shown before the rest is only counted
_MAX_LISTED = 5


class DatasetError(MoecalcError):
    """Training data that cannot be used: names the frames and what is missing."""


@dataclass
class GroupSummary:
    """One line of the report: a group of frames (`info["dataset"]`).

    Energies in eV per atom; `max_force` is the largest component in eV/A.
    """

    name: str
    elements: list[str]
    train: int
    valid: int
    atoms: int
    min_energy: float
    max_energy: float
    max_force: float
    with_stress: int


@dataclass
class DatasetReport:
    """What `convert` wrote."""

    type_map: list[str]
    groups: list[GroupSummary]
    seed: int
    validation: float


def read_frames(source: str | Path) -> list[Any]:
    """Frames of a file as ASE `Atoms`; `*.gz` is read as it is.

    Raises:
        DatasetError: missing, empty or unreadable file.
    """
    path = Path(source)
    if not path.is_file():
        raise DatasetError(
            f"{path}: {describe(path)}, expected structures with energies and forces (extended XYZ)"
        )
    try:
        frames = parse_frames(path)
    except MoecalcError as error:
        raise DatasetError(f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001 # ASE's readers raise whatever they meet
        what = describe(path)
        if what is not None and "text" not in what and path.suffix not in {".gz", ".xz", ".traj", ".db"}:
            raise DatasetError(f"{path}: {what}, expected extended XYZ") from None
        raise DatasetError(
            f"{path}: not readable ({type(error).__name__}: {error}), expected extended XYZ"
        ) from None
    if not frames:
        raise DatasetError(f"{path}: no frames in it")
    return frames


def parse_frames(path: Path) -> list[Any]:
    """Frames of a file as ASE `Atoms`, with stresses from `virial=` (`adopt_virials`); raises whatever ASE's readers raise.

    Extended XYZ, also compressed (`.gz`, `.xz`), is read from memory: ASE jumps between frames, and every jump back in a compressed
    file would read it from its beginning.
    """
    from ase.io import read

    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix)
    name = path.stem if unpack is not None else path.name
    if not name.endswith((".xyz", ".extxyz")):
        return adopt_virials(list(read(path, index=":")))
    content = path.read_bytes()
    text = (content if unpack is None else unpack(content)).decode("utf-8")
    # ASE knows `virial` as a matrix only
    text = _SIX_NUMBERS.sub(lambda found: f'virial="{_as_matrix(found[1].split())}"', text)
    return adopt_virials(list(read(io.StringIO(text), index=":", format="extxyz")))


_SIX_NUMBERS = re.compile(r'\bvirial="\s*((?:[-+.\deE]+\s+){5}[-+.\deE]+)\s*"')


def _as_matrix(voigt: Sequence[str]) -> str:
    xx, yy, zz, yz, xz, xy = voigt
    return f"{xx} {xy} {xz} {xy} {yy} {yz} {xz} {yz} {zz}"


VIRIAL_KEYS = ("virial", "virials")
"""Names in `atoms.info` under which GAP, NEP and MACE write -dE/d(strain) in eV: (3, 3), 9 numbers, or 6 in ASE's Voigt order."""

# of virials (relative, and in eV) where a frame has both: they are written with few digits
_SAME_VIRIAL = 1e-3


def adopt_virials(frames: list[Any]) -> list[Any]:
    """Give frames with a virial in `atoms.info` the stress that it means: stress = -virial / volume.

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
            if key not in atoms.info:
                continue
            stress = _stress_of_virial(atoms.info[key], atoms.get_volume(), f"frame {index}: {key}")
            if "stress" not in results:
                results["stress"] = stress
            else:
                _compare_stress(results["stress"], stress, atoms.get_volume(), f"frame {index}: {key}")
        if "stress" not in results:
            unread |= {key for key in atoms.info if key.lower().endswith(("virial", "virials", "stress"))}
    if unread:
        warnings.warn(
            f"{', '.join(sorted(unread))}: not read, frames with it count as frames without stress; expected the name stress "
            f"(eV/A^3, ASE's sign) or virial (eV)",
            stacklevel=2,
        )
    return frames


def _stress_of_virial(value: Any, volume: float, where: str) -> np.ndarray:
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


def _compare_stress(given: Any, stress: np.ndarray, volume: float, where: str) -> None:
    """Refuse a frame whose stress is not that of its virial."""
    present = np.asarray(given, dtype=float)
    if present.size == 9:
        present = present.reshape(3, 3)[VOIGT]
    difference = np.abs(present - stress).max() * volume
    scale = max(1.0, float(np.abs(stress).max()) * volume)
    if difference <= _SAME_VIRIAL * scale:
        return
    opposite = np.abs(present + stress).max() * volume <= _SAME_VIRIAL * scale
    raise DatasetError(
        f"{where} and stress contradict each other by {difference:.3g} eV{' (their signs are opposite)' if opposite else ''}, expected "
        f"virial = -stress * volume with ASE's stress: correct or remove one of them"
    )


def _conditions(atoms: Any) -> dict[str, tuple[float, ...]]:
    """Charge and multiplicity (`info["charge_spin"]`, or `charge` and `spin`) and frame parameters (`fparam`), where a frame has them.

    Raises:
        ConditionError: values that no model can be trained on.
    """
    info = atoms.info
    found: dict[str, tuple[float, ...]] = {}
    pair = None
    if "charge_spin" in info:
        pair = charge_and_spin(info["charge_spin"])
    elif "charge" in info and "spin" in info:
        pair = info["charge"], info["spin"]
    if pair is not None:
        charge, spin = (
            whole_number("charge", pair[0], CHARGE_RANGE),
            whole_number("spin", pair[1], SPIN_RANGE),
        )
        found["charge_spin"] = (float(charge), float(spin))
    if "fparam" in info:
        found["fparam"] = frame_parameters(info["fparam"])
    return found


def _problem(atoms: Any, type_map: Sequence[str]) -> str | None:
    """Why a frame cannot be used, or None."""
    results = {} if atoms.calc is None else atoms.calc.results
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
        _conditions(atoms)
    except ConditionError as error:
        return str(error)
    return None


def check_frames(frames: Sequence[Any], type_map: Sequence[str]) -> None:
    """Refuse frames that cannot be trained on.

    Raises:
        DatasetError: names the frames without energy or forces, not periodic, with other elements or with values that are not finite.
    """
    problems = [(i, problem) for i, atoms in enumerate(frames) if (problem := _problem(atoms, type_map))]
    if not problems:
        return
    listed = "; ".join(f"frame {i}: {problem}" for i, problem in problems[:_MAX_LISTED])
    more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
    raise DatasetError(
        f"{len(problems)} of {len(frames)} frames cannot be used: {listed}{more}. Remove or repair them"
    )


def _group(atoms: Any) -> str:
    return str(atoms.info.get("dataset", "all"))


def split_frames(frames: Sequence[Any], validation: float, seed: int) -> list[int]:
    """Indices of the held-out frames: of each group (`info["dataset"]`) a share of `validation`, drawn with `seed`.

    The draw is stratified: a group's frames are put in the order of their mean absolute force and cut into as many parts of equal size
    as frames are wanted, and each part gives one at random. A few frames then stand for their group; drawn freely, they may happen to be
    all near a crystal, or all from a melt. A group with two frames or more keeps at least one for training and gives at least one,
    unless `validation` is 0.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, atoms in enumerate(frames):
        groups[_group(atoms)].append(i)
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


def _write_systems(folder: Path, frames: Iterable[Any], type_map: Sequence[str]) -> None:
    """DeePMD-kit systems: frames of one system have the same number of atoms, and all or none of them have a virial, a charge, ..."""
    systems: dict[str, list[Any]] = defaultdict(list)
    for atoms in frames:
        given = _conditions(atoms)
        name = f"{len(atoms):04d}"
        name += "" if "stress" in atoms.calc.results else "-nostress"
        name += "-charge" if "charge_spin" in given else ""
        name += f"-fparam{len(given['fparam'])}" if "fparam" in given else ""
        systems[name].append(atoms)
    index = {symbol: i for i, symbol in enumerate(type_map)}
    for name, members in systems.items():
        data: dict[str, list[Any]] = defaultdict(list)
        for atoms in members:
            results = atoms.calc.results
            data["coord"].append(atoms.positions.ravel())
            data["box"].append(atoms.cell.array.ravel())
            data["energy"].append(results["energy"])
            data["force"].append(np.asarray(results["forces"]).ravel())
            data["real_atom_types"].append([index[symbol] for symbol in atoms.get_chemical_symbols()])
            for key, numbers in _conditions(atoms).items():
                data[key].append(numbers)
            if "stress" in results:
                stress = atoms.get_stress(voigt=False)
                data["virial"].append(-(stress * atoms.get_volume()).ravel())
        target = folder / name / "set.000"
        target.mkdir(parents=True)
        for key, values in data.items():
            np.save(
                target / f"{key}.npy",
                np.array(values, dtype=np.int32 if key == "real_atom_types" else np.float64),
            )
        # the types proper are in real_atom_types; this file only tells the number of atoms
        (folder / name / "type.raw").write_text("0\n" * len(members[0]), encoding="utf-8")
        (folder / name / "type_map.raw").write_text("\n".join(type_map) + "\n", encoding="utf-8")


def _summarize(frames: Sequence[Any], held_out: set[int]) -> list[GroupSummary]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, atoms in enumerate(frames):
        groups[_group(atoms)].append(i)
    table = []
    for name in sorted(groups):
        members = groups[name]
        energies = [frames[i].calc.results["energy"] / len(frames[i]) for i in members]
        symbols: Counter[str] = Counter()
        for i in members:
            symbols.update(frames[i].get_chemical_symbols())
        valid = sum(i in held_out for i in members)
        table.append(
            GroupSummary(
                name=name,
                elements=sorted(symbols),
                train=len(members) - valid,
                valid=valid,
                atoms=sum(symbols.values()),
                min_energy=float(min(energies)),
                max_energy=float(max(energies)),
                max_force=max(float(np.abs(frames[i].calc.results["forces"]).max()) for i in members),
                with_stress=sum("stress" in frames[i].calc.results for i in members),
            )
        )
    return table


def convert(
    source: str | Path,
    out: str | Path,
    validation: float = 0.1,
    seed: int = 0,
    elements: Sequence[str] | None = None,
    force: bool = False,
) -> DatasetReport:
    """Convert a file of DFT frames into training and validation data for `dp --pt train`.

    Args:
        source: file that ASE reads with energies and forces, extended XYZ as a rule.
        out: folder to write.
        validation: share of each group to hold out.
        seed: of the split.
        elements: type_map; None takes the elements of the data, by atomic number.
        force: replace what an earlier call wrote in `out`.

    Raises:
        DatasetError: frames that cannot be used, a share outside [0, 1), or a folder that exists.
    """
    from ase.data import atomic_numbers
    from ase.io import write

    out = Path(out)
    check_outputs([("the folder's file", out / "valid.extxyz")], [("file of frames", source)])
    if not 0.0 <= validation < 1.0:
        raise DatasetError(f"validation = {validation}, expected a share from 0 to below 1")
    written = [out / name for name in ("train", "valid", "valid.extxyz", "split.json")]
    if any(path.exists() for path in written) and not force:
        raise DatasetError(f"{out} has a data set already: choose another folder, or replace it with --force")
    frames = read_frames(source)
    found = {symbol for atoms in frames for symbol in atoms.get_chemical_symbols()}
    type_map = (
        sorted(found, key=lambda symbol: atomic_numbers[symbol]) if elements is None else list(elements)
    )
    unknown = [symbol for symbol in type_map if atomic_numbers.get(symbol, 0) == 0]
    if unknown or len(set(type_map)) != len(type_map):
        raise DatasetError(f"elements {', '.join(type_map)}, expected different chemical symbols")
    check_frames(frames, type_map)
    held_out = split_frames(frames, validation, seed)
    chosen = set(held_out)
    report = DatasetReport(type_map, _summarize(frames, chosen), seed, validation)
    content = {"source": display_text(Path(source).name), **asdict(report), "held_out": held_out}
    with temporary_folder(out) as folder:
        new = folder / "new"
        new.mkdir()
        _write_systems(new / "train", (a for i, a in enumerate(frames) if i not in chosen), type_map)
        if held_out:
            _write_systems(new / "valid", (frames[i] for i in held_out), type_map)
            text = io.StringIO()
            write(text, [frames[i] for i in held_out], format="extxyz")
            (new / "valid.extxyz").write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")
        (new / "split.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _replace_data_set(new, out, [path.name for path in written])
    return report


def _replace_data_set(new: Path, out: Path, names: Sequence[str]) -> None:
    """Move a data set that is complete to its place; one that is there goes away only then."""
    if not out.exists():
        new.rename(out)
        return
    old = new.with_name("old")
    old.mkdir()
    moved: list[str] = []
    try:
        for name in reversed(names):  # split.json first: without it, a data set is not whole
            if (out / name).exists():
                (out / name).rename(old / name)
                moved.append(name)
        for name in names:
            if (new / name).exists():
                (new / name).rename(out / name)
    except BaseException:
        for name in moved:
            if (out / name).exists():
                (out / name).rename(new / f"{name}.unused")
            (old / name).rename(out / name)
        raise
