"""Charge, spin and frame parameters in the C++ evaluator: every kind of model, backend, precision and batch."""

import os

import numpy as np
import pytest
import torch
from helpers import DATA, evaluate_atoms, graph_of

from moecalc import _lib, testing
from moecalc._torch_lib import load_torch_library
from moecalc.conditions import Conditions
from moecalc.package.importers import set_precision
from moecalc.package.lower import lower

ELEMENTS = ["Nb", "Mo", "Ta", "W"]
BACKENDS = ["fused", "plain", "torchscript", "cuda-emulation"]
ORACLE = DATA / "oracle" / "models"

CHARGE_SPIN = {"add_chg_spin_ebd": True}
G2 = {**CHARGE_SPIN, "fparam_is_charge_spin": True, "fitting": {"numb_fparam": 2}}
MOE = {"n_routed": 4}
PACK = {**CHARGE_SPIN, **MOE, "route_on_charge_spin": True}
THREE = {"numb_fparam": 3, "dim_case_embd": 2}
OPTIONS = {
    "one frame parameter": {"fitting": {"numb_fparam": 1}},
    "five frame parameters, mlp": {**MOE, "fitting": {"numb_fparam": 5}},
    "charge and spin": CHARGE_SPIN,
    "both, case embedding": {**CHARGE_SPIN, "fitting": THREE},
    "one input for both": {**G2, **MOE},
    # widths as the first layer counts them: 8 features, 3 frame parameters, 2 of the case embedding
    "skip path": {**CHARGE_SPIN, "fitting": THREE, "neuron": (13, 6)},
    "doubling skip path": {"fitting": THREE, "neuron": (26, 6)},
    "skip path, concatenated embedding": {
        **CHARGE_SPIN, "fitting": THREE, "neuron": (21,), "concat_output_tebd": True,
    },
    "skip path without time step": {"fitting": {**THREE, "resnet_dt": False}, "neuron": (13, 6)},
    "no hidden layer": {**CHARGE_SPIN, "fitting": THREE, "neuron": ()},
    "no hidden layer, concatenated embedding": {
        **CHARGE_SPIN, "fitting": THREE, "neuron": (), "concat_output_tebd": True,
    },
    "concatenated embedding": {**CHARGE_SPIN, **MOE, "concat_output_tebd": True},
    "econf": {**CHARGE_SPIN, "use_econf_tebd": True, "concat_output_tebd": True},
    "100 features": {**CHARGE_SPIN, "n_dim": 100, "nlayers": 2},
    "200 features": {**CHARGE_SPIN, "n_dim": 200, "nlayers": 2},
    "static normalisers": {**CHARGE_SPIN, "use_dynamic_sel": False},
    "no angles": {**CHARGE_SPIN, "update_angle": False},
    "merged experts": {**CHARGE_SPIN, **MOE, "kind": "linear"},
    "two shared experts": {**CHARGE_SPIN, **MOE, "n_shared": 2},
    "pack": {**PACK, "fitting": THREE},
    "pack, merged experts": {**PACK, "kind": "linear"},
    "pack, one input for both": {**G2, **MOE, "route_on_charge_spin": True, "shared_routers": True},
    "configuration": {**CHARGE_SPIN, **MOE, "routing": "configuration"},
    "pack, configuration": {**PACK, "routing": "configuration", "fitting": THREE},
    "pack, configuration, merged experts": {**PACK, "routing": "configuration", "kind": "linear"},
}  # fmt: skip
# no kernels of their own
UNCOVERED = {
    "softplus": {**CHARGE_SPIN, "activation_function": "softplus", "fitting": THREE},
    "softplus fitting": {
        **CHARGE_SPIN, "fitting": {**THREE, "activation_function": "softplus"}, "concat_output_tebd": True,
    },
    "sequential": {**PACK, "sequential_update": True, "fitting": THREE},
}  # fmt: skip


def values_of(config, charge, spin, scale=1.0):
    """Conditions that a configuration takes."""
    pair = (charge, spin) if config.descriptor.add_chg_spin_ebd else (None, None)
    n = config.fitting.numb_fparam
    fparam = tuple(scale * (0.3 + 0.2 * k) for k in range(n)) if n else None
    if config.fparam_is_charge_spin:
        fparam = (float(charge), float(spin))
    return Conditions(*pair, fparam)


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """(path, plain model, configuration) of random models by name of their options."""
    folder = tmp_path_factory.mktemp("conditions")
    made = {}

    def get(name, dtype="float64", fixed=()):
        key = name, dtype, fixed
        if key not in made:
            options = {"nlayers": 2, **(OPTIONS | UNCOVERED)[name]}
            config = testing.random_config(ELEMENTS, **options)
            path = folder / f"{len(made)}.moe.pt"
            testing.write_random_package(path, config, dtype, fixed=dict(fixed))
            made[key] = path, testing.random_potential(config, dtype=dtype), config
        return made[key]

    return get


def open_evaluator(monkeypatch, path, backend, dtype=""):
    monkeypatch.setenv("MOECALC_BACKEND", backend)
    if backend == "torchscript":
        load_torch_library()
    return _lib.load().Evaluator(os.fsencode(path), "cpu", dtype)


def give(evaluator, conditions):
    pairs = [c.charge_spin for c in conditions]
    fparam = [c.fparam for c in conditions]
    if pairs[0] is fparam[0] is None:
        return
    evaluator.set_conditions(
        None if pairs[0] is None else np.array(pairs), None if fparam[0] is None else np.array(fparam)
    )


def run(evaluator, structures, conditions, elements=ELEMENTS):
    """Energies, forces, virials of a batch."""
    give(evaluator, conditions)
    graphs = [graph_of(atoms, elements, evaluator.cutoff) for atoms in structures]
    first = np.cumsum([0] + [len(t) for t, _, _ in graphs])
    return testing.evaluate_edges(
        evaluator,
        torch.cat([t for t, _, _ in graphs]).numpy(),
        torch.cat([e + int(n) for (_, e, _), n in zip(graphs, first, strict=False)], 1).numpy(),
        torch.cat([v for _, _, v in graphs]).numpy(),
        np.repeat(np.arange(len(structures)), np.diff(first)),
        len(structures),
    )


def deviation(out, index, atoms, first, expected):
    rows = slice(first, first + len(atoms))
    return max(
        float(np.abs(out["energies"][rows] - expected.energies.detach().numpy()).max()),
        float(np.abs(out["forces"][rows] - expected.forces.numpy()).max()),
        float(np.abs(out["virial"][index] - expected.virial[0].numpy()).max()),
    )


def plain(model, atoms, given, known={}):  # noqa: B006 - a cache
    """Answer of a plain model, kept: it takes far longer than the evaluator's."""
    key = id(model), id(atoms), given
    if key not in known:
        known[key] = model, atoms, evaluate_atoms(model, atoms, given)  # keeps the ids in use
    return known[key][2]


def check_all(out, model, conditions, tolerance=1e-10, structures=None):
    """Each structure of a batch against the plain model; one condition serves all."""
    structures = structures or STRUCTURES
    if len(conditions) == 1:
        conditions = conditions * len(structures)
    first = 0
    for index, (atoms, given) in enumerate(zip(structures, conditions, strict=True)):
        assert deviation(out, index, atoms, first, plain(model, atoms, given)) < tolerance
        first += len(atoms)


STRUCTURES = [
    testing.molecule(ELEMENTS, n_atoms=5, seed=0),
    testing.bulk_alloy(["Nb", "W"], repeat=1, seed=3),
    testing.molecule(ELEMENTS[1:], n_atoms=4, seed=2),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_of_different_conditions_equals_the_plain_model(packages, monkeypatch, name, backend):
    path, model, config = packages(name)
    evaluator = open_evaluator(monkeypatch, path, backend)
    assert backend.split("-")[0] in evaluator.backend
    conditions = [values_of(config, *x) for x in ((1, 2, 1.0), (-2, 3, -0.4), (1, 2, 1.0))]
    check_all(run(evaluator, STRUCTURES, conditions), model, conditions)


@pytest.mark.parametrize("name", UNCOVERED)
def test_where_kernels_do_not_cover_the_model_a_batch_equals_the_plain_model(packages, monkeypatch, name):
    path, model, config = packages(name)
    evaluator = open_evaluator(monkeypatch, path, "")
    assert evaluator.backend == "plain"
    assert evaluator.backend_reason
    conditions = [values_of(config, *x) for x in ((1, 2, 1.0), (-2, 3, -0.4), (1, 2, 1.0))]
    out = run(evaluator, STRUCTURES, conditions)
    check_all(out, model, conditions)


@pytest.mark.parametrize("name", ["both, case embedding", "pack", "skip path, concatenated embedding"])
@pytest.mark.parametrize(
    ("backend", "found"),
    [("fused", "fused"), ("", "fused"), ("plain", "plain"), ("torchscript", "torchscript")],
)
def test_a_fitting_net_of_another_precision_equals_the_plain_model(
    monkeypatch, tmp_path, name, backend, found
):
    config = testing.random_config(ELEMENTS, **{"nlayers": 2, **OPTIONS[name]})
    lowered = []

    def lower_mixed(*arguments):
        low, routing = lower(*arguments)
        set_precision(low, "float32", "float64")
        lowered.append(low)
        return low, routing

    monkeypatch.setattr("moecalc.package.lower.lower", lower_mixed)
    testing.write_random_package(tmp_path / "mixed.moe.pt", config, "float32")
    model = lowered[0]
    evaluator = open_evaluator(monkeypatch, tmp_path / "mixed.moe.pt", backend)
    assert evaluator.backend.startswith(found)
    conditions = [values_of(config, *x) for x in ((1, 2, 1.0), (-2, 3, -0.4), (1, 2, 1.0))]
    out = run(evaluator, STRUCTURES, conditions)
    check_all(out, model, conditions, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["both, case embedding", "pack", "pack, configuration", "skip path", "merged experts"]
)
def test_float32_kernels_agree_with_float64(packages, monkeypatch, name, backend):
    path, _, config = packages(name, "float32")
    conditions = [values_of(config, *x) for x in ((1, 2, 1.0), (-2, 3, -0.4), (1, 2, 1.0))]
    wide = run(open_evaluator(monkeypatch, path, "fused", "float64"), STRUCTURES, conditions)
    narrow = run(open_evaluator(monkeypatch, path, backend, "float32"), STRUCTURES, conditions)
    for key in ("energies", "forces", "virial"):
        scale = max(1.0, np.abs(wide[key]).max())
        assert np.abs(wide[key] - narrow[key]).max() < 2e-5 * scale


@pytest.mark.parametrize("name", OPTIONS)
def test_a_fixed_package_equals_the_open_one(packages, monkeypatch, name):
    path, _, config = packages(name)
    given = values_of(config, -2, 3)
    values = {k: getattr(given, k) for k in ("charge", "spin", "fparam") if getattr(given, k) is not None}
    fixed, _, _ = packages(name, fixed=tuple(values.items()))
    want = run(open_evaluator(monkeypatch, path, ""), STRUCTURES, [given])
    evaluator = open_evaluator(monkeypatch, fixed, "")
    got = run(evaluator, STRUCTURES, [Conditions()])
    for key in ("energies", "forces", "virial"):
        assert np.abs(got[key] - want[key]).max() < 1e-12 * max(1.0, np.abs(want[key]).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["both, case embedding", "skip path, concatenated embedding", "pack"])
@pytest.mark.parametrize("held", ["charge and spin", "frame parameters"])
def test_a_partly_fixed_package_equals_the_open_one(packages, monkeypatch, name, held, backend):
    _, model, config = packages(name)
    both = [values_of(config, -2, 3), values_of(config, -2, 3, -0.5), values_of(config, -2, 3, 2.0)]
    fixed, left = {"charge": -2, "spin": 3}, [Conditions(fparam=c.fparam) for c in both]
    if held == "frame parameters":
        both = [values_of(config, *x) for x in ((-2, 3), (1, 2), (0, 1))]
        fixed, left = {"fparam": both[0].fparam}, [Conditions(c.charge, c.spin) for c in both]
    part, _, _ = packages(name, fixed=tuple(fixed.items()))
    check_all(run(open_evaluator(monkeypatch, part, backend), STRUCTURES, left), model, both)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["both, case embedding", "pack", "pack, configuration"])
def test_conditions_that_change_between_calls_are_those_of_the_call(packages, monkeypatch, name, backend):
    """Numbers of structures and of distinct conditions go up and down; equal sets come in other orders."""
    path, model, config = packages(name)
    evaluator = open_evaluator(monkeypatch, path, backend)
    a, b, c = (values_of(config, *x) for x in ((1, 2, 1.0), (-2, 3, -0.4), (0, 1, 0.2)))
    for conditions in ([a, b, c], [a, b, a], [a, b, b], [a], [b, a, b], [c, b, a], [c], [c, c, c]):
        out = run(evaluator, STRUCTURES, conditions)
        check_all(out, model, conditions)
    out = run(evaluator, STRUCTURES[:2], [b, a])
    check_all(out, model, [b, a], structures=STRUCTURES[:2])


def test_a_list_outlives_a_change_of_conditions(packages, monkeypatch):
    for backend in BACKENDS:
        path, model, config = packages("pack")
        evaluator = open_evaluator(monkeypatch, path, backend)
        atoms = STRUCTURES[0]
        types, edges, _ = graph_of(atoms, ELEMENTS, evaluator.cutoff)
        give(evaluator, [values_of(config, 0, 1)])
        evaluator.set_list(
            types.numpy(), edges.numpy(), np.zeros((edges.shape[1], 3), int), np.zeros(len(types), int), 1
        )
        for pair in ((0, 1), (1, 2), (0, 1)):
            given = values_of(config, *pair)
            give(evaluator, [given])
            out = evaluator.evaluate(atoms.positions, np.zeros((1, 3, 3)))
            assert deviation(out, 0, atoms, 0, evaluate_atoms(model, atoms, given)) < 1e-10


def test_no_evaluation_before_conditions_are_set(packages, monkeypatch):
    path = packages("charge and spin")[0]
    for backend in BACKENDS:
        evaluator = open_evaluator(monkeypatch, path, backend)
        types, edges, vectors = graph_of(STRUCTURES[0], ELEMENTS, evaluator.cutoff)
        graph = types.numpy(), edges.numpy(), vectors.numpy(), np.zeros(len(types), int), 1
        with pytest.raises(
            _lib.load().Error, match="expected charge and spin or frame parameters for this model, got none"
        ):
            testing.evaluate_edges(evaluator, *graph)
        evaluator.check_reference()
        with pytest.raises(_lib.load().Error, match="got none: call set_conditions"):
            testing.evaluate_edges(evaluator, *graph)  # those of the frames are not the structure's


@pytest.mark.parametrize(
    ("name", "charge_spin", "fparam", "message"),
    [
        ("charge and spin", None, None, r"expected `charge_spin` \(n_systems, 2\) of integers, got none"),
        ("charge and spin", [[0, 1, 2]], None, r"expected `charge_spin` \(n_systems, 2\) of integers, got \(1, 3\)"),
        ("charge and spin", [[100, 1]], None, "charge = 100, expected a whole number from -100 to 99"),
        ("charge and spin", [[0, 1], [0, -1]], None, "spin = -1, expected a whole number from 0 to 99"),
        ("charge and spin", [[0, 1]], [[1.0]], "expected `fparam` to be left out"),
        ("one frame parameter", None, [[1.0, 2.0]], r"expected `fparam` \(n_systems, 1\) of float64, got \(1, 2\)"),
        ("one frame parameter", None, [[float("nan")]], "expected finite frame parameters, got nan"),
        ("one frame parameter", [[0, 1]], [[1.0]], "expected `charge_spin` to be left out"),
        ("both, case embedding", [[0, 1]], [[1.0, 2, 3], [4, 5, 6]], "of the same structures"),
    ],
)  # fmt: skip
def test_the_evaluator_refuses_what_the_model_cannot_take(
    packages, monkeypatch, name, charge_spin, fparam, message
):
    evaluator = open_evaluator(monkeypatch, packages(name)[0], "")
    pairs = None if charge_spin is None else np.array(charge_spin)
    with pytest.raises(_lib.load().Error, match=message):
        evaluator.set_conditions(pairs, None if fparam is None else np.array(fparam))


@pytest.mark.parametrize("n", [2, 4])
def test_conditions_of_another_number_of_structures_are_refused(packages, monkeypatch, n):
    path, _, config = packages("charge and spin")
    for backend in BACKENDS:
        evaluator = open_evaluator(monkeypatch, path, backend)
        with pytest.raises(_lib.load().Error, match=f"expected conditions of 3 structures, got {n}"):
            run(evaluator, STRUCTURES, [values_of(config, k, 1) for k in range(n)])
