"""Steps of DeePMD-kit and of moecalc in turn: agreement, wall and processor time, memory.

    python compare.py CHECKPOINT PACKAGE PYTHON_OF_DEEPMD HEAD [STEPS]      (with moecalc's Python)

PACKAGE: `moecalc package CHECKPOINT --head HEAD --elements O,H`. Both run 192-atom water on one thread, each in a process
of its own; the slower one needs up to 15 GB for 24 layers. Where other programs run, compare the processor times.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

CHILD = """
import json, sys, time
import numpy as np
kind, path, head, atoms = sys.argv[1:5]
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
print("ready", flush=True)
for line in sys.stdin:
    positions = positions + 0.001 * random.standard_normal(positions.shape)
    wall, cpu = time.perf_counter(), time.process_time()
    e, f = step()
    times = time.perf_counter() - wall, time.process_time() - cpu
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
    print(json.dumps({"energy": e, "forces": f.tolist(), "wall": times[0], "cpu": times[1], "peak": peak}), flush=True)
"""


def start(python: str, *args: str) -> subprocess.Popen[str]:
    """A process that does a step for every line that it gets."""
    child = subprocess.Popen(
        [python, "-c", CHILD, *args],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "ready":
            return child
    raise SystemExit(f"{python} ended early")


def ask(child: subprocess.Popen[str]) -> dict:
    """One step."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return json.loads(child.stdout.readline())


def main(checkpoint: str, package: str, python: str, head: str, steps: str = "5") -> None:
    """Print the table."""
    from moecalc.bench import water

    atoms = water()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "water.npz")
        np.savez(
            path, positions=atoms.positions, cell=atoms.cell.array, symbols=np.array(list(atoms.symbols))
        )
        children = {"deepmd-kit": start(python, "deepmd", checkpoint, head, path)}
        children["moecalc"] = start(sys.executable, "moecalc", package, head, path)
        rounds = [{name: ask(child) for name, child in children.items()} for _ in range(int(steps) + 1)]
    for child in children.values():
        child.terminate()
    for name in children:
        wall, cpu = (statistics.median(x[name][key] for x in rounds[1:]) for key in ("wall", "cpu"))
        print(f"{name:10} {wall:8.3f} s wall {cpu:8.3f} s processor {rounds[-1][name]['peak']:6d} MB")
    a, b = rounds[-1]["deepmd-kit"], rounds[-1]["moecalc"]
    forces = np.array(a["forces"])
    print(f"energy deviation {abs(a['energy'] - b['energy']) / abs(a['energy']):.1e} relative")
    print(f"force deviation  {np.abs(forces - b['forces']).max() / np.abs(forces).max():.1e} of the largest")


if __name__ == "__main__":
    main(*sys.argv[1:])
