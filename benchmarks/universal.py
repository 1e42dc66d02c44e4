"""Memory and start of a universal mixture of experts, full size.

89 elements, 64 experts, of which 8 and a shared one are active.

    python benchmarks/universal.py [PACKAGE]

Without PACKAGE, one of random weights is written to a temporary folder first, by a process of its own. Prints
the time to load it, of three steps of 192-atom water on one thread, and the peak memory of the whole process
(VmHWM).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

WRITE = """
import sys
from ase.data import chemical_symbols
from moecalc.testing import full_size_config, write_random_package
write_random_package(sys.argv[1], full_size_config(chemical_symbols[1:90], n_routed=64, top_k=8), "float32")
"""


def measure(package: Path) -> None:
    """Print times and peaks."""
    from moecalc import MoECalculator
    from moecalc._lib import load
    from moecalc.benchmark import memory, water

    load()  # libraries are not the package's
    print(f"libraries             {memory('VmHWM'):7.0f} MB")
    start = time.perf_counter()
    calculator = MoECalculator(package, device="cpu", threads=1)
    print(f"load   {time.perf_counter() - start:7.2f} s      {memory('VmHWM'):7.0f} MB")
    atoms = water()
    atoms.calc = calculator
    for step in range(3):
        start = time.perf_counter()
        atoms.get_forces()
        print(f"step {step + 1} {time.perf_counter() - start:7.2f} s      {memory('VmHWM'):7.0f} MB")
        atoms.rattle(0.001, seed=step)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        package = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "universal.moe.pt"
        if len(sys.argv) < 2:
            subprocess.run([sys.executable, "-c", WRITE, str(package)], check=True)
        measure(package)
