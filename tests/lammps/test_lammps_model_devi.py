"""The file of deviations beside that of `pair_style deepmd`, as tests/data/model_devi/record.py recorded it."""

from __future__ import annotations

import numpy as np
import pytest
from lammps_runs import EV_PER_KCAL, succeed, write_data
from model_devi_cases import ELEMENTS, MEMBERS, RECORDED, script, structures

COLUMNS = ["max_devi_v", "min_devi_v", "avg_devi_v", "max_devi_f", "min_devi_f", "avg_devi_f"]


@pytest.fixture
def ours(packages, tmp_path):
    """Run a case; its file."""

    def run(case, ranks=1, more=""):
        write_data(tmp_path / "data.system", structures()[0], ELEMENTS)
        files = " ".join(str(packages(name)) for name in MEMBERS)
        text = script(case, "moe device cpu untrained yes", files)
        succeed(text.replace("run 4", f"{more}\nrun 4"), tmp_path, ranks=ranks)
        return tmp_path / f"{case}.out"

    return run


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", ["plain", "atomic", "relative"])
def test_the_file_is_that_of_pair_style_deepmd(ours, case, ranks):
    assert ours(case, ranks).read_text() == (RECORDED / f"pair_{case}.out").read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_units_are_converted_as_lammps_does(ours, ranks):
    """DeePMD-kit's kcal/mol of an eV is 23.0605501, LAMMPS' 23.060549."""
    recorded, rows = np.loadtxt(RECORDED / "pair_real.out"), np.loadtxt(ours("real", ranks))
    assert rows[:, 0].tolist() == recorded[:, 0].tolist()
    np.testing.assert_allclose(rows[:, 1:], recorded[:, 1:], rtol=2e-6)


def test_relative_deviations_have_no_unit(ours):
    """DeePMD-kit converts them from eV to kcal/mol all the same, in `units real`."""
    recorded, rows = np.loadtxt(RECORDED / "pair_real_relative.out"), np.loadtxt(ours("real_relative"))
    assert rows[:, 0].tolist() == recorded[:, 0].tolist()
    np.testing.assert_allclose(rows[:, 1:], recorded[:, 1:] * EV_PER_KCAL, rtol=2e-6)


def read_as_dpgen2(path):
    """Columns by name: dpgen2 reads numbers and counts columns, and takes a row for each frame of the dump."""
    rows = np.loadtxt(path)
    if rows.ndim == 1:
        rows = rows.reshape(1, -1)
    return {name: rows[:, k + 1] for k, name in enumerate(COLUMNS)}


@pytest.mark.parametrize(("case", "every"), [("plain", 2), ("atomic", 1), ("relative", 4)])
def test_dpgen2_finds_a_row_for_each_frame_of_a_dump(ours, tmp_path, case, every):
    path = ours(case, 2, f"dump 1 all custom {every} traj.dump id type x y z")
    found = read_as_dpgen2(path)
    recorded = read_as_dpgen2(RECORDED / f"pair_{case}.out")
    frames = (tmp_path / "traj.dump").read_text().count("ITEM: TIMESTEP")
    for name in COLUMNS:
        assert len(found[name]) == frames
        np.testing.assert_array_equal(found[name], recorded[name])


def test_dpgen2_reads_a_file_of_one_line(ours, tmp_path):
    path = ours("plain")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert read_as_dpgen2(path)["max_devi_f"].shape == (1,)
