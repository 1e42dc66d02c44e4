"""Atoms closer than any training data: an error where a run starts, as in ASE, and one warning per run where it comes to that later."""

from __future__ import annotations

import pytest
from broken_package import broken_package
from lammps_cases import Case, run_cases
from lammps_runs import lmp, succeed

from moecalc.keys import MIN_DISTANCE

START = """
units metal
{before}
region box block 0 24 0 12 0 12
create_box 2 box
create_atoms 1 single {first} 3 3
create_atoms 2 single {second} 3 3
mass 1 92.906
mass 2 95.95
pair_style {style}
{coeff}
"""
MOE = "moe dtype float64 device cpu"
ZBL = {
    "style": f"hybrid/overlay {MOE} zbl 1.05 1.5",
    "coeff": "pair_coeff * * moe default Nb Mo\npair_coeff 1 1 zbl 41 41\npair_coeff 2 2 zbl 42 42\npair_coeff 1 2 zbl 41 42",
}
COLLISION = """
group second type 2
velocity second set -2000 0 0
fix 1 all nve
timestep 0.00001
thermo 1
thermo_modify lost error
run 40
"""


def start(lines: str, first: float, second: float, before: str = "", **words: str) -> str:
    values = {"style": MOE, "coeff": "pair_coeff * * default Nb Mo"} | words
    return START.format(first=first, second=second, before=before, **values) + lines


TINY = """
units metal
region box block 0 {a} 0 12 0 12
create_box 1 box
create_atoms 1 single 0.1 3 3
mass 1 183.84
pair_style {style}
pair_coeff * * default W
run 0
"""
GCMC = """
units metal
region box block 0 8 0 8 0 8
create_box 1 box
create_atoms 1 random 6 4711 NULL overlap 2.0 maxtry 500
mass 1 6.94
pair_style moe dtype float64 device cpu
pair_coeff * * default Li
group lithium type 1
fix 1 lithium gcmc 1 400 0 1 29494 300.0 -30.0 0.1
run 1
variable tried equal f_1[3]
print "tried $(v_tried)"
"""

CASES = {
    "run 0": start("run 0\n", 3, 3.32),
    "dynamics": start("fix 1 all nve\nrun 3\n", 3, 3.32),
    "minimize": start("minimize 0 0 10 10\n", 3, 3.32),
    "second run": start("run 0\ndisplace_atoms all move 0 0 0\nset atom 2 x 3.32\nrun 0\n", 3, 5.5),
    "guarded start": start("run 0\n", 3, 3.32, **ZBL),
    "across the border": start("run 0\n", 0.1, 23.78),
    "allowed": start("run 0\n", 3, 3.0001 + MIN_DISTANCE),
    "image": TINY.format(a=0.45, style=MOE),
    "unseen": start(
        "run 0\n", 3, 3.32, style=f"hybrid {MOE} zero 6.0",
        coeff="pair_coeff * * moe default Nb NULL\npair_coeff 2 2 zero\npair_coeff 1 2 zero"),
    "collision": start(COLLISION, 3, 3.9),
    "guarded collision": start(COLLISION, 3, 3.9, **ZBL),
    "two runs": start(COLLISION + "set atom 1 x 3 y 3 z 3\nset atom 2 x 3.9 y 3 z 3\nvelocity all set 0 0 0\nvelocity second set -2000 0 0\nrun 40\n", 3, 3.9),
    "gcmc": GCMC,
}  # fmt: skip

START_ERROR = (
    "Pair style moe: atoms 1 and 2 are 0.320 A apart, expected at least 0.5 A where a run starts: move or remove one of them (for example with "
    "delete_atoms overlap), and check the box and the units"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Case]:
    return run_cases(CASES, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("name", ["run 0", "dynamics", "minimize", "second run", "guarded start"])
def test_a_run_does_not_start_from_atoms_that_are_too_close(name, results):
    assert START_ERROR in results[name].error


def test_distance_is_that_of_the_calculator():
    assert f"expected at least {MIN_DISTANCE:g} A" in START_ERROR


def test_images_count(results):
    assert "atoms 1 and 2 are 0.320 A apart" in results["across the border"].error
    assert "atom 1 and its periodic image are 0.450 A apart" in results["image"].error


@pytest.mark.parametrize("name", ["allowed", "unseen"])
def test_other_pairs_do_not(name, results):
    assert results[name].error == ""
    assert results[name].warnings() == []


@pytest.mark.parametrize("name", ["collision", "guarded collision"])
def test_a_run_that_passes_through_warns_once(name, results):
    case = results[name]
    assert case.error == ""
    (warning,) = case.warnings()
    assert "atoms 1 and 2 are 0.4" in warning
    assert "below 0.5 A there is no training data" in warning
    assert "unless a short-range guard such as zbl is added" in warning


def test_each_run_warns(results):
    assert len(results["two runs"].warnings()) == 2


def test_trial_insertions_get_their_energies(results):
    """fix gcmc tries places where atoms overlap: a warning at most, no error."""
    case = results["gcmc"]
    assert case.error == ""
    assert float(case.log.split("tried ")[-1].split()[0]) > 100
    assert len(case.warnings()) <= 1


@pytest.mark.parametrize("backend", ["", "cuda-emulation"])
def test_two_ranks(backend, tmp_path):
    """The pair lies on both sides of the border between the ranks; one list is kept over many steps."""
    env = {"MOECALC_BACKEND": backend} if backend else {}
    run = lmp(start("run 0\n", 11.9, 12.22, before="processors 2 1 1"), tmp_path, ranks=2, env=env)
    assert run.code not in {0, -9, -11}
    assert START_ERROR in run.error()
    script = start(COLLISION, 11.7, 12.6, before="processors 2 1 1")
    output = succeed(script, tmp_path, ranks=2, env=env).output
    assert output.count("WARNING: Pair style moe: atoms 1 and 2 are 0.4") == 1


def test_closest_atoms_of_all_ranks_are_named(tmp_path):
    """The rank that fails is not the one that has the closest atoms."""
    broken = broken_package(tmp_path)
    script = f"""
    units metal
    processors 2 1 1
    region box block 0 40 0 12 0 12
    create_box 2 box
    create_atoms 1 single 19.6 3 3
    create_atoms 1 single 20.4 3 3
    create_atoms 2 single 33.5 4 5
    create_atoms 2 single 35.1 4 5
    mass * 50
    pair_style moe device cpu
    pair_coeff * * {broken} O H
    run 0
    """
    error = lmp(script, tmp_path, ranks=2).error()
    assert "not finite on rank 1: the closest atoms are 1 at 19.6 3 3 and 2, 0.8 A apart" in error
