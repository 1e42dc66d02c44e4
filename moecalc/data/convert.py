"""`moecalc convert`: frames of any format to DeePMD-kit's mixed-type NumPy folders, with a held-out split.

Layout of a data set:

    train/<atoms>/, valid/<atoms>/   DeePMD-kit systems, one per number of atoms (format deepmd/npy/mixed)
    valid.extxyz                     the held-out frames once more, for `moecalc report` and others
    split.json                       where every frame went, and the table of the groups

Energies in eV, forces in eV/A, virials in eV: virial = -stress * volume with ASE's stress, so positive when
the structure wants to expand. Elements are numbered by the data set's type_map; DeePMD-kit matches it with
that of input.json by name.
"""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from ase.io import write

from moecalc.data.frames import check_frames, group_of, read_frames, split_frames
from moecalc.data.systems import write_systems
from moecalc.errors import DatasetError
from moecalc.files import check_outputs, display_text, temporary_folder


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


def _summarize(frames: Sequence[Atoms], held_out: set[int]) -> list[GroupSummary]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, atoms in enumerate(frames):
        groups[group_of(atoms)].append(i)
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
    """Convert DFT frames into training and validation data for `dp --pt train`.

    Args:
        source: frames with energies and forces, see `moecalc.data.read_frames`; extended XYZ as a rule.
        out: folder to write.
        validation: share of each group to hold out.
        seed: of the split.
        elements: type_map; None takes the elements of the data, by atomic number.
        force: replace what an earlier call wrote in `out`.

    Raises:
        DatasetError: frames that cannot be used, a share outside [0, 1), or a folder that exists or holds the
        source.
    """
    out, source = Path(out), Path(source)
    written = [out / name for name in ("train", "valid", "valid.extxyz", "split.json")]
    _check_folder(out, written, source, force=force)
    if not 0.0 <= validation < 1.0:
        raise DatasetError(f"validation = {validation}, expected a share from 0 to below 1")
    frames = read_frames(source)
    type_map = _type_map(frames, elements)
    check_frames(frames, type_map)
    held_out = split_frames(frames, validation, seed)
    report = DatasetReport(type_map, _summarize(frames, set(held_out)), seed, validation)
    with temporary_folder(out) as folder:
        new = folder / "new"
        new.mkdir()
        _write_data_set(new, frames, held_out, type_map)
        content = {"source": display_text(source.name), **asdict(report), "held_out": held_out}
        (new / "split.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _replace_data_set(new, out, [path.name for path in written])
    return report


def _check_folder(out: Path, written: Sequence[Path], source: Path, *, force: bool) -> None:
    """Refuse to write over the source, or over a data set unless that is meant."""
    check_outputs([("the folder's file", out / "valid.extxyz")], [("file of frames", source)])
    existing = [path for path in written if path.exists()]
    if existing and not force:
        raise DatasetError(f"{out} has a data set already: choose another folder, or replace it with --force")
    read = source.resolve()
    for path in existing:
        if path.resolve().is_relative_to(read) or read.is_relative_to(path.resolve()):
            raise DatasetError(
                f"{path} is part of what is read, {source}, and would be replaced: choose another folder to "
                "write"
            )


def _type_map(frames: Sequence[Atoms], elements: Sequence[str] | None) -> list[str]:
    """The elements as given, or those of the frames by atomic number."""
    found = sorted({int(z) for atoms in frames for z in set(atoms.numbers)})
    type_map = [chemical_symbols[z] for z in found] if elements is None else list(elements)
    unknown = [symbol for symbol in type_map if atomic_numbers.get(symbol, 0) == 0]
    if unknown or len(set(type_map)) != len(type_map):
        raise DatasetError(f"elements {', '.join(type_map)}, expected different chemical symbols")
    return type_map


def _write_data_set(
    folder: Path, frames: Sequence[Atoms], held_out: Sequence[int], type_map: Sequence[str]
) -> None:
    chosen = set(held_out)
    write_systems(folder / "train", (a for i, a in enumerate(frames) if i not in chosen), type_map)
    if held_out:
        valid = [frames[i] for i in held_out]
        write_systems(folder / "valid", valid, type_map)
        text = io.StringIO()
        write(text, valid, format="extxyz")
        (folder / "valid.extxyz").write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")


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
