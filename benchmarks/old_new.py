"""Two installations of moecalc in alternation: time of a step through the ASE calculator, start, and memory.

    python benchmarks/old_new.py --old OTHER/bin/python [--new PYTHON] [--rounds 9] [--json FILE]

Each installation runs every case in a process of its own, which stays alive and does steps when it is asked
to: both meet the same noise of the machine, round by round. A ratio is the median over the rounds of new over
old. One thread; needs Linux.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk
from rich.console import Console
from rich.table import Table

from moecalc.benchmark import Worker, process_memory, repeated, water

WRITE = """
import sys
from moecalc import testing
config = testing.full_size_config(["O", "H"], n_routed=int(sys.argv[2]))
testing.write_random_package(sys.argv[1], config, "float32", seed=1)
"""

# Runs with either installation, so it uses nothing but what both have, and a file of this one that needs
# nothing. Answers a number of steps with their times, an empty line with results.
CHILD = """
import sys, time
begin = time.perf_counter()
import json, os, runpy, warnings
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import moecalc
from moecalc import MoECalculator
calculator = MoECalculator(sys.argv[1] or None, device="cpu", threads=1, check=False, allow_untrained=True)
ready = time.perf_counter() - begin
import numpy as np
from ase import Atoms

def answer(**found):
    print(json.dumps(found), file=out, flush=True)

warnings.filterwarnings("ignore", message="an atom has .* neighbou?rs")
data = np.load(sys.argv[2])
atoms = Atoms(list(data["symbols"]), data["positions"], cell=data["cell"], pbc=True, calculator=calculator)
random = np.random.default_rng(0)
answer(ready_s=ready, folder=os.path.dirname(moecalc.__file__))
for line in sys.stdin:
    if line.strip():
        wall = cpu = 0.0
        for _ in range(int(line)):
            atoms.positions += random.normal(scale=0.002, size=atoms.positions.shape)
            start = time.perf_counter(), time.process_time()
            atoms.get_forces()
            wall, cpu = wall + time.perf_counter() - start[0], cpu + time.process_time() - start[1]
        answer(wall_s=wall / int(line), cpu_s=cpu / int(line))
    else:
        peak = runpy.run_path(sys.argv[3])["memory"]("VmHWM")
        answer(energy=atoms.get_potential_energy(), forces=atoms.get_forces().ravel().tolist(), peak_mb=peak)
"""


@dataclass(frozen=True)
class Comparison:
    """A model and a structure.

    Attributes:
        structure: makes it.
        n_routed: experts of a full-size model with random weights, 0: dense; None: the default model.
        steps: of one timing.
        large: whether a step takes long, so that fewer rounds must do.
    """

    structure: Callable[[], Atoms]
    n_routed: int | None
    steps: int = 1
    large: bool = False


def copper_nickel() -> Atoms:
    """128 atoms of fcc Cu and Ni in random places."""
    random = np.random.default_rng(1)
    atoms = bulk("Cu", "fcc", a=3.57, cubic=True) * (4, 4, 2)
    atoms.symbols[:] = random.permutation(["Cu", "Ni"] * (len(atoms) // 2))
    atoms.positions += random.normal(scale=0.05, size=atoms.positions.shape)
    return atoms


CASES = {
    "default model, 128 atoms of Cu-Ni": Comparison(copper_nickel, None, steps=20),
    "dense, 192 atoms of water": Comparison(water, 0),
    "MoE 8 routed, 192 atoms of water": Comparison(water, 8),
    "dense, 6144 atoms of water": Comparison(lambda: repeated(water(), 32), 0, large=True),
}


class Installation:
    """A Python and the moecalc that it imports."""

    def __init__(self, python: str, path: str | None, folder: Path) -> None:
        self.python = python
        self.folder = folder  # also where it runs: `python -c` imports from the current folder first
        folder.mkdir()
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.environment.pop("PYTHONPATH", None)
        if path is not None:
            self.environment["PYTHONPATH"] = path

    def package(self, n_routed: int | None) -> str:
        """A package in the format of this installation, the same weights for all; '': the default model."""
        if n_routed is None:
            return ""
        path = self.folder / f"routed{n_routed}.moe.pt"
        if not path.exists():
            command = [self.python, "-c", WRITE, str(path), str(n_routed)]
            subprocess.run(command, check=True, cwd=self.folder, env=self.environment)
        return str(path)

    def start(self, package: str, structure: Path) -> Worker:
        """A process of `CHILD` that has loaded a model."""
        command = [self.python, "-c", CHILD, package, str(structure), inspect.getfile(process_memory)]
        return Worker(command, self.environment, self.folder)


def compare(
    case: Comparison, installations: dict[str, Installation], rounds: int, folder: Path
) -> dict[str, Any]:
    """Times of all rounds, their medians and ratios, and how much the results differ."""
    atoms = case.structure()
    structure = folder / "structure.npz"
    np.savez(
        structure, symbols=np.array(list(atoms.symbols)), positions=atoms.positions, cell=atoms.cell.array
    )
    children = {name: of.start(of.package(case.n_routed), structure) for name, of in installations.items()}
    for child in children.values():
        child.ask("2")
    found: list[dict[str, dict[str, Any]]] = []
    for number in range(rounds):
        order = list(children) if number % 2 == 0 else list(children)[::-1]
        found.append({name: children[name].ask(str(case.steps)) for name in order})
    last = {name: child.ask("") for name, child in children.items()}
    for child in children.values():
        child.end()
    result: dict[str, Any] = {"atoms": len(atoms), "rounds": found}
    for key in ("wall_s", "cpu_s"):
        for name in children:
            result[f"{name}_{key}"] = statistics.median(one[name][key] for one in found)
        result[f"{key}_ratio"] = statistics.median(one["new"][key] / one["old"][key] for one in found)
        best = {name: min(one[name][key] for one in found) for name in children}
        result[f"{key}_best_ratio"] = best["new"] / best["old"]
    for name, child in children.items():
        result[f"{name}_ready_s"] = child.about["ready_s"]
        result[f"{name}_folder"] = child.about["folder"]
        result[f"{name}_peak_mb"] = last[name]["peak_mb"]
    forces = {name: np.array(one["forces"]) for name, one in last.items()}
    result["energy_deviation"] = abs(last["new"]["energy"] / last["old"]["energy"] - 1)
    result["force_deviation"] = float(
        np.abs(forces["new"] - forces["old"]).max() / np.abs(forces["old"]).max()
    )
    return result


def report(results: dict[str, dict[str, Any]]) -> None:
    """The table."""
    columns = ("old ms", "new ms", "ratio", "old cpu ms", "new cpu ms", "ratio", "best")
    table = Table("case", "rounds", *columns, "ready s", "peak MB", "force deviation")
    for name, row in results.items():
        times = []
        for key in ("wall_s", "cpu_s"):
            times += [
                f"{1e3 * row[f'old_{key}']:.1f}",
                f"{1e3 * row[f'new_{key}']:.1f}",
                f"{row[f'{key}_ratio']:.3f}",
            ]
        times.append(f"{row['cpu_s_best_ratio']:.3f}")
        ready = f"{row['old_ready_s']:.2f} {row['new_ready_s']:.2f}"
        peak = f"{row['old_peak_mb']:.0f} {row['new_peak_mb']:.0f}"
        table.add_row(name, str(len(row["rounds"])), *times, ready, peak, f"{row['force_deviation']:.1e}")
    Console(width=max(170, Console().width)).print(table)


def main() -> int:
    """Time the cases, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", required=True, help="Python of the installation to compare with")
    parser.add_argument("--old-path", help="its PYTHONPATH, where moecalc is not installed there")
    parser.add_argument("--new", default=sys.executable, help="Python of the other one (this one)")
    parser.add_argument("--new-path", help="its PYTHONPATH")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--large-rounds", type=int, default=3, help="of the case whose steps take long")
    parser.add_argument("--only", action="append", choices=list(CASES), help="a case; may be repeated")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="moecalc-old-new-") as name:
        folder = Path(name)
        installations = {
            "old": Installation(arguments.old, arguments.old_path, folder / "old"),
            "new": Installation(arguments.new, arguments.new_path, folder / "new"),
        }
        for label in arguments.only or CASES:
            print(label, file=sys.stderr, flush=True)
            case = CASES[label]
            rounds = arguments.large_rounds if case.large else arguments.rounds
            results[label] = compare(case, installations, rounds, folder)
    report(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
