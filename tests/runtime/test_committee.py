"""Several packages in one calculator: results of the first, and how far all of them disagree."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from ase import units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.md.verlet import VelocityVerlet
from committees import METALS, write_members

from moecalc import MoECalculator, testing
from moecalc.committee import deviations, run_below
from moecalc.errors import ElementError, MoecalcError, PackageError

OPTIONS = {"dtype": "float64", "device": "cpu", "check": False, "allow_untrained": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models whose cutoffs, widths and orders of elements differ; the first has the smallest cutoff."""
    return write_members(tmp_path_factory.mktemp("members"))


@pytest.fixture
def committee(files):
    return MoECalculator(files, **OPTIONS)


@pytest.fixture
def atoms():
    return testing.bulk_alloy(METALS)


def alone(files, atoms, name):
    """A result of each model by itself."""
    return [MoECalculator(file, **OPTIONS).get_property(name, atoms) for file in files]


def test_energy_and_forces_are_those_of_the_first_package(files, committee, atoms):
    for name in ("energy", "forces", "stress", "energies"):
        expected = MoECalculator(files[0], **OPTIONS).get_property(name, atoms)
        np.testing.assert_allclose(committee.get_property(name, atoms), expected, rtol=1e-10, atol=1e-12)


def test_deviations_are_those_of_the_members(files, committee, atoms):
    forces = np.array(alone(files, atoms, "forces"))
    expected = np.linalg.norm(forces.std(axis=0), axis=1)
    np.testing.assert_allclose(committee.get_property("forces_std", atoms), expected, rtol=1e-9)
    energies = alone(files, atoms, "energy")
    assert committee.get_property("energy_std", atoms) == pytest.approx(np.std(energies), rel=1e-9)
    assert np.ptp(energies) > 0.1


def test_deviations_are_computed_when_they_are_asked_for(committee, atoms, monkeypatch):
    """The first model is not evaluated again for them, and the list is searched once."""
    counts = dict.fromkeys(range(3), 0)
    for index, model in enumerate(committee._committee.models):
        evaluate = model.evaluate

        def counted(*args, index=index, evaluate=evaluate, **options):
            counts[index] += 1
            return evaluate(*args, **options)

        monkeypatch.setattr(model, "evaluate", counted)
    committee.get_property("forces", atoms)
    assert list(counts.values()) == [1, 0, 0]
    committee.get_property("forces_std", atoms)
    committee.get_property("energy_std", atoms)
    assert list(counts.values()) == [1, 1, 1]
    assert committee.neighbor_list.n_rebuilds == 1
    atoms.positions[0] += 0.05
    committee.get_property("energy_std", atoms)
    assert list(counts.values()) == [2, 2, 2]
    assert committee.neighbor_list.n_rebuilds == 1


def test_a_batch_has_the_deviations_of_its_structures(committee, atoms):
    other = testing.molecule()
    other.symbols[:] = "W"
    found = committee.calculate_batch([atoms, other], ["forces_std", "energy_std", "energy"])
    for structure, results in zip((atoms, other), found, strict=True):
        for name in ("forces_std", "energy_std"):
            expected = committee.get_property(name, structure)
            np.testing.assert_allclose(results[name], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_committees(committee, atoms, copied):
    expected = committee.get_property("forces_std", atoms)
    other = copied(committee)
    assert other.paths == committee.paths
    other.reset()
    np.testing.assert_allclose(other.get_property("forces_std", atoms), expected, rtol=1e-12)


def test_the_list_is_that_of_the_largest_cutoff(committee):
    assert committee.cutoff == 5.0
    assert [path.name for path in committee.paths] == ["a.moe.pt", "b.moe.pt", "c.moe.pt"]


def test_one_package_has_no_deviation(files, atoms):
    calculator = MoECalculator(files[:1], **OPTIONS)
    with pytest.raises(PropertyNotImplementedError):
        calculator.get_property("forces_std", atoms)


def test_an_element_that_a_member_does_not_know_is_refused(files, atoms, tmp_path):
    testing.write_random_package(tmp_path / "o.moe.pt", testing.random_config(["O", "Nb"]), "float64")
    calculator = MoECalculator([files[0], tmp_path / "o.moe.pt"], **OPTIONS)
    assert np.isfinite(calculator.get_property("energy", atoms))
    with pytest.raises(ElementError, match="the structure contains Mo, Ta, W"):
        calculator.get_property("forces_std", atoms)


def test_an_empty_list_is_refused():
    with pytest.raises(MoecalcError, match="expected one or more packages, got an empty list"):
        MoECalculator([], **OPTIONS)


def test_a_member_that_is_missing_is_named(files, tmp_path):
    with pytest.raises(PackageError, match=r"nowhere\.moe\.pt: no such file"):
        MoECalculator([files[0], tmp_path / "nowhere.moe.pt"], **OPTIONS)


def test_relative_deviations_are_divided_by_the_mean_and_the_level():
    values = np.array([[[3.0, 0.0, 4.0]], [[3.0, 0.0, 6.0]]])
    assert deviations(values)[0] == pytest.approx(1.0)
    assert deviations(values, 2.0)[0] == pytest.approx(1.0 / (np.hypot(3.0, 5.0) + 2.0))


def test_models_that_agree_on_zero_do_not_deviate_relatively():
    assert deviations(np.zeros((3, 2, 3)), 0.0).tolist() == [0.0, 0.0]


def test_a_run_stops_where_the_models_disagree(committee, atoms):
    atoms.calc = committee
    start = float(committee.get_property("forces_std", atoms).max())
    dynamics = VelocityVerlet(atoms, 1.0 * units.fs)
    assert run_below(dynamics, 4, forces_std=1e9, energy_std=1e9, every=2) is None
    assert dynamics.nsteps == 4
    found = run_below(dynamics, 50, forces_std=0.01 * start)
    assert found is not None
    assert (found.step, found.name) == (dynamics.nsteps, "forces_std")
    assert found.value == pytest.approx(committee.get_property("forces_std", atoms).max())
    assert dynamics.nsteps < 10
    energy = run_below(dynamics, 50, energy_std=1e-9)
    assert energy is not None
    assert energy.name == "energy_std"


@pytest.mark.parametrize("limit", [np.nan, np.inf, -0.1])
def test_a_threshold_that_means_nothing_is_refused(atoms, limit):
    with pytest.raises(MoecalcError, match=f"expected a threshold forces_std of 0 or more, got {limit}"):
        run_below(VelocityVerlet(atoms, 1.0), 1, forces_std=limit)


def test_a_run_without_a_threshold_is_refused(atoms):
    dynamics = VelocityVerlet(atoms, 1.0)
    with pytest.raises(MoecalcError, match="expected forces_std or energy_std, got neither"):
        run_below(dynamics, 1)
    with pytest.raises(MoecalcError, match="expected a look every 1 or more steps, got 0"):
        run_below(dynamics, 1, forces_std=1.0, every=0)
