"""The committee of the native core: several models on one list in one call."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from moecalc import testing
from moecalc._lib import load
from moecalc.committee import deviations
from moecalc.neighbors import SkinNeighborList

METALS = ["Nb", "Mo", "Ta", "W"]


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory):
    """Two models whose cutoffs and orders of elements differ."""
    folder = tmp_path_factory.mktemp("members")
    configs = [
        testing.random_config(METALS, e_rcut=4.0, e_rcut_smth=3.2, nlayers=2),
        testing.random_config(["O", *METALS[::-1]], e_rcut=5.0, e_rcut_smth=4.0),
    ]
    for seed, config in enumerate(configs):
        testing.write_random_package(folder / f"{seed}.moe.pt", config, "float64", seed)
    return [load().Evaluator(str(folder / f"{seed}.moe.pt")) for seed in range(2)]


def list_of(atoms, cutoff, elements):
    pairs, positions = SkinNeighborList(cutoff, skin=0.0).pairs(atoms)
    types = np.array([elements.index(symbol) for symbol in atoms.symbols])
    return (types, pairs.edge_index, pairs.edge_shift, pairs.system_index), positions


def test_members_find_what_they_find_by_themselves(evaluators):
    """On the list of the largest cutoff, with the types of the first."""
    atoms = testing.bulk_alloy(METALS)
    committee = load().Committee(evaluators)
    assert (committee.size, committee.cutoff) == (2, 5.0)
    arrays, positions = list_of(atoms, committee.cutoff, METALS)
    committee.set_list(*arrays)
    found = committee.evaluate(2, positions, atoms.cell.array[None])
    for result, evaluator in zip(found, evaluators, strict=True):
        own, _ = list_of(atoms, evaluator.cutoff, evaluator.elements)
        evaluator.set_list(*own)
        expected = evaluator.evaluate(positions, atoms.cell.array[None])
        for name in ("energies", "forces", "virial"):
            np.testing.assert_allclose(result[name], expected[name], rtol=1e-9, atol=1e-11)


def test_members_that_are_not_asked_for_are_left_out(evaluators):
    atoms = testing.bulk_alloy(METALS)
    committee = load().Committee(evaluators)
    arrays, positions = list_of(atoms, committee.cutoff, METALS)
    committee.set_list(*arrays)
    assert len(committee.evaluate(1, positions, atoms.cell.array[None])) == 1


def test_deviations_are_those_of_numpy():
    values = np.random.default_rng(0).normal(size=(4, 7, 3))
    for level in (None, 0.5):
        np.testing.assert_allclose(load().deviations(values, level), deviations(values, level), rtol=1e-12)
    np.testing.assert_array_equal(load().deviations(np.zeros((3, 2, 3)), 0.0), np.zeros(2))


def test_an_element_that_a_member_does_not_know_is_refused(evaluators):
    atoms = testing.molecule()
    atoms.symbols[:] = "O"
    committee = load().Committee(evaluators[::-1])
    arrays, _ = list_of(atoms, committee.cutoff, evaluators[1].elements)
    with pytest.raises(
        load().Error, match=r"expected elements that all models know, got O, which .* does not"
    ):
        committee.set_list(*arrays)


def test_a_committee_keeps_its_members(tmp_path):
    """Whatever becomes of the list that they came in."""
    testing.write_random_package(tmp_path / "a.moe.pt", testing.random_config(METALS), "float64")
    members = [load().Evaluator(str(tmp_path / "a.moe.pt"))]
    committee = load().Committee(members)
    kept = weakref.ref(members[0])
    members.clear()
    gc.collect()
    assert kept() is not None
    assert committee.cutoff > 0
    del committee
    gc.collect()
    assert kept() is None


def test_no_members_and_shapeless_values_are_refused(evaluators):
    with pytest.raises(load().Error, match="expected at least one model, got none"):
        load().Committee([])
    with pytest.raises(load().Error, match="expected a model for every member, got none for member 1"):
        load().Committee([evaluators[0], None])
    with pytest.raises(TypeError):
        load().Committee(["a.moe.pt"])
    with pytest.raises(load().Error, match=r"expected values \(n_members, n_rows, width\), got"):
        load().deviations(np.zeros((2, 3)))
