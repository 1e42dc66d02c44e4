"""The CUDA kernels, emulated on the CPU: the same numbers as the reference for every option, and what a device step adds."""

import numpy as np
import pytest
import torch
from evaluators import ELEMENTS, OPTIONS, STRUCTURES, assert_same, environment, evaluate, evaluator
from helpers import DATA, frames, graph_of
from worlds import CUTOFF, World, make
from worlds import graph_of as graph_with

from moecalc import _lib, testing
from moecalc.neighbors import SkinNeighborList
from moecalc.package import package_checkpoint
from moecalc.package.lower import lower
from moecalc.package.write import write_bare

EMULATED = "cuda-emulation"
FRAMES = frames("oracle/fixtures")


def listed(model, atoms, skin=0.7):
    """Give a model the list of a structure; returns its positions."""
    types = np.array([model.elements.index(symbol) for symbol in atoms.symbols])
    pairs, positions = SkinNeighborList(model.cutoff, skin).pairs(atoms)
    model.set_list(types, pairs.edge_index, pairs.edge_shift, pairs.system_index, pairs.n_systems)
    return positions


def step(model, atoms, **kwargs):
    return model.evaluate(atoms.positions, atoms.cell.array[None], **kwargs)


# --- the same numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_torchscript(write, name):
    path = write(**OPTIONS[name])
    device, reference = evaluator(path, backend=EMULATED), evaluator(path, backend="torchscript")
    assert device.backend == "cuda emulated float64"
    for atoms in STRUCTURES.values():
        assert_same(evaluate(device, atoms), evaluate(reference, atoms), 1e-11)


@pytest.mark.parametrize("name", ["wide", "mlp", "configuration", "concatenated embedding"])
def test_float32_is_as_accurate_as_the_cpu_kernels(write, name):
    path = write(**OPTIONS[name])
    exact = evaluate(evaluator(path, backend="fused"), STRUCTURES["bulk"])
    errors = [
        np.abs(
            evaluate(evaluator(path, "float32", backend), STRUCTURES["bulk"])["forces"] - exact["forces"]
        ).max()
        for backend in (EMULATED, "fused")
    ]
    assert errors[0] < 3 * errors[1]


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """Packages of the oracle's checkpoints by (model, head)."""
    folder, made = tmp_path_factory.mktemp("oracle-device"), {}

    def get(frame):
        key = frame.model, frame.head
        if key not in made:
            made[key] = folder / f"{frame.model}-{frame.head}.moe.pt"
            checkpoint = DATA / "oracle" / "models" / f"{frame.model}.pt"
            package_checkpoint(checkpoint, made[key], head=frame.head, dtype="float64")
        return made[key]

    return get


@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: f"{f.model}-{f.head}-{f.frame}")
def test_oracle_frames_equal_the_cpu_kernels(package, frame):
    path = package(frame)
    got, want = (evaluate(evaluator(path, backend=b), frame.atoms, atom_virial=True) for b in (EMULATED, ""))
    for key in ("energy", "energies", "forces", "virial", "atom_virial"):
        scale = max(1.0, np.abs(want[key]).max(initial=0.0))
        assert np.abs(got[key] - want[key]).max(initial=0.0) <= 1e-10 * scale, key
    for key in ("n_edge", "n_angle", "max_neighbors", "max_angle_neighbors"):
        assert got[key] == want[key], key


@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: f"{f.model}-{f.head}-{f.frame}")
def test_oracle_frames_in_float32_are_as_accurate_as_torchscripts(package, frame):
    path = package(frame)
    exact = evaluate(evaluator(path), frame.atoms)
    got, torchs = (evaluate(evaluator(path, "float32", b), frame.atoms) for b in (EMULATED, "torchscript"))
    for key in ("energy", "energies", "forces", "virial"):
        errors = [np.abs(result[key] - exact[key]).max(initial=0.0) for result in (got, torchs)]
        scale = max(1.0, np.abs(exact[key]).max(initial=0.0))
        assert errors[0] <= max(testing.ORACLE_FLOAT32 * scale, 3 * errors[1]), key


@pytest.mark.parametrize(("precision", "bound"), [("tf32", 3e-2), ("bf16x3", 2e-4), ("fp16", 3e-2)])
def test_reduced_products_stay_within_their_rounding(write, precision, bound):
    path = write(**OPTIONS["wide"])
    exact = evaluate(evaluator(path, backend="fused"), STRUCTURES["bulk"])
    with environment_of(EMULATED):
        model = _lib.load().Evaluator(str(path), "cpu", "float32", precision)
    assert model.backend == f"cuda emulated {precision}"
    assert_same(evaluate(model, STRUCTURES["bulk"]), exact, bound)


def environment_of(backend):
    return environment(MOECALC_BACKEND=backend)


def test_per_atom_virials_equal_torchscripts(write):
    path = write(**OPTIONS["mlp"])
    got, want = (
        evaluate(evaluator(path, backend=b), STRUCTURES["slab"], atom_virial=True)
        for b in (EMULATED, "torchscript")
    )
    assert np.abs(got["atom_virial"] - want["atom_virial"]).max() < 1e-11


def test_excluded_pairs_and_atoms_stay_excluded(tmp_path):
    config = testing.random_config(ELEMENTS, n_routed=3, exclude_types=[(0, 1), (2, 2)])
    config.fitting.atom_exclude_types = [1]
    low, _ = lower(testing.random_potential(config), config)
    write_bare(tmp_path / "x.moe.pt", low)
    device, reference = (evaluator(tmp_path / "x.moe.pt", backend=b) for b in (EMULATED, "torchscript"))
    assert_same(evaluate(device, STRUCTURES["bulk"]), evaluate(reference, STRUCTURES["bulk"]), 1e-11)


def test_energies_alone_are_the_same(write):
    model = evaluator(write(**OPTIONS["mlp"]), backend=EMULATED)
    full = evaluate(model, STRUCTURES["bulk"])
    alone = evaluate(model, STRUCTURES["bulk"], forces=False, virial=False)
    assert np.array_equal(full["energies"], alone["energies"])


@pytest.mark.parametrize("name", ["mlp", "configuration"])
def test_a_batch_equals_its_structures(write, name):
    model = evaluator(write(**OPTIONS[name]), backend=EMULATED)
    parts, graphs = [], []
    for s, atoms in enumerate([STRUCTURES["bulk"], STRUCTURES["molecule"], STRUCTURES["one atom"]]):
        parts.append(evaluate(model, atoms))
        types, edges, vec = graph_of(atoms, model.elements, model.cutoff)
        graphs.append((types.numpy(), edges.numpy(), vec.numpy(), np.full(len(types), s if s < 2 else 3)))
    offsets = np.cumsum([0, *(len(g[0]) for g in graphs)])
    edges = np.concatenate([g[1] + o for g, o in zip(graphs, offsets[:-1], strict=True)], axis=1)
    order = np.random.default_rng(0).permutation(edges.shape[1])
    types, vec, system = (np.concatenate([g[k] for g in graphs]) for k in (0, 2, 3))
    batch = testing.evaluate_edges(model, types, edges[:, order], vec[order], system, 4)
    for s, part in zip((0, 1, 3), parts, strict=True):
        assert abs(batch["energy"][s] - part["energy"][0]) < 1e-11
        assert np.abs(batch["virial"][s] - part["virial"][0]).max() < 1e-11
    assert batch["energy"][2] == 0
    assert not batch["virial"][2].any()
    assert np.abs(batch["forces"] - np.concatenate([p["forces"] for p in parts])).max() < 1e-11


@pytest.mark.parametrize("borders", [[0.5], [0.2, 0.6], [0.5, 1.0]], ids=["2", "3", "one rank empty"])
@pytest.mark.parametrize("routing", ["element", "configuration"])
def test_ranks_with_ghosts_agree_with_one_rank(tmp_path, routing, borders):
    _, path = make(tmp_path, routing)
    assert CUTOFF == 5.0
    atoms = testing.bulk_alloy()
    with environment_of(EMULATED):
        world = World(atoms, borders)
        results = world.run(_lib.load(), path, atom_virial=True)
        expected = testing.evaluate_edges(_lib.load().Evaluator(path), *graph_with(atoms), atom_virial=True)
    for key in ("energy", "virial"):
        np.testing.assert_allclose(sum(r[key] for r in results), expected[key], rtol=0, atol=1e-11)
    for key in ("forces", "atom_virial"):
        np.testing.assert_allclose(world.gather(results, key), expected[key], rtol=0, atol=1e-11)


def test_padded_rows_of_ghosts_hold_numbers(tmp_path):
    """In float32 these features are padded: what the exchange does not fill must not be NaN."""
    _, path = make(tmp_path, "element", "float32")
    atoms = testing.bulk_alloy()
    with environment_of(EMULATED):
        world = World(atoms, [0.5])
        results = world.run(_lib.load(), path)
        expected = testing.evaluate_edges(_lib.load().Evaluator(path), *graph_with(atoms))
    forces = expected["forces"]
    np.testing.assert_allclose(
        world.gather(results, "forces"), forces, rtol=0, atol=2e-5 * np.abs(forces).max()
    )


# --- a step on the device ----------------------------------------------------------------------------------------


def test_a_list_serves_while_atoms_move_and_edges_cross_the_cutoffs(write):
    path = write(**OPTIONS["mlp"])
    device, reference = evaluator(path, backend=EMULATED), evaluator(path, backend="fused")
    atoms = STRUCTURES["bulk"].copy()
    listed(device, atoms, skin=1.0)
    counts = set()
    rng = np.random.default_rng(5)
    for _ in range(4):
        atoms.positions += rng.uniform(-0.08, 0.08, atoms.positions.shape)
        atoms.set_cell(atoms.cell.array * 1.002, scale_atoms=True)
        got, want = step(device, atoms), evaluate(reference, atoms)
        assert_same(got, want, 1e-11)
        assert (got["n_edge"], got["n_angle"]) == (want["n_edge"], want["n_angle"])
        counts.add((got["n_edge"], got["n_angle"]))
    assert len(counts) > 1


def test_a_step_that_overflows_its_capacity_is_redone(write):
    path = write(**OPTIONS["mlp"])
    device, reference = evaluator(path, backend=EMULATED), evaluator(path, backend="fused")
    atoms = STRUCTURES["molecule"].copy()
    atoms.positions *= 1.9  # few angle neighbours at first
    listed(device, atoms, skin=8.0)
    few = step(device, atoms)
    held = device.buffer_bytes
    atoms.positions /= 2.2
    many = step(device, atoms)
    assert many["n_angle"] > 3 * few["n_angle"] + 64
    assert device.buffer_bytes > held
    assert_same(many, evaluate(reference, atoms), 1e-11)


def moving(path, graphs):
    """Results of steps that move, ask for more or less, and get another list on the way."""
    with environment(MOECALC_BACKEND=EMULATED, MOECALC_CUDA_GRAPHS=graphs):
        model = _lib.load().Evaluator(str(path), "cpu", "float32")
    results = []
    for name in ("bulk", "slab", "bulk"):
        atoms = STRUCTURES[name].copy()
        listed(model, atoms, skin=1.0)
        rng = np.random.default_rng(5)
        for request in ({}, {}, {}, {"atom_virial": True}, {"atom_virial": True}, {"forces": False}, {}, {}):
            atoms.positions += rng.uniform(-0.05, 0.05, atoms.positions.shape)
            results.append(step(model, atoms, **request))
    return results


@pytest.mark.parametrize("name", ["mlp", "configuration"])
def test_recorded_steps_give_the_bits_of_launched_ones(write, name):
    path = write(**OPTIONS[name])
    for launched, recorded in zip(moving(path, "0"), moving(path, "1"), strict=True):
        assert launched.keys() == recorded.keys()
        for key in ("energy", "energies", "forces", "virial", "atom_virial"):
            if key in launched and launched[key] is not None:
                np.testing.assert_array_equal(launched[key], recorded[key], key)


def test_no_neighbours_and_no_atoms(write):
    path = write(**OPTIONS["mlp"])
    device, reference = evaluator(path, backend=EMULATED), evaluator(path, backend="fused")
    alone = np.array([1, 3]), np.zeros((2, 0), int), np.zeros((0, 3)), np.array([0, 0])
    got, want = testing.evaluate_edges(device, *alone), testing.evaluate_edges(reference, *alone)
    assert_same(got, want, 1e-11)
    assert not got["forces"].any()
    nothing = np.zeros(0, int), np.zeros((2, 0), int), np.zeros((0, 3)), np.zeros(0, int)
    assert testing.evaluate_edges(device, *nothing, 2)["energy"].tolist() == [0, 0]


def test_some_atoms_without_neighbours(write):
    path = write(**OPTIONS["mlp"])
    device, reference = evaluator(path, backend=EMULATED), evaluator(path, backend="fused")
    atoms = STRUCTURES["molecule"].copy()
    atoms.positions[3] += 50.0
    atoms.positions[5] -= 3.4
    assert_same(evaluate(device, atoms), evaluate(reference, atoms), 1e-11)


def test_same_input_gives_the_same_bits(write):
    path = write(**OPTIONS["mlp"])
    first, again = (evaluate(evaluator(path, "float32", EMULATED), STRUCTURES["bulk"]) for _ in range(2))
    for key in ("energy", "energies", "forces", "virial"):
        assert np.array_equal(first[key], again[key])


@pytest.mark.parametrize("name", ["mlp", "two heads, res_incr", "res_avg, static, unsmooth", "configuration"])
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(write, name):
    path = write(**OPTIONS[name])
    first = evaluate(evaluator(path, backend=EMULATED), STRUCTURES["bulk"], atom_virial=True)
    with environment(MOECALC_BACKEND=EMULATED, MOECALC_EMULATION_REVERSED="1"):
        model = _lib.load().Evaluator(str(path), "cpu", "float64")
    again = evaluate(model, STRUCTURES["bulk"], atom_virial=True)
    for key in ("energy", "energies", "forces", "virial", "atom_virial"):
        assert np.array_equal(first[key], again[key]), key


def test_results_do_not_depend_on_what_was_evaluated_before(write):
    model = evaluator(write(**OPTIONS["configuration"]), backend=EMULATED)
    first = evaluate(model, STRUCTURES["molecule"])
    for atoms in STRUCTURES.values():
        evaluate(model, atoms)
    again = evaluate(model, STRUCTURES["molecule"])
    assert np.array_equal(first["forces"], again["forces"])


def test_atoms_that_meet_are_refused(write):
    model = evaluator(write(**OPTIONS["mlp"]), backend=EMULATED)
    atoms = STRUCTURES["molecule"].copy()
    listed(model, atoms, skin=8.0)
    step(model, atoms)
    atoms.positions[2] = atoms.positions[0]
    with pytest.raises(RuntimeError, match="expected distinct positions, got distance 0 between atoms"):
        step(model, atoms)


def test_positions_that_are_not_numbers_are_refused(write):
    model = evaluator(write(**OPTIONS["mlp"]), backend=EMULATED)
    atoms = STRUCTURES["molecule"].copy()
    listed(model, atoms)
    atoms.positions[2, 1] = np.nan
    with pytest.raises(RuntimeError, match="expected finite"):
        step(model, atoms)


def test_diverged_weights_do_not_pass_as_numbers(tmp_path):
    config = testing.random_config(ELEMENTS)
    model = testing.random_potential(config)
    model.layers[1].edge_self_linear.bias.data[0, 0] = np.nan
    low, _ = lower(model, config)
    write_bare(tmp_path / "x.moe.pt", low)
    with pytest.raises(
        RuntimeError, match=r"expected `layers\.1\.edge_self_linear\.bias` to be finite, got NaN"
    ):
        evaluator(tmp_path / "x.moe.pt", backend=EMULATED)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sequential_update": True}, "sequential_update"),
        ({"activation_function": "softplus"}, "activation softplus"),
    ],
)
def test_options_without_kernels_are_named(write, options, reason):
    with pytest.raises(RuntimeError, match=f"do not cover {reason}"):
        evaluator(write(**options), backend=EMULATED)


def test_a_fitting_net_of_another_precision_is_not_covered(tmp_path):
    config = testing.random_config(ELEMENTS)
    low, _ = lower(testing.random_potential(config), config)
    low.readout.net.to(torch.float32)
    write_bare(tmp_path / "x.moe.pt", low)
    with pytest.raises(RuntimeError, match="a fitting net of another precision than the layers"):
        evaluator(tmp_path / "x.moe.pt", dtype="", backend=EMULATED)


def test_memory_is_estimated_before_it_is_allocated(write):
    model = evaluator(write(**OPTIONS["wide"]), "float32", EMULATED)
    weights = model.buffer_bytes
    result = evaluate(model, STRUCTURES["bulk"], extra=0.0)
    n = len(STRUCTURES["bulk"])
    estimate = model.estimate_bytes(n, result["n_edge"], result["n_angle"])
    held = model.buffer_bytes
    model.release_weights()
    weights += held - model.buffer_bytes
    # capacities have 15 % of slack and more where systems are small; the list comes on top
    assert 0.9 * estimate < held - weights < 1.6 * estimate
    assert model.estimate_bytes(2 * n, 2 * result["n_edge"], 2 * result["n_angle"]) > 1.9 * estimate


def test_a_system_that_does_not_fit_is_refused_with_one_that_would(write):
    path = write(**OPTIONS["wide"])
    free = evaluator(path, backend=EMULATED)
    evaluate(free, STRUCTURES["isolated"])
    limit = (free.buffer_bytes >> 20) + 1
    with environment(MOECALC_BACKEND=EMULATED, MOECALC_DEVICE_MEMORY=str(limit)):
        model = _lib.load().Evaluator(str(path), "cpu", "float64")
    alone = evaluate(model, STRUCTURES["isolated"])
    message = rf"16 atoms with .* of {limit} MiB for weights .* at most about \d+ atoms fit"
    with pytest.raises(_lib.load().OutOfMemoryError, match=message):
        evaluate(model, STRUCTURES["bulk"])
    assert np.array_equal(evaluate(model, STRUCTURES["isolated"])["energies"], alone["energies"])


def test_a_memory_limit_that_is_no_number_is_refused(write):
    with (
        environment(MOECALC_BACKEND=EMULATED, MOECALC_DEVICE_MEMORY="much"),
        pytest.raises(RuntimeError, match="expected MOECALC_DEVICE_MEMORY to be a number of MiB, got 'much'"),
    ):
        _lib.load().Evaluator(str(write()), "cpu", "float64")
