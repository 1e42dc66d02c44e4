"""Folders of DeePMD-kit, plain and mixed, are read as frames wherever frames are read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from command_line import error_of, run

from moecalc import testing
from moecalc.data import DatasetError, read_frames, read_structure
from moecalc.data.convert import convert
from moecalc.data.systems import read_systems, write_systems
from moecalc.errors import MoecalcError
from moecalc.report import Report, evaluate

ELEMENTS = ["Nb", "Mo"]
TYPES = [0, 1, 1]


@pytest.fixture
def system(tmp_path):
    """A plain system of two sets with 3 and 2 frames of 3 atoms, one number of `type.raw` a line."""
    random = np.random.default_rng(0)
    folder = tmp_path / "system"
    folder.mkdir()
    (folder / "type.raw").write_text("0\n1\n1\n")
    (folder / "type_map.raw").write_text("Nb\nMo\n")
    for name, n in (("set.000", 3), ("set.001", 2)):
        (folder / name).mkdir()
        box = np.tile(5.0 * np.eye(3).ravel(), (n, 1)) + 0.1 * random.normal(size=(n, 9))
        values = {
            "coord": random.uniform(0, 5, size=(n, 9)),
            "box": box,
            "energy": random.normal(size=n),
            "force": random.normal(size=(n, 9)),
            "virial": _symmetric(random.normal(size=(n, 3, 3))).reshape(n, 9),
        }
        for key, value in values.items():
            np.save(folder / name / f"{key}.npy", value)
    return folder


def _symmetric(tensors):
    return tensors + tensors.transpose(0, 2, 1)


def stored(system, name, part="set.000"):
    return np.load(system / part / f"{name}.npy")


def replace(system, name, change, part="set.000"):
    np.save(system / part / f"{name}.npy", change(stored(system, name, part)))


class TestPlain:
    def test_numbers_have_the_units_and_signs_of_ase(self, system):
        frames = read_frames(system)
        assert len(frames) == 5
        first = frames[0]
        assert first.get_chemical_symbols() == ["Nb", "Mo", "Mo"]
        assert first.pbc.all()
        np.testing.assert_array_equal(first.positions.ravel(), stored(system, "coord")[0])
        np.testing.assert_array_equal(first.cell.array.ravel(), stored(system, "box")[0])
        assert first.get_potential_energy() == stored(system, "energy")[0]
        np.testing.assert_array_equal(first.get_forces().ravel(), stored(system, "force")[0])
        virial = -first.get_stress(voigt=False) * first.get_volume()
        np.testing.assert_allclose(virial.ravel(), stored(system, "virial")[0], atol=1e-12)

    def test_sets_follow_each_other(self, system):
        energies = [atoms.get_potential_energy() for atoms in read_frames(system)]
        assert energies == [*stored(system, "energy"), *stored(system, "energy", "set.001")]

    def test_a_system_alone_has_no_group(self, system):
        assert "dataset" not in read_frames(system)[0].info

    def test_types_in_one_line_and_single_precision_are_read(self, system):
        (system / "type.raw").write_text("0 1 1\n")
        replace(system, "energy", lambda e: e.astype(np.float32).reshape(-1, 1))
        first = read_frames(system)[0]
        assert first.get_chemical_symbols() == ["Nb", "Mo", "Mo"]
        assert first.get_potential_energy() == float(stored(system, "energy")[0, 0])

    def test_frames_without_energy_forces_and_virial(self, system):
        for name in ("energy", "force", "virial"):
            (system / "set.000" / f"{name}.npy").unlink()
        frames = read_frames(system)
        assert frames[0].calc is None
        assert set(frames[3].calc.results) == {"energy", "forces", "stress"}

    def test_frames_that_are_not_periodic(self, system):
        (system / "nopbc").touch()
        (system / "set.000" / "box.npy").unlink()
        first = read_frames(system)[0]
        assert not first.pbc.any()
        assert first.cell.rank == 0
        assert set(first.calc.results) == {"energy", "forces"}

    def test_conditions(self, system):
        for part, n in (("set.000", 3), ("set.001", 2)):
            np.save(system / part / "fparam.npy", np.full((n, 2), 0.25))
            np.save(system / part / "charge_spin.npy", np.tile([1.0, 2.0], (n, 1)))
        info = read_frames(system)[0].info
        assert list(info["fparam"]) == [0.25, 0.25]
        assert list(info["charge_spin"]) == [1, 2]

    def test_the_last_frame_is_the_structure(self, system):
        structure = read_structure(system)
        np.testing.assert_array_equal(structure.positions.ravel(), stored(system, "coord", "set.001")[1])


class TestMixed:
    def mixed(self, system, types):
        (system / "type.raw").write_text("0\n" * 3)
        for part, n in (("set.000", 3), ("set.001", 2)):
            np.save(system / part / "real_atom_types.npy", np.tile(types, (n, 1)).astype(np.int32))

    def test_every_frame_has_its_types(self, system):
        self.mixed(system, [1, 0, 1])
        assert {a.get_chemical_formula("reduce") for a in read_frames(system)} == {"MoNbMo"}

    def test_what_fills_up_a_frame_is_left_out(self, system):
        self.mixed(system, [1, 0, -1])
        first = read_frames(system)[0]
        assert first.get_chemical_symbols() == ["Mo", "Nb"]
        np.testing.assert_array_equal(first.positions.ravel(), stored(system, "coord")[0, :6])
        np.testing.assert_array_equal(first.get_forces().ravel(), stored(system, "force")[0, :6])

    def test_what_is_written_is_read(self, system, tmp_path):
        self.mixed(system, [1, 0, 1])
        frames = read_frames(system)
        frames[0].info.update(charge=1, spin=2, fparam=[0.5])
        write_systems(tmp_path / "written", frames, ELEMENTS)
        again = read_systems(tmp_path / "written", "dataset")
        assert [a.info["dataset"] for a in again] == ["0003"] * 4 + ["0003-charge-fparam1"]
        for one, other in zip([*frames[1:], frames[0]], again, strict=True):
            assert list(one.symbols) == list(other.symbols)
            np.testing.assert_array_equal(one.positions, other.positions)
            np.testing.assert_array_equal(one.get_forces(), other.get_forces())
            np.testing.assert_allclose(one.get_stress(), other.get_stress(), atol=1e-15)
        assert list(again[-1].info["charge_spin"]) == [1, 2]
        assert list(again[-1].info["fparam"]) == [0.5]

    def test_dpdata_s_mixed_folders_are_read(self, system, tmp_path):
        dpdata = pytest.importorskip("dpdata", reason="dpdata is not installed: extra deepmd")
        plain = dpdata.LabeledSystem(str(system), fmt="deepmd/npy")
        dpdata.MultiSystems(plain).to("deepmd/npy/mixed", str(tmp_path / "mixed"))
        frames = read_frames(tmp_path / "mixed")
        energies = sorted(atoms.get_potential_energy() for atoms in frames)
        np.testing.assert_allclose(energies, sorted(plain["energies"]))


class TestSeveral:
    def test_systems_below_a_folder_are_groups(self, system, tmp_path):
        root = tmp_path / "systems"
        shutil.copytree(system, root / "bulk" / "a")
        shutil.copytree(system, root / "bulk" / "b")
        frames = read_frames(root)
        assert [atoms.info["dataset"] for atoms in frames] == ["bulk/a"] * 5 + ["bulk/b"] * 5

    def test_convert_takes_a_folder(self, system, tmp_path):
        root = tmp_path / "systems"
        shutil.copytree(system, root / "a")
        shutil.copytree(system, root / "b")
        report = convert(root, tmp_path / "data", validation=0.2)
        assert [(g.name, g.train, g.valid, g.with_stress) for g in report.groups] == [
            ("a", 4, 1, 5),
            ("b", 4, 1, 5),
        ]
        assert report.type_map == ELEMENTS
        assert json.loads((tmp_path / "data" / "split.json").read_text())["source"] == "systems"

    def test_a_data_set_does_not_take_its_own_place(self, system, tmp_path):
        convert(system, tmp_path / "data", validation=0.4)
        for source in (tmp_path / "data", tmp_path / "data" / "train", tmp_path / "data" / "valid" / "0003"):
            with pytest.raises(DatasetError, match="is part of what is read"):
                convert(source, tmp_path / "data", force=True)
        assert len(read_frames(tmp_path / "data")) == 5


def no_coord(system):
    (system / "set.000" / "coord.npy").unlink()


def no_box(system):
    (system / "set.001" / "box.npy").unlink()


def no_types(system):
    (system / "type.raw").unlink()


def empty_types(system):
    (system / "type.raw").write_text("")


def no_type_map(system):
    (system / "type_map.raw").unlink()


def no_sets(system):
    for part in system.glob("set.*"):
        shutil.rmtree(part)


def words_as_types(system):
    (system / "type.raw").write_text("Nb\nMo\nMo\n")


def unknown_element(system):
    (system / "type_map.raw").write_text("Nb\nOW\n")


def large_type(system):
    (system / "type.raw").write_text("0\n1\n2\n")


def negative_type(system):
    (system / "type.raw").write_text("0\n-2\n1\n")


def fewer_atoms(system):
    (system / "type.raw").write_text("0\n1\n")


def fewer_forces(system):
    replace(system, "force", lambda x: x[:2])


def narrow_box(system):
    replace(system, "box", lambda x: x[:, :6])


def flat_coord(system):
    replace(system, "coord", lambda x: x[0])


def flat_cell(system):
    replace(system, "box", lambda x: 0 * x)


def text_as_array(system):
    (system / "set.000" / "energy.npy").write_text("1.0\n")


def objects(system):
    replace(system, "energy", lambda x: np.array(["a"] * len(x)))


def pickled(system):
    np.save(system / "set.000" / "energy.npy", np.array([{}, {}, {}], dtype=object), allow_pickle=True)


def large_mixed_type(system):
    np.save(system / "set.000" / "real_atom_types.npy", np.full((3, 3), 7))


def long_mixed_types(system):
    np.save(system / "set.000" / "real_atom_types.npy", np.zeros((3, 4)))


def no_frames(system):
    shutil.rmtree(system / "set.001")
    for file in (system / "set.000").iterdir():
        np.save(file, np.load(file)[:0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_coord, r"set\.000: no coord\.npy, expected positions \(n_frames, 9\)"),
        (
            no_box,
            r"set\.001: no box\.npy, expected cells \(n_frames, 9\), or an empty file \S+system/nopbc where",
        ),
        (no_types, r"system: no type\.raw, expected a file with the type of every atom"),
        (empty_types, r"type\.raw: empty, expected the type of every atom"),
        (no_type_map, r"system: no type_map\.raw, expected a file with the element of every type"),
        (no_sets, r"system: no folder set\.\*, expected set\.000 with coord\.npy"),
        (words_as_types, r"type\.raw: invalid literal .*'Nb', expected whole numbers"),
        (unknown_element, r"type_map\.raw: 'OW' is no chemical element, expected symbols"),
        (large_type, r"type\.raw: type 2, expected 0 to 1, the lines of \S+type_map\.raw"),
        (negative_type, r"type\.raw: type -2, expected 0 to 1"),
        (fewer_atoms, r"set\.000/coord\.npy: shape \(3, 9\), expected \(3, 6\)"),
        (fewer_forces, r"set\.000/force\.npy: shape \(2, 9\), expected \(3, 9\)"),
        (narrow_box, r"set\.000/box\.npy: shape \(3, 6\), expected \(3, 9\)"),
        (flat_coord, r"set\.000/coord\.npy: shape \(9,\), expected \(n_frames, 9\)"),
        (flat_cell, r"set\.000: frame 0 has a cell without volume, expected three vectors .* \S+nopbc"),
        (text_as_array, r"set\.000/energy\.npy: .*expected a NumPy array of numbers"),
        (objects, r"set\.000/energy\.npy: expected a NumPy array of numbers, got <U1"),
        (pickled, r"set\.000/energy\.npy: .*expected a NumPy array of numbers"),
        (large_mixed_type, r"real_atom_types\.npy: type 7, expected 0 to 1"),
        (long_mixed_types, r"real_atom_types\.npy: shape \(3, 4\), expected \(3, 3\)"),
        (no_frames, r"system: no frames in it, expected some in set\.\*/coord\.npy"),
    ],
)
def test_broken_folders_are_named(system, damage, message):
    damage(system)
    with pytest.raises(DatasetError, match=message) as caught:
        read_frames(system)
    assert "\n" not in str(caught.value)


def test_a_folder_without_systems_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"a folder without systems of DeePMD-kit, expected type\.raw"):
        read_frames(tmp_path)


def labelled(calculator, symbols, seed):
    """A frame whose energy is 10 meV per atom below that of the model."""
    atoms = testing.bulk_alloy(symbols, repeat=1, seed=seed)
    (answer,) = calculator.calculate_batch([atoms], ["energy", "forces", "stress"])
    answer["energy"] -= 0.010 * len(atoms)
    atoms.calc = SinglePointCalculator(atoms, **{k: answer[k] for k in ("energy", "forces", "stress")})
    atoms.info["dataset"] = "".join(symbols)
    return atoms


def test_a_report_on_what_convert_wrote(shared_calculator, tmp_path):
    frames = [labelled(shared_calculator, s, k) for s in (["Nb", "Mo"], ["Ta", "W"]) for k in range(3)]
    write(tmp_path / "frames.extxyz", frames)
    convert(tmp_path / "frames.extxyz", tmp_path / "data", validation=0.4)
    for name in ("valid", "valid/0002"):
        out = tmp_path / "report.md"
        numbers = tmp_path / "report.json"
        files = ("--data", tmp_path / "data" / name, "-o", out, "--json", numbers)
        result = run("report", "default", "--dtype", "float64", *files)
        assert result.exit_code == 0, result.output
        report = Report.model_validate_json(numbers.read_text())
        assert report.data == name.split("/")[-1]
        assert [g.name for g in report.groups] == (["0002"] if name == "valid" else ["all"])
        assert report.n_frames == 2
        assert report.total.energy.mae == pytest.approx(10.0, abs=1e-3)
        assert report.total.forces.mae == pytest.approx(0.0, abs=1e-6)
        assert report.total.stress.mae == pytest.approx(0.0, abs=1e-4)


def test_a_report_on_systems_is_that_on_the_file(shared_calculator, tmp_path):
    frames = [labelled(shared_calculator, s, k) for s in (["Nb", "Mo"], ["Ta", "W"]) for k in range(2)]
    write(tmp_path / "frames.extxyz", frames)
    for name, members in (("a", frames[:2]), ("b", frames[2:])):
        write_systems(tmp_path / "systems" / name, members, ["Nb", "Mo", "Ta", "W"])
    by_file = evaluate(shared_calculator, tmp_path / "frames.extxyz")
    by_system = evaluate(shared_calculator, tmp_path / "systems")
    assert by_system.groups == ["a/0002"] * 2 + ["b/0002"] * 2
    np.testing.assert_allclose(by_file.energy_model, by_system.energy_model, atol=1e-6)
    np.testing.assert_allclose(by_file.stress, by_system.stress, atol=1e-7)


def write_plain(folder, frames):
    """A plain system of frames that have the same atoms."""
    (folder / "set.000").mkdir(parents=True)
    names = sorted(set(frames[0].symbols))
    (folder / "type_map.raw").write_text("\n".join(names) + "\n")
    (folder / "type.raw").write_text("\n".join(str(names.index(s)) for s in frames[0].symbols) + "\n")
    columns = {
        "coord": [a.positions for a in frames],
        "box": [a.cell.array for a in frames],
        "energy": [a.get_potential_energy() for a in frames],
        "force": [a.get_forces() for a in frames],
        "virial": [-a.get_stress(voigt=False) * a.get_volume() for a in frames],
    }
    for name, values in columns.items():
        np.save(folder / "set.000" / f"{name}.npy", np.reshape(values, (len(frames), -1)))


def fit_checkpoint(source, input_file, folder):
    """What a fit of two steps makes of frames."""
    torch = pytest.importorskip("torch")
    result = run("fit", source, "--input", input_file, "-o", folder, "--validation", 0)
    assert result.exit_code == 0, result.output
    return torch.load(folder / "state.averaged.pt", weights_only=False)["state_dict"]


@pytest.mark.parametrize("form", ["plain", "mixed"])
def test_a_fit_on_a_folder_is_that_on_the_file(shared_calculator, tmp_path, form):
    frames = [labelled(shared_calculator, ["Mo", "Nb"], 0) for _ in range(3)]
    for k, atoms in enumerate(frames):
        atoms.info.clear()
        atoms.calc.results["energy"] += 0.1 * k
    write(tmp_path / "frames.extxyz", frames)
    if form == "plain":
        write_plain(tmp_path / "data", frames)
    else:
        write_systems(tmp_path / "data", frames, ["Nb", "Mo"])
    widths = {"n_dim": 16, "e_dim": 16, "a_dim": 16, "a_compress_rate": 0}
    model = testing.random_config(["Mo", "Nb"], neuron=[16, 16], **widths).model_dump(mode="json")
    del model["type_map"]
    given = {"model": model, "fit": {"steps": 2, "batch_atoms": 2}}
    (tmp_path / "fit.json").write_text(json.dumps(given))
    by_file = fit_checkpoint(tmp_path / "frames.extxyz", tmp_path / "fit.json", tmp_path / "a")
    by_folder = fit_checkpoint(tmp_path / "data", tmp_path / "fit.json", tmp_path / "b")
    for name, values in by_file.items():
        np.testing.assert_allclose(
            by_folder[name].numpy(), values.numpy(), rtol=1e-3, atol=1e-6, err_msg=name
        )


def test_clusters_are_reported_without_stress(shared_calculator, tmp_path):
    atoms = Atoms("W2", [[0, 0, 0], [2.6, 0, 0]])
    energy = float(shared_calculator.calculate_batch([atoms], ["energy"])[0]["energy"])
    folder = tmp_path / "dimer"
    (folder / "set.000").mkdir(parents=True)
    (folder / "nopbc").touch()
    (folder / "type.raw").write_text("0 0\n")
    (folder / "type_map.raw").write_text("W\n")
    for name, value in (("coord", atoms.positions.ravel()), ("energy", energy), ("force", np.zeros(6))):
        np.save(folder / "set.000" / f"{name}.npy", np.atleast_1d(value)[None])
    evaluation = evaluate(shared_calculator, folder)
    assert evaluation.energy_model == pytest.approx([energy])
    assert np.isnan(evaluation.stress).all()


def test_bench_takes_a_folder(tmp_path):
    frame = bulk("W", cubic=True)
    frame.calc = SinglePointCalculator(frame, energy=0.0, forces=np.zeros((2, 3)))
    write_systems(tmp_path / "set", [frame], ["W"])
    result = run("bench", "default", "--steps", 1, "--threads", 1, "--structure", tmp_path / "set")
    assert result.exit_code == 0, result.output
    assert "timing: 2 atoms" in result.stderr


def test_the_guard_takes_a_folder(system):
    result = run("zbl", "default", "--elements", "Nb,Mo", "--data", system)
    assert result.exit_code == 0, result.output


def test_a_broken_folder_is_one_line_of_the_command(system):
    no_coord(system)
    assert "no coord.npy" in error_of(run("zbl", "default", "--data", system))


def test_linked_systems_are_read_once(system, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "one").symlink_to(system)
    (folder / "again").symlink_to(system)
    (system / "back").symlink_to(folder)
    assert len(read_frames(folder)) == 5


def filled(system, types):
    """The system in the mixed format."""
    for part, n in (("set.000", 3), ("set.001", 2)):
        np.save(system / part / "real_atom_types.npy", np.tile(types, (n, 1)))
    return system


def test_frames_without_atoms_are_named(system, tmp_path):
    folder = filled(system, [-1, -1, -1])
    assert "no atoms" in run("convert", folder, tmp_path / "out").output
    with pytest.raises(MoecalcError, match="expected a structure with atoms, got none"):
        read_structure(folder)


@pytest.mark.parametrize("value", [0.6, np.nan, 1e30])
def test_types_that_are_not_whole_are_refused(system, value):
    with pytest.raises(DatasetError, match=r"real_atom_types.npy: types that are not whole numbers"):
        read_frames(filled(system, [0.0, 1.0, value]))


def test_a_huge_type_is_refused(system):
    (system / "type.raw").write_text("0 1 " + "9" * 30)
    with pytest.raises(DatasetError, match="expected whole numbers"):
        read_frames(system)
