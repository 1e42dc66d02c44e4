"""Every snippet of docs/other_programs.md, where its program is installed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.io import read, write

import moecalc
from moecalc import MoECalculator
from moecalc._install import INSTALL_LAMMPS
from moecalc.models import default_model_path

PAGE = (Path(__file__).parents[2] / "docs/other_programs.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
PROGRAMS = {  # section: module, package
    "torch-sim": ("torch_sim", "torch-sim-atomistic"),
    "i-PI": ("ipi", "ipi"),
    "phonopy": ("phonopy", "phonopy"),
    "matcalc": ("matcalc", "matcalc"),
    "atomate2": ("atomate2", "atomate2"),
    "D3 in ASE": ("dftd3", "dftd3"),
}
TIME = 300  # seconds


def snippets(section, language):
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


def snippet(section, language="python"):
    (found,) = snippets(section, language)
    return found


def need(section):
    module, package = PROGRAMS[section]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{section} is not installed: pip install {package}")


def run_python(code, folder):
    """What a snippet prints."""
    environment = {**os.environ, "PYTHONPATH": str(Path(moecalc.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIME, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_section_has_a_test_or_a_reason():
    tested = {*PROGRAMS, "D3 in LAMMPS"}
    assert set(SECTIONS) == tested | {"metatomic"}
    assert "it is not built." in " ".join(SECTIONS["metatomic"].split())
    blocks = len(re.findall(r"^```\w", PAGE, re.MULTILINE))
    assert blocks == len(tested) + 1  # i-PI has two


def test_torch_sim(tmp_path):
    need("torch-sim")
    assert "torch.Size([2, 3, 3])" in run_python(snippet("torch-sim"), tmp_path)


def test_phonopy(tmp_path):
    need("phonopy")
    assert 5 < float(run_python(snippet("phonopy"), tmp_path).split()[-1]) < 8  # tungsten: 6.6 THz


def test_matcalc(tmp_path):
    need("matcalc")
    assert 270 < float(run_python(snippet("matcalc"), tmp_path).split()[-1]) < 350  # tungsten: 310 GPa


def test_atomate2(tmp_path):
    need("atomate2")
    energy = float(run_python(snippet("atomate2"), tmp_path).split()[-1])
    atoms = bulk("W", "bcc", a=3.18)
    atoms.calc = MoECalculator(device="cpu", dtype="float64")
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=0.01)


def test_d3_in_ase(tmp_path):
    need("D3 in ASE")
    energy = float(run_python(snippet("D3 in ASE"), tmp_path).split()[0])
    atoms = bulk("W", "bcc", a=3.17, cubic=True)
    atoms.calc = MoECalculator(device="cpu")
    assert -3 < energy - atoms.get_potential_energy() < -0.3  # attraction


def test_i_pi(tmp_path):
    need("i-PI")
    program = shutil.which("i-pi", path=str(Path(sys.executable).parent)) or shutil.which("i-pi")
    assert program is not None
    address = f"moecalc-{tmp_path.name}-{np.random.default_rng().integers(10**9)}"
    atoms = bulk("W", "bcc", a=3.17, cubic=True)
    atoms.rattle(0.02, seed=1)
    write(tmp_path / "start.extxyz", atoms)
    given = snippet("i-PI", "xml").replace("<address> moecalc <", f"<address> {address} <")
    (tmp_path / "input.xml").write_text(given)
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen([program, "input.xml"], cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    try:
        socket = Path(f"/tmp/ipi_{address}")
        for _ in range(600):
            if socket.exists() or server.poll() is not None:
                break
            time.sleep(0.1)
        assert socket.exists(), (tmp_path / "log").read_text()
        client = snippet("i-PI").replace('unixsocket="moecalc"', f'unixsocket="{address}"')
        run_python(client, tmp_path)
        assert server.wait(timeout=TIME) == 0, (tmp_path / "log").read_text()
    finally:
        server.kill()
        server.wait()
        log.close()
    table = np.loadtxt(tmp_path / "run.out")
    assert table[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    atoms = read(tmp_path / "start.extxyz")
    atoms.calc = MoECalculator(device="cpu")
    assert table[0, 3] == pytest.approx(atoms.get_potential_energy(), abs=1e-3)  # all beads at one place


def lammps_energy(script, folder):
    from moecalc.lammps import lammps

    lmp = lammps(cmdargs=["-screen", "none", "-log", str(folder / "log")])
    try:
        lmp.commands_string(script.replace("moe default W", f"moe {default_model_path()} W"))
        return lmp.get_thermo("pe")
    finally:
        lmp.close()


def test_d3_in_lammps(tmp_path):
    pytest.importorskip("lammps", reason=f"LAMMPS is not installed: {INSTALL_LAMMPS}")
    both = snippet("D3 in LAMMPS", "lammps")
    alone = both.replace(
        "hybrid/overlay moe dtype float64 dispersion/d3 bj pbe 30.0 20.0", "moe dtype float64"
    )
    alone = alone.replace("* * moe ", "* * ").replace("pair_coeff * * dispersion/d3 W\n", "")
    d3 = lammps_energy(both, tmp_path) - lammps_energy(alone, tmp_path)
    assert -3 < d3 / 64 < -0.15  # 128 atoms
    if importlib.util.find_spec("dftd3") is not None:
        from dftd3.ase import DFTD3

        atoms = bulk("W", "bcc", a=3.17, cubic=True)
        atoms.calc = DFTD3(method="PBE", damping="d3bj")
        assert d3 / 64 == pytest.approx(atoms.get_potential_energy(), rel=0.02)
