"""Ghosts of ranks and the CUDA kernels: only rows of a plan travel, through the host or from the device."""

import numpy as np
import pytest
import worlds
from evaluators import environment

from moecalc import _lib, testing

EMULATED = "cuda-emulation"


class Planned(worlds.Exchange):
    """Sends rows straight to their ranks; what is neither sent nor received is never seen."""

    of_device = False

    def __init__(self, world, rank):
        super().__init__(world, rank)
        self.segments = {}  # of the rows that are sent, by destination
        self.sent, self.received = [], []
        for other in range(world.n_ranks):
            wanted = [world.row[atom] for atom in world.ghosts[other] if world.owner[atom] == rank]
            self.segments[other] = slice(len(self.sent), len(self.sent) + len(wanted))
            self.sent += map(int, wanted)
            self.received += [
                self.n_local + place
                for place, atom in enumerate(world.ghosts[rank])
                if world.owner[atom] == other
            ]

    def plan(self):
        return self.sent, self.received, self.of_device

    def exchange(self, sent, received, back):
        world = self.world
        if back:
            theirs = self._share(received)
            for other in range(world.n_ranks):
                mine = [world.owner[atom] == self.rank for atom in world.ghosts[other]]
                order = np.argsort([world.owner[atom] for atom in world.ghosts[other]], kind="stable")
                sent[self.segments[other]] = theirs[other][np.array(mine, dtype=bool)[order]]
            return
        theirs, segments = self._share(sent), world.segments
        received[...] = np.concatenate(
            [theirs[other][segments[other][self.rank]] for other in range(world.n_ranks)]
        )

    def forward(self, features):
        assert self.n_local == 0, "a plan was passed over"
        self._share(np.zeros((0, features.shape[1] * features.itemsize), np.uint8))

    reverse = forward


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(worlds, "Exchange", Planned)
    return Planned


def compared(tmp_path, routing, dtype, borders):
    """Forces and virials of ranks, and those of one rank."""
    _, path = worlds.make(tmp_path, routing, dtype)
    atoms = testing.bulk_alloy()
    with environment(MOECALC_BACKEND=EMULATED):
        world = worlds.World(atoms, borders)
        world.segments = [worlds.Exchange(world, rank).segments for rank in range(world.n_ranks)]
        results = world.run(_lib.load(), path, atom_virial=True)
        expected = testing.evaluate_edges(
            _lib.load().Evaluator(path), *worlds.graph_of(atoms), atom_virial=True
        )
    return [(key, world.gather(results, key), expected[key]) for key in ("forces", "atom_virial")]


@pytest.mark.parametrize("of_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("borders", [[0.5], [0.2, 0.6], [0.5, 1.0]], ids=["2", "3", "one rank empty"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_only_rows_of_the_plan_travel(planned, monkeypatch, tmp_path, dtype, borders, of_device):
    monkeypatch.setattr(planned, "of_device", of_device)
    bound = 1e-11 if dtype == "float64" else 2e-5
    for key, got, want in compared(tmp_path, "element", dtype, borders):
        assert np.abs(got - want).max() < bound * max(1.0, np.abs(want).max()), key


def test_a_plan_serves_where_structures_are_groups(planned, tmp_path):
    for key, got, want in compared(tmp_path, "configuration", "float64", [0.5]):
        assert np.abs(got - want).max() < 1e-11 * max(1.0, np.abs(want).max()), key


class BadPlan(worlds.Exchange):
    def plan(self):
        return "many"


class BadExchange(Planned):
    def exchange(self, sent, received, back):
        raise ValueError("no network")


@pytest.mark.parametrize(("kind", "method"), [(BadPlan, "plan"), (BadExchange, "exchange")])
def test_a_failure_of_the_exchange_is_told(tmp_path, kind, method):
    _, path = worlds.make(tmp_path, "element")
    atoms = testing.bulk_alloy()
    with environment(MOECALC_BACKEND=EMULATED):
        world = worlds.World(atoms, [0.5])
        model = _lib.load().Evaluator(path)
        with pytest.raises(RuntimeError, match=f"the ghost exchange failed in `{method}`"):
            testing.evaluate_edges(model, *world.graphs[0], exchange=kind(world, 0))
