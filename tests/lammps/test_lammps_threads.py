"""Threads of pair_style moe beside those of LAMMPS, and the share of a node's processors."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from lammps_runs import Run, succeed
from process_settings import SETTINGS, python

CORES = len(os.sched_getaffinity(0))

ZBL = """
units metal
lattice bcc 3.19
region b block 0 3 0 3 0 3
create_box 1 b
create_atoms 1 box
mass 1 183.84
displace_atoms all random 0.1 0.1 0.1 7
pair_style hybrid/overlay moe dtype float64 device cpu zbl 2.0 3.0
pair_coeff * * moe default W
pair_coeff * * zbl 74 74
compute z all pair zbl
thermo_style custom step pe c_z press
thermo_modify format float %.8f
run 0
"""

MANY = """
units metal
atom_style full
lattice bcc 3.19
region b block 0 3 0 3 0 3
create_box 1 b bond/types 1 extra/bond/per/atom 14 extra/special/per/atom 200
create_atoms 1 box
mass 1 183.84
displace_atoms all random 0.1 0.1 0.1 7
set atom 1*27 charge 0.2
set atom 28*54 charge -0.2
bond_style harmonic
bond_coeff 1 0.5 2.7
pair_style zero 6.0
pair_coeff * *
special_bonds lj/coul 0.0 1.0 1.0
create_bonds many all all 1 2.0 2.9
special_bonds lj/coul 1.0 1.0 1.0
pair_style hybrid/overlay moe dtype float64 device cpu lj/cut 4.0 coul/long 4.5 zbl 2.0 3.0
pair_coeff * * moe default W
pair_coeff * * lj/cut 0.05 2.6
pair_coeff * * coul/long
pair_coeff * * zbl 74 74
kspace_style {kspace} 1.0e-5
velocity all create 300 5
fix 1 all nve
compute lj all pair lj/cut
compute coul all pair coul/long
compute zbl all pair zbl
thermo 1
thermo_style custom step pe c_lj c_coul c_zbl elong ebond pxx pyz
thermo_modify format float %.10f
run 2
"""

# threads of `package omp`, OMP_NUM_THREADS: below, equal, above, unset; 0 is what OpenMP says
SETTINGS_OF_OPENMP = [
    ("1", "2"),
    ("2", "2"),
    ("2", "1"),
    ("3", "1"),
    ("1", None),
    ("2", None),
    ("0", None),
    ("0", "2"),
]


def table(run: Run) -> np.ndarray:
    (rows,) = run.thermo()
    return rows[:, 1:]


@pytest.mark.parametrize(("threads", "openmp"), SETTINGS_OF_OPENMP)
def test_openmp_styles_beside_the_model_compute_all_of_their_work(tmp_path, threads, openmp):
    """These lose a part of it when somebody changes OpenMP's number of threads behind their back."""
    args = ["-sf", "omp", "-pk", "omp", threads]
    rows = table(succeed(ZBL, tmp_path, args=args, env={"OMP_NUM_THREADS": openmp}))
    assert rows[0, :2] == pytest.approx([-523.72052, 120.23371], abs=1e-4)


@pytest.mark.parametrize("openmp", [None, "1", "2"])
def test_the_suffix_alone_is_right(tmp_path, openmp):
    rows = table(succeed(ZBL, tmp_path, args=["-sf", "omp"], env={"OMP_NUM_THREADS": openmp}))
    assert rows[0, :2] == pytest.approx([-523.72052, 120.23371], abs=1e-4)


@pytest.mark.parametrize("kspace", ["pppm", "ewald"])
def test_bonds_pairs_and_long_range_styles_of_openmp_give_the_same(tmp_path, kspace):
    expected = table(succeed(MANY.format(kspace=kspace), tmp_path))
    for threads, openmp in (("1", "2"), ("2", "1"), ("2", None), ("0", None)):
        args = ["-sf", "omp", "-pk", "omp", threads]
        got = table(succeed(MANY.format(kspace=kspace), tmp_path, args=args, env={"OMP_NUM_THREADS": openmp}))
        assert got == pytest.approx(expected, rel=1e-8, abs=1e-7)


def test_openmp_styles_on_two_ranks_give_the_same(tmp_path):
    script = MANY.format(kspace="pppm")
    expected = table(succeed(script, tmp_path, ranks=2))
    got = table(succeed(script, tmp_path, ranks=2, args=["-sf", "omp", "-pk", "omp", "2"]))
    assert got == pytest.approx(expected, rel=1e-8, abs=1e-7)


@pytest.mark.parametrize(("threads", "openmp", "expected"), [("2", "1", 2), ("1", "2", 1), ("3", None, 3)])
def test_the_number_of_package_omp_wins(tmp_path, threads, openmp, expected):
    args = ["-pk", "omp", threads]
    output = succeed(ZBL, tmp_path, args=args, env={"OMP_NUM_THREADS": openmp}).output
    assert f"{expected} threads per rank" in output


# --- the share of a node --------------------------------------------------------------------------


@pytest.mark.parametrize("partitions", ["2x1", "4x1", "2x2", "1 3"])
def test_partitions_share_the_processors(tmp_path, partitions):
    worlds = partitions.split()
    ranks = sum(int(np.prod([int(n) for n in world.split("x")])) for world in worlds)
    args = ["-partition", *worlds]
    succeed(ZBL, tmp_path, ranks=ranks, args=args, env={"OMP_NUM_THREADS": None})
    for k in range(len(list(tmp_path.glob("screen.*")))):
        text = (tmp_path / f"screen.{k}").read_text()
        assert f"{max(1, CORES // ranks)} threads per rank" in text


def test_a_partition_that_loads_no_model_is_not_waited_for(tmp_path):
    script = """
variable run world 1 0
if "${run} == 0" then "jump SELF end"
""" + ZBL + "\nlabel end\n"  # fmt: skip
    succeed(script, tmp_path, ranks=2, args=["-partition", "2x1"], env={"OMP_NUM_THREADS": None}, limit=60)
    assert "Loop time" in (tmp_path / "screen.0").read_text()


def test_a_launcher_that_is_not_known_means_that_all_ranks_are_here(tmp_path):
    env = {"OMP_NUM_THREADS": None, "HIDE": "1"}
    script = tmp_path / "hidden"
    script.write_text(f'#!/bin/sh\nunset MPI_LOCALNRANKS MPI_LOCALRANKID\nexec "{lmp_path()}" "$@"\n')
    script.chmod(0o755)
    (tmp_path / "in.test").write_text(ZBL)
    command = [
        str(mpirun_path()),
        "-np",
        "2",
        str(script),
        "-in",
        "in.test",
        "-log",
        "none",
        "-partition",
        "2x1",
    ]
    environment = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120, stdin=subprocess.DEVNULL)
    assert f"{max(1, CORES // 2)} threads per rank" in (tmp_path / "screen.0").read_text()


def lmp_path() -> Path:
    from lammps_runs import LMP

    return LMP


def mpirun_path() -> Path:
    from lammps_runs import MPIRUN

    return MPIRUN


# --- LAMMPS in Python -----------------------------------------------------------------------------

USE_LAMMPS = f"""
lmp.commands_string('''{ZBL.replace("run 0", "velocity all create 300 1" + chr(10) + "fix 1 all nve" + chr(10) + "run 5")}''')
"""

MAKE_LAMMPS = """
from moecalc.lammps import lammps
lmp = lammps(cmdargs=["-screen", "none", "-log", "none"])
"""


@pytest.mark.parametrize("openmp", ["1", "2"])
def test_the_pair_style_leaves_the_settings_of_the_process_alone(openmp):
    """LAMMPS itself sets OpenMP's number when it starts, so that comes before."""
    assert "unchanged" in python(SETTINGS.format(setup=MAKE_LAMMPS, use=USE_LAMMPS), openmp=openmp)


def test_lammps_twice_in_a_process_leaves_the_settings_alone():
    use = USE_LAMMPS + "lmp.close()\n" + MAKE_LAMMPS + USE_LAMMPS
    assert "unchanged" in python(SETTINGS.format(setup=MAKE_LAMMPS, use=use), openmp="1")
