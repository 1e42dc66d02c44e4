"""The C++ evaluator against the plain PyTorch model: order, batches, ghosts, precision, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from worlds import CUTOFF, ELEMENTS, Exchange, World, graph_of, make

from moecalc import _lib
from moecalc.nn import evaluate
from moecalc.testing import (
    SAME_MODEL,
    bulk_alloy,
    evaluate_edges,
    molecule,
    one_atom_cell,
)


@pytest.fixture(scope="module")
def library():
    return _lib.load()


@pytest.fixture(scope="module", params=["element", "configuration"])
def pair(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("packages"), request.param)


@pytest.fixture
def evaluator(library, pair):
    return library.Evaluator(pair[1])


def join(graphs):
    """One graph of several structures."""
    offsets = np.cumsum([0, *(len(types) for types, *_ in graphs)])
    return (
        np.concatenate([types for types, *_ in graphs]),
        np.concatenate(
            [edges + offset for (_, edges, *_), offset in zip(graphs, offsets, strict=False)], axis=1
        ),
        np.concatenate([vectors for _, _, vectors, _ in graphs]),
        np.concatenate([np.full(len(types), s) for s, (types, *_) in enumerate(graphs)]),
    )


def reference(model, graph, n_systems=1):
    return evaluate(model, *(torch.as_tensor(array) for array in graph), n_systems)


def assert_equal(result, expected, tolerance=SAME_MODEL):
    for key in ("energy", "energies", "forces", "virial"):
        np.testing.assert_allclose(
            result[key], getattr(expected, key).numpy(), rtol=0, atol=tolerance, err_msg=key
        )


def test_properties(library, pair, evaluator):
    assert evaluator.elements == ELEMENTS
    assert (evaluator.cutoff, evaluator.angle_cutoff, evaluator.n_layers) == (CUTOFF, 3.4, 3)
    assert (evaluator.dtype, evaluator.device) == ("float64", "cpu")
    assert json.loads(evaluator.metadata)["name"] == pair[0].routing_level
    assert library.Evaluator(pair[1], "auto").device in {"cpu", "cuda:0"}


@pytest.mark.parametrize(
    "atoms", [bulk_alloy(), molecule(), one_atom_cell()], ids=["bulk", "molecule", "one"]
)
def test_equals_the_reference_model(pair, evaluator, atoms):
    graph = graph_of(atoms)
    result = evaluate_edges(evaluator, *graph)
    assert_equal(result, reference(pair[0], graph))
    assert np.abs(result["forces"]).max() > 1e-3 or len(atoms) == 1


def test_batch_with_shuffled_edges_and_an_empty_structure(pair, evaluator):
    types, edges, vectors, system = join(
        [graph_of(bulk_alloy()), graph_of(molecule()), graph_of(one_atom_cell())]
    )
    system[system == 2] = 3  # structure 2 has no atoms
    order = np.random.default_rng(0).permutation(len(vectors))
    graph = types, edges[:, order], vectors[order], system
    result = evaluate_edges(evaluator, *graph, 4)
    assert_equal(result, reference(pair[0], graph, 4))
    assert result["energy"][2] == 0


def test_counts(evaluator):
    graph = types, edges, vectors, _ = graph_of(bulk_alloy())
    r = np.linalg.norm(vectors, axis=1)
    masked = {(0, 2), (2, 0)}
    kept = (r <= CUTOFF) & [(types[i], types[j]) not in masked for i, j in edges.T]
    neighbors = np.bincount(edges[0, kept], minlength=len(types))
    close = np.bincount(edges[0, kept & (r < 3.4)], minlength=len(types))
    result = evaluate_edges(evaluator, *graph)
    assert result["n_edge"] == kept.sum() < len(r)
    assert result["n_angle"] == (close**2).sum() > 0
    assert (result["max_neighbors"], result["max_angle_neighbors"]) == (neighbors.max(), close.max())


def test_only_what_is_requested_is_returned(evaluator):
    graph = graph_of(molecule())
    always = {"n_edge", "n_angle", "max_neighbors", "max_angle_neighbors", "timings"}
    full = evaluate_edges(evaluator, *graph, atom_virial=True)
    assert set(full) == always | {"energy", "energies", "forces", "virial", "atom_virial"}
    np.testing.assert_allclose(full["atom_virial"].sum(axis=0), full["virial"][0], rtol=0, atol=SAME_MODEL)
    for name in ("forces", "virial", "atom_virial"):
        request = {"forces": False, "virial": False, "atom_virial": False} | {name: True}
        result = evaluate_edges(evaluator, *graph, **request)
        assert set(result) == always | {"energy", "energies", name}
        np.testing.assert_array_equal(result[name], full[name])
    result = evaluate_edges(evaluator, *graph, forces=False, virial=False)
    assert set(result) == always | {"energy", "energies"}
    np.testing.assert_array_equal(result["energies"], full["energies"])


def test_no_atoms_and_no_neighbors(pair, evaluator):
    nothing = np.zeros(0, int), np.zeros((2, 0), int), np.zeros((0, 3)), np.zeros(0, int)
    result = evaluate_edges(evaluator, *nothing, 2, atom_virial=True)
    assert result["energy"].tolist() == [0, 0]
    assert result["forces"].shape == (0, 3)
    assert result["atom_virial"].shape == (0, 3, 3)
    alone = np.array([1, 3]), *nothing[1:3], np.array([0, 0])
    result = evaluate_edges(evaluator, *alone)
    assert_equal(result, reference(pair[0], alone))
    assert not result["forces"].any()


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float64", "float32"), ("float32", "float64"), ("float32", "")]
)
def test_precision_can_be_chosen(library, tmp_path, stored, wanted):
    model, path = make(tmp_path, "element", stored)
    graph = graph_of(bulk_alloy())
    evaluator = library.Evaluator(path, dtype=wanted)
    assert evaluator.dtype == (wanted or stored)
    expected = reference(model, graph)
    scale = max(1.0, float(expected.forces.abs().max()), float(expected.virial.abs().max()))
    assert_equal(evaluate_edges(evaluator, *graph), expected, 2e-5 * scale)


def test_same_input_gives_the_same_bits(library, pair, evaluator):
    graph = graph_of(bulk_alloy())
    first, again = evaluate_edges(evaluator, *graph), evaluate_edges(library.Evaluator(pair[1]), *graph)
    for key in ("energy", "energies", "forces", "virial"):
        np.testing.assert_array_equal(first[key], again[key])


def test_input_may_be_strided_read_only_and_of_other_integer_types(evaluator):
    atoms = molecule()
    types, edges, _, system = graph_of(atoms)
    evaluator.set_list(types, edges, None, system)
    expected = evaluator.evaluate(atoms.positions)
    wide = np.zeros((len(atoms), 6))
    wide[:, ::2] = atoms.positions
    wide.flags.writeable = False
    columns = edges.T.copy()
    columns.flags.writeable = False
    evaluator.set_list(types.astype(np.int32), columns.T, None, system.astype(np.uint8))
    columns = None
    result = evaluator.evaluate(wide[:, ::2])
    np.testing.assert_array_equal(result["forces"], expected["forces"])


def test_the_list_is_the_evaluators_own(evaluator):
    """What its owner does with the arrays afterwards changes nothing."""
    atoms = molecule()
    types, edges, _, system = graph_of(atoms)
    evaluator.set_list(types, edges, None, system)
    expected = evaluator.evaluate(atoms.positions)
    for array in (types, edges, system):
        array.fill(7)
    np.testing.assert_array_equal(evaluator.evaluate(atoms.positions)["forces"], expected["forces"])


def test_results_outlive_the_evaluator(library, pair):
    result = evaluate_edges(library.Evaluator(pair[1]), *graph_of(molecule()))
    copy = result["forces"].copy()
    evaluate_edges(library.Evaluator(pair[1]), *graph_of(bulk_alloy()))
    np.testing.assert_array_equal(result["forces"], copy)


# --- ghosts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "borders", [[], [0.5], [0.2, 0.6], [0.5, 1.0]], ids=["1", "2", "3", "one rank empty"]
)
def test_ranks_with_ghosts_agree_with_one_rank(library, pair, borders):
    atoms = bulk_alloy()
    world = World(atoms, borders)
    results = world.run(library, pair[1], atom_virial=True)
    expected = evaluate_edges(library.Evaluator(pair[1]), *graph_of(atoms), atom_virial=True)
    for key in ("energy", "virial"):
        np.testing.assert_allclose(sum(r[key] for r in results), expected[key], rtol=0, atol=SAME_MODEL)
    for key in ("forces", "atom_virial"):
        np.testing.assert_allclose(world.gather(results, key), expected[key], rtol=0, atol=SAME_MODEL)


def test_ranks_need_no_reverse_exchange_for_energies(library, pair):
    results = World(bulk_alloy(), [0.5, 1.0]).run(library, pair[1], forces=False, virial=False)
    expected = evaluate_edges(library.Evaluator(pair[1]), *graph_of(bulk_alloy()))
    np.testing.assert_allclose(sum(r["energy"] for r in results), expected["energy"], rtol=0, atol=SAME_MODEL)


def test_failing_exchange_is_reported(library, evaluator):
    class Broken(Exchange):
        def __init__(self):
            pass

        def forward(self, features):
            raise ValueError("cable unplugged")

        def sum(self, values):
            pass

    with pytest.raises(
        library.Error, match="ghost exchange failed in `forward`: ValueError: cable unplugged"
    ):
        evaluate_edges(evaluator, *graph_of(molecule()), exchange=Broken())


def test_ghosts_without_exchange_are_refused(library, evaluator):
    graph = np.array([0, 1, 2]), np.array([[0, 1], [2, 2]]), np.ones((2, 3)), np.array([0, 0])
    with pytest.raises(
        library.Error, match="expected a GhostExchange for 1 ghost atoms and a model of 3 layers"
    ):
        evaluate_edges(evaluator, *graph)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"types": [0, 4]}, r"expected types\[1\] in \[0, 4\), got 4"),
        ({"types": [-1, 0]}, r"expected types\[0\] in \[0, 4\), got -1"),
        ({"types": [0.0, 1.0]}, r"expected `types` to be an array of integers, got float64"),
        ({"types": [[0, 1]]}, r"expected `types` of shape \[any\], got \[1, 2\]"),
        ({"edge_index": [[0, 2], [1, 0]]}, r"expected edge_index\[0, 1\] \(a centre\) in \[0, 2\), got 2"),
        (
            {"edge_index": [[0, 1], [-1, 0]]},
            r"expected edge_index\[1, 0\] \(a neighbour\) in \[0, 2\), got -1",
        ),
        ({"edge_index": [[0], [1]]}, r"expected `edge_from` of shape \[1\], got \[2\]"),
        ({"edge_index": [[0.0, 1.0], [1.0, 0.0]]}, r"expected `edge_index` to be an array of integers"),
        ({"edge_vec": [[2.0, 0, 0], [np.nan, 0, 0]]}, r"expected finite `positions`, got \(nan, .* in row 2"),
        ({"edge_vec": [[2.0, 0, 0], [0, 0, np.inf]]}, r"expected finite `positions`, got .*inf.* in row 2"),
        (
            {"edge_vec": [[2.0, 0, 0], [0, 1e300, 1e300]]},
            r"expected finite .*atoms 1 and 0: check the positions",
        ),
        ({"edge_vec": [[0.0, 0, 0], [2.0, 0, 0]]}, r"distance 0 between atoms 0 and 1: remove the duplicate"),
        ({"system_index": [0, 1]}, r"expected system_index\[1\] in \[0, 1\), got 1"),
        (
            {"system_index": [0, 1], "n_systems": 2},
            r"expected edges within one structure, got .* structures 0 and 1",
        ),
        ({"system_index": [0, 0, 0]}, r"expected `system_index` no longer than `types` \(2\), got 3"),
        ({"n_systems": 0}, r"expected `n_systems` >= 1, got 0"),
    ],
)
def test_invalid_edges_are_refused_in_one_line(library, evaluator, change, message):
    valid = {
        "types": [0, 1],
        "edge_index": [[0, 1], [1, 0]],
        "edge_vec": [[2.0, 0, 0], [-2.0, 0, 0]],
        "system_index": [0, 0],
        "n_systems": 1,
    }
    arrays = {k: v if k == "n_systems" else np.asarray(v) for k, v in (valid | change).items()}
    with pytest.raises(library.Error, match=message) as caught:
        evaluate_edges(evaluator, **arrays)
    assert "\n" not in str(caught.value)


def test_errors_have_types(library, evaluator):
    graph = np.array([0, 1]), np.array([[0, 1], [1, 0]])
    with pytest.raises(library.OverlapError, match="distance 0 between atoms 0 and 1"):
        evaluate_edges(evaluator, *graph, np.zeros((2, 3)))
    with pytest.raises(library.NotFiniteError, match="expected finite"):
        evaluate_edges(evaluator, *graph, np.full((2, 3), 1e300))
    assert issubclass(library.NotFiniteError, library.Error)
    assert issubclass(library.OverlapError, library.Error)
    assert issubclass(library.OutOfMemoryError, library.Error)
    assert issubclass(library.Error, RuntimeError)


@pytest.mark.parametrize("device", ["gpu", "cuda0", "", "CPU"])
def test_unknown_device_is_refused(library, pair, device):
    with pytest.raises(library.Error, match=f"expected `device` to be .* got '{device}'"):
        library.Evaluator(pair[1], device)


@pytest.mark.skipif(_lib.load().cuda_device_count() > 0, reason="has a CUDA device")
def test_missing_cuda_is_named(library, pair):
    with pytest.raises(
        library.Error,
        match=r"device 'cuda:0': (no CUDA device was found|this installation has no CUDA kernels .*): use device 'cpu'",
    ):
        library.Evaluator(pair[1], "cuda:0")


def test_unknown_dtype_is_refused(library, pair):
    with pytest.raises(
        library.Error, match=r"expected `dtype` to be 'float64', 'float32' or '' .* got 'float16'"
    ):
        library.Evaluator(pair[1], dtype="float16")


@pytest.mark.cuda
@pytest.mark.skipif(_lib.load().cuda_device_count() == 0, reason="needs a CUDA device")
def test_cuda_agrees_with_cpu(library, pair):
    graph = join([graph_of(bulk_alloy()), graph_of(molecule())])
    on_cpu, on_cuda = (
        evaluate_edges(library.Evaluator(pair[1], device), *graph, 2, atom_virial=True)
        for device in ("cpu", "cuda")
    )
    for key in ("energy", "energies", "forces", "virial", "atom_virial"):
        np.testing.assert_allclose(on_cuda[key], on_cpu[key], rtol=0, atol=100 * SAME_MODEL)
