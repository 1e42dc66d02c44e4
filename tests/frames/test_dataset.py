"""The converter of training data: numbers, split, and what it refuses."""

import gzip
import json
import shutil

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from typer.testing import CliRunner

from moecalc.cli import app
from moecalc.data import DatasetError, split_frames
from moecalc.data.convert import convert


def frame(symbols="NbMo", dataset="a", seed=0, stress=True, **changes):
    random = np.random.default_rng(seed)
    atoms = bulk("W", "bcc", a=3.2, cubic=True)
    atoms.set_chemical_symbols(symbols)
    atoms.rattle(0.1, seed=seed)
    atoms.info["dataset"] = dataset
    results = {"energy": -10.0 + random.normal(), "forces": random.normal(size=(2, 3))}
    if stress:
        results["stress"] = random.normal(size=6)
    results.update(changes)
    atoms.calc = SinglePointCalculator(atoms, **{k: v for k, v in results.items() if v is not None})
    return atoms


def converted(tmp_path, frames, **options):
    write(tmp_path / "frames.extxyz", frames)
    return convert(tmp_path / "frames.extxyz", tmp_path / "data", **options)


def test_numbers_arrive_in_deepmd_kit_s_units_and_signs(tmp_path):
    atoms = frame("MoNb")
    report = converted(tmp_path, [atoms], validation=0.0)
    system = tmp_path / "data/train/0002"
    stored = {path.stem: np.load(path) for path in (system / "set.000").iterdir()}
    assert report.type_map == ["Nb", "Mo"]
    assert (system / "type_map.raw").read_text().split() == ["Nb", "Mo"]
    assert (system / "type.raw").read_text().split() == ["0", "0"]
    assert stored["real_atom_types"].tolist() == [[1, 0]]
    np.testing.assert_allclose(stored["coord"][0], atoms.positions.ravel(), atol=1e-7)
    np.testing.assert_allclose(stored["box"][0], atoms.cell.array.ravel(), atol=1e-7)
    np.testing.assert_allclose(stored["energy"], [atoms.get_potential_energy()], atol=1e-7)
    np.testing.assert_allclose(stored["force"][0], atoms.get_forces().ravel(), atol=1e-7)
    virial = -atoms.get_stress(voigt=False) * atoms.get_volume()
    np.testing.assert_allclose(stored["virial"][0], virial.ravel(), atol=1e-6)


def test_the_virial_is_positive_when_the_structure_wants_to_expand(tmp_path):
    compressed = frame()
    compressed.calc.results["stress"] = np.array([-1.0, -1.0, -1.0, 0.0, 0.0, 0.0])
    converted(tmp_path, [compressed], validation=0.0)
    virial = np.load(tmp_path / "data/train/0002/set.000/virial.npy")[0].reshape(3, 3)
    assert (np.diag(virial) > 0).all()


def test_dpdata_reads_what_was_written(tmp_path):
    dpdata = pytest.importorskip("dpdata", reason="dpdata is not installed: extra deepmd")
    atoms = frame("MoNb")
    converted(tmp_path, [atoms], validation=0.0)
    systems = dpdata.MultiSystems()
    systems.load_systems_from_file(str(tmp_path / "data/train"), fmt="deepmd/npy/mixed")
    (system,) = systems.systems.values()
    assert system["energies"][0] == pytest.approx(atoms.get_potential_energy())
    np.testing.assert_allclose(
        system["virials"][0], -atoms.get_stress(voigt=False) * atoms.get_volume(), atol=1e-5
    )
    assert [system["atom_names"][i] for i in system["atom_types"]] == ["Mo", "Nb"]


def test_frames_are_sorted_into_systems_by_size_and_by_what_they_have(tmp_path):
    large = frame().repeat((2, 1, 1))
    large.calc = SinglePointCalculator(large, energy=-20.0, forces=np.zeros((4, 3)), stress=np.zeros(6))
    converted(tmp_path, [frame(), frame(stress=False, seed=1), large], validation=0.0)
    assert sorted(path.name for path in (tmp_path / "data/train").iterdir()) == [
        "0002",
        "0002-nostress",
        "0004",
    ]
    assert not (tmp_path / "data/train/0002-nostress/set.000/virial.npy").exists()


def test_every_group_gives_its_share_to_validation():
    frames = [frame(dataset="a", seed=i) for i in range(20)] + [frame(dataset="b", seed=i) for i in range(10)]
    held_out = split_frames(frames, 0.2, seed=0)
    assert sum(i < 20 for i in held_out) == 4
    assert sum(i >= 20 for i in held_out) == 2
    assert held_out == split_frames(frames, 0.2, seed=0)
    assert held_out != split_frames(frames, 0.2, seed=1)


@pytest.mark.parametrize("seed", range(5))
def test_held_out_frames_have_weak_and_strong_forces_like_their_group(seed):
    frames = [frame(seed=i) for i in range(20)]
    for strength, i in enumerate(np.random.default_rng(seed).permutation(20)):
        frames[i].calc.results["forces"] = np.full((2, 3), -0.1 * strength)
    held_out = split_frames(frames, 0.2, seed)
    strengths = sorted(round(-frames[i].calc.results["forces"][0, 0] / 0.1) for i in held_out)
    assert [strength // 5 for strength in strengths] == [0, 1, 2, 3]


@pytest.mark.parametrize(("n", "expected"), [(1, 0), (2, 1), (3, 1)])
def test_small_groups_keep_a_frame_for_training(n, expected):
    assert len(split_frames([frame(seed=i) for i in range(n)], 0.1, seed=0)) == expected


def test_no_frame_is_in_both_parts(tmp_path):
    frames = [frame(seed=i) for i in range(10)]
    converted(tmp_path, frames, validation=0.3)
    parts = [np.load(tmp_path / f"data/{part}/0002/set.000/energy.npy") for part in ("train", "valid")]
    assert [len(part) for part in parts] == [7, 3]
    energies = sorted(atoms.get_potential_energy() for atoms in frames)
    np.testing.assert_allclose(sorted(np.concatenate(parts)), energies, atol=1e-6)


def test_the_held_out_frames_are_written_as_extended_xyz_too(tmp_path):
    converted(tmp_path, [frame(seed=i, dataset="x") for i in range(4)], validation=0.5)
    frames = read(tmp_path / "data/valid.extxyz", index=":")
    energies = np.load(tmp_path / "data/valid/0002/set.000/energy.npy")
    assert [atoms.info["dataset"] for atoms in frames] == ["x", "x"]
    np.testing.assert_allclose([atoms.get_potential_energy() for atoms in frames], energies, atol=1e-6)


def test_split_json_says_where_every_frame_went(tmp_path):
    report = converted(tmp_path, [frame(seed=i) for i in range(4)], validation=0.5, seed=3)
    content = json.loads((tmp_path / "data/split.json").read_text())
    assert content["held_out"] == split_frames([frame(seed=i) for i in range(4)], 0.5, 3)
    assert content["seed"] == report.seed == 3
    assert content["groups"][0]["train"] == content["groups"][0]["valid"] == 2


def test_compressed_files_are_read(tmp_path):
    write(tmp_path / "frames.extxyz", [frame(seed=i) for i in range(3)])
    with (
        (tmp_path / "frames.extxyz").open("rb") as source,
        gzip.open(tmp_path / "f.extxyz.gz", "wb") as target,
    ):
        shutil.copyfileobj(source, target)
    report = convert(tmp_path / "f.extxyz.gz", tmp_path / "data", validation=0.0)
    assert report.groups[0].train == 3


def test_elements_fix_the_type_map(tmp_path):
    assert converted(tmp_path, [frame()], elements=["W", "Mo", "Nb"]).type_map == ["W", "Mo", "Nb"]


def without_cell():
    atoms = frame()
    atoms.pbc = [True, True, False]
    return atoms


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (frame(energy=None), "1 of 2 frames cannot be used: frame 1: no energy"),
        (frame(forces=None), "no forces"),
        (without_cell(), "not periodic in all three directions"),
        (frame("NbTa"), "elements Ta, expected Nb, Mo"),
        (frame(energy=float("nan")), "not finite"),
    ],
)
def test_frames_that_cannot_be_used_are_named(tmp_path, atoms, message):
    with pytest.raises(DatasetError, match=message):
        converted(tmp_path, [frame(), atoms], elements=["Nb", "Mo"])
    assert not (tmp_path / "data").exists()


def test_many_problems_are_counted(tmp_path):
    with pytest.raises(DatasetError, match=r"7 of 7 frames cannot be used: .*; and 2 more"):
        converted(tmp_path, [frame(energy=None, seed=i) for i in range(7)])


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_leaves_nothing_is_refused(tmp_path, share):
    with pytest.raises(DatasetError, match="expected a share from 0 to below 1"):
        converted(tmp_path, [frame()], validation=share)


def test_a_data_set_is_not_overwritten_unless_asked(tmp_path):
    converted(tmp_path, [frame()])
    with pytest.raises(DatasetError, match="has a data set already"):
        converted(tmp_path, [frame()])
    converted(tmp_path, [frame()], force=True)


@pytest.mark.parametrize("elements", [["Nb", "Xx"], ["Nb", "Nb"]])
def test_a_type_map_of_anything_but_different_elements_is_refused(tmp_path, elements):
    with pytest.raises(DatasetError, match="expected different chemical symbols"):
        converted(tmp_path, [frame()], elements=elements)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"frames.extxyz: no such file"):
        convert(tmp_path / "frames.extxyz", tmp_path / "data")


def test_a_file_that_is_no_structure_is_named(tmp_path):
    (tmp_path / "frames.extxyz").write_text("hello\n")
    with pytest.raises(DatasetError, match=r"frames.extxyz: not readable"):
        convert(tmp_path / "frames.extxyz", tmp_path / "data")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "frames.extxyz").write_text("")
    with pytest.raises(DatasetError, match=r"frames.extxyz: (no frames|not readable)"):
        convert(tmp_path / "frames.extxyz", tmp_path / "data")


def test_the_command_prints_a_table_of_the_groups(tmp_path):
    write(tmp_path / "frames.extxyz", [frame(seed=i, dataset="bulk") for i in range(4)])
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "frames.extxyz"), str(tmp_path / "data")])
    assert result.exit_code == 0, result.output
    assert "bulk" in result.output
    assert "3 to train, 1 held out (seed 0)" in result.output


def test_charge_spin_and_frame_parameters_are_written(tmp_path):
    frames = [frame(seed=k) for k in range(4)]
    frames[0].info.update(charge=1, spin=2)
    frames[1].info["charge_spin"] = [-2, 3]
    frames[2].info.update(charge=0, spin=1, fparam=[0.5, 0.25])
    frames[3].info["charge"] = 1  # of no use without a multiplicity
    converted(tmp_path, frames, validation=0.0)
    found = {p.name: p for p in (tmp_path / "data" / "train").iterdir()}
    assert sorted(found) == ["0002", "0002-charge", "0002-charge-fparam2"]
    assert np.load(found["0002-charge"] / "set.000/charge_spin.npy").tolist() == [[1, 2], [-2, 3]]
    assert np.load(found["0002-charge-fparam2"] / "set.000/fparam.npy").tolist() == [[0.5, 0.25]]


def test_charges_that_are_not_whole_are_refused(tmp_path):
    frames = [frame(seed=k) for k in range(2)]
    frames[1].info.update(charge=0.5, spin=2)
    with pytest.raises(DatasetError, match=r"frame 1: charge = 0.5, expected a whole number"):
        converted(tmp_path, frames)
