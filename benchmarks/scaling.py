"""What ranks send each other, counted, and what follows for larger machines (docs/scaling.md).

python benchmarks/scaling.py [--copies 27] [--ranks 1 2 4 8] [--json FILE]
python benchmarks/scaling.py --predict

The first form runs LAMMPS on water and has the pair style count rows, messages and bytes of features that go to
other ranks. The model has the width of node features, the layers and the cutoffs of full-size DPA3; its edge and
angle features, which no rank sends, are narrow to save time. The second form prints predicted times: the counts
as a formula, and machines whose speeds are stated here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

N_DIM = 128  # node features: what travels
N_LAYER = 6
CUTOFF = 6.0  # Angstrom
SKIN = 1.0
DENSITY = 0.1003  # atoms per cubic Angstrom: water
BYTES_PER_ROW = 4 * N_DIM  # float32
EXCHANGES = 2 * (N_LAYER - 1)  # per step: features forward, gradients back

SCRIPT = """
units metal
atom_style atomic
read_data water.data
neighbor {skin} bin
pair_style moe untrained yes device cpu
pair_coeff * * model.moe.pt O H
run 0
"""

DRIVER = """
import json
from moecalc.lammps import lammps

engine = lammps(cmdargs=["-screen", "none", "-log", "none"])
for line in open("in.scaling").read().strip().splitlines():
    engine.command(line)
counts = {name: engine.extract_pair(name) for name in ("exchanges", "messages", "rows", "bytes")}
counts |= {"local": engine.extract_global("nlocal"), "ghosts": engine.extract_global("nghost")}
rank = engine.extract_setting("world_rank")
open(f"counts.{rank}.json", "w").write(json.dumps(counts))
engine.finalize()
"""


# --- counts ------------------------------------------------------------------------------------------


def write_inputs(folder: Path, copies: int) -> None:
    """Water, a model, the input and its driver."""
    from ase.data import atomic_masses, atomic_numbers

    from moecalc import benchmark, testing

    atoms = benchmark.repeated(benchmark.water(4), copies)
    x, y, z = atoms.cell.lengths()
    rows = [
        f"{k + 1} {'OH'.index(s) + 1} {p[0]:.12g} {p[1]:.12g} {p[2]:.12g}"
        for k, (s, p) in enumerate(zip(atoms.symbols, atoms.positions, strict=True))
    ]
    masses = [f"{k + 1} {atomic_masses[atomic_numbers[e]]}" for k, e in enumerate("OH")]
    header = f"water\n\n{len(atoms)} atoms\n2 atom types\n0 {x} xlo xhi\n0 {y} ylo yhi\n0 {z} zlo zhi\n"
    (folder / "water.data").write_text(
        "\n".join([header, "Masses\n", *masses, "\nAtoms # atomic\n", *rows, ""])
    )
    config = testing.full_size_config(["O", "H"], e_dim=8, a_dim=4, neuron=(8, 8))
    testing.write_random_package(folder / "model.moe.pt", config)
    (folder / "in.scaling").write_text(SCRIPT.format(skin=SKIN))
    (folder / "drive.py").write_text(DRIVER)


def count(folder: Path, ranks: int) -> dict[str, float]:
    """What one step sends: sums over the ranks, and the largest share of one."""
    for old in folder.glob("counts.*.json"):
        old.unlink()
    mpirun = Path(sys.executable).with_name("mpirun")
    command = [str(mpirun), "-np", str(ranks), sys.executable, "drive.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(path.read_text()) for path in folder.glob("counts.*.json")]
    if done.returncode != 0 or len(found) != ranks:
        raise SystemExit(f"{ranks} ranks: expected counts of each, got {len(found)}: {done.stderr[-500:]}")
    total = {name: sum(of_rank[name] for of_rank in found) for name in ("local", "messages", "rows", "bytes")}
    return {
        "ranks": ranks,
        "atoms": total["local"],
        "exchanges": found[0]["exchanges"],
        "ghosts": sum(of_rank["ghosts"] for of_rank in found),
        "messages": total["messages"],
        "rows": total["rows"],
        "bytes": total["bytes"],
        "most_bytes": max(of_rank["bytes"] for of_rank in found),
    }


def derived(counts: dict[str, float]) -> dict[str, float]:
    """Of one exchange: a layer's features, or their gradients."""
    exchanges = max(1.0, counts["exchanges"])
    local = counts["atoms"] / counts["ranks"]
    return {
        "rows per atom": counts["rows"] / exchanges / counts["atoms"],
        "by the formula": sent_rows(local, split_edges(int(counts["ranks"]))) / local,
        "bytes per atom": counts["bytes"] / exchanges / counts["atoms"],
        "messages per rank": counts["messages"] / exchanges / counts["ranks"],
        "bytes per atom and step": counts["bytes"] / counts["atoms"],
    }


def show_counts(found: list[dict[str, float]]) -> None:
    """A row per number of ranks."""
    names = list(derived(found[0]))
    table = Table("ranks", "atoms", *names, title="one exchange of features or gradients")
    for counts in found:
        table.add_row(
            f"{counts['ranks']:.0f}",
            f"{counts['atoms']:.0f}",
            *(f"{v:.4g}" for v in derived(counts).values()),
        )
    Console(width=130).print(table)


# --- predictions -------------------------------------------------------------------------------------


def split_edges(ranks: int) -> tuple[int, int, int]:
    """How often a cubic box is cut along its edges, with the least surface."""
    best = (ranks, 1, 1)
    for a in range(1, ranks + 1):
        for b in range(1, ranks // a + 1):
            c = ranks // (a * b)
            if a * b * c == ranks and a + b + c < sum(best):
                best = (a, b, c)
    return best


def sent_rows(local: float, cuts: tuple[int, int, int], shell: float = CUTOFF + SKIN) -> float:
    """Atoms of other ranks within the shell around a rank's part of a cubic box.

    Along an edge that is not cut a rank has itself as its neighbor, and sends nothing.
    """
    edge = (local * math.prod(cuts) / DENSITY) ** (1 / 3)
    lengths = [edge / n for n in cuts]
    cut = [n > 1 for n in cuts]
    sides = sum(2 * shell * math.prod(lengths) / lengths[k] for k in range(3) if cut[k])
    edges = sum(math.pi * shell**2 * lengths[k] for k in range(3) if all(cut[j] for j in range(3) if j != k))
    corners = 4 / 3 * math.pi * shell**3 if all(cut) else 0.0
    return DENSITY * (sides + edges + corners)


def partners(cuts: tuple[int, int, int]) -> int:
    """Ranks that share a side, an edge or a corner."""
    return math.prod(min(n, 3) for n in cuts) - 1


@dataclass(frozen=True)
class Machine:
    """Speeds that a prediction rests on; seconds, and bytes per second of one rank."""

    name: str
    atom: float  # a step of one atom
    fixed: float  # a step without atoms: launches, waits, LAMMPS
    copy_speed: float  # packing on one side and unpacking on the other
    bus: float  # between device and host, twice per row; 0: rows do not take it
    wait: float  # for the device, per exchange
    network: float
    latency: float  # of an exchange
    message: float  # of the host, per message


GPU = Machine("GPU, through the host", 2.4e-6, 1.5e-3, 1e12, 25e9, 30e-6, 25e9, 3e-6, 1e-6)
GPU_DIRECT = replace(GPU, name="the same, MPI takes memory of the device", bus=0, wait=10e-6)
CPU = Machine("CPU core", 1.6e-3, 1e-4, 4e9, 0, 0, 0.4e9, 2e-6, 1e-6)


def exchange_seconds(machine: Machine, rows: float, n_partners: int) -> float:
    """One exchange: packing, bus and network one after another, as they are."""
    if rows == 0:
        return 0.0
    size = rows * BYTES_PER_ROW
    time = machine.wait + machine.latency + n_partners * machine.message
    time += 2 * size / machine.copy_speed + size / machine.network
    if machine.bus:
        time += 2 * size / machine.bus
    return time


def exchanges_seconds(machine: Machine, local: float, ranks: int) -> float:
    """All exchanges of a step."""
    cuts = split_edges(ranks)
    return EXCHANGES * exchange_seconds(machine, sent_rows(local, cuts), partners(cuts))


def step_seconds(machine: Machine, local: float, ranks: int) -> float:
    """A step of a rank with so many atoms."""
    return machine.atom * local + machine.fixed + exchanges_seconds(machine, local, ranks)


def efficiency(machine: Machine, atoms: float, ranks: int) -> float:
    """Of `atoms` on `ranks`, against one rank with all of them (strong scaling)."""
    return step_seconds(machine, atoms, 1) / (ranks * step_seconds(machine, atoms / ranks, ranks))


def weak_efficiency(machine: Machine, local: float, ranks: int) -> float:
    """Of `local` atoms on every rank, against one rank with as many."""
    return step_seconds(machine, local, 1) / step_seconds(machine, local, ranks)


def show_predictions(machine: Machine, atoms: float, local: float, ranks: tuple[int, ...]) -> None:
    """Strong scaling of `atoms`, and weak scaling with `local` on every rank."""
    table = Table(
        "ranks", "atoms per rank", "rows per atom", "ms/step", "of it exchange", "strong", "weak",
        title=f"{machine.name}: {atoms:,.0f} atoms; weak: {local:,.0f} per rank",
    )  # fmt: skip
    for n in ranks:
        rows = sent_rows(atoms / n, split_edges(n))
        step = step_seconds(machine, atoms / n, n)
        share = exchanges_seconds(machine, atoms / n, n) / step
        table.add_row(
            str(n),
            f"{atoms / n:,.0f}",
            f"{rows * n / atoms:.2f}",
            f"{1e3 * step:.3g}",
            f"{100 * share:.0f} %",
            f"{100 * efficiency(machine, atoms, n):.0f} %",
            f"{100 * weak_efficiency(machine, local, n):.0f} %",
        )
    Console(width=110).print(table)


def main() -> None:
    """Count or predict."""
    parser = argparse.ArgumentParser(description="what ranks send, and what follows from it")
    parser.add_argument("--predict", action="store_true", help="print predicted times, and count nothing")
    parser.add_argument("--copies", type=int, default=27, help="of 192 atoms of water")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.predict:
        for machine in (GPU, GPU_DIRECT):
            show_predictions(machine, 90_000, 20_000, (1, 2, 4, 8, 16, 32, 64))
        show_predictions(CPU, 90_000, 500, (1, 8, 64, 512, 1000))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options.copies)
        found = [count(folder, ranks) for ranks in options.ranks]
    show_counts(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
