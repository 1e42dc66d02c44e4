"""The page of a run: what was run, what came of it, and what cannot be told from it, with the reason."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import ase
import numpy as np
from ase import Atoms

from moecalc import __version__
from moecalc.calculator import MoECalculator
from moecalc.dynamics import figures
from moecalc.dynamics.analysis import (
    energy_conservation,
    mean_squared_displacement,
    radial_distribution,
    read_second_half,
)
from moecalc.dynamics.settings import MDSettings
from moecalc.errors import PackageError
from moecalc.files import display_text, write_text
from moecalc.package.metadata import Metadata
from moecalc.page import NotComputed, Section, drawing, render_page, significant
from moecalc.page.routing import draw_routing, routing_of, routing_table
from moecalc.page.structure import draw_structure
from moecalc.typing import Floats

_ENSEMBLES: Final = {
    "nve": "nve: velocity Verlet",
    "nvt": "nvt: stochastic velocity rescaling (ase.md.bussi.Bussi)",
    "npt": "npt: Langevin dynamics with a barostat (ase.md.langevinbaoab.LangevinBAOAB)",
}
_CONSERVED: Final = {"nve": "total energy", "nvt": "total energy less the heat of the thermostat"}


@dataclass(frozen=True)
class FinishedRun:
    """A run that came to its end.

    Attributes:
        atoms: the last structure.
        calculator: the model.
        settings: of the run.
        folder: with its files.
        log: columns of the log.
        timestep: fs.
        package, structure: as they were given.
        device, dtype, threads: as they were given.
    """

    atoms: Atoms
    calculator: MoECalculator
    settings: MDSettings
    folder: Path
    log: Mapping[str, Floats]
    timestep: float
    package: str | Path | None
    structure: str | Path
    device: str
    dtype: str | None
    threads: int | None

    @property
    def targets(self) -> tuple[float | None, float | None]:
        """Temperature (K) and pressure (GPa) that are kept; None where they are not."""
        settings = self.settings
        return (
            None if settings.ensemble == "nve" else settings.temperature,
            settings.pressure if settings.ensemble == "npt" else None,
        )

    @property
    def command(self) -> str:
        """The command that does this run."""
        words = ["moecalc", "md", display_text(self.package or "default"), display_text(self.structure)]
        words += ["-o", display_text(self.folder)]
        for option in fields(MDSettings):
            value = getattr(self.settings, option.name)
            if value != option.default or option.name == "ensemble":
                text = f"{value:g}" if isinstance(value, float) else str(value)
                words += [f"--{option.name.replace('_', '-')}", text]
        for name, value in (("device", self.device), ("dtype", self.dtype), ("threads", self.threads)):
            if value not in {None, "auto"}:
                words += [f"--{name}", str(value)]
        return shlex.join(words)


def write_md_page(run: FinishedRun, path: Path) -> None:
    """Write the page. The same run gives the same file.

    Raises:
        MoecalcError: the file cannot be written.
    """
    n_frames = run.settings.steps // run.settings.every + 1
    with drawing():
        frames = read_second_half(run.folder, n_frames, len(run.atoms))
        sections = [
            _thermodynamics(run),
            _conservation(run),
            _distances(frames),
            _motion(run, frames),
            _structure(run),
            _routing(run),
        ]
        text = render_page(
            "moecalc.dynamics",
            "md.html.j2",
            formula=run.atoms.get_chemical_formula("metal"),
            n_atoms=len(run.atoms),
            settings=run.settings,
            time=run.settings.steps * run.timestep / 1000,
            timestep=run.timestep,
            model=_name(run),
            cards=_cards(run),
            facts=_facts(run),
            sections=sections,
        )
    write_text(path, text)


def _name(run: FinishedRun) -> str:
    return str(run.calculator.metadata.get("name", run.calculator.path.name))


def _cards(run: FinishedRun) -> list[tuple[str, str]]:
    """Numbers at the top: means of the second half."""
    log = run.log
    half = slice(len(log["step"]) // 2, None)

    def mean(column: str) -> str:
        values = log[column][half]
        return f"{significant(values.mean())} ± {significant(values.std(), 2)}"

    cards = [(mean("temperature_K"), "K, temperature")]
    if np.isfinite(log["pressure_GPa"]).all():
        cards.append((mean("pressure_GPa"), "GPa, pressure"))
    energy = log["potential_eV"][half].mean() / len(run.atoms)
    cards.append((f"{energy:.4f}", "eV/atom, potential energy"))
    try:
        drift = energy_conservation(log, len(run.atoms)).slope
    except NotComputed:
        pass
    else:
        cards.append((f"{drift:.3g}", "meV/atom/ps, drift of the conserved energy"))
    return cards


def _facts(run: FinishedRun) -> list[tuple[str, str]]:
    atoms, settings, metadata = run.atoms, run.settings, run.calculator.metadata
    elements = sorted(set(atoms.symbols))
    cell = "none" if atoms.cell.rank == 0 else ", ".join(f"{x:.4g}" for x in atoms.cell.cellpar())
    source = metadata.get("source", {})
    rows = [
        (
            "structure",
            f"{display_text(Path(run.structure).name)}: {len(atoms)} atoms, {atoms.symbols.formula:metal}",
        ),
        ("cell", f"{cell} (Å, degrees; at the end), periodic along {_directions(atoms)}"),
        ("package", f"{display_text(run.calculator.path.name)}: {_name(run)}"),
        ("elements", f"{' '.join(elements)} here, {' '.join(metadata['elements'])} in the package"),
        ("checkpoint", f"{source.get('file', '')}, SHA-256 {source.get('sha256', '')}"),
        ("precision", f"{run.calculator.dtype} on {run.calculator.device}"),
        ("ensemble", _ENSEMBLES[settings.ensemble]),
        ("temperature", f"{settings.temperature:g} K{'' if run.targets[0] else ', of new velocities'}"),
    ]
    if run.targets[0] is not None:
        rows.append(("thermostat", f"time constant {settings.thermostat_time:g} fs"))
    if run.targets[1] is not None:
        rows.append(
            (
                "barostat",
                f"{settings.pressure:g} GPa, {settings.cell}, time constant {settings.barostat_time:g} fs",
            )
        )
    rows += [
        ("steps", f"{settings.steps:,} of {run.timestep:g} fs; seed {settings.seed}"),
        ("output", f"a frame every {settings.every} steps, a line of the log every {settings.log_every}"),
        ("versions", f"moecalc {__version__}, ASE {ase.__version__}"),
        ("cite", metadata.get("citation", "")),
        ("command", run.command),
    ]
    return [(name, value) for name, value in rows if value]


def _directions(atoms: Atoms) -> str:
    return " ".join(axis for axis, periodic in zip("abc", atoms.pbc, strict=True) if periodic) or "nothing"


def _thermodynamics(run: FinishedRun) -> Section:
    section = Section("Thermodynamics", "thermodynamics")
    curves = figures.md_curves(run.log, len(run.atoms), *run.targets)
    section.pictures = figures.draw_thermo(run.log["time_ps"], curves)
    section.notes.append(
        "Energies are those of the start taken off. Dashed: what thermostat and barostat aim at."
        if run.targets[0]
        else "Energies are those of the start taken off."
    )
    names = {curve.name for curve in curves}
    if "pressure" not in names:
        section.omitted.append(
            "Pressure and volume: left out, they need a structure that is periodic in all directions."
        )
    elif "volume" not in names:
        section.omitted.append("Volume: left out, it does not change in this run.")
    return section


def _conservation(run: FinishedRun) -> Section:
    section = Section("Energy conservation", "conservation")

    def fill(section: Section) -> None:
        found = energy_conservation(run.log, len(run.atoms))
        name = _CONSERVED[run.settings.ensemble]
        section.pictures.append(figures.draw_conservation(found, name))
        section.notes.append(
            f"The {name} should not change. A line fitted to all of the run drifts by "
            f"{found.slope:.3g} meV/atom/ps, which is {found.slope * found.times[-1]:.3g} meV/atom over "
            f"{found.times[-1]:.4g} ps; the rest scatters around it by {found.scatter:.3g} meV/atom."
        )

    section.add(fill)
    return section


def _distances(frames: list[Atoms]) -> Section:
    section = Section("Distances", "distances")

    def fill(section: Section) -> None:
        found = radial_distribution(frames)
        section.pictures = figures.draw_distribution(found)
        note = f"Radial distribution functions g(r), the mean of {found.n_frames} frames of the second half."
        if found.half_width < found.distances[-1]:
            note += (
                f" Beyond the dashed line, {found.half_width:.2f} Å, half the width of the cell, atoms see "
                "several images of one another."
            )
        section.notes.append(note)
        section.header = ("pair", "first peak (Å)", "shortest distance (Å)")
        section.rows = [
            (pair, "–" if (peak := found.first_peak(pair)) is None else f"{peak:.2f}", f"{shortest:.3f}")
            for pair, shortest in found.shortest.items()
        ]

    section.add(fill)
    return section


def _motion(run: FinishedRun, frames: list[Atoms]) -> Section:
    section = Section("Motion", "motion")

    def fill(section: Section) -> None:
        found = mean_squared_displacement(frames, fixed=bool(run.atoms.constraints))
        section.pictures.append(figures.draw_displacement(found))
        section.notes.append(
            f"Mean squared displacement between two of {found.n_frames} frames of the second half, over all "
            "starts. Where it is a straight line, a sixth of its slope is the diffusion coefficient; in a "
            "crystal it stays flat."
        )

    section.add(fill)
    return section


def _structure(run: FinishedRun) -> Section:
    section = Section("Last structure", "structure")
    section.pictures.append(draw_structure(run.atoms, f"Structure after {run.settings.steps:,} steps"))
    section.notes.append("Parallel projection. final.extxyz has the coordinates.")
    return section


def _routing(run: FinishedRun) -> Section:
    section = Section("Experts", "experts")

    def fill(section: Section) -> None:
        elements = sorted(set(run.atoms.symbols))
        try:
            metadata = routing_of(Metadata.model_validate(run.calculator.metadata), elements)
            header, rows = routing_table(metadata)
        except PackageError as error:
            raise NotComputed(f"Routing: left out, {error}.") from None
        section.pictures = draw_routing(metadata)
        section.header, section.rows = header, rows
        section.notes.append(
            "Which routed experts (rows) the elements of this run use, and with which weights. Expert "
            "numbers have a meaning within one gate only. Shared experts, of weight 1 for every element, are "
            "not shown."
        )

    section.add(fill)
    return section
