"""The numbers of a report, as pydantic models: what `--json` writes and what the templates show."""

from __future__ import annotations

import itertools
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from ase import units
from pydantic import BaseModel

from moecalc import __version__
from moecalc.benchmark import machine
from moecalc.report.composition import contributions, shares
from moecalc.report.elastic import NAMES, constants
from moecalc.report.evaluation import Evaluation
from moecalc.typing import Bools, Floats, Ints
from moecalc.zbl import guard_radii

_WORST = 10  # frames listed
_BINS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, math.inf)  # eV/A


class Errors(BaseModel):
    """Errors of one quantity: model minus reference, in the unit of its field."""

    n: int
    mae: float
    rmse: float
    mean: float
    largest: float
    scale: float
    """To compare the errors with: root mean square of the reference, of energies their standard deviation."""
    r2: float | None
    """1 - sum of squared errors / sum of squared deviations of the reference.

    None where the reference does not vary.
    """


class Group(BaseModel):
    """One group of frames."""

    name: str
    n_frames: int
    n_atoms: int
    elements: list[str]
    energy: Errors
    """meV/atom"""
    energy_shifted: Errors
    """meV/atom without the group's mean error: what is left if the element energies were refitted."""
    forces: Errors
    """eV/A, components"""
    stress: Errors | None
    """GPa, components"""


class Element(BaseModel):
    """Forces on one element."""

    name: str
    n_frames: int
    n_atoms: int
    forces: Errors
    shift: float | None
    """meV/atom: share of the element in the energy errors of all frames, by least squares.

    None if the data cannot tell.
    """


class ForceBin(BaseModel):
    """Force errors by the length of the reference force."""

    low: float
    high: float | None
    n_atoms: int
    mean: float
    """mean length of the reference forces, eV/A"""
    median_error: float
    """median length of the error vector, eV/A"""
    p90_error: float


class Worst(BaseModel):
    """A frame with large errors."""

    index: int
    group: str
    formula: str
    energy: float
    """meV/atom"""
    force: float
    """length of the largest error of a force, eV/A"""


class ElasticConstants(BaseModel):
    """Constants in GPa of one crystal, reference and model from the same cells by the same fit."""

    cell: str
    group: str
    lattice: str
    n_cells: int
    names: list[str]
    reference: list[float]
    model: list[float]


class CrystalState(BaseModel):
    """Equation of state of the lowest crystal of an element."""

    element: str
    lattice: str
    frame: int
    volume_reference: float
    volume_model: float | None
    modulus_model: float | None


class PairDistance(BaseModel):
    """Shortest distance of a pair of elements in the data, Angstrom, and the guard for it."""

    pair: str
    shortest: float
    inner: float
    outer: float


class Speed(BaseModel):
    """Throughput of the evaluation in batches, neighbor search included."""

    atom_steps_per_s: float
    machine: str
    device: str
    dtype: str
    threads: int


class Report(BaseModel):
    """Everything in numbers. Units are in the descriptions of the fields."""

    model: str
    metadata: dict[str, Any]
    data: str
    key: str
    limit: int | None
    created: str
    moecalc: str
    n_read: int
    n_frames: int
    n_atoms: int
    skipped: list[tuple[int, str]]
    total: Group
    groups: list[Group]
    elements: list[Element]
    force_bins: list[ForceBin]
    worst_energy: list[Worst]
    worst_force: list[Worst]
    elastic: list[ElasticConstants]
    crystals: list[CrystalState]
    pairs: list[PairDistance]
    absent_pairs: list[str]
    """pairs of the data's elements that never come within 4 A of each other"""
    speed: Speed
    remarks: list[str]


def summarise(evaluation: Evaluation) -> Report:
    """All numbers of a report."""
    ev = evaluation
    n_atoms, groups = ev.n_atoms, np.array(ev.groups)
    per_atom = 1000 * (ev.energy_model - ev.energy) / n_atoms
    difference = ev.forces_model - ev.forces
    length = np.linalg.norm(difference, axis=1)
    largest = np.maximum.reduceat(length, np.cumsum([0, *n_atoms[:-1]]))
    names = list(dict.fromkeys(ev.groups))
    shifts = _element_shifts(ev, per_atom)
    elements = []
    for name in sorted(set(ev.symbols.tolist())):
        rows = ev.symbols == name
        elements.append(
            Element(
                name=name,
                n_frames=len(np.unique(ev.frame_of_atom[rows])),
                n_atoms=int(rows.sum()),
                forces=_errors(ev.forces_model[rows], ev.forces[rows]),
                shift=shifts.get(name),
            )
        )
    symbols = [e.name for e in elements]
    guard = guard_radii(symbols, ev.shortest)
    return Report(
        model=str(ev.calculator.metadata.get("name", ev.calculator.path.name)),
        metadata=ev.calculator.metadata,
        data=Path(ev.source).name,
        key=ev.key,
        limit=ev.limit,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        moecalc=__version__,
        n_read=ev.n_read,
        n_frames=len(ev.frames),
        n_atoms=int(n_atoms.sum()),
        skipped=ev.skipped,
        total=_group(ev, "all", np.ones(len(groups), dtype=bool)),
        groups=[_group(ev, name, groups == name) for name in names],
        elements=elements,
        force_bins=_force_bins(np.linalg.norm(ev.forces, axis=1), length),
        worst_energy=_worst(ev, np.argsort(-np.abs(per_atom)), per_atom, largest),
        worst_force=_worst(ev, np.argsort(-largest), per_atom, largest),
        elastic=_elastic(ev),
        crystals=[
            CrystalState(
                element=c.element,
                lattice=c.lattice,
                frame=c.frame,
                volume_reference=c.volume,
                volume_model=_finite(c.eos.volume),
                modulus_model=_finite(c.eos.modulus),
            )
            for c in ev.crystals
        ],
        pairs=[
            PairDistance(pair="-".join(p), shortest=d, inner=guard[p][0], outer=guard[p][1])
            for p, d in ev.shortest.items()
        ],
        absent_pairs=["-".join(p) for p in guard if p not in ev.shortest],
        speed=Speed(
            atom_steps_per_s=float(n_atoms.sum()) / ev.seconds,
            machine=machine().cpu,
            device=ev.calculator.device,
            dtype=ev.calculator.dtype,
            threads=ev.calculator.n_threads,
        ),
        remarks=ev.remarks,
    )


def _errors(model: Floats, reference: Floats, *, center: bool = False) -> Errors:
    """Errors over all numbers of two arrays.

    Args:
        model: any shape.
        reference: the same.
        center: whether the scale is the deviation from the mean (energies, whose origin means nothing).
    """
    d = (model - reference).ravel()
    deviation = reference.ravel() - reference.mean()
    spread = float((deviation**2).sum())
    # rounding of a constant is no variation
    varies = spread > 1e-16 * max(1.0, float((reference**2).sum()))
    return Errors(
        n=d.size,
        mae=float(np.abs(d).mean()),
        rmse=float(np.sqrt((d**2).mean())),
        mean=float(d.mean()),
        largest=float(np.abs(d).max()),
        scale=float(np.sqrt((deviation**2).mean() if center else (reference**2).mean())),
        r2=1 - float((d**2).sum()) / spread if varies else None,
    )


def _group(ev: Evaluation, name: str, rows: Bools) -> Group:
    atoms = rows[ev.frame_of_atom]
    reference = 1000 * ev.energy[rows] / ev.n_atoms[rows]
    model = 1000 * ev.energy_model[rows] / ev.n_atoms[rows]
    with_stress = rows & np.isfinite(ev.stress).all(axis=1)
    return Group(
        name=name,
        n_frames=int(rows.sum()),
        n_atoms=int(atoms.sum()),
        elements=sorted(set(ev.symbols[atoms].tolist())),
        energy=_errors(model, reference, center=True),
        energy_shifted=_errors(model - (model - reference).mean(), reference, center=True),
        forces=_errors(ev.forces_model[atoms], ev.forces[atoms]),
        stress=_errors(ev.stress_model[with_stress] / units.GPa, ev.stress[with_stress] / units.GPa)
        if with_stress.any()
        else None,
    )


def _element_shifts(ev: Evaluation, per_atom: Floats) -> dict[str, float]:
    """Energy error per atom of each element; without those that the compositions do not determine."""
    elements = sorted(set(ev.symbols.tolist()))
    found, determined = contributions(shares(ev.frames, elements), per_atom)
    return {e: float(x) for e, x, known in zip(elements, found, determined, strict=True) if known}


def _force_bins(reference: Floats, error: Floats) -> list[ForceBin]:
    bins = []
    for low, high in itertools.pairwise(_BINS):
        rows = (reference >= low) & (reference < high)
        if rows.any():
            bins.append(
                ForceBin(
                    low=low,
                    high=_finite(high),
                    n_atoms=int(rows.sum()),
                    mean=float(reference[rows].mean()),
                    median_error=float(np.median(error[rows])),
                    p90_error=float(np.quantile(error[rows], 0.9)),
                )
            )
    return bins


def _worst(ev: Evaluation, order: Ints, energy: Floats, force: Floats) -> list[Worst]:
    return [
        Worst(
            index=ev.indices[k],
            group=ev.groups[k],
            formula=ev.frames[k].get_chemical_formula(),
            energy=float(energy[k]),
            force=float(force[k]),
        )
        for k in order[:_WORST].tolist()
    ]


def _elastic(ev: Evaluation) -> list[ElasticConstants]:
    return [
        ElasticConstants(
            cell=s.family.label,
            group=s.group,
            lattice=s.lattice,
            n_cells=len(s.family.indices),
            names=list(NAMES),
            reference=list(constants(s.family.curves(s.reference))),
            model=list(constants(s.family.curves(s.model))),
        )
        for s in ev.strained
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
