"""pair_style moe with the CUDA kernels, on a GPU (marked `cuda`) or emulated: whatever changes the list is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lammps_runs import alloy, from_dump, lmp, succeed, write_data
from stages import ENERGY, FORCES, FRAME, METALS, STAGES, START

from moecalc import _lib

# Atoms, types, box or LAMMPS' list change in another way in each of these.
CHANGES = (
    "npt",
    "npt_triclinic",
    "swap",
    "minimize",
    "box_relax",
    "change_box",
    "delete",
    "create",
    "displace",
    "rare_neighbors",
    "wide_ghosts",
    "respa",
)
MPI = {"npt", "swap", "box_relax", "delete", "rare_neighbors"}


class Device:
    """Where the kernels run: how to say so in the input and in the environment."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.keywords = "device cuda" if name == "cuda" else "device cpu"
        self.env = {} if name == "cuda" else {"MOECALC_BACKEND": "cuda-emulation"}

    def run(self, script: str, folder: Path, **options):
        run = succeed(script.replace("device cpu", self.keywords), folder, env=self.env, **options)
        assert "(cuda " in run.output, run.output[:2000]
        return run


@pytest.fixture(
    params=[
        "emulation",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(_lib.load().cuda_device_count() == 0, reason="needs a CUDA device"),
            ],
        ),
    ]
)
def device(request):
    return Device(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_whatever_changes_is_noticed(device, ranks, shared_calculator, tmp_path):
    write_data(tmp_path / "data.alloy", alloy(METALS, (2, 2, 2)), METALS)
    stages = {name: STAGES[name] for name in CHANGES if ranks == 1 or name in MPI}
    script = START.format(before="", inputs="", temperature=2000)
    for stage, commands in stages.items():
        script += f"\n{commands}\n" + FRAME.format(stage=stage)
    run = device.run(script, tmp_path, ranks=ranks, limit=400)
    for stage in stages:
        frame = run.dump(f"dump.{stage}")[-1]
        atoms = from_dump(frame, METALS)
        printed = next(line.split() for line in run.output.splitlines() if line.startswith(f"frame {stage} "))
        expected = shared_calculator.calculate_batch([atoms])[0]
        assert int(printed[3]) == len(atoms)
        assert abs(float(printed[2]) - expected["energy"]) <= ENERGY * len(atoms), stage
        assert np.abs(frame.array("fx", "fy", "fz") - expected["forces"]).max() <= FORCES, stage


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_grand_canonical(device, ranks, shared_calculator, tmp_path):
    """Atoms that come, go and are hidden for a trial deletion."""
    script = """
    units metal
    lattice bcc 3.3
    region box block 0 2 0 2 0 4
    region low block 0 2 0 2 0 2
    create_box 2 box
    create_atoms 1 region low
    mass 1 92.9
    mass 2 6.94
    pair_style moe dtype float64 device cpu
    pair_coeff * * default Nb Li
    group lithium type 2
    fix 1 lithium gcmc 1 8 0 2 29494 6000.0 -9.0 0.1
    thermo_style custom step atoms pe f_1[4] f_1[6]
    thermo_modify format float %.17g
    thermo 1
    dump 1 all custom 1 dump.gcmc id type x y z
    dump_modify 1 format float %.17g
    run 4
    """
    run = device.run(script, tmp_path, ranks=ranks, limit=300)
    table, frames = run.thermo()[0], run.dump("dump.gcmc")
    assert table[-1, 3] > 0, "no insertion"
    for row, frame in zip(table, frames, strict=True):
        atoms = from_dump(frame, ["Nb", "Li"])
        assert len(atoms) == row[1]
        assert abs(row[2] - shared_calculator.calculate_batch([atoms])[0]["energy"]) <= ENERGY * len(atoms)


@pytest.mark.slow
def test_rerun(device, tmp_path):
    write_data(tmp_path / "data.alloy", alloy(METALS, (2, 2, 2)), METALS)
    script = START.format(before="", inputs="", temperature=3000)
    script += """
    thermo 2
    dump 1 all custom 2 dump.run id type x y z
    dump_modify 1 format float %.17g
    fix 1 all nve
    run 6
    undump 1
    unfix 1
    rerun dump.run every 2 dump x y z
    """
    first, second = device.run(script, tmp_path, limit=300).thermo()
    assert np.abs(first[:, 2] - second[:, 2]).max() < 1e-9
    assert np.ptp(first[:, 2]) > 1e-3


@pytest.mark.slow
def test_ranks_that_share_a_device_agree(device, tmp_path):
    write_data(tmp_path / "data.alloy", alloy(METALS, (2, 2, 2), shear=0.1), METALS)
    script = START.format(before="", inputs="", temperature=900)
    script += (
        "fix 1 all nve\ncompute 1 all stress/atom NULL virial\nrun 4\n"
        "write_dump all custom dump.end id type x y z fx fy fz c_1[1] c_1[6] modify format float %.17g\n"
    )
    end = {}
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        (tmp_path / str(ranks) / "data.alloy").write_bytes((tmp_path / "data.alloy").read_bytes())
        end[ranks] = device.run(script, tmp_path / str(ranks), ranks=ranks, limit=300).dump("dump.end")[0]
    for names, allowed in ((("x", "y", "z"), 1e-10), (("fx", "fy", "fz"), FORCES)):
        assert np.abs(end[1].array(*names) - end[2].array(*names)).max() < allowed
    virials = [end[ranks].array("c_1[1]", "c_1[6]") for ranks in (1, 2)]
    assert np.abs(virials[0] - virials[1]).max() < 1e-6 * np.abs(virials[0]).max()


DRIVER = """
from moecalc.lammps import lammps
engine = lammps(cmdargs=["-screen", "none", "-log", "none"])
def lists():
    return int(engine.extract_pair("n_lists"))
for line in SCRIPT.strip().splitlines():
    engine.command(line)
    if line.startswith(("run", "set", "minimize")):
        print("lists", line.split()[0], lists())
"""


@pytest.mark.parametrize("case", ["emulation"])
def test_the_list_is_sent_when_lammps_builds_one(case, tmp_path):
    """Once for run 5 without a rebuild, once more when a type changed in between, and for no step else."""
    write_data(tmp_path / "data.alloy", alloy(METALS, (2, 2, 2)), METALS)
    device = Device(case)
    script = START.format(before="", inputs="", temperature=300) + (
        "neighbor 2.0 bin\nneigh_modify every 100 delay 100 check no\nfix 1 all nve\nrun 5\n"
        "run 5 pre no\nset atom 3 type 1\nrun 1 pre no\nneigh_modify every 1 delay 0 check no\nrun 3\n"
    )
    (tmp_path / "drive.py").write_text(f"SCRIPT = {script!r}\n{DRIVER}")

    done = subprocess.run(
        [sys.executable, "drive.py"],
        cwd=tmp_path,
        env={**os.environ, **device.env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("lists run")]
    assert counts == [1, 1, 2, 6]


def test_overlapping_atoms_are_named(tmp_path):
    write_data(tmp_path / "data.alloy", alloy(METALS, (2, 2, 2)), METALS)
    script = START.format(before="", inputs="", temperature=300) + "set atom 2 x 1.0 y 1.0 z 1.0\n"
    script += "set atom 5 x 1.0 y 1.0 z 1.0\nrun 0\n"
    run = lmp(script, tmp_path, env=Device("emulation").env)
    assert "expected distinct positions, got atoms" in run.error()


def test_a_reduced_precision_is_used(tmp_path):
    write_data(tmp_path / "data.alloy", alloy(METALS, (2, 2, 2)), METALS)
    script = START.format(before="", inputs="", temperature=300).replace("float64", "float32 precision tf32")
    output = succeed(script + "run 0\n", tmp_path, env=Device("emulation").env).output
    assert "float32 on cpu (cuda emulated tf32)" in output
