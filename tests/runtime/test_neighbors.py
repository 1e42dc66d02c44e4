"""The neighbour list finds every pair of every kind of structure, keeps its list only while it may, and refuses broken structures."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from moecalc import neighbors, testing
from moecalc.errors import StructureError
from moecalc.neighbors import PairList, SkinNeighborList


class Edges(NamedTuple):
    edge_index: np.ndarray
    edge_vec: np.ndarray


def edges_of(neighbor_list, atoms):
    pairs, positions = neighbor_list.pairs(atoms)
    assert len(pairs.system_index) == len(atoms)
    return Edges(pairs.edge_index, pairs.vectors(positions, atoms.cell.array[None]))


def as_points(i, j, vec):
    return np.column_stack([10.0 * np.asarray(i), 10.0 * np.asarray(j), vec])


def assert_complete(neighbor_list, atoms):
    """Every pair within the cutoff is there, every edge is a pair, none is there twice, and they are sorted by centre."""
    graph = edges_of(neighbor_list, atoms)
    edges = as_points(*graph.edge_index, graph.edge_vec)
    needed = as_points(*testing.brute_force_edges(atoms, neighbor_list.cutoff - testing.ROUNDING))
    if len(edges) == 0:
        assert len(needed) == 0
        return graph
    reach = np.linalg.norm(graph.edge_vec, axis=1).max() + testing.ROUNDING
    possible = as_points(*testing.brute_force_edges(atoms, reach))
    if len(needed):
        missing, _ = cKDTree(edges).query(needed)
        assert missing.max() < testing.ROUNDING
    invented, which = cKDTree(possible).query(edges)
    assert invented.max() < testing.ROUNDING
    assert len(set(which)) == len(edges)
    assert (np.diff(graph.edge_index[0]) >= 0).all()
    assert graph.edge_index.dtype == np.int64
    return graph


def spread_atoms(rng, n, cell, pbc, closest=0.6):
    """Atoms at random, none of which overlaps with another or with an image."""
    atoms = Atoms(cell=cell, pbc=pbc)
    for _ in range(50):
        if len(atoms) == n:
            break
        # several cells wide, so that atoms lie outside of theirs
        trial = atoms + Atoms("W", [rng.uniform(-6, 6, 3)])
        trial.set_cell(cell)
        trial.pbc = pbc
        if len(testing.brute_force_edges(trial, closest)[0]) == 0:
            atoms = trial
    return atoms


CELLS = {
    "cubic": np.diag([5.0, 5.0, 5.0]),
    "shorter than the cutoff": np.diag([1.6, 1.9, 2.2]),
    "triclinic": np.array([[4.0, 0, 0], [2.5, 3.6, 0], [-1.4, 1.1, 3.9]]),
    "left-handed and skewed": np.array([[2.0, 0, 0], [1.9, 2.0, 0], [1.5, 1.9, -2.4]]),
    "no third vector": np.diag([4.0, 5.0, 0.0]),
    "third vector short": np.diag([4.0, 5.0, 0.7]),
    "third vector almost in the plane": np.array([[4.0, 0, 0], [0, 5.0, 0], [3.0, 3.0, 0.1]]),
    "third vector in the plane": np.array([[4.0, 0, 0], [0, 5.0, 0], [3.0, 3.0, 0.0]]),
    "no cell": np.zeros((3, 3)),
}
PBC = list(itertools.product((True, False), repeat=3))


def allowed(cell, pbc):
    """Whether atoms fit into it without overlap, and few enough images matter for brute force."""
    periodic = cell[np.array(pbc)]
    return (
        np.linalg.matrix_rank(periodic) == len(periodic)
        and (np.linalg.norm(np.linalg.pinv(periodic), axis=0) < 1.2).all()
    )


@pytest.mark.parametrize("skin", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "pbc"), [(name, pbc) for name in CELLS for pbc in PBC if allowed(CELLS[name], pbc)]
)
def test_every_pair_is_found(name, pbc, skin):
    atoms = spread_atoms(np.random.default_rng(3), 6, CELLS[name], pbc)
    assert_complete(SkinNeighborList(4.0, skin), atoms)


@pytest.mark.parametrize("pbc", [False, True, (True, False, True)])
def test_one_atom(pbc):
    graph = assert_complete(
        SkinNeighborList(4.0), Atoms("W", [[7.0, -3.0, 1.0]], cell=np.diag([3.0, 2.5, 3.5]), pbc=pbc)
    )
    assert (graph.edge_index == 0).all()


@pytest.mark.parametrize("cell", [np.zeros((3, 3)), np.eye(3)])
@pytest.mark.parametrize("pbc", [False, True])
def test_no_atoms(cell, pbc):
    graph = edges_of(SkinNeighborList(4.0), Atoms(cell=cell, pbc=pbc))
    assert graph.edge_index.shape == (2, 0)
    assert graph.edge_vec.shape == (0, 3)


def test_a_pair_at_exactly_the_cutoff_is_an_edge():
    edges = edges_of(SkinNeighborList(3.0, skin=0.0), Atoms("W2", [[0, 0, 0], [3.0, 0, 0]]))
    assert len(edges.edge_vec) == 2


@pytest.mark.parametrize("pbc", [(False, False, False), (True, False, False), (True, True, False)])
def test_boxes_with_much_vacuum_are_cut(monkeypatch, pbc):
    monkeypatch.setattr(neighbors, "_MAX_BINS", 8)
    rng = np.random.default_rng(0)
    atoms = Atoms(
        "W30",
        np.concatenate([rng.uniform(0, 12, (24, 3)), rng.uniform(-300, 300, (6, 3))]),
        cell=np.diag([15.0, 15, 15]),
        pbc=pbc,
    )
    atoms.positions[-1] = atoms.positions[-2] + 1.1
    keep = np.ones(len(atoms), dtype=bool)
    i, j, _ = testing.brute_force_edges(atoms, 0.6)
    keep[i[i < j]] = False
    assert_complete(SkinNeighborList(4.0), atoms[keep])


def test_two_atoms_far_apart_cost_no_memory():
    edges = edges_of(SkinNeighborList(4.0), Atoms("W2", [[0, 0, 0], [5e6, 5e6, 5e6]]))
    assert len(edges.edge_vec) == 0


# what can happen to a structure between two calls, small and large
changes = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "rattle",
                "drift",
                "strain",
                "shear",
                "rotate",
                "wrap",
                "jump",
                "cell only",
                "compress",
                "squeeze",
            ]
        ),
        st.sampled_from([1e-3, 0.05, 0.2, 0.6]),
    ),
    min_size=2,
    max_size=6,
)


def change(atoms, kind, size, rng):
    cell = atoms.cell.array.copy()
    if kind == "rattle":
        atoms.positions += rng.uniform(-size, size, atoms.positions.shape)
    elif kind == "drift":
        atoms.positions += 10 * size * rng.uniform(-1, 1, 3)
    elif kind in ("strain", "shear", "compress", "squeeze", "rotate"):
        random = rng.uniform(-0.3, 0.3, (3, 3)) * size
        if kind == "compress":
            random = -0.3 * size * np.eye(3)
        if kind == "squeeze":
            normal = rng.standard_normal(3)
            random = 0.8 * size * (0.1 * np.eye(3) - np.outer(normal, normal) / (normal @ normal))
        linear = np.linalg.qr(np.eye(3) + random)[0] if kind == "rotate" else np.eye(3) + random
        atoms.set_cell(cell @ linear)
        atoms.positions = atoms.positions @ linear
        if kind == "shear":
            atoms.positions += rng.uniform(-size, size, atoms.positions.shape) / 4
    elif kind == "cell only":
        atoms.set_cell(cell * (1 + 0.3 * size * rng.uniform(-1, 1, (3, 1))))
    elif kind == "wrap" and atoms.pbc.all():
        atoms.wrap()
    elif kind == "jump":
        atoms.positions += (rng.integers(-2, 3, (len(atoms), 3)) * atoms.pbc) @ cell


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    cell=st.sampled_from(["cubic", "shorter than the cutoff", "triclinic", "left-handed and skewed"]),
    pbc=st.sampled_from(PBC),
    skin=st.sampled_from([0.3, 1.0, 2.0]),
    steps=changes,
)
def test_a_kept_list_misses_no_pair(seed, cell, pbc, skin, steps):
    rng = np.random.default_rng(seed)
    atoms = spread_atoms(rng, 5, CELLS[cell], pbc, closest=1.0)
    neighbor_list = SkinNeighborList(3.5, skin)
    for kind, size in [("none", 0.0), *steps]:
        change(atoms, kind, size, rng)
        if len(testing.brute_force_edges(atoms, 0.55)[0]):
            return  # atoms ran into each other, which is an error of its own
        assert_complete(neighbor_list, atoms)


@pytest.fixture
def crystal():
    return bulk("W", cubic=True) * 2


@pytest.fixture
def built(crystal):
    neighbor_list = SkinNeighborList(4.5, skin=1.0)
    edges_of(neighbor_list, crystal)
    assert neighbor_list.n_rebuilds == 1
    return neighbor_list


def rebuilds_after(neighbor_list, atoms):
    assert_complete(neighbor_list, atoms)
    return neighbor_list.n_rebuilds - 1


def test_kept_while_two_atoms_move_less_than_the_skin(built, crystal):
    crystal.positions[0, 0] += 0.45
    crystal.positions[1, 0] -= 0.45
    assert rebuilds_after(built, crystal) == 0


def test_rebuilt_when_two_atoms_moved_by_more_than_the_skin(built, crystal):
    crystal.positions[0, 0] += 0.6
    crystal.positions[1, 0] -= 0.6
    assert rebuilds_after(built, crystal) == 1


def test_kept_when_all_atoms_drift(built, crystal):
    crystal.positions += [30.0, -7.0, 2.0]
    assert rebuilds_after(built, crystal) == 0


def test_kept_under_a_small_strain(built, crystal):
    crystal.set_cell(crystal.cell.array @ (np.eye(3) + 0.02), scale_atoms=True)
    assert rebuilds_after(built, crystal) == 0


def test_rebuilt_when_compression_brings_new_pairs(built, crystal):
    crystal.set_cell(0.75 * crystal.cell.array, scale_atoms=True)
    assert rebuilds_after(built, crystal) == 1


def test_rebuilt_when_the_cell_is_squeezed_in_one_direction():
    atoms = Atoms("W", cell=[2.8, 3.0, 3.0], pbc=True)
    neighbor_list = SkinNeighborList(4.5, skin=1.0)
    edges_of(neighbor_list, atoms)
    atoms.cell = [0.8 * 2.8, 3.1, 3.1]
    assert rebuilds_after(neighbor_list, atoms) == 1


def test_rebuilt_when_the_cell_grows_under_atoms_many_cells_apart():
    atoms = Atoms("W2", [[0, 0, 0], [305.2, 0, 0]], cell=[30, 30, 30], pbc=True)
    neighbor_list = SkinNeighborList(4.0, skin=1.0)
    assert len(edges_of(neighbor_list, atoms).edge_vec) == 0
    atoms.set_cell([30.13, 30, 30])
    assert rebuilds_after(neighbor_list, atoms) == 1
    assert len(edges_of(neighbor_list, atoms).edge_vec) == 2


def test_kept_when_atoms_are_wrapped(built, crystal):
    crystal.positions += 1.0
    crystal.positions[3] += crystal.cell.array[1] - 2 * crystal.cell.array[2]
    crystal.positions[3, 0] += 0.3
    assert rebuilds_after(built, crystal) == 0
    crystal.wrap()
    assert rebuilds_after(built, crystal) == 0


def test_a_jump_in_a_direction_without_periodicity_is_a_move(crystal):
    crystal.pbc = (True, True, False)
    neighbor_list = SkinNeighborList(4.5)
    edges_of(neighbor_list, crystal)
    crystal.positions[3] += crystal.cell.array[2]
    assert rebuilds_after(neighbor_list, crystal) == 1


def test_rebuilt_when_pbc_changes(built, crystal):
    crystal.pbc = (True, False, True)
    assert rebuilds_after(built, crystal) == 1


def test_rebuilt_when_an_atom_is_removed(built, crystal):
    del crystal[5]
    assert rebuilds_after(built, crystal) == 1


def test_rebuilt_for_another_order_of_the_atoms(built, crystal):
    crystal.positions = crystal.positions[::-1].copy()
    assert rebuilds_after(built, crystal) == 1


def test_a_cell_vector_without_periodicity_does_not_matter(crystal):
    crystal.pbc = (True, True, False)
    neighbor_list = SkinNeighborList(4.5)
    edges_of(neighbor_list, crystal)
    crystal.cell[2] = [3.0, 2.0, 40.0]
    assert rebuilds_after(neighbor_list, crystal) == 0


def test_without_skin_every_call_searches(crystal):
    neighbor_list = SkinNeighborList(4.5, skin=0.0)
    for _ in range(3):
        assert_complete(neighbor_list, crystal)
    assert (neighbor_list.n_rebuilds, neighbor_list.n_calls) == (3, 3)


def test_a_failed_search_leaves_no_list_behind(built, crystal):
    bad = crystal.copy()
    bad.set_cell(np.zeros((3, 3)))
    with pytest.raises(StructureError):
        edges_of(built, bad)
    assert rebuilds_after(built, crystal) == 1


def test_a_list_is_the_same_object_until_a_search(built, crystal):
    kept, _ = built.pairs(crystal)
    crystal.positions[0, 0] += 0.3
    crystal.set_cell(1.01 * crystal.cell.array, scale_atoms=True)
    assert built.pairs(crystal)[0] is kept
    crystal.positions[0, 0] += 1.0
    assert built.pairs(crystal)[0] is not kept


def test_structures_are_joined_with_shifted_indices():
    atoms = [bulk("W"), Atoms(), Atoms("W2", [[0, 0, 0], [2.0, 0, 0]]), bulk("Cu")]
    lists = [SkinNeighborList(3.0).pairs(a)[0] for a in atoms]
    batch = PairList.concatenate(lists)
    assert batch.n_systems == 4
    assert batch.system_index.tolist() == [0, 2, 2, 3]
    assert batch.edge_index.shape == (2, sum(len(pairs.edge_shift) for pairs in lists))
    last = len(lists[-1].edge_shift)
    assert batch.edge_index[:, -last - 2 : -last].tolist() == [[1, 2], [2, 1]]
    assert (batch.edge_index[:, -last:] == 3).all()
    vectors = batch.vectors(
        np.concatenate([a.positions for a in atoms]), np.stack([a.cell.array for a in atoms])
    )
    parts = [pairs.vectors(a.positions, a.cell.array[None]) for pairs, a in zip(lists, atoms, strict=True)]
    np.testing.assert_allclose(vectors, np.concatenate(parts), rtol=0, atol=testing.SAME_MODEL)


def test_an_empty_batch_has_no_systems():
    batch = PairList.concatenate([])
    assert (batch.n_systems, batch.edge_index.shape, batch.edge_shift.shape) == (0, (2, 0), (0, 3))


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (
            Atoms("HW", [[0, 0, 0], [1, np.nan, 0]]),
            r"position of atom 1 \(W\) is \[1\.0, nan, 0\.0\], expected finite numbers",
        ),
        (
            Atoms("HW", [[np.inf, 0, 0], [1, 0, 0]]),
            r"position of atom 0 \(H\) is \[inf, 0\.0, 0\.0\], expected finite numbers",
        ),
        (
            Atoms("HW", [[0, 0, 0], [1, 0, -1e9]]),
            r"position of atom 1 .* expected coordinates below 1e\+07 A",
        ),
        (
            Atoms("H", cell=np.diag([3, np.nan, 3]), pbc=True),
            r"cell vector 1 is \[0\.0, nan, 0\.0\], expected finite",
        ),
        (
            Atoms("H", cell=np.diag([3, 3, 0]), pbc=True),
            r"periodic directions \[0, 1, 2\] .* of volume 0 A\^3.*set the cell, or pbc=False",
        ),
        (
            Atoms("H", cell=np.diag([0, 3, 3]), pbc=(True, False, True)),
            r"periodic directions \[0, 2\] .* of area 0 A\^2",
        ),
        (
            Atoms("H", cell=np.diag([3, 0.4, 3]), pbc=(False, True, False)),
            r"periodic directions \[1\] .* of length 0\.4 A, expected at least 0\.5 A",
        ),
        (
            Atoms("HW", [[0, 0, 0], [0.3, 0, 0]]),
            r"atoms 0 \(H\) and 1 \(W\) are 0\.300 A apart, expected at least 0\.5 A: move or remove",
        ),
        (Atoms("HW", [[0, 0, 0], [0, 0, 0]]), r"atoms 0 \(H\) and 1 \(W\) are 0\.000 A apart"),
        (
            Atoms("HW", [[0, 0, 0], [4.9, 0, 0]], cell=[5, 5, 5], pbc=True),
            r"atoms 0 \(H\) and 1 \(W\) \(a periodic image\) are 0\.100 A apart",
        ),
        (
            Atoms("W", cell=[[5, 0, 0], [5, 0.45, 0], [0, 0, 5]], pbc=True),
            r"atom 0 \(W\) and its own periodic image are 0\.450 A apart, .*: check the cell",
        ),
    ],
)
def test_broken_structures_are_refused(atoms, message):
    with pytest.raises(StructureError, match=message):
        edges_of(SkinNeighborList(4.0), atoms)


def test_an_overlap_within_a_kept_list_is_refused(built, crystal):
    crystal.positions[0] += 0.85 * (crystal.positions[1] - crystal.positions[0])
    with pytest.raises(StructureError, match=r"atoms 0 .* apart"):
        edges_of(built, crystal)


@pytest.mark.parametrize(
    ("cutoff", "skin", "message"),
    [
        (0.0, 1.0, "expected a positive cutoff"),
        (4.0, -0.1, r"expected skin >= 0 in Angstrom, got -0\.1"),
        (4.0, np.nan, r"got nan"),
    ],
)
def test_senseless_radii_are_refused(cutoff, skin, message):
    with pytest.raises(ValueError, match=message):
        SkinNeighborList(cutoff, skin)
