"""The ASE calculator: right numbers, ASE's protocols, clear refusals."""

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from alterations import edit_json
from ase import Atoms, units
from ase.calculators.calculator import CalculatorSetupError, PropertyNotImplementedError
from ase.filters import FrechetCellFilter
from ase.io import Trajectory, read, write
from ase.md import MDLogger
from ase.md.nose_hoover_chain import MTKNPT
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from ase.stress import voigt_6_to_full_3x3_stress

import moecalc
from moecalc import MoECalculator, _lib, models, runtime, testing
from moecalc import calculator as module
from moecalc.errors import ElementError, MoecalcError, PackageError, StructureError
from moecalc.testing import FINITE_DIFFERENCE, ROUNDING, SAME_MODEL

STRUCTURES = {
    "bulk": lambda: testing.bulk_alloy(repeat=1),
    "slab": lambda: testing.slab(repeat=1),
    "molecule": lambda: testing.molecule(n_atoms=4),
    "one-atom cell": testing.one_atom_cell,
}


@pytest.fixture(params=STRUCTURES)
def structure(request):
    return STRUCTURES[request.param]()


def fake_calculator(monkeypatch, elements=("Nb", "W"), metadata=None, **arguments):
    """A calculator with a pair potential in place of the compiled evaluator, which is returned as well."""
    evaluator = testing.PairEvaluator(
        elements, cutoff=5.0, metadata=json.dumps({"name": "fake", **(metadata or {})})
    )
    model = runtime.Model(Path("fake.moe.pt"), evaluator)
    monkeypatch.setattr(module, "open_model", lambda *_, **__: model)
    return MoECalculator("fake.moe.pt", **arguments), evaluator


def set_velocities(atoms, temperature):
    thermal = np.sqrt(units.kB * temperature * atoms.get_masses())
    atoms.set_momenta(np.random.default_rng(0).normal(size=(len(atoms), 3)) * thermal[:, None])


# --- numbers ---------------------------------------------------------------------------------------


def test_forces_are_the_derivative_of_the_energy(structure, shared_calculator, energies_of):
    structure.calc = shared_calculator
    expected = testing.finite_difference_forces(energies_of, structure)
    np.testing.assert_allclose(structure.get_forces(), expected, rtol=0, atol=FINITE_DIFFERENCE)


@pytest.mark.parametrize("name", ["bulk", "one-atom cell"])
def test_stress_is_the_derivative_of_the_energy(name, shared_calculator, energies_of):
    atoms = STRUCTURES[name]()
    atoms.calc = shared_calculator
    expected = testing.finite_difference_stress(energies_of, atoms)
    assert np.abs(expected).max() > 100 * FINITE_DIFFERENCE
    np.testing.assert_allclose(atoms.get_stress(), expected, rtol=0, atol=FINITE_DIFFERENCE)


def test_compression_gives_negative_stress(shared_calculator):
    atoms = testing.one_atom_cell(a=2.9)
    atoms.calc = shared_calculator
    assert atoms.get_stress()[:3].max() < 0


def test_forces_on_an_isolated_structure_cancel(structure, shared_calculator):
    structure.calc = shared_calculator
    np.testing.assert_allclose(structure.get_forces().sum(axis=0), 0, atol=ROUNDING)


def test_per_atom_energies_sum_to_the_energy(structure, shared_calculator):
    structure.calc = shared_calculator
    assert structure.get_potential_energies().sum() == pytest.approx(
        structure.get_potential_energy(), abs=ROUNDING
    )


def test_free_energy_is_the_energy(structure, shared_calculator):
    structure.calc = shared_calculator
    assert structure.get_potential_energy(force_consistent=True) == structure.get_potential_energy()


def test_per_atom_stresses_sum_to_the_stress(small_bulk, shared_calculator):
    small_bulk.calc = shared_calculator
    stresses = small_bulk.get_stresses()
    assert stresses.shape == (2, 6)
    np.testing.assert_allclose(stresses.sum(axis=0), small_bulk.get_stress(), rtol=0, atol=SAME_MODEL)


def test_repeating_the_cell_repeats_the_results(small_bulk, shared_calculator):
    single, repeated = shared_calculator.calculate_batch(
        [small_bulk, small_bulk * (1, 2, 2)], ["energies", "forces", "stress"]
    )
    np.testing.assert_allclose(repeated["energies"], np.tile(single["energies"], 4), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(repeated["forces"], np.tile(single["forces"], (4, 1)), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(repeated["stress"], single["stress"], rtol=0, atol=ROUNDING)


def test_float32_agrees_with_float64(shared_calculator):
    structures = [make() for make in STRUCTURES.values()]
    single = MoECalculator(dtype="float32", device="cpu").calculate_batch(structures)
    for got, expected in zip(single, shared_calculator.calculate_batch(structures), strict=True):
        np.testing.assert_allclose(got["forces"], expected["forces"], rtol=0, atol=1e-4)


def test_no_atoms_have_no_energy(shared_calculator):
    atoms = Atoms(calculator=shared_calculator)
    assert atoms.get_potential_energy() == 0.0
    assert atoms.get_forces().shape == (0, 3)


def test_an_isolated_atom_has_an_energy_and_no_force(shared_calculator):
    atoms = Atoms("W", [[3.0, 4.0, 5.0]], calculator=shared_calculator)
    assert np.isfinite(atoms.get_potential_energy())
    assert (atoms.get_forces() == 0).all()


def test_wrapping_changes_nothing(small_bulk, calculator):
    small_bulk.positions += 1.7
    small_bulk.calc = calculator
    energy, forces = small_bulk.get_potential_energy(), small_bulk.get_forces()
    small_bulk.wrap()
    assert small_bulk.get_potential_energy() == pytest.approx(energy, abs=ROUNDING)
    np.testing.assert_allclose(small_bulk.get_forces(), forces, rtol=0, atol=ROUNDING)


def test_the_skin_changes_no_trajectory(small_bulk, calculator):
    set_velocities(small_bulk, 2000)
    small_bulk.calc = calculator
    fresh = MoECalculator(dtype="float64", device="cpu", skin=0.0)
    dynamics = VelocityVerlet(small_bulk, 2 * units.fs)
    for _ in range(10):
        dynamics.run(1)
        again = small_bulk.copy()
        again.calc = fresh
        np.testing.assert_allclose(small_bulk.get_forces(), again.get_forces(), rtol=0, atol=ROUNDING)
    assert calculator.neighbor_list.n_rebuilds < fresh.neighbor_list.n_rebuilds == 10


# --- batches ---------------------------------------------------------------------------------------


def test_a_batch_gives_what_single_calculations_give(shared_calculator, calculator):
    structures = [make() for make in STRUCTURES.values()] + [Atoms(), Atoms("Cu", [[0, 0, 0]])]
    batch = shared_calculator.calculate_batch(structures, ["energy", "free_energy", "energies", "forces"])
    for atoms, results in zip(structures, batch, strict=True):
        atoms.calc = calculator
        assert results["energy"] == pytest.approx(atoms.get_potential_energy(), abs=ROUNDING)
        assert results["free_energy"] == results["energy"]
        np.testing.assert_allclose(results["energies"], atoms.get_potential_energies(), rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(results["forces"], atoms.get_forces(), rtol=0, atol=ROUNDING)


def test_a_batch_gives_stress_of_periodic_structures(small_bulk, shared_calculator, calculator):
    structures = [small_bulk, testing.one_atom_cell()]
    for atoms, results in zip(
        structures, shared_calculator.calculate_batch(structures, ["stress", "stresses"]), strict=True
    ):
        atoms.calc = calculator
        assert set(results) == {"stress", "stresses"}
        np.testing.assert_allclose(results["stress"], atoms.get_stress(), rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(results["stresses"], atoms.get_stresses(), rtol=0, atol=ROUNDING)


def test_a_batch_is_one_evaluation(monkeypatch):
    calculator, evaluator = fake_calculator(monkeypatch)
    assert len(calculator.calculate_batch(testing.molecule(["Nb"]) for _ in range(5))) == 5
    assert evaluator.n_calls == 1


def test_an_empty_batch_is_no_evaluation(monkeypatch):
    calculator, evaluator = fake_calculator(monkeypatch)
    assert calculator.calculate_batch([]) == []
    assert evaluator.n_calls == 0


def test_a_batch_leaves_the_calculator_alone(monkeypatch, small_bulk):
    calculator, _ = fake_calculator(monkeypatch, elements=("Nb", "Mo", "Ta", "W"))
    small_bulk.calc = calculator
    energy = small_bulk.get_potential_energy()
    calculator.calculate_batch([testing.molecule()])
    assert calculator.results["energy"] == energy
    assert calculator.neighbor_list.n_calls == 1


@pytest.mark.parametrize(
    ("broken", "properties", "error", "message"),
    [
        (Atoms("Fe"), ["energy"], ElementError, "^structure 1: the structure contains Fe"),
        (Atoms("W2", [[0, 0, 0], [0, 0, 0.1]]), ["forces"], StructureError, "^structure 1: atoms 0"),
        (Atoms("W"), ["stress"], module.UndefinedStressError, "^structure 1: stress is undefined"),
    ],
)
def test_a_batch_names_the_structure_it_refuses(monkeypatch, broken, properties, error, message):
    calculator, _ = fake_calculator(monkeypatch)
    with pytest.raises(error, match=message):
        calculator.calculate_batch([testing.one_atom_cell(), broken], properties)


def test_a_batch_refuses_unknown_properties(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch)
    with pytest.raises(
        PropertyNotImplementedError, match=r"expected properties among energy, .*, got 'dipole'"
    ):
        calculator.calculate_batch([], ["dipole"])


# --- ASE's protocols -------------------------------------------------------------------------------


def test_energy_forces_and_stress_are_one_evaluation(monkeypatch):
    atoms = testing.one_atom_cell()
    atoms.calc, evaluator = fake_calculator(monkeypatch)
    atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(), atoms.get_potential_energies()
    assert evaluator.n_calls == 1


def test_per_atom_stresses_are_computed_when_asked_for(monkeypatch):
    atoms = testing.one_atom_cell()
    atoms.calc, evaluator = fake_calculator(monkeypatch)
    atoms.get_forces()
    assert "stresses" not in atoms.calc.results
    atoms.get_stresses()
    atoms.get_forces()
    assert evaluator.n_calls == 2


def test_charges_and_magnetic_moments_change_nothing(monkeypatch):
    atoms = testing.one_atom_cell()
    atoms.calc, evaluator = fake_calculator(monkeypatch)
    atoms.get_potential_energy()
    atoms.set_initial_charges([1.0])
    atoms.set_initial_magnetic_moments([2.0])
    atoms.get_potential_energy()
    assert evaluator.n_calls == 1


@pytest.mark.parametrize("attribute", ["numbers", "positions", "cell", "pbc"])
def test_every_other_change_is_a_new_evaluation(monkeypatch, attribute):
    atoms = testing.molecule(["W"])
    atoms.cell = np.diag([20.0, 20.0, 20.0])
    atoms.calc, evaluator = fake_calculator(monkeypatch)
    atoms.get_potential_energy()
    changed = {"numbers": [41] * 8, "positions": atoms.positions * 1.1, "cell": [4.5] * 3, "pbc": True}
    setattr(atoms, attribute, changed[attribute])
    atoms.get_potential_energy()
    assert evaluator.n_calls == 2


def test_results_are_copies(small_bulk, calculator):
    small_bulk.calc = calculator
    small_bulk.get_forces()[:] = 0
    assert np.abs(small_bulk.get_forces()).max() > 0


def test_relaxation_of_positions_and_cell(small_bulk, calculator):
    small_bulk.calc = calculator
    with BFGS(FrechetCellFilter(small_bulk), logfile=None) as optimizer:
        assert optimizer.run(fmax=0.05, steps=40)
    assert np.abs(small_bulk.get_forces()).max() < 0.05
    assert np.abs(small_bulk.get_stress()).max() * small_bulk.get_volume() < 0.1


def test_relaxation_without_cell(calculator):
    atoms = testing.molecule(n_atoms=3)
    atoms.calc = calculator
    start = atoms.get_potential_energy()
    with FIRE(atoms, logfile=None) as optimizer:
        optimizer.run(fmax=0.05, steps=5)
    assert atoms.get_potential_energy() < start


def test_npt_dynamics(small_bulk, calculator):
    set_velocities(small_bulk, 300)
    small_bulk.calc = calculator
    volume = small_bulk.get_volume()
    MTKNPT(
        small_bulk, units.fs, temperature_K=300, pressure_au=0.0, tdamp=50 * units.fs, pdamp=100 * units.fs
    ).run(5)
    assert small_bulk.get_volume() != volume
    assert np.isfinite(small_bulk.get_forces()).all()


def test_nudged_elastic_band_with_one_calculator(calculator):
    first = testing.molecule(n_atoms=3)
    last = first.copy()
    last.positions[0] += 0.4
    images = [first, first.copy(), first.copy(), last]
    for image in images:
        image.calc = calculator
    band = NEB(images, method="improvedtangent", allow_shared_calculator=True)
    band.interpolate()
    forces = band.get_forces()
    alone = images[1].copy()
    alone.calc = MoECalculator(dtype="float64", device="cpu")
    assert forces.shape == (6, 3)
    assert band.energies[1] == pytest.approx(alone.get_potential_energy(), abs=ROUNDING)


def test_trajectory_of_a_bulk_has_all_results(tmp_path, small_bulk, calculator):
    small_bulk.calc = calculator
    energy, forces, stress = (
        small_bulk.get_potential_energy(),
        small_bulk.get_forces(),
        small_bulk.get_stress(),
    )
    with Trajectory(tmp_path / "x.traj", "w", small_bulk) as trajectory:
        trajectory.write()
    again = read(tmp_path / "x.traj")
    assert again.get_potential_energy() == energy
    np.testing.assert_array_equal(again.get_forces(), forces)
    np.testing.assert_array_equal(again.get_stress(), stress)


def test_trajectory_names_what_made_it(tmp_path, small_bulk, calculator):
    small_bulk.calc = calculator
    small_bulk.get_potential_energy()
    with Trajectory(tmp_path / "x.traj", "w", small_bulk) as trajectory:
        trajectory.write()
    described = read(tmp_path / "x.traj").calc
    assert described.name == "moecalc"
    assert described.parameters["source_sha256"] == calculator.metadata["source"]["sha256"]
    assert described.parameters["dtype"] == "float64"


def test_dynamics_of_a_slab_are_logged_and_written(tmp_path, calculator):
    atoms = testing.slab(repeat=1)
    atoms.calc = calculator
    log = io.StringIO()
    with Trajectory(tmp_path / "x.traj", "w", atoms) as trajectory:
        dynamics = VelocityVerlet(atoms, units.fs)
        dynamics.attach(trajectory.write)
        dynamics.attach(MDLogger(dynamics, atoms, log))
        dynamics.run(2)
    last = read(tmp_path / "x.traj")
    assert len(log.getvalue().splitlines()) == 4
    assert last.get_potential_energy() == atoms.get_potential_energy()
    with pytest.raises(PropertyNotImplementedError):
        last.get_stress()


@pytest.mark.parametrize("suffix", ["xyz", "json", "db"])
@pytest.mark.parametrize("name", ["bulk", "slab"])
def test_results_are_written_with_the_structure(tmp_path, shared_calculator, name, suffix):
    atoms = STRUCTURES[name]()
    atoms.calc = shared_calculator
    energy = atoms.get_potential_energy()
    write(tmp_path / f"x.{suffix}", atoms)
    again = read(tmp_path / f"x.{suffix}")
    assert again.get_potential_energy() == pytest.approx(energy, abs=1e-6)
    assert ("stress" in again.calc.results) == (name == "bulk")


# --- copies ----------------------------------------------------------------------------------------


def test_a_pickled_calculator_gives_the_same(small_bulk, calculator):
    small_bulk.calc = calculator
    forces = small_bulk.get_forces()
    again = pickle.loads(pickle.dumps(small_bulk))
    assert again.calc.parameters == calculator.parameters
    again.calc.reset()
    np.testing.assert_allclose(again.get_forces(), forces, rtol=0, atol=SAME_MODEL)


def test_a_pickle_keeps_results(monkeypatch):
    atoms = testing.one_atom_cell()
    atoms.calc, evaluator = fake_calculator(monkeypatch)
    energy = atoms.get_potential_energy()
    assert pickle.loads(pickle.dumps(atoms)).get_potential_energy() == energy
    assert evaluator.n_calls == 1


def test_a_pickle_of_the_default_model_holds_no_path(calculator):
    assert calculator.parameters["model"] is None
    assert str(calculator.path.parent).encode() not in pickle.dumps(calculator)


def test_a_pickle_of_a_relative_path_works_in_another_folder(monkeypatch, tmp_path):
    package = models.default_model_path()
    monkeypatch.chdir(package.parent)
    text = pickle.dumps(MoECalculator(package.name, device="cpu"))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(text).path == package


def test_a_deep_copy_shares_the_model_but_not_the_list(small_bulk, calculator):
    small_bulk.calc = calculator
    energy = small_bulk.get_potential_energy()
    other = copy.deepcopy(calculator)
    assert other._model is calculator._model
    assert other.neighbor_list is not calculator.neighbor_list
    assert other.get_potential_energy(small_bulk) == energy


def test_a_copy_does_not_need_the_file(tmp_path, small_bulk):
    package = tmp_path / "copy.moe.pt"
    package.write_bytes(models.default_model_path().read_bytes())
    calculator = MoECalculator(package, device="cpu", check=False)
    package.unlink()
    assert np.isfinite(copy.copy(calculator).get_potential_energy(small_bulk))


def test_a_copy_has_its_own_results(small_bulk, calculator):
    small_bulk.calc = calculator
    small_bulk.get_potential_energy()
    copy.copy(calculator).reset()
    assert calculator.results


def test_calculators_of_one_package_share_the_model(calculator):
    assert MoECalculator(dtype="float64", device="cpu")._model is calculator._model


def test_a_model_is_released_with_its_last_calculator():
    package = models.default_model_path()
    before = len(runtime._open_models)
    one = MoECalculator(package, device="cpu", dtype="float32", check=False)
    del one
    gc.collect()
    assert len(runtime._open_models) == before


def test_threads_that_share_a_calculator_get_the_results_of_their_own_structures(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch, elements=("Nb", "Mo", "Ta", "W"))
    structures = [testing.bulk_alloy(repeat=1, seed=k) * (1, 1, 1 + k) for k in range(4)]
    expected = [calculator.calculate_batch([a], ["energy", "forces", "stress"])[0] for a in structures]
    wrong, done = [], []

    def work(k):
        atoms = structures[k].copy()
        atoms.calc = calculator
        for n in range(100):
            # as an optimiser does: energy, forces and stress of the same structure, asked for one by one
            try:
                found = (atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress())
            except Exception as error:  # noqa: BLE001 - any would be wrong
                wrong.append(error)
                return
            for name, value in zip(("energy", "forces", "stress"), found, strict=True):
                if not np.allclose(value, expected[k][name], rtol=0, atol=ROUNDING):
                    wrong.append((k, n, name))
            done.append(len(found))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(done) == 1200


def test_threads_that_share_a_calculator_of_the_default_model(calculator):
    structures = [testing.bulk_alloy(repeat=1, seed=k) for k in range(4)]
    expected = [r["forces"] for r in calculator.calculate_batch(structures, ["forces"])]
    wrong = []

    def work(k):
        for _ in range(5):
            if not np.allclose(calculator.get_forces(structures[k]), expected[k], rtol=0, atol=ROUNDING):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_copy_of_a_calculator_has_a_lock_of_its_own(calculator):
    assert copy.deepcopy(calculator)._lock is not calculator._lock


def test_threads_may_share_a_model(small_bulk, shared_calculator):
    expected = shared_calculator.calculate_batch([small_bulk])[0]["energy"]
    found = []

    def work():
        mine = MoECalculator(dtype="float64", device="cpu")
        for _ in range(5):
            mine.reset()
            found.append(mine.get_potential_energy(small_bulk))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    np.testing.assert_allclose(found, [expected] * 15, rtol=0, atol=SAME_MODEL * 100)


# --- refusals --------------------------------------------------------------------------------------


def test_stress_of_a_slab_is_refused(monkeypatch):
    atoms = testing.slab()
    atoms.calc, _ = fake_calculator(monkeypatch, elements=("Nb", "Mo", "Ta", "W"))
    message = r"stress is undefined, expected a structure periodic in all directions, but pbc is \[True, True, False\]: ask for"
    with pytest.raises(StructureError, match=message):
        atoms.get_stress()
    with pytest.raises(PropertyNotImplementedError, match=message):
        atoms.get_stresses()


def test_refused_stress_leaves_energy_and_forces(monkeypatch):
    atoms = testing.molecule()
    atoms.calc, evaluator = fake_calculator(monkeypatch, elements=("Nb", "Mo", "Ta", "W"))
    energy = atoms.get_potential_energy()
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()
    assert atoms.get_potential_energy() == energy
    assert evaluator.n_calls == 1


def test_stress_without_volume_is_refused(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch)
    with pytest.raises(module.UndefinedStressError, match="the cell has no volume"):
        Atoms(pbc=True, calculator=calculator).get_stress()


def test_unknown_elements_are_refused(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch)
    message = "the structure contains Fe, Li, expected only elements of the model fake, Nb, W: use a model that knows Fe, Li"
    with pytest.raises(ElementError, match=message):
        calculator.get_potential_energy(Atoms("LiWFe", np.diag([2.0, 4.0, 6.0])))


def test_untrained_elements_are_refused(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch, metadata={"trained_elements": ["W"]})
    message = "the structure contains Nb, which the model fake has parameters for but was not trained on: .*allow_untrained=True"
    with pytest.raises(ElementError, match=message):
        calculator.get_potential_energy(Atoms("WNb", [[0, 0, 0], [3, 0, 0]]))


def test_trained_elements_of_the_same_model_are_accepted(monkeypatch):
    calculator, evaluator = fake_calculator(monkeypatch, metadata={"trained_elements": ["W"]})
    calculator.get_potential_energy(Atoms("W"))
    assert evaluator.n_calls == 1


def test_untrained_elements_can_be_allowed(monkeypatch):
    calculator, evaluator = fake_calculator(
        monkeypatch, metadata={"trained_elements": ["W"]}, allow_untrained=True
    )
    calculator.get_potential_energy(Atoms("Nb"))
    assert evaluator.n_calls == 1


def test_a_refused_structure_is_not_answered_with_old_results(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch)
    calculator.calculate(Atoms("W"))
    broken = Atoms("W2", [[0, 0, 0], [0, 0, 0.1]])
    for _ in range(2):
        with pytest.raises(StructureError, match="apart"):
            calculator.get_potential_energy(broken)
    with pytest.raises(StructureError, match="apart"):
        calculator.calculate(broken)
    assert calculator.results == {}


def test_non_finite_positions_are_refused(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch)
    with pytest.raises(StructureError, match=r"position of atom 0 \(W\) is \[nan, 0\.0, 0\.0\]"):
        calculator.get_forces(Atoms("W", [[np.nan, 0, 0]]))


def test_a_calculation_without_a_structure_is_refused(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch)
    with pytest.raises(CalculatorSetupError, match="expected a structure, got none"):
        calculator.calculate()


def test_errors_of_the_evaluator_name_the_package(monkeypatch):
    calculator, evaluator = fake_calculator(monkeypatch)

    def fail(*_, **__):
        raise _lib.load().Error("out of memory in layer 3")

    evaluator.evaluate = fail
    with pytest.raises(MoecalcError, match=r"fake\.moe\.pt: out of memory in layer 3"):
        calculator.get_potential_energy(Atoms("W"))


@pytest.mark.parametrize("kind", ["NotFiniteError", "OverlapError"])
def test_a_structure_that_the_evaluator_refuses_is_to_blame(monkeypatch, kind):
    calculator, evaluator = fake_calculator(monkeypatch)

    def fail(*_, **__):
        raise getattr(_lib.load(), kind)("expected finite energies")

    evaluator.evaluate = fail
    with pytest.raises(StructureError, match=r"fake\.moe\.pt: expected finite energies"):
        calculator.get_potential_energy(Atoms("W"))


@pytest.fixture
def with_limits(tmp_path):
    """Makes calculators of the default model with other numbers of neighbors in training."""

    def make(edge, angle):
        def change(metadata):
            return {**metadata, "neighbor_limits": {"edge": edge, "angle": angle}}

        path = tmp_path / "limited.moe.pt"
        path.write_bytes(edit_json(models.default_model_path(), "metadata.json", change))
        return MoECalculator(path, device="cpu", check=False)

    return make


def test_more_neighbors_than_in_training_warn_once(with_limits):
    calculator = with_limits(10, 5)
    with pytest.warns(
        UserWarning,
        match=r"an atom has \d+ neighbors within [\d.]+ A, .* at most the nearest 10: all of them are used",
    ) as caught:
        calculator.get_potential_energy(testing.one_atom_cell())
    # NumPy 2.5 warns of ASE.
    assert [w.category for w in caught if "ase" not in Path(w.filename).parts] == [UserWarning]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calculator.get_potential_energy(testing.one_atom_cell(a=3.0))


def test_more_angle_neighbors_than_in_training_warn(with_limits):
    calculator = with_limits(1000, 5)
    with pytest.warns(UserWarning, match=r"an atom has \d+ neighbors within [\d.]+ A, .* nearest 5: all"):
        calculator.get_potential_energy(testing.one_atom_cell())


def test_as_many_neighbors_as_in_training_do_not_warn(with_limits):
    calculator = with_limits(1, 1)
    calculator.get_potential_energy(Atoms("W2", [[0, 0, 0], [2.5, 0, 0]]))
    with pytest.warns(UserWarning, match="an atom has 2 neighbors"):
        calculator.get_potential_energy(Atoms("W3", [[0, 0, 0], [2.5, 0, 0], [0, 2.5, 0]]))


# --- loading ---------------------------------------------------------------------------------------


@pytest.fixture
def with_reference(tmp_path):
    """Writes the default package with changed reference frames."""

    def write(change):
        path = tmp_path / "changed.moe.pt"
        path.write_bytes(edit_json(models.default_model_path(), "reference.json", change))
        return path

    return write


@pytest.mark.parametrize("quantity", ["energy", "forces", "virial"])
def test_a_deviating_reference_frame_is_refused(with_reference, quantity):
    def change(frames):
        largest = max(frames, key=lambda frame: len(frame["symbols"]))
        values = np.array(largest[quantity], dtype=float)
        values.flat[0] += 1e-3 * len(largest["symbols"])
        largest[quantity] = values.tolist()
        return frames

    path = with_reference(change)
    with pytest.raises(
        PackageError, match=f"{quantity} of the stored reference frame deviates by .* pass check=False"
    ):
        MoECalculator(path, device="cpu")
    MoECalculator(path, device="cpu", check=False)


@pytest.mark.parametrize("quantity", ["energy", "forces", "virial"])
def test_a_reference_frame_with_nan_is_refused(with_reference, quantity):
    def change(frames):
        for frame in frames:
            frame[quantity] = np.full(np.shape(frame[quantity]), np.nan).tolist()
        return frames

    with pytest.raises(PackageError, match=r"reference\.json: not JSON .an unexpected character at byte"):
        MoECalculator(with_reference(change), device="cpu")


def test_a_package_without_reference_frames_is_refused(with_reference):
    with pytest.raises(PackageError, match="expected reference frames, got none"):
        MoECalculator(with_reference(lambda _: []), device="cpu")


@pytest.mark.parametrize(("check", "expected"), [(True, 1), (False, 0)])
def test_a_package_is_checked_once_per_process(monkeypatch, tmp_path, check, expected):
    copied = tmp_path / "copy.moe.pt"
    copied.write_bytes(models.default_model_path().read_bytes())
    checked = []
    monkeypatch.setattr(runtime, "check_model", lambda *arguments: checked.append(arguments))
    for _ in range(2):
        MoECalculator(copied, device="cpu", check=check)
    assert len(checked) == expected


def test_a_missing_package_is_refused(tmp_path):
    with pytest.raises(PackageError, match=r"nothing\.moe\.pt: no such file"):
        MoECalculator(tmp_path / "nothing.moe.pt")


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "foreign.moe.pt"
    path.write_text("no package")
    with pytest.raises(PackageError, match=r"foreign\.moe\.pt: "):
        MoECalculator(path, device="cpu")


def test_a_missing_default_model_is_refused(tmp_path):
    with pytest.raises(
        PackageError, match=r"default: no such file, expected the name of the default model here: install"
    ):
        models.default_model_path(tmp_path)
    (tmp_path / "default").write_text("absent\n")
    with pytest.raises(
        PackageError,
        match=r"absent\.moe\.pt: no such file, expected the default model here: install moecalc again",
    ):
        models.default_model_path(tmp_path)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'kpts'"):
        MoECalculator(kpts=(1, 1, 1))


def test_an_unknown_device_is_refused():
    with pytest.raises(MoecalcError, match="expected device 'cpu', 'cuda', 'cuda:N' or 'auto', got 'gpu'"):
        MoECalculator(device="gpu")


@pytest.fixture
def devices(monkeypatch):
    """Pretends that there are so many GPUs."""
    return lambda number: monkeypatch.setattr(_lib.load(), "cuda_device_count", lambda: number)


def test_cuda_without_a_device_is_refused(devices):
    devices(0)
    with pytest.raises(MoecalcError, match=r"device 'cuda' is not available, .*: use device='cpu'"):
        MoECalculator(device="cuda")


def test_a_device_number_too_large_is_refused(devices):
    devices(2)
    with pytest.raises(MoecalcError, match="expected device 'cuda:N' with N below 2, got 'cuda:2'"):
        MoECalculator(device="cuda:2")


def test_auto_is_the_cpu_without_cuda(devices):
    devices(0)
    assert MoECalculator(check=False).device == "cpu"


@pytest.mark.parametrize("backend", ["magic", "", "cpu"])
def test_other_backends_are_refused(backend):
    with pytest.raises(
        MoecalcError, match=f"expected backend None .*'plain', 'torchscript'.*, got '{backend}'"
    ):
        MoECalculator(backend=backend)


@pytest.mark.filterwarnings("ignore:.*evaluated ")
@pytest.mark.parametrize("backend", ["fused", "plain", "torchscript", "cuda-emulation"])
def test_every_backend_gives_the_same(small_bulk, shared_calculator, backend):
    expected = shared_calculator.calculate_batch([small_bulk])[0]
    calculator = MoECalculator(dtype="float64", device="cpu", backend=backend)
    assert backend.split("-")[0] in calculator._model.backend
    np.testing.assert_allclose(
        calculator.get_forces(small_bulk), expected["forces"], rtol=0, atol=100 * SAME_MODEL
    )


@pytest.mark.parametrize("dtype", ["float16", "single", torch.bfloat16, int])
def test_other_precisions_are_refused(dtype):
    with pytest.raises(MoecalcError, match="expected dtype 'float32', 'float64' or None"):
        MoECalculator(dtype=dtype)


@pytest.mark.parametrize("dtype", ["float64", np.float64, np.dtype("float64"), torch.float64])
def test_precisions_of_numpy_and_torch_are_understood(dtype):
    assert MoECalculator(dtype=dtype, device="cpu").dtype == "float64"


def test_the_precision_of_the_package_is_the_default(shared_calculator):
    assert MoECalculator(device="cpu").dtype == shared_calculator.metadata["dtype"]


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_a_senseless_number_of_threads_is_refused(threads):
    with pytest.raises(ValueError, match="expected threads to be a positive integer or None"):
        MoECalculator(threads=threads)


def test_threads_of_torch_stay(small_bulk):
    before = torch.get_num_threads()
    MoECalculator(device="cpu", threads=before + 1).get_forces(small_bulk)
    assert torch.get_num_threads() == before


def test_too_many_threads_are_refused():
    with pytest.raises(ValueError, match="expected threads to be at most 4096, got 5000"):
        MoECalculator(device="cpu", threads=5000)


def test_a_negative_skin_is_refused():
    with pytest.raises(ValueError, match="expected skin >= 0 in Angstrom, got -1"):
        MoECalculator(device="cpu", skin=-1)


# --- parameters and the rest -----------------------------------------------------------------------


def test_the_skin_can_be_changed(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch)
    assert calculator.set(skin=2.0) == {"skin": 2.0}
    assert calculator.neighbor_list.skin == 2.0


def test_setting_the_same_value_changes_nothing(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch)
    assert calculator.set(skin=1.0, check=True) == {}


def test_untrained_elements_can_be_allowed_later(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch, metadata={"trained_elements": ["W"]})
    calculator.set(allow_untrained=True)
    calculator.get_potential_energy(Atoms("Nb"))


def test_the_model_cannot_be_changed(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch)
    with pytest.raises(MoecalcError, match="dtype cannot be changed to 'float32' after the model was loaded"):
        calculator.set(dtype="float32")


def test_unknown_parameters_are_refused(monkeypatch):
    calculator, _ = fake_calculator(monkeypatch)
    with pytest.raises(TypeError, match=r"expected a parameter among model, .*, got 'kpts'"):
        calculator.set(kpts=3)


def test_the_representation_says_what_it_is(shared_calculator):
    text = repr(shared_calculator)
    assert "Li N Si Ni Cu Ge Nb Mo Ta W" in text
    assert "float64 on cpu" in text


def test_atoms_can_be_given_to_the_constructor(monkeypatch):
    atoms = testing.one_atom_cell()
    calculator, _ = fake_calculator(monkeypatch, atoms=atoms)
    assert atoms.calc is calculator


def test_stress_tensors_can_be_made_of_the_results(small_bulk, shared_calculator):
    small_bulk.calc = shared_calculator
    np.testing.assert_array_equal(
        small_bulk.get_stress(voigt=False), voigt_6_to_full_3x3_stress(small_bulk.get_stress())
    )


def test_importing_moecalc_does_not_import_torch():
    code = "import moecalc, sys; assert moecalc.__version__; assert not {'torch', 'ase', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_moecalc_lists_what_it_exports():
    assert {"MoECalculator", "__version__"} <= set(dir(moecalc))


def test_moecalc_has_no_other_attributes():
    with pytest.raises(AttributeError, match="module 'moecalc' has no attribute 'Calculator'"):
        _ = moecalc.Calculator


@pytest.mark.parametrize("backend", ["fused", "cuda-emulation"])
def test_a_backend_of_the_cpu_needs_no_device(backend, monkeypatch):
    """On a machine with a GPU, `auto` would be that."""
    monkeypatch.setattr(runtime, "device_name", lambda _: "cuda:0")
    assert MoECalculator(backend=backend, check=False).device == "cpu"
    monkeypatch.setenv("MOECALC_BACKEND", backend)
    assert MoECalculator(check=False).device == "cpu"
