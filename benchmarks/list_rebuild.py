"""Time of the host for a new neighbor list of the CUDA kernels: orders, slots, and packing for the one upload.

python benchmarks/list_rebuild.py [--copies 52] [--skin 1.0] [--repeat 10]

The kernels are emulated, so no GPU is needed; what is timed is the same code. The copy to a device comes on top.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description="host time of a list rebuild")
    parser.add_argument("--copies", type=int, default=52, help="of 192 atoms of water (52: 9,984 atoms)")
    parser.add_argument("--skin", type=float, default=1.0, help="Angstrom")
    parser.add_argument("--repeat", type=int, default=10)
    options = parser.parse_args()

    from moecalc import _lib, benchmark, testing
    from moecalc.neighbors import SkinNeighborList

    atoms = benchmark.repeated(benchmark.water(4), options.copies)
    small: dict[str, Any] = {
        "n_dim": 4,
        "e_dim": 4,
        "a_dim": 4,
        "nlayers": 1,
        "neuron": (4,),
        "update_angle": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.moe.pt"
        testing.write_random_package(path, testing.full_size_config(**small))
        model = _lib.load().Evaluator(str(path), "cpu", "float32", "fp32", "cuda-emulation")
    types = np.array([model.elements.index(symbol) for symbol in atoms.symbols])
    pairs, positions = SkinNeighborList(model.cutoff, options.skin).pairs(atoms)
    times = []
    for _ in range(options.repeat):
        model.set_list(types, pairs.edge_index, pairs.edge_shift, pairs.system_index)
        times.append(model.evaluate(positions, atoms.cell.array[None], forces=False)["timings"]["list"])
    n_pairs = pairs.edge_index.shape[1]
    print(
        f"{len(atoms)} atoms, {n_pairs} pairs: first {1e3 * times[0]:.1f} ms, then "
        f"{1e3 * min(times[1:]):.1f} to {1e3 * max(times[1:]):.1f} ms, "
        f"median {1e3 * statistics.median(times[1:]):.1f} ms"
    )


if __name__ == "__main__":
    main()
