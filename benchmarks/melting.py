"""Hot runs that a model must survive, in LAMMPS with the short-range guard.

NVT: NbMoTaW at 3000 K, and liquid Cu at 1500 K.

    python benchmarks/melting.py --ps 50 --folder melting
    python benchmarks/melting.py --ps 50 --folder melting --model my.moe.pt --ranks 2

A run that was interrupted goes on from its last checkpoint when the same command is given again; a finished
one is read, and a larger --ps continues it. Results: a table, `melting.json` in the folder, and exit code 1
if a check fails:

- no atom is lost, and every number of the thermo output is finite;
- the mean temperature of the second half is within 5 % of the target;
- the energy of atoms and thermostat together (econserve) drifts by less than 1 meV/atom per ps and stays
  within 20 meV/atom of the start;
- the potential energy per atom of the last fifth is within 50 meV/atom of that of the fifth before (no
  blow-up).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ase.build import bulk
from ase.data import atomic_masses, atomic_numbers
from rich.console import Console
from rich.table import Table

from moecalc.lammps import mpirun
from moecalc.zbl import guard_radii, lammps_commands

TIMESTEP = 0.001  # ps
THERMO = 100  # steps


@dataclass(frozen=True)
class HotRun:
    """One run: elements in equal shares on a lattice, heated to `start` and held at `target` (K)."""

    name: str
    elements: tuple[str, ...]
    lattice: str
    a: float
    repeat: int
    start: float
    target: float
    melt: float
    """ps at `start` before the run: long enough to lose the crystal; 0 leaves it"""


CASES = (
    HotRun("NbMoTaW, 3000 K", ("Nb", "Mo", "Ta", "W"), "bcc", 3.28, 4, 3000, 3000, 0.0),
    # density of the liquid at 1500 K, 7.9 g/cm^3: 13.4 A^3/atom
    HotRun("liquid Cu, 1500 K", ("Cu",), "fcc", 3.77, 3, 4000, 1500, 5.0),
)

SCRIPT = """
units metal
atom_style atomic
boundary p p p
{begin}
{styles}
neighbor 1.0 bin
timestep {timestep}
thermo {thermo}
thermo_style custom step atoms temp pe etotal econserve press
thermo_modify format float %.12g lost error flush yes
{melt}
fix nvt all nvt temp {target} {target} 0.1
restart {every} run.restart.a run.restart.b
run {steps} upto
write_restart run.restart.end
write_data final.data
"""


def write_start(path: Path, case: HotRun, seed: int = 1) -> int:
    """Data file of the crystal; its number of atoms."""
    atoms = bulk(case.elements[0], case.lattice, a=case.a, cubic=True) * case.repeat
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(len(atoms)) % len(case.elements) + 1
    masses = np.array([atomic_masses[atomic_numbers[e]] for e in case.elements])
    lines = [f"{case.name}\n\n{len(atoms)} atoms\n{len(case.elements)} atom types\n"]
    lines += [
        f"0 {length:.10f} {axis}lo {axis}hi" for axis, length in zip("xyz", atoms.cell.lengths(), strict=True)
    ]
    lines += ["\nMasses\n", *(f"{k} {mass:.6f}" for k, mass in enumerate(masses, start=1))]
    lines += ["\nAtoms # atomic\n"]
    positions = atoms.positions + rng.normal(0, 0.02, (len(atoms), 3))
    lines += [
        f"{k} {kind} {x:.10f} {y:.10f} {z:.10f}"
        for k, (kind, (x, y, z)) in enumerate(zip(kinds, positions, strict=True), start=1)
    ]
    path.write_text("\n".join(lines) + "\n")
    return len(atoms)


def run(case: HotRun, folder: Path, ps: float, model: str, ranks: int, every_ps: float) -> None:
    """Start, continue, or do nothing if the run is long enough.

    Raises:
        RuntimeError: LAMMPS stopped; the message is its error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    melt_steps, steps = round(case.melt / TIMESTEP), round((case.melt + ps) / TIMESTEP)
    found = [folder / f"run.restart.{which}" for which in ("a", "b", "end")]
    newest = max((f for f in found if f.exists()), key=lambda f: f.stat().st_mtime, default=None)
    rows = thermo(folder)
    if newest is not None and newest.name == "run.restart.end" and len(rows) and rows[-1, 0] >= steps:
        return
    styles = lammps_commands(case.elements, guard_radii(case.elements), model)
    if newest is None:
        write_start(folder / "start.data", case)
        begin = "read_data start.data"
        melt = f"velocity all create {2 * case.start} 7281 loop geom\n"
        if melt_steps:
            melt += (
                f"fix melt all nvt temp {case.start} {case.start} 0.1\nrun {melt_steps}\nunfix melt\n"
                f"velocity all scale {case.target}"
            )
    else:
        begin, melt = f"read_restart {newest.name}", ""
    attempt = sum(1 for _ in folder.glob("log.*"))
    script = SCRIPT.format(
        begin=begin, styles=styles, timestep=TIMESTEP, thermo=THERMO, melt=melt, target=case.target,
        every=max(THERMO, round(every_ps / TIMESTEP)), steps=steps,
    )  # fmt: skip
    (folder / "in.run").write_text(script)
    command = [
        str(Path(sys.executable).with_name("lmp")),
        "-in",
        "in.run",
        "-log",
        f"log.{attempt:03d}",
        "-nocite",
    ]
    if ranks > 1:
        command = [str(mpirun()), "-np", str(ranks), *command]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
        raise RuntimeError(
            lines[0] if lines else f"exit code {done.returncode}: {(done.stdout + done.stderr)[-300:]}"
        )


def thermo(folder: Path) -> np.ndarray:
    """(n, 7) rows of all logs by step; where a continued run repeats steps, the later log counts."""
    rows: dict[int, list[float]] = {}
    for log in sorted(folder.glob("log.*")):
        for line in log.read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) == 7 and words[0].isdecimal():
                rows[int(words[0])] = [float(word) for word in words]
    return np.array([rows[step] for step in sorted(rows)]).reshape(len(rows), 7)


def production(case: HotRun, folder: Path) -> np.ndarray:
    """Rows of `thermo` after melting and the first 0.2 ps, which are the thermostat's."""
    rows = thermo(folder)
    return rows[rows[:, 0] >= round((case.melt + 0.2) / TIMESTEP)]


@dataclass
class Outcome:
    """What a run showed."""

    case: str
    n_atoms: int
    ps: float
    temperature: float
    temperature_std: float
    drift: float
    """of econserve, meV/atom per ps"""
    largest: float
    """excursion of econserve, meV/atom"""
    energy_change: float
    """meV/atom, last fifth against the one before"""
    pressure: float
    """mean of the second half, GPa"""
    failures: list[str]


def judge(case: HotRun, rows: np.ndarray, n_atoms: int) -> Outcome:
    """Check the rows of `production`, at least six."""
    time, lost = rows[:, 0] * TIMESTEP, (rows[:, 1] != n_atoms).any()
    half, fifth = rows[len(rows) // 2 :], max(1, len(rows) // 5)
    conserved = 1000 * rows[:, 5] / n_atoms
    # a restart keeps the thermostat's state, so the quantity goes on
    drift = float(np.polyfit(time, conserved, 1)[0])
    energy = 1000 * rows[:, 3] / n_atoms
    outcome = Outcome(
        case=case.name,
        n_atoms=n_atoms,
        ps=float(time[-1] - time[0]),
        temperature=float(half[:, 2].mean()),
        temperature_std=float(half[:, 2].std()),
        drift=drift,
        largest=float(np.abs(conserved - conserved[0]).max()),
        energy_change=float(energy[-fifth:].mean() - energy[-2 * fifth : -fifth].mean()),
        pressure=float(half[:, 6].mean()) / 1e4,
        failures=[],
    )
    checks = (
        (not lost, "atoms were lost"),
        (bool(np.isfinite(rows).all()), "numbers that are not finite"),
        (abs(outcome.temperature / case.target - 1) < 0.05, "temperature"),
        (abs(outcome.drift) < 1, "drift"),
        (outcome.largest < 20, "conserved energy"),
        (abs(outcome.energy_change) < 50, "potential energy"),
    )
    outcome.failures = [name for passed, name in checks if not passed]
    return outcome


def main() -> int:
    """Run what is missing, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description="NbMoTaW at 3000 K and liquid Cu at 1500 K, NVT in LAMMPS with the guard"
    )
    parser.add_argument("--ps", type=float, default=50.0, help="length of each run in ps, after melting")
    parser.add_argument(
        "--folder", type=Path, default=Path("melting"), help="for logs, checkpoints and results"
    )
    parser.add_argument("--model", default="default", help="package, or default")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--checkpoint-ps", type=float, default=1.0, help="time between checkpoints")
    parser.add_argument("--only", choices=["alloy", "copper"], help="one of the two")
    options = parser.parse_args()
    if options.ps <= 0:
        parser.error(f"expected --ps above 0, got {options.ps:g}")
    model = options.model if options.model == "default" else str(Path(options.model).resolve())
    console = Console(highlight=False)
    outcomes = []
    for name, case in zip(("alloy", "copper"), CASES, strict=True):
        if options.only not in {None, name}:
            continue
        folder = options.folder / name
        console.print(f"{case.name}: {options.ps:g} ps in {folder}")
        stopped = ""
        try:
            run(case, folder, options.ps, model, options.ranks, options.checkpoint_ps)
        except RuntimeError as error:
            stopped = str(error)
        n_atoms = len(bulk(case.elements[0], case.lattice, a=case.a, cubic=True)) * case.repeat**3
        rows = production(case, folder)
        if len(rows) < 6:
            outcomes.append(Outcome(case.name, n_atoms, 0.0, *[float("nan")] * 6, [stopped or "too short"]))
            continue
        outcome = judge(case, rows, n_atoms)
        if stopped:
            outcome.failures.append(stopped)
        outcomes.append(outcome)
    table = Table(
        "run", "atoms", "ps", "K", "drift\nmeV/atom/ps", "largest\nmeV/atom", "dE\nmeV/atom", "GPa", "",
        box=None, padding=(0, 1),
    )  # fmt: skip
    for o in outcomes:
        verdict = "[green]ok[/]" if not o.failures else f"[red]{', '.join(o.failures)}[/]"
        table.add_row(
            o.case, str(o.n_atoms), f"{o.ps:.1f}", f"{o.temperature:.0f} ± {o.temperature_std:.0f}",
            f"{o.drift:+.3f}", f"{o.largest:.2f}", f"{o.energy_change:+.1f}", f"{o.pressure:.1f}", verdict,
        )  # fmt: skip
    console.print(table)
    result = {"model": options.model, "ranks": options.ranks, "runs": [asdict(o) for o in outcomes]}
    (options.folder / "melting.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(any(o.failures for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
