"""The files of a run: a log in CSV, a trajectory in extended XYZ, and where to cut them to go on."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from moecalc.errors import MoecalcError
from moecalc.typing import Floats

TRAJECTORY: Final = "trajectory.extxyz"
LOG: Final = "log.csv"
SETTINGS: Final = "settings.json"  # of molecular dynamics


class Records:
    """An open log and an open trajectory.

    Args:
        log, trajectory: files, opened to append.
        columns: names of the log's columns.
    """

    def __init__(self, log: io.BufferedIOBase, trajectory: io.BufferedIOBase, columns: Sequence[str]) -> None:
        self._log = log
        self._trajectory = trajectory
        self._columns = columns
        if log.tell() == 0:
            self._log.write((",".join(columns) + "\n").encode())

    def add_row(self, row: Mapping[str, Any]) -> None:
        """A line of the log; None is an empty field."""
        fields = ["" if row[name] is None else f"{row[name]:.10g}" for name in self._columns]
        self._log.write((",".join(fields) + "\n").encode())

    def add_frame(self, atoms: Atoms, **info: Any) -> None:
        """A frame of the trajectory, with the results of its calculator."""
        self._trajectory.write(frame_text(atoms, **info).encode())

    def sizes(self) -> dict[str, int]:
        """Bytes of both files, after what was added is in them."""
        self._log.flush()
        self._trajectory.flush()
        return {LOG: self._log.tell(), TRAJECTORY: self._trajectory.tell()}


def refuse_results(folder: Path) -> None:
    """Raise MoecalcError if a folder has a log or a trajectory, which a new one would replace."""
    found = [name for name in (LOG, TRAJECTORY) if (folder / name).exists()]
    if found:
        raise MoecalcError(
            f"{folder} has results ({found[0]}): choose another folder with -o, or overwrite them with "
            "--force"
        )


@contextmanager
def open_records(
    folder: Path, columns: Sequence[str], sizes: Mapping[str, int] | None = None
) -> Iterator[Records]:
    """Log and trajectory of a folder, open to append.

    Args:
        folder: exists.
        columns: of the log.
        sizes: of `Records.sizes`, to cut off what was written later; None: begin anew.

    Raises:
        MoecalcError: a file is shorter than it was, or cannot be written.
    """
    try:
        with ExitStack() as stack:
            files = []
            for name in (LOG, TRAJECTORY):
                path = folder / name
                size = 0 if sizes is None else int(sizes[name])
                if size > 0 and (not path.is_file() or path.stat().st_size < size):
                    raise MoecalcError(
                        f"{path}: expected at least {size} bytes of the run so far, got fewer: restore the "
                        "file, or begin anew with --force"
                    )
                file = stack.enter_context(path.open("ab"))
                file.truncate(size)
                file.seek(size)
                files.append(file)
            yield Records(files[0], files[1], columns)
    except OSError as error:
        raise MoecalcError(f"{folder}: the results were not written ({error.strerror or error})") from error


def frame_text(atoms: Atoms, **info: Any) -> str:
    """A structure with its energy, forces and stress, as extended XYZ."""
    frame = atoms.copy()
    frame.info.update(info)
    results: dict[str, Any] = {
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces(apply_constraint=False),
    }
    if has_volume(atoms):
        results["stress"] = atoms.get_stress(apply_constraint=False)
    frame.calc = SinglePointCalculator(frame, **results)
    frame.set_constraint()
    text = io.StringIO()
    write(text, frame, format="extxyz")
    return text.getvalue()


def has_volume(atoms: Atoms) -> bool:
    """Whether stress and pressure are defined."""
    return bool(atoms.pbc.all()) and atoms.cell.rank == 3


def pressure_of(atoms: Atoms, *, kinetic: bool = False) -> float | None:
    """Pressure, GPa; None where it is undefined.

    Args:
        atoms: with a calculator.
        kinetic: with the part of the moving atoms.
    """
    if not has_volume(atoms):
        return None
    stress = atoms.get_stress(include_ideal_gas=kinetic, apply_constraint=False)
    return -float(stress[:3].mean()) / units.GPa


def read_log(folder: Path) -> dict[str, Floats]:
    """Columns of the log; empty fields are NaN."""
    table = np.genfromtxt(folder / LOG, delimiter=",", names=True, encoding="utf-8")
    table = np.atleast_1d(table)
    return {name: np.asarray(table[name], dtype=float) for name in table.dtype.names or ()}
