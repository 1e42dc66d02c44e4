"""Several packages in one pair style: who drives the dynamics, and the file that tells how far they disagree."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from ase import Atoms
from broken_package import broken_package
from committees import METALS, write_members
from helpers import DATA
from lammps_cases import run_cases
from lammps_runs import EV_PER_KCAL, alloy, lmp, succeed, write_data

from moecalc import MoECalculator

HEADER = (
    "#       step         max_devi_v         min_devi_v         avg_devi_v"
    "         max_devi_f         min_devi_f         avg_devi_f"
)
PRINTED = 1.0e-6  # relative: seven digits

SCRIPT = """
units {units}
boundary p p p
box tilt large
read_data data.alloy
pair_style moe dtype float64 device cpu untrained yes {keywords}
pair_coeff * * {files} Nb Mo Ta W
{lines}
"""


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Models whose cutoffs, widths, layers and orders of elements differ; the first has the smallest cutoff."""
    return write_members(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def atoms():
    return alloy(METALS, (2, 2, 2), shear=0.1)


def devi(folder, name="model_devi.out"):
    """Numbers of the file, a row per line."""
    return np.loadtxt(folder / name, ndmin=2)


def calculators(members):
    return [
        MoECalculator(m, dtype="float64", device="cpu", check=False, allow_untrained=True) for m in members
    ]


def rows_of_members(atoms, members, rotation):
    """Forces (m, n, 3) and virials per atom (m, 9) of each model by itself, in LAMMPS' frame."""
    forces, virials = [], []
    for calculator in calculators(members):
        copy = atoms.copy()
        copy.calc = calculator
        forces.append(copy.get_forces() @ rotation)
        virial = -copy.get_stress(voigt=False) * copy.get_volume()
        virials.append((rotation.T @ virial @ rotation).ravel() / len(atoms))
    return np.array(forces), np.array(virials)


def deepmd_columns(forces, virials, relative=None, relative_v=None):
    """The six numbers and those of the atoms, by DeePMD-kit's definition."""
    of_atom = np.linalg.norm(np.std(forces, axis=0), axis=-1)
    of_virial = np.std(virials, axis=0)
    if relative is not None:
        of_atom = of_atom / (np.linalg.norm(np.mean(forces, axis=0), axis=-1) + relative)
    if relative_v is not None:
        of_virial = of_virial / (np.abs(np.mean(virials, axis=0)) + relative_v)
    summary = [of_virial.max(), of_virial.min(), np.linalg.norm(of_virial) / 3]
    return np.array([*summary, of_atom.max(), of_atom.min(), of_atom.mean(), *of_atom])


def script(members, keywords="", lines="run 0", units="metal"):
    files = " ".join(str(m) for m in members)
    return SCRIPT.format(units=units, keywords=keywords, files=files, lines=lines)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_file_has_what_deepmd_kit_finds(packages, ranks, tmp_path):
    """Forces and virials are those that DeePMD-kit gave for the same checkpoints."""
    names = ["relu6", "gelu", "tebd1", "moe_fused_heads"]
    stored = [np.load(DATA / f"deepmd/{name}__tri20.npz") for name in names]
    atoms = Atoms(stored[0]["symbols"], stored[0]["positions"], cell=stored[0]["cell"], pbc=True)
    elements = sorted(set(atoms.symbols))
    rotation = write_data(tmp_path / "data.alloy", atoms, elements)
    text = script([packages(name) for name in names], "out_freq 1 atomic").replace(
        "Nb Mo Ta W", " ".join(elements)
    )
    succeed(text, tmp_path, ranks=ranks)
    forces = np.array([one["forces"] @ rotation for one in stored])
    virials = np.array(
        [(rotation.T @ one["virial"].reshape(3, 3) @ rotation).ravel() / len(atoms) for one in stored]
    )
    np.testing.assert_allclose(
        devi(tmp_path)[0, 1:], deepmd_columns(forces, virials), rtol=PRINTED, atol=1e-9
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_file_has_the_deviation_of_the_members(members, atoms, ranks, tmp_path):
    rotation = write_data(tmp_path / "data.alloy", atoms, METALS)
    succeed(script(members, "atomic"), tmp_path, ranks=ranks)
    expected = deepmd_columns(*rows_of_members(atoms, members, rotation))
    np.testing.assert_allclose(devi(tmp_path)[0, 1:], expected, rtol=PRINTED)


def test_ranks_without_atoms_take_part(members, tmp_path):
    atoms = alloy(METALS, (2, 2, 2))
    atoms.positions += 0.3
    atoms.wrap()
    atoms.cell[2, 2] += 40.0
    rotation = write_data(tmp_path / "data.alloy", atoms, METALS)
    text = script(members, "atomic").replace("boundary", "processors 1 1 3\nboundary")
    succeed(text, tmp_path, ranks=3)
    expected = deepmd_columns(*rows_of_members(atoms, members, rotation))
    np.testing.assert_allclose(devi(tmp_path)[0, 1:], expected, rtol=PRINTED)


@pytest.mark.parametrize("ranks", [1, 2])
def test_relative_deviations_are_divided_by_the_mean_and_the_level(members, atoms, ranks, tmp_path):
    rotation = write_data(tmp_path / "data.alloy", atoms, METALS)
    succeed(script(members, "atomic relative 0.3 relative_v 0.02"), tmp_path, ranks=ranks)
    expected = deepmd_columns(*rows_of_members(atoms, members, rotation), 0.3, 0.02)
    np.testing.assert_allclose(devi(tmp_path)[0, 1:], expected, rtol=PRINTED)


def test_the_file_is_in_the_units_of_the_simulation(members, atoms, tmp_path):
    """A relative deviation has no unit, but its level has."""
    rotation = write_data(tmp_path / "data.alloy", atoms, METALS)
    level = 0.3 / EV_PER_KCAL
    lines = f"run 0\npair_style moe dtype float64 device cpu untrained yes out_file b.out relative {level}\n"
    lines += f"pair_coeff * * {' '.join(map(str, members))} Nb Mo Ta W\nrun 0"
    succeed(script(members, "atomic", lines, units="real"), tmp_path)
    rows = rows_of_members(atoms, members, rotation)
    expected = deepmd_columns(*rows)
    np.testing.assert_allclose(devi(tmp_path)[0, 1:], expected / EV_PER_KCAL, rtol=PRINTED)
    relative = deepmd_columns(*rows, relative=0.3)[3:6]
    np.testing.assert_allclose(devi(tmp_path, "b.out")[0, 4:7], relative, rtol=PRINTED)


DYNAMICS = """
velocity all create 600 3
fix 1 all nve
dump d all custom 1 {dump} id type x y z fx fy fz
dump_modify d format float %.17g
thermo_style custom step pe press
run 6
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_package_drives_the_dynamics(members, atoms, ranks, tmp_path):
    """The others see the same list and positions, and leave no trace in the trajectory."""
    write_data(tmp_path / "data.alloy", atoms, METALS)
    succeed(script(members, "out_freq 2", DYNAMICS.format(dump="many")), tmp_path, ranks=ranks)
    alone = succeed(script(members[:1], "out_freq 2", DYNAMICS.format(dump="one")), tmp_path, ranks=ranks)
    for many, one in zip(alone.dump("many"), alone.dump("one"), strict=True):
        names = ("x", "y", "z", "fx", "fy", "fz")
        np.testing.assert_allclose(many.array(*names), one.array(*names), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("keywords", "steps"), [("out_freq 2", [0, 2, 4, 6]), ("out_freq 5", [0, 5]), ("", [0])]
)
def test_there_is_a_line_every_out_freq_steps(members, atoms, keywords, steps, tmp_path):
    write_data(tmp_path / "data.alloy", atoms, METALS)
    succeed(script(members, keywords, DYNAMICS.format(dump="d")), tmp_path, ranks=2)
    assert devi(tmp_path)[:, 0].tolist() == steps


def test_an_input_that_comes_back_to_a_file_goes_on_with_it(members, atoms, tmp_path):
    write_data(tmp_path / "data.alloy", atoms, METALS)
    style = "pair_style moe dtype float64 device cpu untrained yes"
    lines = "\n".join(
        f"{style} {words}\nrun 0" for words in ("out_file b.out", "out_freq 0", "out_file a.out")
    )
    succeed(script(members, "out_file a.out", f"run 0\n{lines}"), tmp_path)
    assert (tmp_path / "a.out").read_text().count("step") == 1
    assert len(devi(tmp_path, "a.out")) == 2


def test_the_text_is_that_of_deepmd_kit(members, atoms, tmp_path):
    write_data(tmp_path / "data.alloy", atoms, METALS)
    succeed(script(members, "out_file a.out"), tmp_path)
    succeed(script(members, "out_file b.out atomic"), tmp_path)
    header, line = (tmp_path / "a.out").read_text().splitlines()
    assert header == HEADER
    assert len(line) == 12 + 6 * 19
    assert line.startswith(" " * 11 + "0 ")
    assert all(len(word.split("e")[0]) == 8 for word in line.split()[1:])
    header, line = (tmp_path / "b.out").read_text().splitlines()
    assert header == HEADER + "      atm_devi_f(N)"
    assert len(line.split()) == 7 + len(atoms)


@pytest.mark.parametrize("lines", ["out_freq 0", "out_file other.out"])
def test_no_file_is_written_that_was_not_asked_for(members, atoms, lines, tmp_path):
    write_data(tmp_path / "data.alloy", atoms, METALS)
    succeed(script(members, lines), tmp_path)
    succeed(script(members[:1], "out_freq 1"), tmp_path)
    assert not (tmp_path / "model_devi.out").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_fix_halt_stops_on_the_largest_deviation(members, atoms, ranks, tmp_path):
    write_data(tmp_path / "data.alloy", atoms, METALS)
    lines = """
    compute devi all pair moe
    variable most equal c_devi[4]
    thermo_style custom step c_devi[4] c_devi[1]
    thermo_modify format float %.8e
    thermo 2
    velocity all create 600 3
    fix 1 all nve
    fix stop all halt 2 v_most > {limit} error continue
    run 8
    """
    free = succeed(script(members, "out_freq 2", lines.format(limit=1e9)), tmp_path, ranks=ranks)
    rows = devi(tmp_path)
    np.testing.assert_allclose(free.thermo()[0], rows[:, [0, 4, 1]], rtol=PRINTED)
    limit = np.sort(rows[1:, 4])[-2]  # passed in one step only, or from one step on
    first = rows[1:][rows[1:, 4] > limit][0, 0]
    stopped = succeed(script(members, "out_freq 2", lines.format(limit=limit)), tmp_path, ranks=ranks)
    assert stopped.thermo()[0][-1, 0] == first


def test_a_package_alone_has_no_deviation_to_halt_on(members, atoms, tmp_path):
    write_data(tmp_path / "data.alloy", atoms, METALS)
    lines = "compute devi all pair moe\nthermo_style custom step c_devi[4]\nrun 0"
    assert "devi" in lmp(script(members[:1], "", lines), tmp_path).error()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_restart_goes_on_with_the_file(members, atoms, ranks, tmp_path):
    write_data(tmp_path / "data.alloy", atoms, METALS)
    keywords = "out_file d.out out_freq 2 relative 0.5 relative_v 0.1 atomic"
    succeed(
        script(members, keywords, "fix 1 all nve\nrun 2\nwrite_restart file.restart"), tmp_path, ranks=ranks
    )
    again = "read_restart file.restart\nfix 1 all nve\nrun 2"
    succeed(again, tmp_path, ranks=ranks)
    rows = devi(tmp_path, "d.out")
    assert rows[:, 0].tolist() == [0, 2, 2, 4]
    np.testing.assert_allclose(rows[1], rows[2], rtol=1e-5)
    assert (tmp_path / "d.out").read_text().count("#") == 1


def test_atoms_that_the_models_do_not_see_have_no_deviation(members, atoms, tmp_path):
    write_data(tmp_path / "data.alloy", atoms, METALS)
    text = script(members, "atomic").replace("pair_style moe", "pair_style hybrid/overlay zero 4.0 moe")
    text = text.replace("pair_coeff * * ", "pair_coeff * * moe ").replace("Nb Mo Ta W", "Nb Mo Ta NULL")
    succeed(text.replace("run 0", "pair_coeff * * zero\nrun 0"), tmp_path, ranks=2)
    row = devi(tmp_path)[0, 1:]
    seen = np.array(atoms.symbols) != "W"
    assert (row[6:][~seen] == 0).all()
    np.testing.assert_allclose(
        row[3:6], [row[6:][seen].max(), row[6:][seen].min(), row[6:][seen].mean()], rtol=1e-5
    )


DRIVER = """
from moecalc.lammps import lammps
engine = lammps(cmdargs=["-screen", "none", "-log", "none"])
engine.file("in.test")
print("lists", engine.extract_pair("n_lists"))
"""


def test_a_file_that_takes_no_line_stops_the_run(members, atoms, tmp_path):
    """Here a pipe whose reader has gone."""
    write_data(tmp_path / "data.alloy", atoms, METALS)
    (tmp_path / "in.test").write_text(script(members, "out_freq 1 out_file pipe", "fix 1 all nve\nrun 1000"))
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", DRIVER]  # Python ignores SIGPIPE
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        with (tmp_path / "pipe").open() as pipe:
            assert pipe.readline().startswith("#")
        output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    message = "Pair style moe: expected pipe to take a line, got an error of the file system"
    assert message in " ".join(output.split())


@pytest.mark.parametrize("keywords", ["out_freq 5", "out_file other.out"])
def test_other_keywords_need_a_run_with_pre_yes(members, atoms, keywords, tmp_path):
    write_data(tmp_path / "data.alloy", atoms, METALS)
    again = f"run 0\npair_style moe dtype float64 device cpu untrained yes {keywords}\nrun 1 pre"
    text = script(members, "out_freq 0", f"fix 1 all nve\n{again}")
    assert "expected a run with `pre yes`, got `pre no`" in lmp(f"{text.rstrip()} no\n", tmp_path).error()
    succeed(f"{text.rstrip()} yes\n", tmp_path)


def test_mistakes_are_named(members, packages, atoms, tmp_path):
    write_data(tmp_path / "data.alloy", atoms, METALS)
    water = packages("A_dyn")
    mistakes = {
        "freq": (
            "out_freq -1",
            members,
            "expected a number of steps after keyword out_freq, 0 for never, got -1",
        ),
        "word": ("out_freq often", members, "expected a number of steps after keyword out_freq"),
        "none": ("out_freq", members, "expected a value after keyword out_freq"),
        "next": ("out_file atomic", members, "expected a value after keyword out_file"),
        "blank": ("out_file 'a b'", members, "expected a file name without blanks and quotes"),
        "level": ("relative -1", members, "expected a number of 0 or more after keyword relative, got -1"),
        "level v": (
            "relative_v x",
            members,
            "expected a number of 0 or more after keyword relative_v, got x",
        ),
        "twice": ("atomic atomic", members, "expected keyword atomic once, got it twice"),
        "folder": (
            "out_file no/such.out",
            members,
            "expected out_file no/such.out in a folder that can be written",
        ),
        "full": (
            "out_file /dev/full",
            members,
            "expected out_file /dev/full in a folder that can be written",
        ),
        "missing": ("", [members[0], "nowhere.moe.pt"], "nowhere.moe.pt: no such file"),
        "element": ("", [members[0], water], "expected elements of the model A_dyn"),
        "no file": (
            "",
            [members[0], "second"],
            "expected 4 elements in pair_coeff, one per atom type, got 5",
        ),
    }
    cases = {name: script(files, keywords) for name, (keywords, files, _) in mistakes.items()}
    found = run_cases(cases, tmp_path)
    for name, (_, _, message) in mistakes.items():
        assert message in " ".join(found[name].error.split()), (name, found[name].error)


@pytest.mark.parametrize("ranks", [1, 2])
def test_energies_that_are_not_finite_name_their_package(packages, ranks, tmp_path):
    text = f"""
    units metal
    region box block 0 20 0 12 0 12
    create_box 1 box
    create_atoms 1 single 3 3 3
    create_atoms 1 single 5.2 3 3
    mass * 50
    pair_style moe device cpu untrained yes
    pair_coeff * * {packages("E1_moe_all")} {broken_package(tmp_path)} H
    run 0
    """
    run = lmp(text, tmp_path, ranks=ranks)
    assert run.code not in {0, -9, -11}
    assert "(model broken: expected finite energies" in run.error()


def test_a_list_is_made_once_for_all_packages(members, atoms, tmp_path):
    """A new list of LAMMPS is one list of neighbors here, however many packages there are."""
    write_data(tmp_path / "data.alloy", atoms, METALS)
    (tmp_path / "in.test").write_text(script(members, "out_freq 1", DYNAMICS.format(dump="d")))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "lists 1.0" in done.stdout
    assert devi(tmp_path).shape == (7, 7)
