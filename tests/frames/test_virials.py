"""`virial=` of GAP, NEP and MACE files is used as stress, with the right sign, wherever frames are read."""

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from typer.testing import CliRunner

from moecalc import testing
from moecalc.cli import app
from moecalc.data import DatasetError, read_frames
from moecalc.data.convert import convert
from moecalc.errors import MoecalcError
from moecalc.report import evaluate
from moecalc.training.graphs import to_frame


def labelled(a=3.4):
    """Compressed or stretched copper with EMT's results, and its virial by differences: -dE/d(strain)."""
    atoms = bulk("Cu", "fcc", a=a, cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.calc = EMT()
    virial = np.zeros((3, 3))
    h = 1e-5
    for i in range(3):
        for j in range(3):
            strain = np.zeros((3, 3))
            strain[i, j] += 0.5 * h
            strain[j, i] += 0.5 * h
            energies = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.set_cell(atoms.cell.array @ (np.eye(3) + sign * strain), scale_atoms=True)
                moved.calc = EMT()
                energies.append(moved.get_potential_energy())
            virial[i, j] = -(energies[0] - energies[1]) / (2 * h)
    return atoms, virial


def file_with(path, atoms, stress=False, **info):
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    expected = atoms.get_stress()
    frame = atoms.copy()
    if stress is not False:
        results["stress"] = expected if stress is True else stress
    frame.calc = SinglePointCalculator(frame, **results)
    frame.info.update(info)
    write(path, [frame], format="extxyz")
    return expected


def six(virial):
    return virial[(0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)]


@pytest.mark.parametrize("key", ["virial", "virials"])
@pytest.mark.parametrize("form", ["matrix", "nine", "six"])
def test_a_virial_is_read_as_stress(key, form, tmp_path):
    atoms, virial = labelled()
    value = {"matrix": virial, "nine": virial.ravel(), "six": six(virial)}[form]
    expected = file_with(tmp_path / "a.xyz", atoms, **{key: value})
    (read,) = read_frames(tmp_path / "a.xyz")
    np.testing.assert_allclose(read.calc.results["stress"], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(to_frame(read, ["Cu"], 3.0).virial, virial, rtol=0, atol=1e-4)


def test_the_line_of_a_nep_file_is_read(tmp_path):
    atoms, virial = labelled(3.9)  # stretched: it wants to contract, virials are negative
    cell = " ".join(f"{x:.8f}" for x in atoms.cell.array.ravel())
    numbers = " ".join(f"{x:.8f}" for x in virial.ravel())
    lines = [
        str(len(atoms)),
        (
            f'energy={atoms.get_potential_energy():.8f} Lattice="{cell}" pbc="T T T" virial="{numbers}" '
            "Properties=species:S:1:pos:R:3:forces:R:3"
        ),
    ]
    for position, force in zip(atoms.positions, atoms.get_forces(), strict=True):
        lines.append("Cu " + " ".join(f"{x:.8f}" for x in (*position, *force)))
    (tmp_path / "train.xyz").write_text("\n".join(lines) + "\n")
    (read,) = read_frames(tmp_path / "train.xyz")
    assert read.get_stress()[:3].min() > 0
    np.testing.assert_allclose(read.get_stress(), atoms.get_stress(), rtol=0, atol=1e-6)


def test_the_converter_writes_the_virial_as_it_was(tmp_path):
    atoms, virial = labelled()
    file_with(tmp_path / "a.xyz", atoms, virial=virial)
    convert(tmp_path / "a.xyz", tmp_path / "set", validation=0.0)
    stored = np.load(tmp_path / "set/train/0004/set.000/virial.npy")
    np.testing.assert_allclose(stored.reshape(3, 3), virial, rtol=0, atol=1e-6)


def test_stress_and_virial_that_agree_are_accepted(tmp_path):
    atoms, virial = labelled()
    expected = file_with(tmp_path / "a.xyz", atoms, stress=True, virial=np.round(virial, 4))
    (read,) = read_frames(tmp_path / "a.xyz")
    np.testing.assert_allclose(read.get_stress(), expected, rtol=0, atol=1e-7)


def test_stress_and_virial_of_opposite_signs_are_refused(tmp_path):
    atoms, virial = labelled()
    file_with(tmp_path / "a.xyz", atoms, stress=True, virial=-virial)
    with pytest.raises(
        MoecalcError, match=r"a.xyz: frame 0: virial and stress .* \(their signs are opposite\)"
    ):
        read_frames(tmp_path / "a.xyz")


def test_stress_and_virial_that_contradict_are_refused_in_one_line(tmp_path):
    atoms, virial = labelled()
    file_with(tmp_path / "a.xyz", atoms, stress=True, virial=virial + np.eye(3))
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "a.xyz"), str(tmp_path / "set")])
    assert result.exit_code == 2
    assert "frame 0: virial and stress contradict each other by 1 eV, expected" in result.stderr


def test_two_virials_that_contradict_are_refused(tmp_path):
    atoms, virial = labelled()
    file_with(tmp_path / "a.xyz", atoms, virial=virial, virials=2 * virial)
    with pytest.raises(DatasetError, match="virials and stress contradict"):
        read_frames(tmp_path / "a.xyz")


def test_a_virial_of_another_shape_is_refused(tmp_path):
    atoms, _ = labelled()
    file_with(tmp_path / "a.xyz", atoms, virials=np.array([1.0, 2.0, 3.0]))
    with pytest.raises(DatasetError, match="frame 0: virials has 3 values, expected 9"):
        read_frames(tmp_path / "a.xyz")


@pytest.mark.parametrize("key", ["REF_virial", "dft_stress"])
def test_other_names_are_told(key, tmp_path):
    atoms, virial = labelled()
    file_with(tmp_path / "a.xyz", atoms, **{key: virial})
    with pytest.warns(UserWarning, match=f"{key}: not read"):
        (read,) = read_frames(tmp_path / "a.xyz")
    assert "stress" not in read.calc.results


def test_a_virial_of_a_cluster_is_no_stress(tmp_path):
    atoms, virial = labelled()
    frame = atoms.copy()
    frame.pbc = False
    frame.calc = SinglePointCalculator(frame, energy=1.0, forces=np.zeros((4, 3)))
    frame.info["virial"] = virial
    write(tmp_path / "a.xyz", [frame], format="extxyz")
    (read,) = read_frames(tmp_path / "a.xyz")
    assert "stress" not in read.calc.results


def test_a_report_on_frames_of_the_caller_uses_their_virials(shared_calculator):
    atoms = testing.bulk_alloy(repeat=1)
    atoms.calc = shared_calculator
    stress = atoms.get_stress()
    frame = atoms.copy()
    frame.calc = SinglePointCalculator(frame, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
    frame.info["virial"] = -stress[[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3) * atoms.get_volume()
    evaluation = evaluate(shared_calculator, [frame])
    np.testing.assert_allclose(evaluation.stress, evaluation.stress_model, rtol=0, atol=1e-9)
    assert "stress" not in frame.calc.results
