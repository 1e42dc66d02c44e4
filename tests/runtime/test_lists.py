"""Neighbour lists that an evaluator keeps: the same numbers as with edges, one list per search, clear refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from moecalc import MoECalculator, _lib, runtime, testing
from moecalc import calculator as module
from moecalc.errors import MoecalcError, StructureError
from moecalc.models import default_model_path
from moecalc.neighbors import PairList, SkinNeighborList

STRUCTURES = {
    "bulk": lambda: testing.bulk_alloy(repeat=1),
    "slab": lambda: testing.slab(repeat=1),
    "molecule": lambda: testing.molecule(n_atoms=4),
    "one-atom cell": testing.one_atom_cell,
}


@pytest.fixture(scope="module")
def evaluator():
    return _lib.load().Evaluator(str(default_model_path()), "cpu", "float64")


def listed(evaluator, atoms, skin=0.7):
    """types, list and positions of a structure."""
    types = np.array([evaluator.elements.index(symbol) for symbol in atoms.symbols])
    pairs, positions = SkinNeighborList(evaluator.cutoff, skin).pairs(atoms)
    return types, pairs, positions


def by_edges(evaluator, atoms, **request):
    """Results of the edges that brute force finds; the list is lost."""
    types = np.array([list(evaluator.elements).index(symbol) for symbol in atoms.symbols], dtype=np.int64)
    i, j, vectors = testing.brute_force_edges(atoms, evaluator.cutoff)
    return testing.evaluate_edges(evaluator, types, np.stack([i, j]), vectors, **request)


def set_list(evaluator, types, pairs):
    evaluator.set_list(types, pairs.edge_index, pairs.edge_shift, pairs.system_index, pairs.n_systems)


# --- the evaluator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_list_gives_what_edges_give(evaluator, name):
    atoms = STRUCTURES[name]()
    expected = by_edges(evaluator, atoms, atom_virial=True)
    types, pairs, positions = listed(evaluator, atoms)
    set_list(evaluator, types, pairs)
    result = evaluator.evaluate(positions, atoms.cell.array[None], atom_virial=True)
    for key in ("energy", "energies", "forces", "virial", "atom_virial"):
        np.testing.assert_allclose(result[key], expected[key], rtol=0, atol=testing.ROUNDING, err_msg=key)
    assert (result["n_edge"], result["n_angle"]) == (expected["n_edge"], expected["n_angle"])


def test_a_list_serves_for_moved_atoms_and_a_strained_cell(evaluator):
    atoms = testing.bulk_alloy(repeat=1)
    types, pairs, _ = listed(evaluator, atoms)
    set_list(evaluator, types, pairs)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.01 * np.eye(3, k=1)), scale_atoms=True)
    atoms.rattle(0.05)
    result = evaluator.evaluate(atoms.positions, atoms.cell.array[None])
    expected = by_edges(evaluator, atoms)
    np.testing.assert_allclose(result["forces"], expected["forces"], rtol=0, atol=testing.SAME_MODEL)
    np.testing.assert_allclose(result["virial"], expected["virial"], rtol=0, atol=testing.SAME_MODEL)


def test_positions_without_a_list_are_refused():
    fresh = _lib.load().Evaluator(str(default_model_path()))
    with pytest.raises(RuntimeError, match="expected a list before positions, got none: call set_list first"):
        fresh.evaluate(np.zeros((1, 3)))


def test_a_refused_list_leaves_none_behind(evaluator):
    atoms = testing.bulk_alloy(repeat=1)
    types, pairs, positions = listed(evaluator, atoms)
    set_list(evaluator, types, pairs)
    with pytest.raises(RuntimeError, match="types"):
        set_list(evaluator, types + 99, pairs)
    with pytest.raises(RuntimeError, match="expected a list before positions"):
        evaluator.evaluate(positions, atoms.cell.array[None])


def test_the_check_of_the_package_leaves_no_list_behind(evaluator):
    atoms = testing.bulk_alloy(repeat=1)
    types, pairs, positions = listed(evaluator, atoms)
    set_list(evaluator, types, pairs)
    evaluator.check_reference()
    with pytest.raises(RuntimeError, match="expected a list before positions"):
        evaluator.evaluate(positions, atoms.cell.array[None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"types": np.array([0, 99])}, r"expected types\[1\] in \[0, "),
        ({"edge_index": np.array([[0, 2], [1, 0]])}, r"expected edge_index\[0, 1\] \(a centre\) in \[0, 2\), got 2"),
        ({"edge_index": np.array([[0, 1], [1, -1]])}, r"\(a neighbour\) in \[0, 2\), got -1"),
        ({"edge_index": np.array([0, 1])}, r"expected `edge_index` of shape \[2, any\], got \[2\]"),
        ({"edge_shift": np.zeros((1, 3), int)}, r"expected `edge_shift` of shape \[2, 3\]"),
        ({"edge_shift": np.zeros((2, 3))}, "expected `edge_shift` to be an array of integers"),
        ({"system_index": np.array([0, 1])}, r"expected system_index\[1\] in \[0, 1\), got 1"),
        ({"system_index": np.array([0, 1]), "n_systems": 2}, "expected edges within one structure"),
        ({"n_systems": 0}, "expected `n_systems` >= 1, got 0"),
    ],
)  # fmt: skip
def test_an_invalid_list_is_refused(evaluator, change, message):
    valid = {
        "types": np.array([0, 1]),
        "edge_index": np.array([[0, 1], [1, 0]]),
        "edge_shift": None,
        "system_index": np.array([0, 0]),
    }
    with pytest.raises(RuntimeError, match=message):
        evaluator.set_list(**{**valid, **change})


@pytest.mark.parametrize(
    ("positions", "cells", "message"),
    [
        (np.zeros((1, 3)), np.eye(3)[None], "expected `positions` of 2 or more rows, which the list names, got 1"),
        (np.zeros((2, 2)), np.eye(3)[None], r"expected `positions` of shape \[any, 3\]"),
        (np.array([[0, 0, 0], [1, np.nan, 0]]), np.eye(3)[None], r"expected finite `positions`, got \(1.0+, nan, 0.0+\)"),
        (np.eye(3)[:2], None, "expected `cells`, got none"),
        (np.eye(3)[:2], np.eye(3), r"expected `cells` of shape \[1, 3, 3\]"),
        (np.eye(3)[:2], np.full((1, 3, 3), np.inf), "expected finite `cells`, got inf in structure 0"),
    ],
)  # fmt: skip
def test_invalid_positions_are_refused(evaluator, positions, cells, message):
    pairs = PairList(np.array([[0, 1], [1, 0]]), np.zeros((2, 3), int), np.zeros(2, int))
    set_list(evaluator, np.array([0, 1]), pairs)
    with pytest.raises(RuntimeError, match=message):
        evaluator.evaluate(positions, cells)


@pytest.mark.parametrize(
    ("dtype", "precision", "message"),
    [
        ("float64", "tf32", "precision 'tf32' is for float32 networks, got dtype float64: use dtype float32"),
        ("float32", "bf16x3", "precision 'bf16x3' is for GPUs, got device 'cpu': use precision fp32"),
        (
            "float32",
            "fp8",
            "expected `precision` to be 'fp32', 'fp32-ffma', 'bf16x3', 'tf32' or 'fp16', got 'fp8'",
        ),
    ],
)
def test_a_precision_that_does_not_apply_is_refused(dtype, precision, message):
    with pytest.raises(RuntimeError, match=message):
        _lib.load().Evaluator(str(default_model_path()), "cpu", dtype, precision)
    with pytest.raises(MoecalcError, match=message):
        MoECalculator(device="cpu", dtype=dtype, precision=precision)


# --- the calculator --------------------------------------------------------------------------------


@pytest.fixture
def keeping(monkeypatch):
    """Makes calculators of one model, whose evaluator, which is returned as well, counts lists."""
    evaluator = testing.PairEvaluator(["Nb", "W"], metadata=json.dumps({"name": "fake"}))
    model = runtime.Model(Path("fake.moe.pt"), evaluator)
    monkeypatch.setattr(module, "open_model", lambda *_, **__: model)
    return lambda **arguments: (MoECalculator("fake.moe.pt", **arguments), evaluator)


def without_lists(atoms):
    """Energy and forces by edges."""
    return by_edges(testing.PairEvaluator(["Nb", "W"]), atoms)


def crystal():
    return testing.bulk_alloy(("Nb", "W"), repeat=1)


def test_the_list_is_handed_over_once_per_search(keeping):
    calculator, evaluator = keeping(skin=1.0)
    atoms = crystal()
    atoms.calc = calculator
    for seed in range(5):
        atoms.rattle(0.02, seed=seed)
        expected = without_lists(atoms)
        np.testing.assert_allclose(atoms.get_forces(), expected["forces"], rtol=0, atol=testing.SAME_MODEL)
    assert (evaluator.n_calls, evaluator.n_lists) == (5, 1)
    atoms.positions[0] += 1.0
    np.testing.assert_allclose(
        atoms.get_forces(), without_lists(atoms)["forces"], rtol=0, atol=testing.SAME_MODEL
    )
    assert evaluator.n_lists == calculator.neighbor_list.n_rebuilds == 2


def test_a_swap_of_elements_is_a_new_list(keeping):
    calculator, evaluator = keeping()
    atoms = crystal()
    atoms.calc = calculator
    atoms.get_potential_energy()
    atoms.symbols[:] = ["Nb" if symbol == "W" else "W" for symbol in atoms.symbols]
    assert atoms.get_potential_energy() == pytest.approx(without_lists(atoms)["energy"][0], abs=1e-10)
    assert (evaluator.n_lists, calculator.neighbor_list.n_rebuilds) == (2, 1)


def test_a_strained_cell_keeps_the_list(keeping):
    calculator, evaluator = keeping()
    atoms = crystal()
    atoms.calc = calculator
    atoms.get_potential_energy()
    atoms.set_cell(1.01 * atoms.cell.array, scale_atoms=True)
    assert atoms.get_potential_energy() == pytest.approx(without_lists(atoms)["energy"][0], abs=1e-10)
    assert evaluator.n_lists == 1


def test_wrapped_atoms_keep_the_list(keeping):
    calculator, evaluator = keeping()
    atoms = crystal()
    atoms.calc = calculator
    atoms.get_potential_energy()
    atoms.positions[1] += atoms.cell[2] - atoms.cell[0]
    assert atoms.get_potential_energy() == pytest.approx(without_lists(atoms)["energy"][0], abs=1e-10)
    assert evaluator.n_lists == 1


def test_calculators_that_share_a_model_do_not_share_lists(keeping):
    (first, evaluator), (second, _) = keeping(), keeping()
    atoms, molecule = crystal(), Atoms("NbW", [[0, 0, 0], [0, 0, 2.2]])
    atoms.calc, molecule.calc = first, second
    for step in range(2):
        molecule.positions[1, 2] += 0.1
        atoms.positions[0, 0] += 0.1
        for one in (atoms, molecule):
            expected = without_lists(one)["energy"][0]
            assert one.get_potential_energy() == pytest.approx(expected, abs=1e-10)
        assert evaluator.n_lists == 2 * (step + 1)


def test_a_list_that_is_refused_is_handed_over_again(keeping, monkeypatch):
    calculator, evaluator = keeping()
    atoms = crystal()
    atoms.calc = calculator
    atoms.get_potential_energy()
    accept = evaluator.set_list

    def refuse(*_):
        raise _lib.load().Error("expected fewer pairs")

    monkeypatch.setattr(evaluator, "set_list", refuse)
    atoms.symbols[:] = "W"
    with pytest.raises(MoecalcError, match="expected fewer pairs"):
        atoms.get_potential_energy()
    monkeypatch.setattr(evaluator, "set_list", accept)
    assert atoms.get_potential_energy() == pytest.approx(without_lists(atoms)["energy"][0], abs=1e-10)


@pytest.mark.parametrize("act", ["release_weights", "check_reference"])
def test_what_loses_the_list_of_the_evaluator_has_it_handed_over_again(calculator, monkeypatch, act):
    atoms = testing.bulk_alloy(repeat=1)
    atoms.calc = calculator
    forces = atoms.get_forces()
    getattr(calculator._model, act)()
    calculator.reset()
    np.testing.assert_array_equal(atoms.get_forces(), forces)
    assert calculator.neighbor_list.n_rebuilds == 1


def test_the_compiled_evaluator_gets_its_list_once_per_search(tmp_path, monkeypatch):
    """A spy between the model and the evaluator of the default package."""

    class Spy:
        def __init__(self, evaluator):
            self.evaluator, self.lists = evaluator, 0

        def __getattr__(self, name):
            return getattr(self.evaluator, name)

        def set_list(self, *arguments):
            self.lists += 1
            self.evaluator.set_list(*arguments)

    calculator = MoECalculator(dtype="float64", device="cpu")
    spy = Spy(calculator._model._evaluator)
    calculator._model = runtime.Model(default_model_path(), spy)
    atoms = testing.bulk_alloy(repeat=1)
    atoms.calc = calculator
    for seed in range(5):
        atoms.rattle(0.01, seed=seed)
        atoms.get_forces()
    assert spy.lists == calculator.neighbor_list.n_rebuilds == 1
    atoms.positions[0] += 1.0
    atoms.get_forces()
    assert spy.lists == calculator.neighbor_list.n_rebuilds == 2


def test_a_batch_is_one_list(keeping):
    calculator, evaluator = keeping()
    structures = [crystal(), Atoms(), Atoms("NbW", [[0, 0, 0], [0, 0, 2.2]]), testing.one_atom_cell("W")]
    results = calculator.calculate_batch(structures, ["energy", "forces"])
    assert (evaluator.n_calls, evaluator.n_lists) == (1, 1)
    for atoms, result in zip(structures, results, strict=True):
        expected = without_lists(atoms)
        assert result["energy"] == pytest.approx(expected["energy"].sum(), abs=1e-10)
        np.testing.assert_allclose(result["forces"], expected["forces"], rtol=0, atol=testing.SAME_MODEL)


@pytest.mark.parametrize("skin", [0.0, 1.0])
def test_atoms_that_meet_between_searches_are_refused(keeping, skin):
    calculator, _ = keeping(skin=skin)
    atoms = Atoms("NbW", [[0, 0, 0], [0, 0, 1.4]])
    atoms.calc = calculator
    atoms.get_potential_energy()
    atoms.positions += [[0, 0, 0.47], [0, 0, -0.47]]
    with pytest.raises(StructureError, match=r"0 \(Nb\) and 1 \(W\) are 0.460 A apart"):
        atoms.get_potential_energy()


def test_atoms_that_meet_in_a_growing_cell_are_refused(keeping):
    calculator, _ = keeping()
    atoms = Atoms("NbW", [[0, 0, 0], [0, 0, 1.9]], cell=[9, 9, 9], pbc=True)
    atoms.calc = calculator
    atoms.get_potential_energy()
    atoms.set_cell([10, 10, 10], scale_atoms=True)
    atoms.positions[:, 2] = [0.0, 0.45]
    with pytest.raises(StructureError, match=r"0.450 A apart"):
        atoms.get_potential_energy()


@pytest.mark.parametrize(
    ("backend", "how"), [("plain", "by the plain backend"), ("torchscript", "through TorchScript")]
)
def test_slow_backends_are_warned_about(tmp_path, backend, how):
    path = tmp_path / "fresh.moe.pt"  # of which no model is open
    path.write_bytes(default_model_path().read_bytes())
    reason = rf"backend {backend} was asked for"
    with pytest.warns(
        UserWarning, match=rf"evaluated {how}, several times slower than the fused kernels \({reason}\)"
    ) as caught:
        MoECalculator(path, device="cpu", backend=backend, check=False)
    assert [Path(w.filename).name for w in caught] == [Path(__file__).name]
