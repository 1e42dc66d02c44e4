"""DeePMD-kit's model deviation of frames, and its text file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ase import Atoms

from moecalc.ase_conditions import conditions_of
from moecalc.committee import Committee, Deviation, deviation_of
from moecalc.data import group_of, read_frames
from moecalc.data.frames import GROUP
from moecalc.errors import DatasetError, MoecalcError
from moecalc.models import default_model_path
from moecalc.neighbors import SkinNeighborList
from moecalc.runtime import dtype_name, open_model

if TYPE_CHECKING:
    from moecalc._C import Evaluation

_COLUMNS = ("max_devi_v", "min_devi_v", "avg_devi_v", "max_devi_f", "min_devi_f", "avg_devi_f", "devi_e")


class SystemDeviation(NamedTuple):
    """Deviations of the frames of one system."""

    name: str
    frames: list[Deviation]


def model_deviations(
    packages: Sequence[str | Path | None],
    source: str | Path,
    *,
    device: str = "auto",
    dtype: Any = None,
    relative: float | None = None,
    relative_v: float | None = None,
    allow_untrained: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[SystemDeviation]:
    """How far packages disagree about frames.

    Args:
        packages: two or more; None is the model that comes with moecalc.
        source: frames as for `moecalc.data.read_frames`; their energies and forces are not needed.
        device: as for `MoECalculator`.
        dtype: as for `MoECalculator`.
        relative: level of relative deviations of forces, eV/A.
        relative_v: the same of virials, eV per atom.
        allow_untrained: accept elements that a model was not trained on.
        progress: called with what is done, how many and of how many.

    Returns:
        Deviations by system, in the order of the frames. The name of a system is its path, as that of a
        folder of DeePMD-kit, or else its group (`info["dataset"]`).

    Raises:
        MoecalcError: fewer than two packages, or one that cannot be used; a level that is no number of 0 or
            more.
        ElementError: names the frame with an element that a model does not know, or was not trained on.
        DatasetError: frames that cannot be read.
    """
    if len(packages) < 2:
        raise MoecalcError(
            f"expected two or more packages to compare, got {len(packages)}: `moecalc fit` with --seeds 4 "
            "fits some"
        )
    for name, level in (("relative", relative), ("relative_v", relative_v)):
        if level is not None and not (np.isfinite(level) and level >= 0):
            raise MoecalcError(f"expected a level {name} of 0 or more, got {level}")
    network = dtype_name(dtype)
    paths = [default_model_path() if p is None else Path(p).expanduser().resolve() for p in packages]
    committee = Committee([open_model(path, device, network) for path in paths])
    frames = read_frames(source)
    found = []
    for index, atoms in enumerate(frames):
        if progress is not None:
            progress("evaluating", index, len(frames))
        try:
            results = _results(committee, atoms, allow_untrained=allow_untrained)
        except MoecalcError as error:
            raise type(error)(f"frame {index}: {error}") from None
        found.append(deviation_of(results, relative=relative, relative_v=relative_v))
    groups = groupby(zip(frames, found, strict=True), key=lambda pair: _system_of(pair[0], Path(source)))
    return [SystemDeviation(name, [one for _, one in members]) for name, members in groups]


def _system_of(atoms: Atoms, source: Path) -> str:
    """As `dp model-devi` names it, where the frames are folders of DeePMD-kit."""
    if not source.is_dir():
        return group_of(atoms)
    return str(source / atoms.info.get(GROUP, ""))


def _results(committee: Committee, atoms: Atoms, *, allow_untrained: bool) -> list[Evaluation]:
    pairs, positions = SkinNeighborList(committee.cutoff, skin=0.0).pairs(atoms)
    conditions = [[conditions_of(atoms, model.conditions, {})] for model in committee.models]
    cells = atoms.cell.array[None]
    return committee.evaluate(
        pairs, atoms.numbers, positions, cells, conditions, allow_untrained=allow_untrained
    )


def model_devi_text(systems: Sequence[SystemDeviation], *, atomic: bool = False, frequency: int = 1) -> str:
    """The text that `dp model-devi` writes: a header and a line per frame, for each system.

    Args:
        systems: deviations.
        atomic: add the force deviation of each atom.
        frequency: steps between two frames, for the first column.

    Raises:
        DatasetError: frames of different numbers of atoms in one system, with `atomic`.
    """
    lines = []
    for name, frames in systems:
        sizes = sorted({len(frame.of_atoms) for frame in frames})
        if atomic and len(sizes) > 1:
            raise DatasetError(
                f"{name}: expected frames of one number of atoms, got {sizes[0]} to {sizes[-1]}: leave out "
                "--atomic, or give the frames of each size in a file of their own"
            )
        columns = (*_COLUMNS, "atm_devi_f(N)") if atomic else _COLUMNS
        lines.append(f"# {' '.join(name.split())}")
        lines.append(f"# {'step':10s}" + "".join(f"{column:19s}" for column in columns))
        for index, frame in enumerate(frames):
            numbers = np.concatenate([frame[:7], frame.of_atoms]) if atomic else frame[:7]
            lines.append(f"{index * frequency:12d}" + "".join(f"{number:19.6e}" for number in numbers))
    return "\n".join(lines) + "\n"
