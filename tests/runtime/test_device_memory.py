"""Memory of the CUDA kernels: what stays of the forward, what a process may take, and lists that change a little."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from evaluators import OPTIONS, STRUCTURES, environment, evaluate, evaluator

from moecalc import _lib, testing
from moecalc.neighbors import SkinNeighborList

EMULATED = "cuda-emulation"
CPP = Path(__file__).parents[2] / "cpp"
COMPILER = shutil.which("g++") or shutil.which("clang++")
MIB = 1 << 20

# Of water at the density of docs/performance.md, within 6 and 4 A.
EDGES_PER_ATOM, ANGLES_PER_ATOM = 89, 708


def limited(path, bytes_, dtype="float64"):
    """An evaluator that may hold so many bytes on its device."""
    with environment(MOECALC_BACKEND=EMULATED, MOECALC_DEVICE_MEMORY=str(bytes_ / MIB)):
        return _lib.load().Evaluator(str(path), "cpu", dtype)


def needs(path, atoms, dtype="float64"):
    """Bytes that a model holds for a structure, and what it would save by computing all layers again."""
    model = evaluator(path, dtype, EMULATED)
    result = evaluate(model, atoms)
    counts = len(atoms), result["n_edge"], result["n_angle"]
    return model.buffer_bytes, model.estimate_bytes(*counts) - model.estimate_bytes(*counts, least=True)


RECOMPUTED = (
    "wide",
    "mlp",
    "five layers",
    "two heads, res_incr",
    "res_avg, static, unsmooth",
    "no angles",
    "two layers",
)


@pytest.mark.parametrize("share", [0.3, 0.95])
@pytest.mark.parametrize("name", RECOMPUTED)
def test_layers_that_are_computed_again_give_the_same_bits(write, name, share):
    path, atoms = write(**OPTIONS[name]), STRUCTURES["bulk"]
    expected = evaluate(evaluator(path, backend=EMULATED), atoms, atom_virial=True)
    held, saved = needs(path, atoms)
    model = limited(path, held - share * saved)
    got = evaluate(model, atoms, atom_virial=True)
    assert model.buffer_bytes <= held - share * saved
    for key in ("energy", "energies", "forces", "virial", "atom_virial"):
        assert np.array_equal(got[key], expected[key]), key


def test_a_larger_system_is_computed_again_where_a_smaller_one_was_not(write):
    path = write(**OPTIONS["five layers"])
    held, saved = needs(path, STRUCTURES["bulk"])
    model = limited(path, held - saved / 2)
    for name in ("isolated", "bulk", "isolated"):
        expected = evaluate(evaluator(path, backend=EMULATED), STRUCTURES[name])
        assert np.array_equal(evaluate(model, STRUCTURES[name])["forces"], expected["forces"]), name


def test_twice_as_many_atoms_fit_on_80_gigabytes(tmp_path):
    """93,500 atoms of the full-size dense model fitted before layers were computed again."""
    path = tmp_path / "dense.moe.pt"
    testing.write_random_package(path, testing.full_size_config())
    model = evaluator(path, "float32", EMULATED)
    n = 187_000
    counts = n, EDGES_PER_ATOM * n, ANGLES_PER_ATOM * n
    assert model.estimate_bytes(*counts, least=True) < 80e9 < model.estimate_bytes(*counts)


def test_nothing_is_estimated_where_other_kernels_run(write):
    model = evaluator(write(**OPTIONS["wide"]), backend="fused")
    assert model.estimate_bytes(10, 100, 100, least=True) == 0


def test_a_list_that_is_a_little_longer_takes_no_new_memory(write):
    path, atoms = write(**OPTIONS["wide"]), STRUCTURES["bulk"]
    model = evaluator(path, backend=EMULATED)
    types = np.array([model.elements.index(symbol) for symbol in atoms.symbols])
    pairs, positions = SkinNeighborList(model.cutoff, 0.7).pairs(atoms)
    few = pairs.edge_index.shape[1] * 99 // 100

    def bytes_after(n):
        model.set_list(types, pairs.edge_index[:, :n], pairs.edge_shift[:n], pairs.system_index)
        model.evaluate(positions, atoms.cell.array[None])
        return model.buffer_bytes

    first, second = bytes_after(few), bytes_after(few + 20)
    # the list itself is as long as it is
    assert 0 <= second - first < 20 * 64


def test_the_time_of_a_list_is_told_once(write):
    model, atoms = evaluator(write(**OPTIONS["wide"]), backend=EMULATED), STRUCTURES["bulk"]
    types = np.array([model.elements.index(symbol) for symbol in atoms.symbols])
    pairs, positions = SkinNeighborList(model.cutoff, 0.7).pairs(atoms)
    model.set_list(types, pairs.edge_index, pairs.edge_shift, pairs.system_index)
    timings = [model.evaluate(positions, atoms.cell.array[None])["timings"] for _ in range(2)]
    assert timings[0]["list"] > 0
    assert "list" not in timings[1]


def test_results_that_nobody_asked_for_are_not_brought(write):
    model = evaluator(write(**OPTIONS["wide"]), backend=EMULATED)
    alone = evaluate(model, STRUCTURES["bulk"], virial=False)
    assert "virial" not in alone
    assert np.isfinite(alone["forces"]).all()


@pytest.mark.parametrize("far", [127, 128, -128, -129, 5000])
def test_atoms_many_cells_away_have_the_same_forces(write, far):
    """Shifts travel as bytes where they fit."""
    path = write(**OPTIONS["wide"])
    model, reference = evaluator(path, backend=EMULATED), evaluator(path, backend="fused")
    atoms = STRUCTURES["bulk"].copy()
    near = evaluate(reference, atoms)
    atoms.positions[3] += far * atoms.cell.array[0]
    types = np.array([model.elements.index(symbol) for symbol in atoms.symbols])
    pairs, positions = SkinNeighborList(model.cutoff, 0.0).pairs(atoms)
    shift = pairs.edge_shift.copy()
    moved = atoms.positions - positions  # by whole cells, where the list wrapped them
    cells = np.rint(moved @ np.linalg.inv(atoms.cell.array)).astype(np.int64)
    shift += cells[pairs.edge_index[0]] - cells[pairs.edge_index[1]]
    model.set_list(types, pairs.edge_index, shift, pairs.system_index)
    got = model.evaluate(atoms.positions, atoms.cell.array[None])
    assert np.abs(shift).max() >= abs(far) - 1
    assert np.abs(got["forces"] - near["forces"]).max() < 1e-8


PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "backends/cuda/memory.h"

int main(int, char** a) {
  const auto number = [&](int k) { return std::atoll(a[k]); };
  std::printf("%lld", static_cast<long long>(
      moecalc::cuda::free_of_part(number(1), number(2), number(3), number(4))));
}
"""


@pytest.fixture(scope="module")
def free_of_part(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("part")
    (folder / "part.cpp").write_text(PROGRAM)
    include = [f"-I{CPP}", f"-I{CPP / 'include'}"]
    subprocess.run([COMPILER, "-std=c++20", *include, "-o", folder / "part", folder / "part.cpp"], check=True)

    def call(free, total, held, n_sharers):
        command = [folder / "part", *map(str, (free, total, held, n_sharers))]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return call


def test_one_process_may_take_all_that_is_free(free_of_part):
    assert free_of_part(900, 1000, 50, 1) == 900


def test_processes_that_share_a_gpu_take_their_parts(free_of_part):
    assert free_of_part(900, 1000, 0, 2) == 475
    assert free_of_part(700, 1000, 200, 2) == 275


def test_no_process_takes_more_than_is_free(free_of_part):
    assert free_of_part(100, 1000, 0, 2) == 100


def test_a_process_beyond_its_part_takes_nothing(free_of_part):
    assert free_of_part(400, 1000, 600, 2) == 0
