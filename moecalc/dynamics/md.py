"""Molecular dynamics by ASE, in a folder that a later call goes on in."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from ase import Atoms, units
from ase.md.bussi import Bussi
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.verlet import VelocityVerlet

from moecalc.ase_conditions import NAMES, PAIR
from moecalc.calculator import MoECalculator
from moecalc.data import read_structure
from moecalc.dynamics.figures import draw_md
from moecalc.dynamics.page import FinishedRun, write_md_page
from moecalc.dynamics.records import (
    LOG,
    SETTINGS,
    TRAJECTORY,
    Records,
    frame_text,
    has_volume,
    open_records,
    pressure_of,
    read_log,
    refuse_results,
)
from moecalc.dynamics.settings import MDSettings, check_cell
from moecalc.errors import MoecalcError, StructureError
from moecalc.files import check_outputs, make_folder, replacing, write_bytes, write_text
from moecalc.typing import Floats

STATE: Final = "state.npz"
FINAL: Final = "final.extxyz"
PICTURE: Final = "md.png"
PAGE: Final = "md.html"
COLUMNS: Final = (
    "step",
    "time_ps",
    "potential_eV",
    "kinetic_eV",
    "total_eV",
    "conserved_eV",
    "temperature_K",
    "pressure_GPa",
    "volume_A3",
)
_SAVE_EVERY: Final = 10.0  # seconds
_HOTTEST: Final = 1e5  # K
_SAVED: Final = ("step", "positions", "momenta", "cell", "random", "sizes")
_OF_DYNAMICS: Final[dict[str, tuple[str, ...]]] = {
    "nve": (),
    "nvt": ("transferred_energy",),
    "npt": ("p_eps", "force_eps", "gamma_mod"),  # momentum, force and drag of the cell at the end of a step
}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MDResult:
    """What a run left: means are of the second half of the log."""

    folder: Path
    steps: int
    started_at: int  # the step that an earlier call had reached
    timestep: float  # fs
    temperature: float  # K
    pressure: float | None  # GPa
    drift: float  # of the total energy over the whole run, meV/atom
    seconds_per_step: float


def run_md(
    package: str | Path | None,
    structure: str | Path,
    folder: str | Path,
    settings: MDSettings,
    *,
    device: str = "auto",
    dtype: str | None = None,
    threads: int | None = None,
    force: bool = False,
    page: bool = True,
    progress: Progress = lambda *_: None,
) -> MDResult:
    """Run molecular dynamics; goes on where an earlier call with the same folder stopped.

    Writes to `folder`: `log.csv`, `trajectory.extxyz`, `final.extxyz`, the page `md.html`, `md.png`, and
    `settings.json` and `state.npz`, from which a later call goes on. A run that goes on is the run that was
    not interrupted, but for rounding; more steps prolong it.

    Args:
        package: file, or None for the default model.
        structure: file that ASE reads. Its momenta are used; without any, velocities are drawn.
        folder: made where it does not exist.
        settings: of the run.
        device: as for `MoECalculator`.
        dtype: as for `MoECalculator`.
        threads: as for `MoECalculator`.
        force: begin anew in a folder that has a run.
        page: draw `md.html` and `md.png` at the end.
        progress: called with what happens, the step, and the last step.

    Raises:
        MoecalcError: settings, structure or model are others than those of the folder's run; the folder has
            other results; the atoms fly apart; a file cannot be written.
        StructureError: no such structure, or the model cannot evaluate it.
    """
    out = Path(folder)
    names = (SETTINGS, STATE, LOG, TRAJECTORY, FINAL, PICTURE, PAGE)
    check_outputs([("the run's file", out / name) for name in names], [("structure", structure)])
    progress("reading", 0, settings.steps)
    atoms = read_structure(structure)
    if settings.ensemble == "npt":
        check_cell(atoms, "npt")
        if atoms.constraints:
            raise StructureError(
                "npt moves all atoms, got a structure with fixed ones: use nvt, or free them"
            )
    calculator = MoECalculator(package, device=device, dtype=dtype, threads=threads)
    calculator.get_potential_energy(atoms)  # what the model refuses leaves no folder behind
    description = _describe(settings, atoms, calculator)
    earlier = None if force else _earlier(out, description)
    make_folder(out)
    run = _Run(atoms, calculator, settings, out, earlier)
    if earlier is None:
        (out / STATE).unlink(missing_ok=True)
        write_text(out / SETTINGS, json.dumps(description, indent=1) + "\n")
    result = run.to_the_end(progress)
    if not page:
        return result
    progress("drawing", settings.steps, settings.steps)
    finished = FinishedRun(
        atoms=run.atoms,
        calculator=calculator,
        settings=settings,
        folder=out,
        log=read_log(out),
        timestep=run.timestep,
        package=package,
        structure=structure,
        device=device,
        dtype=dtype,
        threads=threads,
    )
    write_bytes(out / PICTURE, draw_md(finished.log, len(run.atoms), *finished.targets))
    write_md_page(finished, out / PAGE)
    return result


def _describe(settings: MDSettings, atoms: Atoms, calculator: MoECalculator) -> dict[str, Any]:
    """What must be the same when a run goes on; the number of steps need not be."""
    described = asdict(settings)
    del described["steps"]
    start = hashlib.sha256()
    arrays = (atoms.numbers, atoms.positions, atoms.cell.array, atoms.get_momenta(), atoms.pbc)
    for array in (*arrays, atoms.get_masses()):
        start.update(np.ascontiguousarray(array).tobytes())
    conditions = {name: np.ravel(atoms.info[name]).tolist() for name in (*NAMES, PAIR) if name in atoms.info}
    start.update(repr((conditions, [one.todict() for one in atoms.constraints])).encode())
    return described | {
        "structure_sha256": start.hexdigest(),
        "model": calculator.metadata.get("name", calculator.path.name),
        "model_sha256": calculator.metadata.get("source", {}).get("sha256", ""),
        "model_digest": calculator.metadata.get("digest", ""),  # one source gives more than one package
        "dtype": calculator.dtype,
    }


def _earlier(folder: Path, description: dict[str, Any]) -> dict[str, Any] | None:
    """The state of the run in a folder; None if there is none that got so far."""
    if not (folder / SETTINGS).is_file():
        refuse_results(folder)
        return None
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        differing = [
            f"{name} {found.get(name)!r}" for name, value in description.items() if found.get(name) != value
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise MoecalcError(
            f"{folder / SETTINGS}: expected the settings of a run ({error}): begin anew with --force"
        ) from None
    if differing:
        raise MoecalcError(
            f"{folder} has a run with {', '.join(differing)}: choose another folder with -o, the same "
            "settings to go on, or --force to begin anew"
        )
    if not (folder / STATE).is_file():
        return None
    try:
        with (folder / STATE).open("rb") as file, np.load(file, allow_pickle=False) as saved:
            return {name: saved[name] for name in (*_SAVED, *_OF_DYNAMICS[description["ensemble"]])}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise MoecalcError(f"{folder / STATE}: damaged ({error}): begin anew with --force") from None


class _Run:
    """A run in progress: the atoms, ASE's dynamics, and the folder."""

    def __init__(
        self,
        atoms: Atoms,
        calculator: MoECalculator,
        settings: MDSettings,
        folder: Path,
        earlier: dict[str, Any] | None,
    ) -> None:
        self.atoms, self.settings, self.folder = atoms, settings, folder
        self.timestep = settings.timestep_of(atoms)
        self.random = np.random.default_rng(settings.seed)
        self.step = self.started_at = 0
        self.sizes: dict[str, int] | None = None
        self.n_degrees = degrees_of_freedom(atoms, settings.ensemble)
        atoms.calc = calculator
        if earlier is None:
            if not atoms.get_momenta().any():
                _draw_velocities(atoms, settings.temperature, self.n_degrees, self.random)
        else:
            atoms.set_cell(earlier["cell"])
            atoms.set_positions(earlier["positions"], apply_constraint=False)
            atoms.set_momenta(earlier["momenta"], apply_constraint=False)
            self.random.bit_generator.state = json.loads(str(earlier["random"]))
            self.step = self.started_at = int(earlier["step"])
            self.sizes = json.loads(str(earlier["sizes"]))
        self.dynamics = self._make_dynamics()
        if earlier is not None:
            for name in _OF_DYNAMICS[settings.ensemble]:
                setattr(self.dynamics, name, earlier[name][()])

    def _make_dynamics(self) -> VelocityVerlet | LangevinBAOAB:  # Bussi is a VelocityVerlet
        settings, timestep = self.settings, self.timestep * units.fs
        if settings.ensemble == "nve":
            return VelocityVerlet(self.atoms, timestep)
        thermostat_time = settings.thermostat_time * units.fs
        if settings.ensemble == "nvt":
            dynamics = Bussi(
                self.atoms,
                timestep,
                temperature_K=settings.temperature,
                taut=thermostat_time,
                rng=self.random,
            )
            # ASE counts three for every atom
            dynamics.target_kinetic_energy *= self.n_degrees / dynamics.ndof
            dynamics.ndof = self.n_degrees
            return dynamics
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using heuristic P_mass")
            return LangevinBAOAB(
                self.atoms,
                timestep,
                temperature_K=settings.temperature,
                externalstress=-settings.pressure * units.GPa,
                hydrostatic=settings.cell == "isotropic",
                T_tau=thermostat_time,
                P_tau=settings.barostat_time * units.fs,
                rng=self.random,
            )

    @property
    def temperature(self) -> float:
        """K, of the degrees of freedom that share the kinetic energy."""
        return _temperature(self.atoms, self.n_degrees)

    def _conserved(self, total: float) -> float | None:
        """What the dynamics should conserve, eV; None: ASE has no such quantity for them."""
        if isinstance(self.dynamics, LangevinBAOAB):
            return None
        return total - self.dynamics.transferred_energy if isinstance(self.dynamics, Bussi) else total

    def to_the_end(self, progress: Progress) -> MDResult:
        """Take the steps that are left, and write what comes at the end."""
        begun = time.perf_counter()
        last = self.settings.steps
        if self.step > last:
            raise MoecalcError(
                f"{self.folder} has a run of {self.step} steps, expected at most the {last} asked for: give "
                "more --steps"
            )
        with open_records(self.folder, COLUMNS, self.sizes) as records:
            if self.step == 0:
                self._record(records)
            saved = time.monotonic()
            while self.step < last:
                self._advance()
                self._record(records)
                progress(f"{self.settings.ensemble} {self.temperature:.0f} K", self.step, last)
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._save(records.sizes())
                    saved = time.monotonic()
            self._save(records.sizes())
        taken = self.step - self.started_at
        seconds = (time.perf_counter() - begun) / max(1, taken)
        write_text(self.folder / FINAL, frame_text(self.atoms, **self._stamp()))
        return self._result(seconds)

    def _advance(self) -> None:
        try:
            self.dynamics.step()
        except StructureError as error:
            raise StructureError(f"step {self.step + 1}: {error}: {_REMEDY}") from error
        self.step += 1
        temperature = self.temperature
        if not temperature < _HOTTEST:
            raise StructureError(
                f"step {self.step}: expected a temperature below {_HOTTEST:g} K, got {temperature:.3g} K: "
                f"{_REMEDY}"
            )

    def _stamp(self) -> dict[str, Any]:
        return {"step": self.step, "time_ps": self.step * self.timestep / 1000}

    def _record(self, records: Records) -> None:
        if self.step % self.settings.log_every == 0:
            potential, kinetic = self.atoms.get_potential_energy(), self.atoms.get_kinetic_energy()
            records.add_row(
                self._stamp()
                | {
                    "potential_eV": potential,
                    "kinetic_eV": kinetic,
                    "total_eV": potential + kinetic,
                    "conserved_eV": self._conserved(potential + kinetic),
                    "temperature_K": self.temperature,
                    "pressure_GPa": pressure_of(self.atoms, kinetic=True),
                    "volume_A3": self.atoms.get_volume() if has_volume(self.atoms) else None,
                }
            )
        if self.step % self.settings.every == 0:
            records.add_frame(self.atoms, **self._stamp())

    def _save(self, sizes: dict[str, int]) -> None:
        """Write what a later call goes on from, after the files that it refers to."""
        with replacing(self.folder / STATE) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                step=self.step,
                positions=self.atoms.positions,
                momenta=self.atoms.get_momenta(),
                cell=self.atoms.cell.array,
                random=json.dumps(self.random.bit_generator.state),
                sizes=json.dumps(sizes),
                **{name: getattr(self.dynamics, name) for name in _OF_DYNAMICS[self.settings.ensemble]},
            )

    def _result(self, seconds: float) -> MDResult:
        log = read_log(self.folder)
        half = len(log["step"]) // 2
        pressure = float(np.mean(log["pressure_GPa"][half:]))
        return MDResult(
            folder=self.folder,
            steps=self.step,
            started_at=self.started_at,
            timestep=self.timestep,
            temperature=float(np.mean(log["temperature_K"][half:])),
            pressure=None if np.isnan(pressure) else pressure,
            drift=1000 * float(log["total_eV"][-1] - log["total_eV"][0]) / len(self.atoms),
            seconds_per_step=seconds,
        )


_REMEDY: Final = (
    "relax the structure first (`moecalc relax`), use a smaller --timestep, or see docs/short_range.md"
)


def _temperature(atoms: Atoms, n_degrees: int) -> float:
    return float(2 * atoms.get_kinetic_energy() / (units.kB * n_degrees))


def degrees_of_freedom(atoms: Atoms, ensemble: str) -> int:
    """Degrees of freedom that share the kinetic energy.

    Without the motion of all atoms together, which forces and the rescaling of velocities leave at zero. A
    structure that comes with such a motion keeps it, and Langevin dynamics makes one: then it counts.

    Raises:
        StructureError: no atom can move.
    """
    n_degrees = int(atoms.get_number_of_degrees_of_freedom())
    if n_degrees < 1:
        raise StructureError("expected atoms that can move, got a structure whose atoms are all fixed")
    if ensemble == "npt" or not _is_free(atoms):
        return n_degrees
    momenta, masses = atoms.get_momenta(), atoms.get_masses()[:, None]
    common = _common_motion(atoms, momenta)
    if (common**2 / masses).sum() > 1e-6 * (momenta**2 / masses).sum():
        return n_degrees
    # a line of atoms turns about two axes
    turns = 0 if atoms.pbc.any() else int(np.linalg.matrix_rank(_inertia(atoms), tol=1e-6))
    return n_degrees - 3 - turns


def _draw_velocities(atoms: Atoms, temperature: float, n_degrees: int, random: np.random.Generator) -> None:
    """Velocities of exactly this temperature; free atoms do not drift, and a cluster does not turn."""
    masses = atoms.get_masses()[:, None]
    momenta = np.sqrt(units.kB * temperature * masses) * random.standard_normal((len(atoms), 3))
    if _is_free(atoms):
        momenta -= _common_motion(atoms, momenta)
    atoms.set_momenta(momenta)  # fixed atoms get none
    found = _temperature(atoms, n_degrees)
    if found > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(temperature / found))


def _is_free(atoms: Atoms) -> bool:
    """Whether atoms can move together, and in other ways too."""
    return not atoms.constraints and len(atoms) > 1


def _common_motion(atoms: Atoms, momenta: Floats) -> Floats:
    """The part of the momenta with which the atoms drift and, in a cluster, turn together."""
    masses = atoms.get_masses()[:, None]
    drift = masses * momenta.sum(0) / masses.sum()
    if atoms.pbc.any():
        return np.asarray(drift)
    arms = atoms.positions - atoms.get_center_of_mass()
    # a line of atoms has no moment about itself
    velocity = np.linalg.pinv(_inertia(atoms), rcond=1e-9) @ np.cross(arms, momenta).sum(0)
    return np.asarray(drift + masses * np.cross(velocity, arms))


def _inertia(atoms: Atoms) -> Floats:
    arms = atoms.positions - atoms.get_center_of_mass()
    masses = atoms.get_masses()[:, None, None]
    return np.asarray((masses * ((arms**2).sum(1)[:, None, None] * np.eye(3) - _outer(arms))).sum(0))


def _outer(vectors: Floats) -> Floats:
    return vectors[:, :, None] * vectors[:, None, :]
