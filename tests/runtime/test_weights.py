"""Weights of elements: laid out when an element first occurs, kept while memory allows, read from the file in time."""

import json

import numpy as np
import pytest
from evaluators import assert_same, environment
from helpers import evaluate_atoms, graph_of

from moecalc import MoECalculator, _lib, keys, testing
from moecalc.errors import MoecalcError
from moecalc.package.lower import lower
from moecalc.package.write import write_bare

# a small universal package: many elements, tiny widths
ELEMENTS = ["H", "C", "N", "O", "Al", "Si", "Ti", "Fe", "Cu", "Nb", "Mo", "Ta", "W", "Pt", "Au", "U"]
BACKENDS = ["fused", "cuda-emulation"]
WW, WNB = testing.molecule(["W"]), testing.molecule(["W", "Nb"])


def written(folder, dtype="float64", **options):
    """A package whose expert matrices are large enough to stay in the file."""
    path = folder / "universal.moe.pt"
    config = testing.random_config(ELEMENTS, **{"n_routed": 40, "top_k": 4, **options})
    low, _ = lower(testing.random_potential(config, dtype=dtype), config)
    write_bare(path, low)
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return written(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def copied(package, tmp_path):
    path = tmp_path / "copy.moe.pt"
    path.write_bytes(package.read_bytes())
    return path


def opened(path, backend="fused", dtype="", kept=""):
    with environment(MOECALC_WEIGHTS=kept):
        return _lib.load().Evaluator(str(path), "cpu", dtype, backend=backend)


def evaluate(model, atoms):
    types, edge_index, vec = (x.numpy() for x in graph_of(atoms, ELEMENTS, model.cutoff))
    return testing.evaluate_edges(model, types, edge_index, vec)


def same_bits(a, b):
    return all(np.array_equal(a[name], b[name]) for name in (keys.ENERGIES, keys.FORCES, keys.VIRIAL))


# --- what is laid out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_elements_with_atoms_are_laid_out(package, backend):
    model = opened(package, backend)
    assert model.n_packed_groups == 0
    evaluate(model, WNB)
    assert model.n_packed_groups == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_element_that_appears_is_computed_as_from_the_start(package, backend):
    model = opened(package, backend)
    evaluate(model, WW)
    assert model.n_packed_groups == 1
    assert same_bits(evaluate(model, WNB), evaluate(opened(package, backend), WNB))
    assert model.n_packed_groups == 2
    assert same_bits(evaluate(model, WW), evaluate(opened(package, backend), WW))
    assert model.n_packed_groups == 2  # kept for its return


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_laid_out_is_counted(package, backend):
    model = opened(package, backend)
    before = model.buffer_bytes
    evaluate(model, WNB)
    held = model.buffer_bytes
    model.release_weights()
    assert before < model.buffer_bytes < held


def test_a_batch_lays_out_the_elements_of_all_its_structures(package):
    calculator = MoECalculator(package, device="cpu", check=False)
    structures = [testing.molecule([symbol]) for symbol in ELEMENTS[:5]]
    batch = calculator.calculate_batch(structures)
    assert calculator._model._evaluator.n_packed_groups == 5
    for atoms, result in zip(structures, batch, strict=True):
        single = evaluate(opened(package), atoms)
        assert np.abs(result["forces"] - single[keys.FORCES]).max() < testing.SAME_MODEL


def test_elements_that_use_the_same_experts_share_their_weights(tmp_path):
    model = opened(written(tmp_path, n_routed=0))  # dense: all elements do
    evaluate(model, testing.molecule(["W"]))
    held = model.buffer_bytes
    evaluate(model, testing.molecule(["Nb"]))
    assert model.n_packed_groups == 2
    assert model.buffer_bytes - held < 5000  # routing weights


def test_routing_by_configuration_lays_out_what_the_composition_asks_for(tmp_path):
    path = written(tmp_path, routing="configuration")
    model = opened(path)
    for atoms in (WW, WNB, WW):
        assert same_bits(evaluate(model, atoms), evaluate(opened(path), atoms))
        assert model.n_packed_groups == 1


# --- what is dropped -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_elements_are_dropped_when_memory_is_short(package, backend):
    model = opened(package, backend, kept="0")
    evaluate(model, WNB)
    assert same_bits(evaluate(model, WW), evaluate(opened(package, backend), WW))
    assert model.n_packed_groups == 1
    assert same_bits(evaluate(model, WNB), evaluate(opened(package, backend), WNB))


def test_the_element_that_was_absent_for_longest_goes_first(copied):
    model = opened(copied)
    evaluate(model, testing.molecule(["W"]))
    one = model.buffer_bytes
    model.release_weights()
    mebibytes = (one - model.buffer_bytes) / 2**20
    model = opened(copied, kept=str(1.5 * mebibytes))  # one absent element
    for symbol in ("W", "Nb", "W", "Mo"):
        evaluate(model, testing.molecule([symbol]))
    assert model.n_packed_groups == 2
    copied.write_bytes(b"nothing can be laid out from now on")
    evaluate(model, testing.molecule(["W"]))
    with pytest.raises(RuntimeError, match="the file was changed"):
        evaluate(model, testing.molecule(["Nb"]))


@pytest.mark.parametrize("value", ["much", "-1"])
def test_a_limit_that_is_no_number_is_refused(package, value):
    with pytest.raises(RuntimeError, match=f"expected MOECALC_WEIGHTS to be a number of MiB, got '{value}'"):
        opened(package, kept=value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_released_weights_are_laid_out_again(package, backend):
    model = opened(package, backend)
    expected = evaluate(model, WNB)
    model.release_weights()
    assert model.n_packed_groups == 0
    assert same_bits(evaluate(model, WNB), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_that_is_kept_survives_a_release(package, backend):
    model = opened(package, backend)
    types, edge_index, _ = (x.numpy() for x in graph_of(WNB, ELEMENTS, model.cutoff))
    model.set_list(types, edge_index, None, np.zeros(len(WNB), dtype=int))
    expected = model.evaluate(WNB.positions)
    model.release_weights()
    assert same_bits(model.evaluate(WNB.positions), expected)


# --- the file --------------------------------------------------------------------------------------------------


def test_a_file_that_was_replaced_is_still_read(copied, package, tmp_path):
    model = opened(copied)
    other = tmp_path / "other"
    other.write_bytes(b"another file")
    other.replace(copied)
    assert same_bits(evaluate(model, WNB), evaluate(opened(package), WNB))


def test_a_file_that_was_deleted_is_still_read(copied, package):
    model = opened(copied)
    copied.unlink()
    assert same_bits(evaluate(model, WNB), evaluate(opened(package), WNB))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_was_overwritten_is_told_when_an_element_appears(copied, backend):
    model = opened(copied, backend)
    expected = evaluate(model, WW)
    body = copied.read_bytes()
    copied.write_bytes(body[: len(body) // 2])
    with pytest.raises(
        RuntimeError, match=r"copy\.moe\.pt: the file was changed since it was loaded.*with `mv`"
    ):
        evaluate(model, WNB)
    assert same_bits(evaluate(model, WW), expected)  # what is laid out is still good
    copied.write_bytes(body)


def test_an_overwritten_file_is_an_error_of_the_calculator(copied):
    calculator = MoECalculator(copied, device="cpu", check=False)
    copied.write_bytes(b"something else")
    with pytest.raises(MoecalcError, match=r"copy\.moe\.pt: the file was changed since it was loaded"):
        calculator.get_potential_energy(WW.copy())


@pytest.mark.parametrize("stored", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_from_the_file_are_those_of_the_plain_backend(tmp_path, stored, dtype):
    path = written(tmp_path, stored)
    expected = evaluate(opened(path, "plain", dtype), WNB)
    for backend in BACKENDS:
        result = evaluate(opened(path, backend, dtype), WNB)
        if dtype == "float64":
            assert_same(result, expected, 1e-11)
        else:
            scale = np.abs(expected[keys.FORCES]).max()
            assert np.abs(result[keys.FORCES] - expected[keys.FORCES]).max() < 1e-5 * max(1.0, scale)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_merged_experts_from_the_file_are_those_of_the_eager_model(tmp_path, kind):
    path = written(tmp_path, kind=kind)
    config = testing.random_config(ELEMENTS, n_routed=40, top_k=4, kind=kind)
    out = evaluate_atoms(testing.random_potential(config), WNB)
    expected = {name: getattr(out, name).numpy() for name in (keys.ENERGIES, keys.FORCES, keys.VIRIAL)}
    for backend in (*BACKENDS, "plain"):
        assert_same(evaluate(opened(path, backend), WNB), expected, 1e-11)


def test_records_are_those_of_the_file_that_was_loaded(copied):
    model = opened(copied)
    copied.unlink()
    assert list(json.loads(model.record("extra/metadata.json"))) == ["digest"]
    with pytest.raises(RuntimeError, match="it has no record `extra/nothing`"):
        model.record("extra/nothing")


# --- in the middle of a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_atom_that_becomes_another_element(package, backend):
    with environment(MOECALC_BACKEND=backend):
        atoms = testing.bulk_alloy(["W", "Nb"])
        atoms.calc = MoECalculator(package, device="cpu", check=False)
        atoms.get_forces()
        atoms.numbers[3] = 8
        fresh = atoms.copy()
        changed = atoms.get_forces()
        fresh.calc = MoECalculator(package, device="cpu", check=False, dtype="float64")  # another evaluator
        assert fresh.calc._model is not atoms.calc._model
        assert np.array_equal(changed, fresh.get_forces())
