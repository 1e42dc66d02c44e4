"""The plain backend against the PyTorch model: every option of a package, both precisions, derivatives and ghosts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluators import ELEMENTS, STRUCTURES
from helpers import graph_of
from worlds import World

from moecalc import _lib, testing
from moecalc.conditions import Conditions
from moecalc.keys import VOIGT
from moecalc.nn import evaluate
from moecalc.package.importers import set_precision
from moecalc.package.lower import lower
from moecalc.package.metadata import Source
from moecalc.package.reference import condition_tensors
from moecalc.package.write import Labels, Lowered, write_package

TOLERANCE = {"float64": 1e-12, "float32": 5e-5}

UNSMOOTH = {"use_dynamic_sel": False, "smooth_edge_update": False}
SEQUENTIAL = {"sequential_update": True}
CONFIGURATION = {"n_routed": 4, "routing": "configuration"}
OPTIONS = {
    "dense": {},
    "wide": {"n_dim": 40, "e_dim": 24, "a_dim": 20},
    "all wider than 64 but angles": {"n_dim": 72, "e_dim": 88, "a_dim": 40, "n_routed": 3},
    "all wider than 64": {"n_dim": 136, "e_dim": 72, "a_dim": 72},
    "mlp": {"n_routed": 4},
    "one expert at a time": {"n_routed": 4, "top_k": 1, "n_shared": 0, "gate": "softmax_topk"},
    "softmax before the selection": {"n_routed": 4, "gate": "softmax_topk"},
    "two shared experts": {"n_routed": 3, "n_shared": 2},
    "shared experts alone": {"n_routed": 3, "top_k": 0, "n_shared": 2},
    "merged": {"n_routed": 4, "kind": "linear"},
    "router per group": {"n_routed": 4, "shared_routers": True, "n_shared": 0},
    "configuration": CONFIGURATION,
    "configuration, merged": {**CONFIGURATION, "kind": "linear"},
    "configuration, softmax before the selection": {**CONFIGURATION, "gate": "softmax_topk"},
    "no angles": {"n_routed": 3, "update_angle": False},
    "linear compression": {"n_routed": 3, "a_compress_use_split": False},
    "strong compression": {"n_routed": 3, "a_compress_rate": 2, "a_compress_e_rate": 1},
    "no compression": {"n_routed": 3, "a_compress_rate": 0},
    "two heads, res_incr": {"n_routed": 3, "n_multi_edge_message": 2, "update_style": "res_incr"},
    "res_avg": {"n_routed": 3, "update_style": "res_avg"},
    "far edges keep their features": {"n_routed": 3, **UNSMOOTH},
    "far edges keep their features, res_avg": {"update_style": "res_avg", **UNSMOOTH},
    "polynomial switch, edges from the switch": {"use_exp_switch": False, "edge_init_use_dist": False},
    "protected distance": {"env_protection": 0.1, "edge_init_use_dist": False},
    "axis of 2": {"axis_neuron": 2},
    "concatenated embedding": {"n_routed": 3, "concat_output_tebd": True, "use_tebd_bias": True},
    "one layer": {"n_routed": 3, "nlayers": 1},
    "two layers": {"n_routed": 3, "nlayers": 2},
    "five layers": {"nlayers": 5},
    "case embedding": {"fitting": {"dim_case_embd": 2}},
    "fitting net without time steps": {"fitting": {"resnet_dt": False}},
    "fitting net that doubles": {"neuron": (16, 16, 5)},
    "fitting net without hidden layers": {"neuron": ()},
    "fitting net with softplus": {"fitting": {"activation_function": "softplus"}},
    "atoms without energy": {"fitting": {"atom_exclude_types": [1]}},
    "excluded pairs": {"n_routed": 3, "exclude_types": [(0, 1), (2, 2)]},
    "sequential": SEQUENTIAL,
    "sequential, mlp": {**SEQUENTIAL, "n_routed": 4},
    "sequential, merged by configuration": {**SEQUENTIAL, **CONFIGURATION, "kind": "linear"},
    "sequential, no angles": {**SEQUENTIAL, "update_angle": False},
    "sequential, one layer": {**SEQUENTIAL, "nlayers": 1},
    "sequential, linear compression": {**SEQUENTIAL, "a_compress_use_split": False},
    "sequential, far edges keep their features": {**SEQUENTIAL, **UNSMOOTH},
    "sequential, two heads": {**SEQUENTIAL, "n_multi_edge_message": 2},
    "sequential, softplus": {**SEQUENTIAL, "activation_function": "softplus"},
    **{
        f"activation {name}": {"activation_function": name, "edge_init_use_dist": False}
        for name in (
            "softplus", "silu", "silut:0.1", "silut:10.0", "tanh", "gelu", "sigmoid", "relu", "relu6", "linear",
        )
    },
}  # fmt: skip

CHARGE_SPIN = {"add_chg_spin_ebd": True}
THREE = {"numb_fparam": 3, "dim_case_embd": 2}
PACK = {**CHARGE_SPIN, "n_routed": 4, "route_on_charge_spin": True}
CONDITIONAL = {
    "frame parameters": {"fitting": {"numb_fparam": 2}},
    "charge and spin": {**CHARGE_SPIN, "n_routed": 4},
    "both, case embedding": {**CHARGE_SPIN, "fitting": THREE},
    # widths as the first layer counts them: 8 features, 3 frame parameters, 2 of the case embedding
    "skip path": {**CHARGE_SPIN, "fitting": THREE, "neuron": (13, 6)},
    "doubling skip path": {"fitting": THREE, "neuron": (26, 6)},
    "concatenated embedding": {**CHARGE_SPIN, "fitting": THREE, "concat_output_tebd": True},
    "no hidden layer": {**CHARGE_SPIN, "fitting": THREE, "neuron": ()},
    "experts by condition": PACK,
    "experts by condition, merged": {**PACK, "kind": "linear"},
    "experts by condition and configuration": {**PACK, "routing": "configuration"},
    "experts by configuration": {**CHARGE_SPIN, **CONFIGURATION},
    "experts by condition, sequential": {**PACK, **SEQUENTIAL},
    "softplus": {**CHARGE_SPIN, "activation_function": "softplus"},
}  # fmt: skip


@pytest.fixture(scope="module")
def library():
    """The native library, whose evaluators use the plain backend."""
    native = _lib.load()
    return SimpleNamespace(
        Error=native.Error,
        Evaluator=lambda path, dtype="": native.Evaluator(path, dtype=dtype, backend="plain"),
    )


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Model and path of a random package by options; cached."""
    folder = tmp_path_factory.mktemp("plain")
    made = {}

    def get(dtype="float64", fixed=None, **options):
        key = repr((dtype, fixed, sorted(options.items())))
        if key not in made:
            config = testing.random_config(ELEMENTS, **options)
            path = str(folder / f"{len(made)}.moe.pt")
            testing.write_random_package(path, config, dtype, fixed=fixed)
            made[key] = testing.random_potential(config, dtype=dtype), path, config
        return made[key]

    return get


def batch(*structures, cutoff=5.0):
    """Arguments of an evaluation of several structures: types, edges, vectors, structure of every atom, how many."""
    graphs = [graph_of(atoms, ELEMENTS, cutoff) for atoms in structures]
    sizes = [len(atoms) for atoms in structures]
    first = np.cumsum([0, *sizes])
    return (
        torch.cat([types for types, _, _ in graphs]),
        torch.cat([edges + int(k) for (_, edges, _), k in zip(graphs, first, strict=False)], dim=1),
        torch.cat([vectors for _, _, vectors in graphs]),
        torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        len(sizes),
    )


def answer(evaluator, graph, **request):
    *arrays, n_systems = graph
    return testing.evaluate_edges(evaluator, *(array.numpy() for array in arrays), n_systems, **request)


def assert_same(got, want, tolerance):
    for key in ("energy", "energies", "forces", "virial"):
        expected = getattr(want, key).numpy()
        scale = max(1.0, np.abs(expected).max(initial=0.0))
        assert np.abs(got[key] - expected).max(initial=0.0) <= tolerance * scale, key


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_the_pytorch_model(library, make, name, dtype):
    model, path, _ = make(**OPTIONS[name])
    evaluator = library.Evaluator(path, dtype)
    assert (evaluator.backend, evaluator.dtype) == ("plain", dtype)
    for atoms in STRUCTURES.values():
        graph = batch(atoms)
        assert_same(answer(evaluator, graph), evaluate(model, *graph), TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["mlp", "configuration", "configuration, merged", "sequential"])
def test_a_batch_equals_the_pytorch_model(library, make, name):
    model, path, _ = make(**OPTIONS[name])
    graph = batch(*STRUCTURES.values())
    assert_same(answer(library.Evaluator(path), graph), evaluate(model, *graph), TOLERANCE["float64"])


def conditions_of(config, charge, spin, scale):
    """Conditions that a configuration takes."""
    pair = (charge, spin) if config.descriptor.add_chg_spin_ebd else (None, None)
    n = config.fitting.numb_fparam
    return Conditions(*pair, tuple(scale * (0.3 + 0.2 * k) for k in range(n)) if n else None)


def arrays_of(given):
    return [None if tensor is None else tensor.numpy() for tensor in condition_tensors(given)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_batch_of_conditions_equals_the_pytorch_model(library, make, name, dtype):
    model, path, config = make(**CONDITIONAL[name])
    given = [conditions_of(config, *values) for values in ((0, 1, 1.0), (1, 2, 2.0), (0, 1, 1.0))]
    graph = batch(STRUCTURES["molecule"], STRUCTURES["bulk"], STRUCTURES["slab"])
    charge_spin, fparam = condition_tensors(given)
    want = evaluate(model, *graph, charge_spin=charge_spin, fparam=fparam)
    evaluator = library.Evaluator(path, dtype)
    evaluator.set_conditions(*arrays_of(given))
    assert_same(answer(evaluator, graph), want, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "name", ["both, case embedding", "skip path", "experts by condition and configuration"]
)
def test_folded_conditions_equal_the_pytorch_model(library, make, name):
    config = testing.random_config(ELEMENTS, **CONDITIONAL[name])
    given = conditions_of(config, -2, 3, 0.5)
    fixed = {"charge": given.charge, "spin": given.spin, "fparam": given.fparam}
    model, path, _ = make(fixed={k: x for k, x in fixed.items() if x is not None}, **CONDITIONAL[name])
    charge_spin, fparam = condition_tensors([given])
    graph = batch(STRUCTURES["bulk"])
    want = evaluate(model, *graph, charge_spin=charge_spin, fparam=fparam)
    assert_same(answer(library.Evaluator(path), graph), want, TOLERANCE["float64"])


@pytest.mark.parametrize("layers", TOLERANCE)
def test_a_fitting_net_of_another_precision_equals_the_pytorch_model(library, tmp_path, layers):
    net = "float32" if layers == "float64" else "float64"
    config = testing.random_config(ELEMENTS, n_routed=3, concat_output_tebd=True)
    low, routing = lower(testing.random_potential(config), config)
    set_precision(low, layers, net)
    source = Source(file="", sha256="", layout="random", size_bytes=0, parameters=0)
    path = tmp_path / "mixed.moe.pt"
    write_package(path, Lowered(low, routing, config), Labels("mixed", source), [])
    evaluator = library.Evaluator(str(path))
    assert evaluator.dtype == layers
    graph = batch(STRUCTURES["bulk"])
    assert_same(answer(evaluator, graph), evaluate(low, *graph), TOLERANCE["float32"])


@pytest.mark.parametrize("name", ["mlp", "sequential, softplus", "far edges keep their features"])
def test_forces_and_virial_are_finite_differences(library, make, name):
    evaluator = library.Evaluator(make(**OPTIONS[name])[1])

    def energies(structures):
        return answer(evaluator, batch(*structures), forces=False, virial=False)["energy"]

    atoms = testing.bulk_alloy(ELEMENTS, repeat=1)
    result = answer(evaluator, batch(atoms))
    forces = testing.finite_difference_forces(energies, atoms)
    assert np.abs(result["forces"] - forces).max() < testing.FINITE_DIFFERENCE
    stress = testing.finite_difference_stress(energies, atoms)
    voigt = -result["virial"][0][VOIGT] / atoms.get_volume()
    assert np.abs(voigt - stress).max() < testing.FINITE_DIFFERENCE


@pytest.mark.parametrize("borders", [[0.5], [0.2, 0.6], [0.5, 1.0]], ids=["2", "3", "one rank empty"])
@pytest.mark.parametrize("name", ["mlp", "configuration", "sequential, mlp", "one layer"])
def test_ranks_with_ghosts_agree_with_one_rank(library, make, name, borders):
    _, path, _ = make(**OPTIONS[name])
    atoms = STRUCTURES["bulk"]
    world = World(atoms, borders)
    results = world.run(library, path, atom_virial=True)
    want = answer(library.Evaluator(path), batch(atoms, cutoff=5.4), atom_virial=True)
    for key in ("energy", "virial"):
        assert np.abs(sum(result[key] for result in results) - want[key]).max() < testing.SAME_MODEL
    for key in ("forces", "atom_virial"):
        assert np.abs(world.gather(results, key) - want[key]).max() < testing.SAME_MODEL


def test_atom_virials_sum_to_the_virial(library, make):
    evaluator = library.Evaluator(make(**OPTIONS["sequential, mlp"])[1])
    result = answer(evaluator, batch(STRUCTURES["slab"]), atom_virial=True)
    np.testing.assert_allclose(result["atom_virial"].sum(0), result["virial"][0], rtol=0, atol=1e-11)


def test_energies_alone_are_the_same(library, make):
    evaluator = library.Evaluator(make(**OPTIONS["sequential, mlp"])[1])
    graph = batch(STRUCTURES["bulk"])
    alone = answer(evaluator, graph, forces=False, virial=False)
    np.testing.assert_array_equal(alone["energies"], answer(evaluator, graph)["energies"])
    assert "forces" not in alone


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_results_do_not_depend_on_the_number_of_threads(library, make, dtype):
    evaluator = library.Evaluator(make(**OPTIONS["sequential, mlp"])[1], dtype)
    graph = batch(STRUCTURES["bulk"], STRUCTURES["slab"])
    results = []
    for n_threads in (1, 2, 3):
        evaluator.num_threads = n_threads
        results.append(answer(evaluator, graph))
    for key in ("energies", "forces", "virial"):
        np.testing.assert_array_equal(results[0][key], results[1][key])
        np.testing.assert_array_equal(results[0][key], results[2][key])


def test_results_do_not_depend_on_what_was_evaluated_before(library, make):
    evaluator = library.Evaluator(make(**OPTIONS["configuration"])[1])
    graph = batch(STRUCTURES["molecule"])
    first = answer(evaluator, graph)
    for atoms in STRUCTURES.values():
        answer(evaluator, batch(atoms))
    np.testing.assert_array_equal(answer(evaluator, graph)["forces"], first["forces"])


def test_weights_can_be_given_back(library, make):
    evaluator = library.Evaluator(make(**OPTIONS["mlp"])[1])
    empty = evaluator.buffer_bytes
    graph = batch(STRUCTURES["bulk"])
    first = answer(evaluator, graph)
    held = evaluator.buffer_bytes
    assert held > empty
    evaluator.release_weights()
    assert evaluator.buffer_bytes < held
    np.testing.assert_array_equal(answer(evaluator, graph)["forces"], first["forces"])
