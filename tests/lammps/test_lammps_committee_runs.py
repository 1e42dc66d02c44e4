"""Several packages in one pair style, in the commands that users give: runs in a row, minimize, rerun, restarts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import DATA
from lammps_runs import alloy, from_dump, lmp, succeed, write_data

from moecalc import MoECalculator, testing
from moecalc.committee import deviations

METALS = ["Nb", "Mo", "Ta", "W"]
CHARGED = {"add_chg_spin_ebd": True, "default_chg_spin": (0, 1)}
PAGE = DATA.parents[1] / "docs/pair_moe.md"

SCRIPT = """
units metal
boundary p p p
box tilt large
read_data data.alloy
pair_style moe device cpu untrained yes {keywords}
pair_coeff * * {files} Nb Mo Ta W
fix 1 all nve
{lines}
"""


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """A network of float64, one of float32 with another cutoff, and one that takes a charge, by name."""
    folder = tmp_path_factory.mktemp("members")
    configs = {
        "double": (testing.random_config(METALS, e_rcut=4.0, e_rcut_smth=3.2), "float64"),
        "single": (testing.random_config(METALS[::-1], n_routed=2, nlayers=2, n_dim=12), "float32"),
        "charged": (testing.random_config(METALS, **CHARGED), "float64"),
    }
    for seed, (name, (config, dtype)) in enumerate(configs.items()):
        testing.write_random_package(folder / f"{name}.moe.pt", config, dtype, seed)
    return {name: folder / f"{name}.moe.pt" for name in configs}


@pytest.fixture
def atoms(tmp_path):
    """Their data file is in the folder."""
    found = alloy(METALS, (2, 2, 2), shear=0.1)
    write_data(tmp_path / "data.alloy", found, METALS)
    return found


def script(members, keywords="", lines="run 0", names=("double", "single")):
    files = " ".join(str(members[name]) for name in names)
    return SCRIPT.format(keywords=keywords, files=files, lines=lines)


def devi(folder, name="model_devi.out"):
    return np.loadtxt(folder / name, ndmin=2)


def forces_deviate(members, atoms, names=("double", "single"), **given):
    """Deviation of the force on each atom, (n_atoms,) eV/A, by ASE."""
    options = {"device": "cpu", "check": False, "allow_untrained": True, **given}
    forces = [MoECalculator(members[name], **options).get_property("forces", atoms) for name in names]
    return deviations(np.array(forces))


@pytest.mark.parametrize("ranks", [1, 2])
def test_packages_of_both_precisions_are_compared(members, atoms, ranks, tmp_path):
    succeed(script(members, "atomic"), tmp_path, ranks=ranks)
    np.testing.assert_allclose(devi(tmp_path)[0, 7:], forces_deviate(members, atoms), rtol=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_later_runs_go_on_with_the_file(members, atoms, ranks, tmp_path):
    (tmp_path / "model_devi.out").write_text("of an earlier input\n")
    succeed(script(members, "out_freq 2", "run 2\nrun 2\nrun 1 pre no post no\nrun 1"), tmp_path, ranks=ranks)
    text = (tmp_path / "model_devi.out").read_text()
    assert text.count("#") == 1
    assert "earlier" not in text
    assert devi(tmp_path)[:, 0].tolist() == [0, 2, 2, 4, 6]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_pair_style_after_a_restart_goes_on_with_the_file(members, atoms, ranks, tmp_path):
    """As the inputs of dpgen2 have it."""
    first = script(members, "out_freq 2", "run 2\nwrite_restart file.restart")
    succeed(first, tmp_path, ranks=ranks)
    again = first.replace("read_data data.alloy", "read_restart file.restart")
    succeed(again, tmp_path, ranks=ranks)
    assert devi(tmp_path)[:, 0].tolist() == [0, 2, 2, 4]
    assert (tmp_path / "model_devi.out").read_text().count("#") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rerun_has_the_deviations_of_its_frames(members, atoms, ranks, tmp_path):
    lines = """
    velocity all create 600 3
    dump d all custom 2 traj.dump id type x y z
    dump_modify d sort id format float %.17g
    run 4
    undump d
    """
    run = succeed(script(members, "out_freq 1", lines), tmp_path, ranks=ranks)
    expected = devi(tmp_path)[::2]
    frames = run.dump("traj.dump")
    succeed(script(members, "out_freq 1", "rerun traj.dump dump x y z"), tmp_path, ranks=ranks)
    np.testing.assert_allclose(devi(tmp_path), expected, rtol=1e-4)
    last = forces_deviate(members, from_dump(frames[-1], METALS))
    assert devi(tmp_path)[-1, 4] == pytest.approx(last.max(), rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_minimization_tells_of_its_steps(members, atoms, ranks, tmp_path):
    """Each evaluation of a line search counts, and the first package alone decides where it goes."""
    lines = "unfix 1\nthermo_modify format float %.10g\nmin_style cg\nminimize 0 1e-3 4 40"
    names = ("double", "charged")
    both = succeed(script(members, "out_freq 2", lines, names), tmp_path, ranks=ranks)
    steps = devi(tmp_path)[:, 0]
    assert sorted(set(steps)) == [0, 2, 4]
    assert (np.diff(steps) >= 0).all()
    alone = succeed(script(members, "", lines, names[:1]), tmp_path, ranks=ranks)
    np.testing.assert_allclose(both.thermo()[0], alone.thermo()[0], rtol=1e-8)


def test_atoms_may_come_and_go_between_runs(members, atoms, tmp_path):
    lines = """
    run 0
    group some id 3 7 12
    delete_atoms group some compress no
    run 0
    """
    succeed(script(members, "atomic", lines), tmp_path, ranks=2)
    rows = (tmp_path / "model_devi.out").read_text().splitlines()[1:]
    first, second = (np.array(row.split()[7:], float) for row in rows)
    assert (len(first), len(second)) == (len(atoms), len(atoms) - 3)
    kept = np.delete(np.arange(len(atoms)), [2, 6, 11])
    np.testing.assert_allclose(second, forces_deviate(members, atoms[kept]), rtol=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_page_s_lines_stop_a_run(members, atoms, ranks, tmp_path):
    """Without thermodynamic output or another command that asks for the deviation."""
    page = re.search(r"passes 0.5 eV/A:\n.*?```lammps\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    lines = [line for line in page.splitlines() if not line.startswith("pair_")]
    assert len(lines) == 3
    start = "velocity all create 900 3"
    succeed(script(members, "out_freq 2", f"{start}\nrun 20"), tmp_path, ranks=ranks)
    limit = float(np.median(devi(tmp_path)[1:, 4]))
    lines = "\n".join(lines).replace("halt 10", "halt 2").replace("0.5", f"{limit:.6e}")
    stopped = succeed(script(members, "out_freq 2", f"{start}\n{lines}\nrun 20"), tmp_path, ranks=ranks)
    rows = devi(tmp_path)
    assert rows[-1, 4] > limit
    assert (rows[1:-1, 4] <= limit).all()
    assert f"met on step {int(rows[-1, 0])} " in stopped.output
    assert rows[-1, 0] < 20


def test_charge_is_given_to_all_packages(members, atoms, tmp_path):
    names = ("charged", "charged")
    run = succeed(script(members, "charge 1 spin 2 atomic", names=names), tmp_path)
    assert "charge 1, spin 2" in run.output
    assert (devi(tmp_path)[0, 1:] == 0).all()
    error = lmp(script(members, "charge 1", names=("charged", "double")), tmp_path).error()
    assert "double.moe.pt" in error


def test_hybrid_committees_have_files_of_their_own(members, atoms, tmp_path):
    files = f"{members['double']} {members['single']}"
    text = script(members, "atomic").replace(
        "pair_style moe device cpu untrained yes atomic",
        "pair_style hybrid/scaled 0.5 moe device cpu untrained yes 0.5 moe device cpu untrained yes out_file b.out",
    )
    text = text.replace(
        f"pair_coeff * * {files}", f"pair_coeff * * moe 1 {files} Nb Mo Ta W\npair_coeff * * moe 2 {files}"
    )
    succeed(text, tmp_path, ranks=2)
    np.testing.assert_array_equal(devi(tmp_path), devi(tmp_path, "b.out"))
