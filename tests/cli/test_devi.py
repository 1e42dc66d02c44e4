"""`moecalc devi`: the text of DeePMD-kit's `dp model-devi`."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from command_line import run
from model_devi_cases import DEVI_CASES, RECORDED, checkpoints, structures, write_system

from moecalc import MoECalculator, testing

METALS = ["Nb", "Mo", "Ta", "W"]
HEADER = (
    "# step      max_devi_v         min_devi_v         avg_devi_v         "
    "max_devi_f         min_devi_f         avg_devi_f         devi_e             "
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    paths = [folder / f"{name}.moe.pt" for name in "ab"]
    for seed, path in enumerate(paths):
        testing.write_random_package(path, testing.random_config(METALS, nlayers=2), "float64", seed)
    return paths


@pytest.fixture
def frames(files):
    """Two periodic frames and a cluster, labelled by the first model."""
    found = [testing.bulk_alloy(METALS, seed=seed) for seed in (1, 2)]
    cluster = Atoms("NbMoW", [[0, 0, 0], [2.4, 0, 0], [0, 2.5, 0.3]])
    calculator = MoECalculator(files[0], check=False, allow_untrained=True, device="cpu")
    for atoms in found:
        results = {name: calculator.get_property(name, atoms) for name in ("energy", "forces", "stress")}
        atoms.calc = SinglePointCalculator(atoms, **results)
    return [*found, cluster]


def expected_row(files, atoms):
    """By DeePMD-kit's formulas."""
    calculators = [MoECalculator(file, check=False, allow_untrained=True, device="cpu") for file in files]
    of_member = [
        calculator.calculate_batch([atoms], ["energy", "forces", "stress"])[0] for calculator in calculators
    ]
    n = len(atoms)
    matrix = [[0, 5, 4], [5, 1, 3], [4, 3, 2]]
    virials = np.array([-one["stress"][matrix].ravel() * atoms.get_volume() / n for one in of_member]).std(
        axis=0
    )
    forces = np.linalg.norm(np.std([one["forces"] for one in of_member], axis=0), axis=-1)
    energy = np.std([one["energy"] / n for one in of_member])
    summary = [
        virials.max(),
        virials.min(),
        np.linalg.norm(virials) / 3,
        forces.max(),
        forces.min(),
        forces.mean(),
    ]
    return [*summary, energy], forces


def devi(files, data, out, *options):
    return run("devi", *files, "--data", data, "-o", out, "--device", "cpu", *options)


def test_the_file_is_that_of_dp_model_devi(files, frames, tmp_path):
    write(tmp_path / "frames.extxyz", frames)
    result = devi(files, tmp_path / "frames.extxyz", tmp_path / "devi.out", "--frequency", "5")
    assert result.exit_code == 0, result.output
    assert "3 frames: largest deviation of a force" in result.output
    lines = (tmp_path / "devi.out").read_text().splitlines()
    assert lines[:2] == ["# all", HEADER]
    assert all(len(line) == 12 + 7 * 19 for line in lines[2:])
    rows = np.loadtxt(tmp_path / "devi.out")
    assert rows[:, 0].tolist() == [0, 5, 10]
    for row, atoms in zip(rows[:2], frames, strict=False):
        np.testing.assert_allclose(row[1:], expected_row(files, atoms)[0], rtol=1e-6, atol=1e-12)
    assert (rows[2, [1, 3, 4, 6, 7]] > 0).all()  # a cluster has a virial as well


def test_each_atom_has_a_column(files, frames, tmp_path):
    write(tmp_path / "frames.extxyz", frames[:2])
    assert devi(files, tmp_path / "frames.extxyz", tmp_path / "devi.out", "--atomic").exit_code == 0
    header = (tmp_path / "devi.out").read_text().splitlines()[1]
    assert header == HEADER + "atm_devi_f(N)      "
    rows = np.loadtxt(tmp_path / "devi.out")
    for row, atoms in zip(rows, frames, strict=False):
        np.testing.assert_allclose(row[8:], expected_row(files, atoms)[1], rtol=1e-6)


def test_relative_deviations_have_levels(files, frames, tmp_path):
    write(tmp_path / "frames.extxyz", frames[:2])
    assert devi(files, tmp_path / "frames.extxyz", tmp_path / "a", "--atomic").exit_code == 0
    levels = ("--relative", "1e6", "--relative-v", "1e6")
    assert devi(files, tmp_path / "frames.extxyz", tmp_path / "b", "--atomic", *levels).exit_code == 0
    one, two = np.loadtxt(tmp_path / "a"), np.loadtxt(tmp_path / "b")
    np.testing.assert_allclose(two[:, 1:7] * 1e6, one[:, 1:7], rtol=1e-3)
    np.testing.assert_allclose(two[:, 7], one[:, 7])


def test_folders_of_deepmd_kit_have_a_part_per_system(files, frames, tmp_path):
    """What `moecalc convert` wrote."""
    small = testing.bulk_alloy(METALS, repeat=1)
    calculator = MoECalculator(files[0], check=False, allow_untrained=True, device="cpu")
    labels = calculator.calculate_batch([small], ["energy", "forces", "stress"])[0]
    small.calc = SinglePointCalculator(small, **labels)
    write(tmp_path / "frames.extxyz", [frames[0], small])
    converted = run("convert", tmp_path / "frames.extxyz", tmp_path / "data", "--validation", "0")
    assert converted.exit_code == 0, converted.output
    assert devi(files, tmp_path / "data", tmp_path / "devi.out").exit_code == 0
    lines = (tmp_path / "devi.out").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["#", "#", "0"] * 2
    rows = np.loadtxt(tmp_path / "devi.out")
    expected = sorted(expected_row(files, atoms)[0][3] for atoms in (frames[0], small))
    np.testing.assert_allclose(sorted(rows[:, 4]), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Packages of the checkpoints that DeePMD-kit compared."""
    folder = tmp_path_factory.mktemp("recorded")
    for checkpoint in checkpoints():
        testing.write_checkpoint_package(folder / f"{checkpoint.stem}.moe.pt", checkpoint)
    return [folder / f"{checkpoint.stem}.moe.pt" for checkpoint in checkpoints()]


@pytest.mark.filterwarnings("ignore:.*evaluated by the plain backend")  # one of the four has a softplus
@pytest.mark.parametrize("case", DEVI_CASES)
def test_the_text_is_what_dp_model_devi_wrote(members, case, tmp_path, monkeypatch):
    """As tests/data/model_devi/record.py recorded it."""
    monkeypatch.chdir(tmp_path)
    write_system(tmp_path / "system", structures())
    result = devi(members, "system", "devi.out", "--untrained", *DEVI_CASES[case])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "devi.out").read_text() == (RECORDED / f"dp_{case}.out").read_text()


@pytest.mark.filterwarnings("ignore:.*evaluated by the plain backend")
def test_relative_virials_are_those_of_pair_style_deepmd(members, tmp_path):
    """Each component is divided by its own mean; `dp model-devi` takes the norm of all nine."""
    atoms = structures()[0]
    cell, rotation = atoms.cell.standard_form()  # as LAMMPS has it
    turned = Atoms(atoms.symbols, atoms.positions @ rotation.T, cell=cell, pbc=True)
    write_system(tmp_path / "system", [turned])
    levels = ("--relative", "0.3", "--relative-v", "0.02", "--atomic")
    assert devi(members, tmp_path / "system", tmp_path / "devi.out", "--untrained", *levels).exit_code == 0
    row = np.loadtxt(tmp_path / "devi.out")
    recorded = np.loadtxt(RECORDED / "pair_relative.out")[0]
    np.testing.assert_allclose(row[1:7], recorded[1:7], rtol=1e-6)
    np.testing.assert_allclose(row[8:], recorded[7:], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*evaluated by the plain backend")
def test_elements_that_a_model_was_not_trained_on_are_refused(members, tmp_path):
    write_system(tmp_path / "system", structures())
    result = devi(members, tmp_path / "system", tmp_path / "devi.out")
    assert result.exit_code == 2
    assert "frame 0: the structure contains Cl, Na, which the model gelu has" in result.stderr


def test_a_plain_folder_of_deepmd_kit_is_read(files, frames, tmp_path):
    folder = tmp_path / "system"
    (folder / "set.000").mkdir(parents=True)
    (folder / "type_map.raw").write_text("\n".join(METALS) + "\n")
    (folder / "type.raw").write_text("\n".join(str(METALS.index(s)) for s in frames[0].symbols) + "\n")
    np.save(folder / "set.000/coord.npy", frames[0].positions.reshape(1, -1))
    np.save(folder / "set.000/box.npy", frames[0].cell.array.reshape(1, 9))
    assert devi(files, folder, tmp_path / "devi.out").exit_code == 0
    row = np.loadtxt(tmp_path / "devi.out")
    np.testing.assert_allclose(row[1:], expected_row(files, frames[0])[0], rtol=1e-6, atol=1e-12)


def test_mistakes_are_named(files, frames, tmp_path):
    data = tmp_path / "frames.extxyz"
    write(data, frames)
    (tmp_path / "old.out").write_text("kept")
    foreign = tmp_path / "foreign.extxyz"
    write(foreign, [frames[0], Atoms("He")])
    mistakes = [
        (devi(files[:1], data, tmp_path / "a"), "expected two or more packages to compare, got 1"),
        (devi(files, data, tmp_path / "old.out"), "old.out exists: choose another name"),
        (devi(files, data, tmp_path / "no/a"), "no such folder, expected an existing one for the deviations"),
        (devi(files, data, data, "--force"), "itself, which would be lost"),
        (devi(files, data, files[0], "--force"), "itself, which would be lost"),
        (devi(files, tmp_path / "nothing", tmp_path / "a"), "nothing"),
        (
            devi(files, data, tmp_path / "a", "--atomic"),
            "all: expected frames of one number of atoms, got 3 to",
        ),
        (devi(files, data, tmp_path / "a", "--relative", "nan"), "should be greater than or equal to 0"),
        (devi(files, data, tmp_path / "a", "--relative-v", "inf"), "a level relative_v of 0 or more"),
        (devi(files, foreign, tmp_path / "a"), "frame 1: the structure contains He"),
        (
            devi(files, data, tmp_path / "a", "--relative", "inf"),
            "expected a level relative of 0 or more, got inf",
        ),
    ]
    for result, message in mistakes:
        assert result.exit_code == 2, result.output
        assert message in result.stderr
    assert (tmp_path / "old.out").read_text() == "kept"
    assert not (tmp_path / "a").exists()
