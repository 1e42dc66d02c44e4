"""A model on reference frames, evaluated in batches."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from moecalc.calculator import MoECalculator
from moecalc.conditions import ConditionError
from moecalc.data import group_of, read_frames, with_virials
from moecalc.errors import ElementError, MoecalcError, StructureError
from moecalc.files import display_text
from moecalc.report.elastic import (
    EquationOfStateResult,
    StrainedCells,
    equation_of_state,
    find_strained_cells,
    lattice_name,
)
from moecalc.typing import Floats, Ints
from moecalc.zbl import Pair, shortest_distances

Reference = tuple[float, Floats, Floats]
"""Energy, forces and stress of a frame."""

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it is done and how much there is."""


def _silent(_what: str, _done: int, _total: int) -> None:
    pass


BATCH = 400
"""Atoms per evaluation: beyond, batches are not faster and only take memory."""

RELAXED = 0.05
"""eV/A: largest force of a frame that is taken for a crystal at rest."""
MAX_CRYSTAL = 128
"""Most atoms of such a crystal."""


@dataclass
class Strained:
    """A family of strained cells, and the stresses (n, 6) of reference and model in ASE's order and units."""

    family: StrainedCells
    group: str
    lattice: str
    reference: Floats
    model: Floats


@dataclass
class Crystal:
    """The lowest-energy crystal of an element in the data, and the model's equation of state for it."""

    element: str
    lattice: str
    frame: int
    volume: float
    eos: EquationOfStateResult
    # volume and energy (per atom) of frames that are the same crystal, scaled
    reference: tuple[Floats, Floats]


@dataclass
class Evaluation:
    """Reference and model on the same frames.

    Energies are totals in eV, forces eV/A, stress eV/A^3 in ASE's order and sign.

    Attributes:
        calculator: the model.
        source: file of the frames, empty where they came from memory.
        frames: (n,) structures, in the order of the file.
        indices: (n,) their places in the file, from 0.
        groups: (n,) names of their groups.
        energy, energy_model: (n,).
        forces, forces_model: (n_atoms, 3) of all frames, one after the other.
        stress, stress_model: (n, 6); NaN where the data have none or the frame is not periodic.
        n_read: frames in the file.
        shortest, strained, crystals: of all frames, whatever `limit` is.
        skipped: places in the file of frames with elements that the model lacks, and the elements.
        seconds: time of the evaluation.
        remarks: warnings of the calculator.
    """

    calculator: MoECalculator
    source: str
    key: str
    limit: int | None
    frames: list[Atoms]
    indices: list[int]
    groups: list[str]
    energy: Floats
    energy_model: Floats
    forces: Floats
    forces_model: Floats
    stress: Floats
    stress_model: Floats
    n_read: int
    skipped: list[tuple[int, str]]
    seconds: float
    shortest: dict[Pair, float]
    strained: list[Strained] = field(default_factory=list)
    crystals: list[Crystal] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @cached_property
    def n_atoms(self) -> Ints:
        """(n,) atoms of each frame."""
        return np.array([len(atoms) for atoms in self.frames])

    @cached_property
    def frame_of_atom(self) -> Ints:
        """(n_atoms,) frame that each row of the forces belongs to."""
        return np.repeat(np.arange(len(self.frames)), self.n_atoms)

    @cached_property
    def symbols(self) -> NDArray[np.str_]:
        """(n_atoms,) element of each row of the forces."""
        return np.concatenate([np.array(atoms.get_chemical_symbols()) for atoms in self.frames])


def evaluate(
    model: str | Path | MoECalculator | None,
    data: str | Path | Sequence[Atoms],
    *,
    key: str = "dataset",
    limit: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    skip_unknown: bool = False,
    progress: Progress = _silent,
) -> Evaluation:
    """Evaluate a model on frames with reference energies and forces.

    Args:
        model: package file, None for the default model, or a calculator (then `device` and `dtype` do not
            matter).
        data: file or folder (see `moecalc.data.read_frames`), or frames.
        key: name in `atoms.info` of the group that a frame belongs to; frames without it form the group
            "all".
        limit: largest number of frames per group, taken evenly from the file; None is all.
        device: see `MoECalculator`.
        dtype: see `MoECalculator`.
        skip_unknown: leave out frames with elements that the model lacks (they are listed) instead of
            raising.
        progress: told how far it is.

    Raises:
        MoecalcError: no file, no frames, a broken folder, or frames without energy or forces.
        ElementError: elements that the model lacks or was not trained on.
        StructureError: a frame that cannot be evaluated.
    """
    if limit is not None and limit < 1:
        raise MoecalcError(f"expected a limit of at least 1 frame per group, got {limit}")
    calculator = model if isinstance(model, MoECalculator) else MoECalculator(model, device, dtype)
    progress("reading", 0, 1)
    everything = with_virials(data) if not isinstance(data, str | Path) else read_frames(data)
    if not everything:
        raise MoecalcError("expected frames, got none")
    known = set(calculator.metadata["trained_elements"])
    skipped = [
        (k, " ".join(sorted(missing)))
        for k, a in enumerate(everything)
        if (missing := set(a.symbols) - known)
    ]
    if skipped and not skip_unknown:
        unknown = _joined({element for _, names in skipped for element in names.split()})
        raise ElementError(
            f"{len(skipped)} of {len(everything)} frames, the first is {skipped[0][0]}, have elements that "
            f"the model was not trained on ({unknown}; it knows {_joined(known)}): leave them out with "
            "--skip-unknown"
        )
    out = {k for k, _ in skipped}
    usable = [k for k in range(len(everything)) if k not in out and len(everything[k])]
    chosen = _choose(usable, everything, key, limit)
    if not chosen:
        raise MoecalcError(f"no frame is left to evaluate, {len(skipped)} of {len(everything)} were left out")
    frames = [everything[k] for k in chosen]
    values = {k: _reference(everything[k], k) for k in usable}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        results, seconds = _evaluate(calculator, frames, chosen, "evaluating", progress)
        progress("distances", 0, 1)
        shortest = shortest_distances(everything[k] for k in usable)
        strained = _strained(calculator, everything, usable, values, key, progress)
        crystals = _crystals(calculator, everything, usable, values, progress)
    no_stress = np.full(6, np.nan)
    return Evaluation(
        calculator=calculator,
        source=display_text(data) if isinstance(data, str | Path) else "",
        key=key,
        limit=limit,
        frames=frames,
        indices=chosen,
        groups=[group_of(a, key) for a in frames],
        energy=np.array([values[k][0] for k in chosen]),
        energy_model=np.array([r["energy"] for r in results]),
        forces=np.concatenate([values[k][1] for k in chosen]),
        forces_model=np.concatenate([r["forces"] for r in results]),
        stress=np.array([values[k][2] for k in chosen]),
        stress_model=np.array([r.get("stress", no_stress) for r in results]),
        n_read=len(everything),
        skipped=skipped,
        seconds=seconds,
        shortest=shortest,
        strained=strained,
        crystals=crystals,
        remarks=sorted({str(w.message) for w in caught}),
    )


def _choose(candidates: list[int], frames: list[Atoms], key: str, limit: int | None) -> list[int]:
    groups: dict[str, list[int]] = {}
    for k in candidates:
        groups.setdefault(group_of(frames[k], key), []).append(k)
    chosen: list[int] = []
    for members in groups.values():
        n = len(members) if limit is None else min(limit, len(members))
        chosen += [members[round(x)] for x in np.linspace(0, len(members) - 1, n)]
    return sorted(chosen)


def _reference(atoms: Atoms, index: int) -> Reference:
    """Energy, forces and stress (NaN if there is none) that come with a frame."""
    results = {} if atoms.calc is None else atoms.calc.results
    missing = [name for name in ("energy", "forces") if name not in results]
    if missing:
        raise MoecalcError(
            f"frame {index} has no {' and no '.join(missing)}: expected reference data, in extxyz energy=... "
            "in the comment line and a column forces:R:3"
        )
    energy, forces = float(results["energy"]), np.asarray(results["forces"], dtype=float)
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        raise MoecalcError(
            f"frame {index}: expected finite energy and forces, got {energy} and forces with NaN or infinity"
        )
    stress = np.full(6, np.nan)
    if atoms.pbc.all() and "stress" in results:
        stress = np.asarray(atoms.get_stress(), dtype=float)
    return energy, forces, stress


def _evaluate(
    calculator: MoECalculator, frames: list[Atoms], indices: list[int], action: str, progress: Progress
) -> tuple[list[dict[str, Floats]], float]:
    """Results in the order of the frames, and the time of all but the first batch, scaled up to all."""
    order = sorted(range(len(frames)), key=lambda k: bool(frames[k].pbc.all()))
    batches: list[list[int]] = []
    for k in order:  # stress is defined for none or for all of a batch
        if (
            not batches
            or sum(len(frames[i]) for i in batches[-1]) + len(frames[k]) > BATCH
            or frames[batches[-1][0]].pbc.all() != frames[k].pbc.all()
        ):
            batches.append([])
        batches[-1].append(k)
    found: dict[int, dict[str, Floats]] = {}
    times = []
    for batch in batches:
        properties = ["energy", "forces", *(["stress"] if frames[batch[0]].pbc.all() else [])]
        start = time.perf_counter()
        try:
            answers = calculator.calculate_batch([frames[k] for k in batch], properties)
        except (StructureError, ConditionError):
            raise _culprit(calculator, [(indices[k], frames[k]) for k in batch], properties) from None
        times.append(time.perf_counter() - start)
        found.update(zip(batch, answers, strict=True))
        progress(action, len(found), len(frames))
    results = [found[k] for k in range(len(frames))]
    total = sum(times)
    if len(batches) > 1:  # the first one warms up
        n_atoms = [sum(len(frames[k]) for k in batch) for batch in batches]
        total = sum(times[1:]) * sum(n_atoms) / sum(n_atoms[1:])
    return results, total


def _culprit(
    calculator: MoECalculator, members: list[tuple[int, Atoms]], properties: list[str]
) -> MoecalcError:
    """The error of the frame that made a batch fail, by its place in the file."""
    for index, atoms in members:
        try:
            calculator.calculate_batch([atoms], properties)
        except (StructureError, ConditionError) as error:
            return type(error)(f"frame {index}: {str(error).removeprefix('structure 0: ')}")
    return StructureError(f"frames {members[0][0]} to {members[-1][0]} cannot be evaluated together")


def _strained(
    calculator: MoECalculator,
    frames: list[Atoms],
    usable: list[int],
    values: Mapping[int, Reference],
    key: str,
    progress: Progress,
) -> list[Strained]:
    """Strained crystals with the model's stresses."""
    candidates = [frames[k] for k in usable]
    stress = np.array([values[k][2] for k in usable])
    found = []
    for family in find_strained_cells(candidates, stress):
        members = [candidates[k] for k in family.indices]
        indices = [usable[k] for k in family.indices]
        results, _ = _evaluate(calculator, members, indices, f"strained {family.label}", progress)
        unstrained = members[int(np.abs(family.deformation).max(axis=(1, 2)).argmin())]
        found.append(
            Strained(
                family=family,
                group=group_of(members[0], key),
                lattice=lattice_name(unstrained),
                reference=stress[family.indices],
                model=np.array([r["stress"] for r in results]),
            )
        )
    return found


def _crystals(
    calculator: MoECalculator,
    frames: list[Atoms],
    usable: list[int],
    values: Mapping[int, Reference],
    progress: Progress,
) -> list[Crystal]:
    """The lowest crystal of every element that has one at rest in the data."""
    candidates: dict[str, list[int]] = {}
    for k in usable:
        atoms = frames[k]
        pure = len(set(atoms.symbols)) == 1 and len(atoms) <= MAX_CRYSTAL and atoms.pbc.all()
        if pure and np.abs(values[k][1]).max() < RELAXED:
            candidates.setdefault(str(atoms.symbols[0]), []).append(k)
    found = []

    def per_atom(k: int) -> float:
        return values[k][0] / len(frames[k])

    def energy(structures: list[Atoms]) -> list[float]:
        return [calculator.calculate_batch([a], ["energy"])[0]["energy"] for a in structures]

    for n, element in enumerate(sorted(candidates)):
        progress("equations of state", n, len(candidates))
        members = candidates[element]
        best = min(members, key=per_atom)
        lattice = lattice_name(frames[best])
        if not lattice:
            continue
        scaled = [k for k in members if _is_scaled(frames[k], frames[best])]
        found.append(
            Crystal(
                element=element,
                lattice=lattice,
                frame=best,
                volume=frames[best].get_volume() / len(frames[best]),
                eos=equation_of_state(frames[best], energy),
                reference=(
                    np.array([frames[k].get_volume() / len(frames[k]) for k in scaled]),
                    np.array([per_atom(k) for k in scaled]),
                ),
            )
        )
    return found


def _is_scaled(atoms: Atoms, crystal: Atoms) -> bool:
    """Whether a frame is a crystal with all lengths multiplied by one number."""
    if len(atoms) != len(crystal):
        return False
    scale = (atoms.get_volume() / crystal.get_volume()) ** (1 / 3)
    cells = bool(np.abs(atoms.cell.array - scale * crystal.cell.array).max() < 1e-3)
    shift = atoms.get_scaled_positions() - crystal.get_scaled_positions()
    return cells and bool(np.abs(shift - np.round(shift)).max() < 1e-3)


def _joined(names: set[str]) -> str:
    return " ".join(sorted(names))
