"""Steps of DeePMD-kit and of moecalc in turn: agreement, wall and processor time, memory.

    python compare.py CHECKPOINT PACKAGE PYTHON_OF_DEEPMD HEAD [STEPS]      (with moecalc's Python)

PACKAGE: `moecalc package CHECKPOINT --head HEAD --elements O,H`. Both run 192-atom water on one thread, each
in a process of its own; the slower one needs up to 15 GB for 24 layers. Where other programs run, compare the
processor times.
"""

from __future__ import annotations

import inspect
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from moecalc.benchmark import Worker, process_memory, water

CHILD = """
import json, os, runpy, sys, time
import numpy as np
kind, path, head, atoms, process_memory = sys.argv[1:6]
memory = runpy.run_path(process_memory)["memory"]
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # DeePMD-kit talks on standard output

def answer(**found):
    print(json.dumps(found), file=out, flush=True)

data = np.load(atoms)
positions, random = data["positions"], np.random.default_rng(0)
if kind == "deepmd":
    import torch
    from deepmd.infer import DeepPot
    torch.set_num_threads(1)
    model = DeepPot(path, head=head, no_jit=True)
    symbols = model.get_type_map()
    types = [symbols.index(x) for x in data["symbols"]]
    def step():
        e, f, _ = model.eval(positions.reshape(1, -1), data["cell"].reshape(1, 9), types)[:3]
        return float(e.ravel()[0]), f[0]
else:
    from ase import Atoms
    from moecalc import MoECalculator
    atoms = Atoms(list(data["symbols"]), positions, cell=data["cell"], pbc=True)
    atoms.calc = MoECalculator(path, device="cpu", threads=1)
    def step():
        atoms.positions = positions
        return atoms.get_potential_energy(), atoms.get_forces()
answer(ready=True)
for line in sys.stdin:
    positions = positions + 0.001 * random.standard_normal(positions.shape)
    wall, cpu = time.perf_counter(), time.process_time()
    e, f = step()
    times = time.perf_counter() - wall, time.process_time() - cpu
    answer(energy=e, forces=f.tolist(), wall=times[0], cpu=times[1], peak=memory("VmHWM"))
"""


def start(python: str, *args: str) -> Worker:
    """A process that does a step for every line that it gets."""
    command = [python, "-c", CHILD, *args, inspect.getfile(process_memory)]
    return Worker(command, {**os.environ, "OMP_NUM_THREADS": "1"})


def main(checkpoint: str, package: str, python: str, head: str, steps: str = "5") -> None:
    """Print the table."""
    atoms = water()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "water.npz")
        np.savez(
            path, positions=atoms.positions, cell=atoms.cell.array, symbols=np.array(list(atoms.symbols))
        )
        children = {"deepmd-kit": start(python, "deepmd", checkpoint, head, path)}
        children["moecalc"] = start(sys.executable, "moecalc", package, head, path)
        rounds = [{name: child.ask() for name, child in children.items()} for _ in range(int(steps) + 1)]
    for child in children.values():
        child.end()
    for name in children:
        wall, cpu = (statistics.median(x[name][key] for x in rounds[1:]) for key in ("wall", "cpu"))
        print(f"{name:10} {wall:8.3f} s wall {cpu:8.3f} s processor {rounds[-1][name]['peak']:6.0f} MB")
    a, b = rounds[-1]["deepmd-kit"], rounds[-1]["moecalc"]
    forces = np.array(a["forces"])
    print(f"energy deviation {abs(a['energy'] - b['energy']) / abs(a['energy']):.1e} relative")
    print(f"force deviation  {np.abs(forces - b['forces']).max() / np.abs(forces).max():.1e} of the largest")


if __name__ == "__main__":
    main(*sys.argv[1:])
