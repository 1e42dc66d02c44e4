"""The CUDA kernels: on a GPU where there is one (marked `cuda`), and in any case emulated on the CPU, against the fused kernels of the CPU.

On a GPU: `pytest -m cuda`.
"""

import os
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from helpers import DATA, frames

from moecalc import MoECalculator, _lib, testing
from moecalc.models import default_model_path
from moecalc.neighbors import SkinNeighborList
from moecalc.testing import evaluate_edges

FLOAT64 = 1e-8  # of energies, forces and virials, in eV and A
FLOAT32 = 5e-6  # relative to the largest component
PRECISIONS = {
    "fp32-ffma": 5e-6,
    "tf32": 2e-2,
    "bf16x3": 1e-4,
    "fp16": 2e-2,
}  # the same, of the other precisions
FRAMES = frames("oracle/fixtures") + frames("deepmd")
STRUCTURES = {
    "bulk": lambda: testing.bulk_alloy(repeat=1),
    "slab": lambda: testing.slab(repeat=1),
    "molecule": lambda: testing.molecule(n_atoms=4),
    "one-atom cell": testing.one_atom_cell,
    "isolated atom": lambda: Atoms("W", [[0, 0, 0]]),
}


@contextmanager
def backend(name):
    """Evaluators that are made in this context use this backend."""
    with mock.patch.dict(os.environ, {} if name is None else {"MOECALC_BACKEND": name}):
        if name is None:
            os.environ.pop("MOECALC_BACKEND", None)
        yield


def evaluator(device, path, dtype="float64", precision="fp32"):
    """An evaluator of the CUDA kernels, on "cuda" or "emulation", or of the CPU's own kernels ("cpu")."""
    with backend("cuda-emulation" if device == "emulation" else None):
        name = "cuda:0" if device == "cuda" else "cpu"
        return _lib.load().Evaluator(str(path), name, dtype, precision)


ON_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(_lib.load().cuda_device_count() == 0, reason="needs a CUDA device"),
]


@pytest.fixture(params=["emulation", pytest.param("cuda", marks=ON_GPU)])
def device(request):
    return request.param


def cases(every):
    """Frames: all on a GPU, some emulated, since test_device_model.py has all."""

    def case(device, frame, marks=()):
        return pytest.param(
            device, frame, marks=marks, id=f"{device}-{frame.model}-{frame.head}-{frame.frame}"
        )

    return [case("emulation", frame) for frame in FRAMES[::every]] + [
        case("cuda", frame, ON_GPU) for frame in FRAMES
    ]


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """Packages of the checkpoints of tests/data, without the verification that other tests cover."""
    folder = tmp_path_factory.mktemp("packages")

    def write(name, head=None) -> Path:
        out = folder / f"{name}-{head}.moe.pt"
        if not out.exists():
            source = next(p for p in (DATA / "oracle/models", DATA / "deepmd") if (p / f"{name}.pt").exists())
            testing.write_checkpoint_package(out, source / f"{name}.pt", head, frames=())
        return out

    return write


def graph_of(model, atoms, skin=0.5):
    types = np.array([model.elements.index(symbol) for symbol in atoms.symbols], dtype=np.int64)
    pairs, positions = SkinNeighborList(model.cutoff, skin).pairs(atoms)
    return types, pairs.edge_index, pairs.vectors(positions, atoms.cell.array[None]), pairs.system_index


def evaluate(model, atoms, **request):
    """The list of a structure, evaluated."""
    types = np.array([model.elements.index(symbol) for symbol in atoms.symbols], dtype=np.int64)
    pairs, positions = SkinNeighborList(model.cutoff, 0.5).pairs(atoms)
    model.set_list(types, pairs.edge_index, pairs.edge_shift, pairs.system_index)
    return model.evaluate(positions, atoms.cell.array[None], **request)


def assert_close(result, expected, absolute=0.0, relative=0.0, keys=("energies", "forces", "virial")):
    for key in keys:
        allowed = absolute + relative * max(1.0, np.abs(expected[key]).max(initial=0.0))
        deviation = np.abs(result[key] - expected[key]).max(initial=0.0)
        assert deviation <= allowed, f"{key}: {deviation:.2g}, allowed {allowed:.2g}"
    for key in ("n_edge", "n_angle", "max_neighbors", "max_angle_neighbors"):
        assert result[key] == expected[key], key


def covered(device, *arguments):
    """An evaluator, or a skip where the CUDA kernels do not cover the package."""
    try:
        model = evaluator(device, *arguments)
    except RuntimeError as error:
        assert "the CUDA kernels do not cover" in str(error)  # noqa: PT017
        pytest.skip(str(error))
    assert model.backend.startswith("cuda")
    return model


# --- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "frame"), cases(8))
def test_frames_of_the_independent_codes_in_float64(device, frame, package):
    path = package(frame.model, frame.head)
    model = covered(device, path)
    expected = evaluate(evaluator("cpu", path), frame.atoms, atom_virial=True)
    result = evaluate(model, frame.atoms, atom_virial=True)
    assert_close(result, expected, FLOAT64, keys=("energies", "forces", "virial", "atom_virial"))
    assert result["energy"][0] == pytest.approx(expected["energy"][0], abs=FLOAT64)


@pytest.mark.parametrize(("device", "frame"), cases(16))
def test_frames_of_the_independent_codes_in_float32(device, frame, package):
    path = package(frame.model, frame.head)
    model = covered(device, path, "float32")
    expected = evaluate(evaluator("cpu", path), frame.atoms)
    assert_close(evaluate(model, frame.atoms), expected, relative=FLOAT32)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_other_precisions(device, precision):
    model = covered(device, default_model_path(), "float32", precision)
    assert model.backend.endswith(precision)
    atoms = testing.bulk_alloy(repeat=1)
    expected = evaluate(evaluator("cpu", default_model_path()), atoms)
    assert_close(evaluate(model, atoms), expected, relative=PRECISIONS[precision])


@pytest.mark.parametrize("n_routed", [0, 4])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_random_models_of_every_kind(device, n_routed, kind, tmp_path):
    config = testing.random_config(["Nb", "W"], n_routed=n_routed, kind=kind)
    testing.write_random_package(tmp_path / "x.moe.pt", config, "float64")
    atoms = testing.bulk_alloy(("Nb", "W"), repeat=1)
    expected = evaluate(evaluator("cpu", tmp_path / "x.moe.pt"), atoms)
    assert_close(evaluate(covered(device, tmp_path / "x.moe.pt"), atoms), expected, FLOAT64)


@pytest.fixture
def model(device):
    return covered(device, default_model_path())


@pytest.fixture(scope="module")
def on_cpu():
    return evaluator("cpu", default_model_path())


@pytest.mark.parametrize("name", STRUCTURES)
def test_lists_and_edges(model, on_cpu, name):
    atoms = STRUCTURES[name]()
    expected = evaluate_edges(on_cpu, *graph_of(on_cpu, atoms))
    assert_close(evaluate_edges(model, *graph_of(model, atoms)), expected, FLOAT64)
    assert_close(evaluate(model, atoms), expected, FLOAT64)


def test_no_atoms(model):
    result = evaluate(model, Atoms())
    assert (result["energy"].tolist(), result["forces"].shape) == ([0.0], (0, 3))


def test_a_batch_of_structures_in_any_order(model, on_cpu):
    rng = np.random.default_rng(0)
    graphs = [graph_of(on_cpu, STRUCTURES[name]()) for name in ("bulk", "isolated atom", "molecule")]
    ends = np.cumsum([0, *(len(types) for types, *_ in graphs)])
    types = np.concatenate([types for types, *_ in graphs])
    edges = np.concatenate([g[1] + n for g, n in zip(graphs, ends, strict=False)], axis=1)
    vectors = np.concatenate([g[2] for g in graphs])
    system = np.repeat([0, 1, 3], np.diff(ends))  # structure 2 has no atoms
    atom, edge = rng.permutation(len(types)), rng.permutation(len(vectors))
    graph = types[atom], np.argsort(atom)[edges[:, edge]], vectors[edge], system[atom]
    expected = evaluate_edges(on_cpu, *graph, 4, atom_virial=True)
    result = evaluate_edges(model, *graph, 4, atom_virial=True)
    assert_close(result, expected, FLOAT64, keys=("energy", "energies", "forces", "virial", "atom_virial"))


@pytest.mark.parametrize(
    "request_", [{"forces": False, "virial": False}, {"virial": False}, {"forces": False}]
)
def test_less_may_be_asked_for(model, on_cpu, request_):
    atoms = testing.bulk_alloy(repeat=1)
    expected = evaluate(on_cpu, atoms, **request_)
    result = evaluate(model, atoms, **request_)
    assert set(result) == set(expected)
    assert_close(result, expected, FLOAT64, keys=set(result) & {"energies", "forces", "virial"})


def test_a_list_serves_while_atoms_and_cell_move(model, on_cpu):
    atoms = testing.bulk_alloy(repeat=1)
    types = np.array([model.elements.index(symbol) for symbol in atoms.symbols])
    pairs, _ = SkinNeighborList(model.cutoff, 1.5).pairs(atoms)
    model.set_list(types, pairs.edge_index, pairs.edge_shift, pairs.system_index)
    rng = np.random.default_rng(1)
    for _ in range(3):
        strain = np.eye(3) + rng.normal(scale=0.01, size=(3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        atoms.positions += rng.normal(scale=0.03, size=atoms.positions.shape)
        result = model.evaluate(atoms.positions, atoms.cell.array[None])
        assert_close(result, evaluate(on_cpu, atoms), FLOAT64)


def test_equal_input_gives_bitwise_equal_output(device):
    model = covered(device, default_model_path(), "float32")
    atoms = testing.bulk_alloy(repeat=2)
    first = evaluate(model, atoms)
    evaluate(model, testing.molecule())
    second = evaluate(model, atoms)
    for key in ("energies", "forces", "virial"):
        np.testing.assert_array_equal(first[key], second[key])


# --- what must not pass -----------------------------------------------------------------------------


def test_atoms_at_the_same_place_are_refused(model):
    atoms = testing.bulk_alloy(repeat=1)
    types, edges, vectors, system = graph_of(model, atoms)
    vectors[3] = 0.0
    with pytest.raises(RuntimeError, match=r"expected (distinct positions|finite)"):
        evaluate_edges(model, types, edges, vectors, system)


def test_ghosts_without_an_exchange_are_refused(model):
    with pytest.raises(RuntimeError, match="expected a GhostExchange for 1 ghost atoms"):
        evaluate_edges(model, np.array([0, 0]), np.array([[0], [1]]), np.array([[2.0, 0, 0]]), np.array([0]))


def test_the_evaluator_goes_on_after_an_error(model, on_cpu):
    atoms = testing.bulk_alloy(repeat=1)
    types, edges, vectors, system = graph_of(model, atoms)
    broken = vectors.copy()
    broken[0] = np.nan
    with pytest.raises(RuntimeError, match="expected finite `positions`"):
        evaluate_edges(model, types, edges, broken, system)
    expected = evaluate_edges(on_cpu, types, edges, vectors, system)
    assert_close(evaluate_edges(model, types, edges, vectors, system), expected, FLOAT64)


def test_emulation_is_for_the_cpu(monkeypatch):
    monkeypatch.setenv("MOECALC_BACKEND", "cuda-emulation")
    assert _lib.load().Evaluator(str(default_model_path()), "cpu").backend.startswith("cuda emulated")


# --- the calculator ----------------------------------------------------------------------------------


def calculator(device, **arguments):
    with backend("cuda-emulation" if device == "emulation" else None):
        return MoECalculator(device="cuda" if device == "cuda" else "cpu", **arguments)


def drift(calculator, steps):
    """Largest change of the total energy in NVE, eV/atom."""
    atoms = testing.bulk_alloy(repeat=1)
    atoms.calc = calculator
    thermal = np.sqrt(units.kB * 900 * atoms.get_masses())
    atoms.set_momenta(np.random.default_rng(0).normal(size=(len(atoms), 3)) * thermal[:, None])
    energies = []
    dynamics = VelocityVerlet(atoms, 1.0 * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy() / len(atoms)))
    dynamics.run(steps)
    return np.array(energies)


def test_energy_is_conserved_as_on_the_cpu(device):
    steps = 200 if device == "cuda" else 20
    result = drift(calculator(device, dtype="float64"), steps)
    expected = drift(MoECalculator(device="cpu", dtype="float64"), steps)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-8)
    assert np.ptp(result) < 1e-3


def test_the_calculator_gives_stresses_and_batches(device, shared_calculator):
    structures = [testing.bulk_alloy(repeat=1), testing.one_atom_cell()]
    names = ["energy", "forces", "stress", "stresses"]
    found = calculator(device, dtype="float64").calculate_batch(structures, names)
    expected = shared_calculator.calculate_batch(structures, names)
    for one, other in zip(found, expected, strict=True):
        for name in names:
            np.testing.assert_allclose(one[name], other[name], rtol=0, atol=FLOAT64, err_msg=name)
