"""A random model with its package, structures as graphs, and structures spread over ranks that are threads."""

import threading

import numpy as np
import torch

from moecalc.nn import ModelConfig, MoEPotential
from moecalc.package.importers import set_precision
from moecalc.package.lower import lower
from moecalc.package.write import write_bare
from moecalc.testing import brute_force_edges, evaluate_edges

ELEMENTS = ["Nb", "Mo", "Ta", "W"]

CUTOFF = 5.0


def config(routing, dtype="float64"):
    positions = ("node_self_mlp", "node_sym_linear", "node_edge_linear", "edge_self_linear")
    angle_positions = ("edge_angle_linear1", "angle_self_linear")
    return ModelConfig.model_validate(
        {
            "type_map": ELEMENTS,
            "descriptor": {
                "n_dim": 8,
                "e_dim": 6,
                "a_dim": 4,
                "nlayers": 3,
                "e_rcut": CUTOFF,
                "e_rcut_smth": 3.5,
                "e_sel": 60,
                "a_rcut": 3.4,
                "a_rcut_smth": 2.8,
                "a_sel": 20,
                "axis_neuron": 3,
                "precision": dtype,
                "exclude_types": [[0, 2]],
            },
            "fitting": {"neuron": [6, 6], "precision": dtype},
            "moe": {
                "routing": routing,
                "routers": {"main": {"n_routed_experts": 4, "top_k": 2, "n_shared_experts": 1}},
                "positions": {name: {"router": "main"} for name in positions + angle_positions},
            },
        }
    )


def make(folder, routing, dtype="float64"):
    """A random model and the package made of it."""
    torch.manual_seed(1)
    model = MoEPotential(config(routing, dtype)).eval()
    set_precision(model, dtype, dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    path = folder / f"{routing}-{dtype}.moe.pt"
    low, _ = lower(model, config(routing, dtype))
    write_bare(path, low, routing)
    return model, str(path)


def graph_of(atoms, cutoff=CUTOFF + 0.4):
    types = np.array([ELEMENTS.index(symbol) for symbol in atoms.symbols])
    centre, neighbor, vectors = brute_force_edges(atoms, cutoff)
    return types, np.stack([centre, neighbor]), vectors, np.zeros(len(atoms), dtype=np.int64)


class World:
    """A few ranks, each a thread with a slab of the cell and a shell of ghosts one cutoff thick."""

    def __init__(self, atoms, borders):
        types = graph_of(atoms)[0]
        x = atoms.get_scaled_positions()[:, 0]
        self.owner = np.searchsorted(borders, x, side="right")
        self.n_ranks = len(borders) + 1
        self.owned = [np.flatnonzero(self.owner == rank) for rank in range(self.n_ranks)]
        self.row = np.array([int((self.owned[self.owner[k]] == k).argmax()) for k in range(len(atoms))])
        self.barrier = threading.Barrier(self.n_ranks, timeout=60)
        self.shared = [np.zeros(0)] * self.n_ranks
        self.graphs, self.ghosts = [], []
        centre, neighbor, vectors = brute_force_edges(atoms, CUTOFF + 0.4)
        for rank, owned in enumerate(self.owned):
            mine = self.owner[centre] == rank
            i, j, r = self.row[centre[mine]], neighbor[mine], vectors[mine]
            # one ghost per edge to a foreign atom: engines merge them, but nothing relies on it
            foreign = self.owner[j] != rank
            row = self.row[j]
            row[foreign] = len(owned) + np.arange(foreign.sum())
            self.ghosts.append(j[foreign])
            rows = np.concatenate([owned, j[foreign]])
            self.graphs.append((types[rows], np.stack([i, row]), r, np.zeros(len(owned), dtype=np.int64)))

    def run(self, library, path, **request):
        results, errors = [None] * self.n_ranks, []

        def work(rank):
            try:
                evaluator = library.Evaluator(path)
                results[rank] = evaluate_edges(
                    evaluator, *self.graphs[rank], exchange=Exchange(self, rank), **request
                )
            except Exception as error:  # noqa: BLE001 - raised again by the main thread
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.n_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def gather(self, results, key):
        """Rows of owned atoms plus what the ghosts of other ranks contribute, in the order of the atoms."""
        total = np.zeros((len(self.row), *results[0][key].shape[1:]))
        for rank, result in enumerate(results):
            np.add.at(total, np.concatenate([self.owned[rank], self.ghosts[rank]]), result[key])
        return total


class Exchange:
    def __init__(self, world, rank):
        self.world, self.rank = world, rank
        self.n_local = len(world.owned[rank])

    def _share(self, array):
        self.world.shared[self.rank] = array.copy()
        self.world.barrier.wait()
        shared = list(self.world.shared)
        self.world.barrier.wait()
        return shared

    def forward(self, features):
        shared, world = self._share(features), self.world
        for row, atom in enumerate(world.ghosts[self.rank], self.n_local):
            features[row] = shared[world.owner[atom]][world.row[atom]]

    def reverse(self, gradients):
        shared, world = self._share(gradients), self.world
        for rank in range(world.n_ranks):
            for row, atom in enumerate(world.ghosts[rank], len(world.owned[rank])):
                if world.owner[atom] == self.rank:
                    gradients[world.row[atom]] += shared[rank][row]

    def sum(self, values):
        values[...] = sum(self._share(values))
