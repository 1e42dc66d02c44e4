"""Every LAMMPS example runs, shortened, and gives what it promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lammps_runs import LMP, MPIRUN, Run

from moecalc.zbl import guard_radii, lammps_commands

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "lammps"


def example(name: str, folder: Path, ranks: int = 1, **variables) -> Run:
    shutil.copy(EXAMPLES / name, folder)
    command = [str(LMP), "-in", name, "-log", "none"]
    if ranks > 1:
        command = [str(MPIRUN), "-np", str(ranks), *command]
    for key, value in variables.items():
        command += ["-var", key, str(value)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    return Run(done.returncode, done.stdout, folder)


def test_melt_quench(tmp_path):
    run = example("in.melt_quench", tmp_path, steps=6, repeat=2)
    melt, quench = run.thermo()
    assert melt[0, 1] == pytest.approx(5000)
    assert melt[-1, 4] != melt[0, 4], "the volume does not change"
    assert np.isfinite(quench).all()
    assert (tmp_path / "quenched.data").read_text().count("\n") > 16


def test_zbl(tmp_path):
    run = example("in.zbl", tmp_path, steps=20)
    table = run.thermo()[0]
    assert np.isfinite(table).all()
    assert abs(table[-1, 5] - table[0, 5]) < 54 * 0.01  # eV
    assert set(lammps_commands(["Nb", "Mo", "Ta", "W"], guard_radii(["Nb", "Mo", "Ta", "W"])).split()) <= set(
        (tmp_path / "in.zbl").read_text().split()
    )


@pytest.mark.slow
def test_relax(tmp_path):
    run = example("in.relax", tmp_path)
    words = run.output.split("relaxed: ")[-1].split()
    assert float(words[5].rstrip(",")) < 0.05  # eV/A
    assert abs(float(words[8])) < 200  # bar


def test_heat_flux(tmp_path):
    run = example("in.heat_flux", tmp_path, steps=50, repeat=1)
    assert "thermal conductivity from this run:" in run.output
    assert np.abs(run.thermo()[1][:, 4:]).max() > 0
    assert (tmp_path / "heat_flux.txt").exists()


def test_two_ranks(tmp_path):
    energies = [example("in.two_ranks", tmp_path, ranks, steps=4).thermo()[0][:, 3] for ranks in (1, 2)]
    assert energies[0] == pytest.approx(energies[1], abs=2e-3)  # 168 atoms in float32


def test_driver(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "driver.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-2]) < 1e-9


def test_python_of_the_manual_page(tmp_path):
    """All blocks of docs/pair_moe.md, one after the other; ASE's LAMMPSlib gives what the calculator gives."""
    page = (EXAMPLES.parents[1] / "docs" / "pair_moe.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert any("LAMMPSlib" in block for block in blocks)
    check = """
from moecalc import MoECalculator
atoms.calc = MoECalculator(dtype="float64", device="cpu")
assert abs(energy - atoms.get_potential_energy()) < 1e-8
assert abs(forces - atoms.get_forces()).max() < 1e-8
"""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*blocks, check])],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
