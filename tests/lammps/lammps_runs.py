"""Running LAMMPS in the tests, and structures between ASE and LAMMPS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers

LMP = Path(sys.executable).with_name("lmp")
MPIRUN = Path(sys.executable).with_name("mpirun")

EV_PER_KCAL = 1 / 23.060549  # the factor that LAMMPS converts potentials with
METAL_PRESSURE = 1.6021765e6  # bar per eV/A^3 as LAMMPS has it (force->nktv2p)


@dataclass
class Run:
    """What a run left behind."""

    code: int
    output: str
    folder: Path

    def error(self) -> str:
        """The text of the error that stopped LAMMPS, in one line."""
        start = self.output.find("ERROR")
        assert start >= 0, self.output[-3000:]
        return " ".join(self.output[start:].split("Last input line")[0].split())

    def values(self, label: str) -> list[np.ndarray]:
        """The numbers of all lines that the script printed as `label number number ...`."""
        lines = [line.split()[1:] for line in self.output.splitlines() if line.startswith(label + " ")]
        return [np.array([float(x) for x in line]) for line in lines]

    def thermo(self) -> list[np.ndarray]:
        """Rows of the thermo tables, one array per run command."""
        tables, rows, width = [], None, 0
        for line in self.output.splitlines():
            words = line.split()
            if words[:1] == ["Step"]:
                rows, width = [], len(words)
            elif rows is not None and line.startswith("Loop time"):
                tables.append(np.array(rows))
                rows = None
            elif rows is not None and len(words) == width:
                rows.append([float(x) for x in words])
        return tables

    def dump(self, name: str) -> list[Dump]:
        """All frames of a text dump, sorted by atom ID."""
        return read_dump(self.folder / name)


@dataclass
class Dump:
    """One frame of a text dump."""

    step: int
    bounds: np.ndarray
    columns: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def array(self, *names: str) -> np.ndarray:
        return np.stack([self.columns[name] for name in names], axis=1)


def read_dump(path: Path) -> list[Dump]:
    lines = path.read_text().splitlines()
    frames, at = [], 0
    while at < len(lines):
        assert lines[at].startswith("ITEM: TIMESTEP")
        step, n = int(lines[at + 1]), int(lines[at + 3])
        bounds = np.array([[float(x) for x in line.split()] for line in lines[at + 5 : at + 8]])
        names = lines[at + 8].split()[2:]
        rows = np.array([[float(x) for x in line.split()] for line in lines[at + 9 : at + 9 + n]])
        rows = rows[rows[:, names.index("id")].argsort()] if n else np.zeros((0, len(names)))
        frames.append(Dump(step, bounds, {name: rows[:, k] for k, name in enumerate(names)}))
        at += 9 + n
    return frames


def lmp(
    script: str,
    folder: Path,
    *,
    ranks: int = 1,
    limit: float = 120.0,
    env: Mapping[str, str | None] | None = None,
    args: Sequence[str] = (),
) -> Run:
    """Run a script with `lmp`, under `mpirun` if ranks > 1, and end all of it when the time is over.

    Args:
        env: variables of the environment; None unsets one.
        args: more arguments of `lmp`.
    """
    (folder / "in.test").write_text(script)
    command = [str(LMP), "-in", "in.test", "-log", "none", "-nocite", *args]
    if ranks > 1:
        command = [str(MPIRUN), "-np", str(ranks), *command]
    wanted = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    environment = {name: value for name, value in wanted.items() if value is not None}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"lmp hangs: no end after {limit} s\n{output[-3000:]}") from None
    return Run(process.returncode, output, folder)


def succeed(script: str, folder: Path, **options) -> Run:
    """A run that must end well."""
    run = lmp(script, folder, **options)
    assert run.code == 0, run.output[-3000:]
    assert "ERROR" not in run.output, run.output[-3000:]
    return run


# --- structures ---------------------------------------------------------------------------------------


def restricted(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """LAMMPS' form of the cell (lower triangular, positive diagonal) and the rotation with x_lammps = x @ rotation."""
    q, r = np.linalg.qr(atoms.cell.array.T)  # cell = r.T @ q.T
    signs = np.sign(np.diag(r))
    return (r * signs[:, None]).T, q * signs[None, :]


def write_data(path: Path, atoms: Atoms, elements: list[str], bounds: np.ndarray | None = None) -> np.ndarray:
    """Write a structure as a LAMMPS data file (atom_style atomic, 17 digits).

    Args:
        bounds: (3, 2) box of a structure that has no cell.

    Returns:
        The rotation (3, 3) from ASE's frame to that of LAMMPS, x_lammps = x @ rotation.
    """
    if bounds is None:
        cell, rotation = restricted(atoms)
        (xhi, yhi, zhi), low = np.diag(cell), np.zeros(3)
        tilts = f"{cell[1, 0]:.17g} {cell[2, 0]:.17g} {cell[2, 1]:.17g} xy xz yz\n"
        if np.abs(cell - np.diag(np.diag(cell))).max() < 1e-12:
            tilts = ""
    else:
        rotation, tilts = np.eye(3), ""
        low, (xhi, yhi, zhi) = bounds[:, 0], bounds[:, 1]
    lines = [
        "structure of a test\n",
        f"{len(atoms)} atoms\n{len(elements)} atom types\n",
        f"{low[0]:.17g} {xhi:.17g} xlo xhi\n{low[1]:.17g} {yhi:.17g} ylo yhi\n{low[2]:.17g} {zhi:.17g} zlo zhi\n{tilts}",
        "Masses\n",
        "\n".join(f"{k + 1} {atomic_masses[atomic_numbers[e]]:.6f}" for k, e in enumerate(elements)) + "\n",
        "Atoms # atomic\n",
    ]
    for k, (symbol, position) in enumerate(zip(atoms.symbols, atoms.positions @ rotation, strict=True)):
        x, y, z = position
        lines.append(f"{k + 1} {elements.index(symbol) + 1} {x:.17g} {y:.17g} {z:.17g}")
    path.write_text("\n".join(lines) + "\n")
    return rotation


def from_dump(frame: Dump, elements: list[str], pbc: bool | tuple[bool, ...] = True) -> Atoms:
    """ASE structure of a dump with id, type and x y z (or xu yu zu)."""
    bounds = frame.bounds
    if bounds.shape[1] == 3:
        xy, xz, yz = bounds[:, 2]
        xlo = bounds[0, 0] - min(0.0, xy, xz, xy + xz)
        xhi = bounds[0, 1] - max(0.0, xy, xz, xy + xz)
        ylo, yhi = bounds[1, 0] - min(0.0, yz), bounds[1, 1] - max(0.0, yz)
        cell = np.array([[xhi - xlo, 0, 0], [xy, yhi - ylo, 0], [xz, yz, bounds[2, 1] - bounds[2, 0]]])
    else:
        cell = np.diag(bounds[:, 1] - bounds[:, 0])
    names = ("xu", "yu", "zu") if "xu" in frame.columns else ("x", "y", "z")
    symbols = [elements[int(t) - 1] for t in frame["type"]]
    return Atoms(symbols, frame.array(*names), cell=cell, pbc=pbc)


def alloy(
    elements: list[str],
    repeat: tuple[int, int, int],
    a: float = 3.22,
    amplitude: float = 0.12,
    seed: int = 5,
    shear: float = 0.0,
) -> Atoms:
    """Rattled random bcc alloy, 2 atoms per cubic cell, sheared into a triclinic box."""
    from ase.build import bulk

    atoms = bulk(elements[0], "bcc", a=a, cubic=True) * repeat
    rng = np.random.default_rng(seed)
    atoms.symbols[:] = [elements[k % len(elements)] for k in rng.permutation(len(atoms))]
    if shear:
        strain = np.eye(3) + shear * np.array([[0.0, 0.3, 0.2], [0.6, 0.05, 0.4], [-0.5, 0.8, -0.1]])
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    atoms.positions += amplitude * rng.uniform(-1, 1, (len(atoms), 3))
    return atoms
