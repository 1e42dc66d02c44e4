"""Speed of pair_style moe on 2 ranks x 1 thread against 1 rank x 1 thread, in alternation.

The figures are medians of whole short runs. With `--device cuda` both ranks use the GPUs of the node.

python benchmarks/lammps_ranks.py [--repeat 10] [--steps 10] [--rounds 5] [--device cpu] [--json FILE]
python benchmarks/lammps_ranks.py --start-up [--rounds 5] [--json FILE]

The second form measures what the pair style adds to a rank beside `pair_style zero`: time of a whole `run 0`
of 54 atoms, and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

SCRIPT = """
units metal
lattice bcc 3.24
region box block 0 {repeat} 0 {repeat} 0 {repeat}
create_box 4 box
create_atoms 1 box
set type 1 type/ratio 2 0.25 29381
set type 1 type/ratio 3 0.3333 48113
set type 1 type/ratio 4 0.5 77171
mass * 100.0
velocity all create 600.0 4928459 loop geom
pair_style moe device {device}
pair_coeff * * default Nb Mo Ta W
fix 1 all nve
timestep 0.001
run {steps}
run {steps}
"""


def seconds_per_step(ranks: int, repeat: int, steps: int, folder: Path, device: str = "cpu") -> float:
    """Wall time of one step in the second of two runs (the first one warms up)."""
    bin_folder = Path(sys.executable).parent
    (folder / "in.ranks").write_text(SCRIPT.format(repeat=repeat, steps=steps, device=device))
    command = [str(bin_folder / "lmp"), "-in", "in.ranks", "-log", "none"]
    if ranks > 1:
        command = [str(bin_folder / "mpirun"), "-np", str(ranks), *command]
    run = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    loops = re.findall(r"Loop time of (\S+) on", run.stdout)
    return float(loops[1]) / steps


STYLES = {
    "zero": "pair_style zero 6.0\npair_coeff * *",
    "moe": "pair_style moe\npair_coeff * * default Nb Mo Ta W",
}


def start_up(style: str, folder: Path) -> tuple[float, float]:
    """Wall time (s) of a process with `run 0` of 54 atoms, and its peak memory (1e6 bytes)."""
    script = SCRIPT.format(repeat=3, steps=0, device="cpu")
    before, after = script.split("pair_style moe device")[0], script.split("Nb Mo Ta W\n")[1]
    # not what getrusage says, which is inherited from the program that starts LAMMPS
    peak = 'shell "grep VmHWM /proc/$PPID/status"'
    (folder / "in.start").write_text(f"{before}{STYLES[style]}\n{after}{peak}\n")
    command = [str(Path(sys.executable).parent / "lmp"), "-in", "in.start", "-log", "none"]
    begin = time.perf_counter()
    run = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - begin
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", run.stdout)
    return seconds, 1024 * int(kibibytes) / 1e6


def measure_start_up(rounds: int, json_file: Path | None) -> None:
    """Both styles in turn; prints a table."""
    found: dict[str, list[tuple[float, float]]] = {style: [] for style in STYLES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for style, values in found.items():
                values.append(start_up(style, Path(folder)))
    medians = {
        style: tuple(map(statistics.median, zip(*values, strict=True))) for style, values in found.items()
    }
    table = Table("pair style", "time (s)", "peak memory (MB)")
    for style, (seconds, megabytes) in medians.items():
        table.add_row(style, f"{seconds:.3f}", f"{megabytes:.1f}")
    more = [moe - zero for moe, zero in zip(medians["moe"], medians["zero"], strict=True)]
    table.add_row("moe more", f"{more[0]:.3f}", f"{more[1]:.1f}")
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps({"seconds_and_megabytes": found}, indent=1))


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description="2 ranks against 1 rank, one thread each; or what a rank costs to start"
    )
    parser.add_argument(
        "--start-up", action="store_true", help="time and memory of a start beside pair_style zero"
    )
    parser.add_argument("--repeat", type=int, default=10, help="bcc cells along each edge (10: 2000 atoms)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.start_up:
        measure_start_up(options.rounds, options.json)
        return
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for ranks, found in times.items():
                found.append(
                    seconds_per_step(ranks, options.repeat, options.steps, Path(folder), options.device)
                )
    medians = {ranks: statistics.median(found) for ranks, found in times.items()}
    atoms = 2 * options.repeat**3
    table = Table("ranks x threads", "median (ms/step)", "all (ms/step)", "atom-steps/s")
    for ranks, found in times.items():
        every = " ".join(f"{1e3 * t:.0f}" for t in found)
        table.add_row(f"{ranks} x 1", f"{1e3 * medians[ranks]:.1f}", every, f"{atoms / medians[ranks]:.0f}")
    console = Console()
    console.print(table)
    console.print(f"{atoms} atoms: 2 ranks run {medians[1] / medians[2]:.2f} times as fast as 1")
    if options.json:
        result = {"atoms": atoms, "seconds_per_step": times, "speedup": medians[1] / medians[2]}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
