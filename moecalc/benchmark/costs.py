"""Arithmetic and memory traffic of one evaluation, counted from a package and the graph of a structure.

Counted is what no implementation of the model can avoid: products with the weights of the active experts (a
multiplication and an addition are 2 FLOPs) and the symmetrisation, with concatenated inputs split, so that
the part of a map that depends on a node or an edge alone is computed once for it, and without updates that
cannot reach the energy. The backward goes to features only: weights have no gradients. Activations are
counted apart. docs/performance.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from ase import Atoms

from moecalc.errors import PackageError
from moecalc.neighbors import SkinNeighborList
from moecalc.package import archive
from moecalc.typing import Bools, Floats, Ints

if TYPE_CHECKING:
    from moecalc.package.architecture import Architecture as ModelRecord
    from moecalc.package.architecture import StoredTensor


PARTS: Final = ("angle", "edge", "symmetrisation", "node", "fitting")
"""Parts of an evaluation, in the order of the tables."""

_SCALARS_FORWARD: Final = 5
"""Numbers per edge beside its features: switch, and direction in four."""

_GRADIENT_BYTES: Final = 40
"""Gradients of the switch and the direction of an edge: five float64."""


@dataclass(frozen=True)
class Layer:
    """Widths of a RepFlow layer, and its active experts at each position that reaches the energy.

    Attributes:
        node, edge, angle: feature widths; angle is 0 without angles.
        heads, axis: messages per edge, and columns of the symmetrisation.
        vc, ec: widths of the node's and the edge's part of the angle input.
        experts: active experts by position; a dense or merged map has 1, a position that cannot reach the
            energy is absent.
        keep_far: whether edges without angles pass through `edge_angle_linear2` (else its answer for them is
            a constant).
    """

    node: int
    edge: int
    angle: int
    heads: int
    axis: int
    vc: int
    ec: int
    experts: Mapping[str, int]
    keep_far: bool = False

    @property
    def edge_columns(self) -> int:
        """Columns of the edge maps, all active experts side by side."""
        message = self.experts["node_edge_linear"] * self.heads * self.node
        return message + self.experts.get("edge_self_linear", 0) * self.edge

    @property
    def angle_columns(self) -> int:
        """Columns of the angle maps, all active experts side by side."""
        return (
            self.experts.get("edge_angle_linear1", 0) * self.edge
            + self.experts.get("angle_self_linear", 0) * self.angle
        )


@dataclass(frozen=True)
class Architecture:
    """Layers, widths of the fitting net from input to energy, and routing of a package.

    Attributes:
        layers: the layers in order.
        fitting: widths n0, n1, ..., 1.
        by_element: whether atoms of different elements use different weights.
        pair_mask: (T, T), False where a pair of element indices makes no edge.
    """

    layers: Sequence[Layer]
    fitting: Sequence[int]
    by_element: bool
    pair_mask: Bools


@dataclass(frozen=True)
class GraphCounts:
    """Sizes of the graph of a structure.

    Attributes:
        atoms: atoms.
        edges: directed edges within the cutoff.
        close: directed edges within the angle cutoff.
        angles: ordered pairs of close edges of one atom, j = k included.
        slots: pairs (weights in use, neighbor) that occur; as many as neighbors when all atoms use the same
            weights.
    """

    atoms: int
    edges: int
    close: int
    angles: int
    slots: int


@dataclass(frozen=True)
class Cost:
    """What one part costs in one evaluation of energy, forces and virial.

    Attributes:
        forward, backward: FLOPs.
        recompute: FLOPs more where the backward computes intermediate values anew instead of reading them
            from memory.
        activations: values of the activation function in the forward; as many slopes in the backward.
        forward_bytes, backward_bytes: memory traffic when every feature is read and written once per layer
            and nothing else leaves the cache.
    """

    forward: int = 0
    backward: int = 0
    recompute: int = 0
    activations: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recompute + other.recompute,
            self.activations + other.activations,
            self.forward_bytes + other.forward_bytes,
            self.backward_bytes + other.backward_bytes,
        )

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def read_architecture(path: str | Path) -> Architecture:
    """Widths and active experts of a package, from what it says of its model.

    Raises:
        PackageError: as `moecalc.package.read_architecture`, or tensors that are missing or of another kind.
    """
    model, tensors = archive.read_architecture(path), archive.read_tensors(path)
    try:
        layers = [_layer(model, tensors, index) for index in range(len(model.layers))]
        net = "readout.net."
        widths = [tensors[f"{net}layers.{k}.matrix"].shape[0] for k in range(len(model.readout.layers))]
        fitting = [*widths, tensors[f"{net}out_matrix"].shape[0], 1]
        pair_mask = archive.read_tensor(path, tensors["pair_mask"]).astype(bool)
    except (KeyError, IndexError) as error:
        raise PackageError(
            f"{path}: expected tensors of RepFlow layers, got none that fits {error}: package again"
        ) from None
    if pair_mask.shape != (len(model.elements),) * 2:
        raise PackageError(
            f"{path}: expected pair_mask of {len(model.elements)} elements, got shape {pair_mask.shape}: "
            "package again"
        )
    routed = any(position.routed for layer in model.layers for position in layer.positions.values())
    return Architecture(layers, fitting, routed and model.routing_level == "element", pair_mask)


def _layer(model: ModelRecord, tensors: Mapping[str, StoredTensor], index: int) -> Layer:
    layer = model.layers[index]
    experts = {}
    for name, position in layer.positions.items():
        if not position.routed or position.merge:
            experts[name] = 1
            continue
        router = layer.routers[position.router]
        if router.kind == "table":
            experts[name] = tensors[f"layers.{index}.routers.{position.router}.ids"].shape[1]
        else:
            experts[name] = router.top_k + router.n_shared
    # a linear compression is folded into the map behind it, which then has the full width
    whole = layer.compress and not layer.compress_split
    return Layer(
        node=model.n_dim,
        edge=model.e_dim,
        angle=model.a_dim if layer.with_angles else 0,
        heads=layer.n_head,
        axis=layer.axis,
        vc=model.n_dim if whole else layer.vc_dim,
        ec=model.e_dim if whole else layer.ec_dim,
        experts=experts,
        keep_far=layer.keep_far_edges,
    )


def count_graph(
    architecture: Architecture,
    types: Ints,
    edge_index: Ints,
    edge_vec: Floats,
    cutoff: float,
    angle_cutoff: float,
) -> GraphCounts:
    """Count what the model sees of a graph, of whose edges some may lie beyond the cutoff.

    Args:
        architecture: of the package.
        types: (n_node,) element indices.
        edge_index: (2, n_edge) centres and neighbors.
        edge_vec: (n_edge, 3) Angstrom.
        cutoff, angle_cutoff: Angstrom.
    """
    centre, neighbor = edge_index
    r2 = np.einsum("ij,ij->i", edge_vec, edge_vec)
    inside = (r2 <= cutoff**2) & architecture.pair_mask[types[centre], types[neighbor]]
    close = inside & (r2 < angle_cutoff**2)
    per_atom = np.bincount(centre[close], minlength=len(types)).astype(np.int64)
    group = types[centre] if architecture.by_element else np.zeros_like(centre)
    slots = np.unique((group * len(types) + neighbor)[inside])
    return GraphCounts(
        atoms=len(types),
        edges=int(inside.sum()),
        close=int(close.sum()),
        angles=int((per_atom**2).sum()),
        slots=len(slots),
    )


def costs(architecture: Architecture, graph: GraphCounts, item_size: int = 4) -> dict[str, Cost]:
    """Cost of every part of one evaluation.

    Args:
        architecture: of the package.
        graph: sizes of the structure's graph.
        item_size: bytes of a number of the network: 4 or 8.

    Returns:
        One `Cost` for each of `PARTS`.
    """
    total = dict.fromkeys(PARTS, Cost())
    # in the backward, an array is read only if a later layer has written it
    later_angles = later_edges = False
    for index in reversed(range(len(architecture.layers))):
        layer = architecture.layers[index]
        for part, cost in _layer_costs(
            layer, graph, item_size, first=index == 0, later_edges=later_edges, later_angles=later_angles
        ).items():
            total[part] += cost
        later_edges = True
        later_angles = later_angles or layer.angle_columns > 0
    widths = architecture.fitting
    products = 2 * graph.atoms * sum(a * b for a, b in pairwise(widths))
    rows = 2 * item_size * graph.atoms * sum(widths)
    total["fitting"] = Cost(products, products, 0, graph.atoms * sum(widths[1:-1]), rows, rows)
    return total


def evaluation_costs(
    package: str | Path, atoms: Atoms, item_size: int = 4
) -> tuple[GraphCounts, dict[str, Cost]]:
    """Graph of a structure as a package sees it, and the cost of one evaluation by part.

    Args:
        package: `*.moe.pt`.
        atoms: of elements of the package.
        item_size: bytes of a number of the network: 4 or 8.

    Raises:
        PackageError: as `read_architecture`.
    """
    metadata = archive.read_metadata(package)
    architecture = read_architecture(package)
    types = np.array([metadata.elements.index(symbol) for symbol in atoms.symbols], dtype=np.int64)
    pairs, positions = SkinNeighborList(metadata.cutoff, 0.0).pairs(atoms)
    edge_vec = pairs.vectors(positions, atoms.cell.array[None])
    cutoffs = (metadata.cutoff, metadata.angle_cutoff)
    counts = count_graph(architecture, types, pairs.edge_index, edge_vec, *cutoffs)
    return counts, costs(architecture, counts, item_size)


def _layer_costs(
    layer: Layer, graph: GraphCounts, size: int, *, first: bool, later_edges: bool, later_angles: bool
) -> dict[str, Cost]:
    """Costs of one layer.

    The nodes of the first layer follow from the elements alone: no gradient flows through them.
    """
    n, e, a, k = layer.node, layer.edge, layer.angle, layer.experts
    N, E, C, A, S = graph.atoms, graph.edges, graph.close, graph.angles, graph.slots
    edge_columns, angle_columns = layer.edge_columns, layer.angle_columns
    beyond_first = 0 if first else 1

    self_map = 2 * N * n * k["node_self_mlp"] * n
    sym_map = 2 * N * layer.axis * (e + n) * k["node_sym_linear"] * n
    node_parts = 2 * (N + S) * n * edge_columns + 2 * N * layer.vc * angle_columns
    invariants = 2 * 3 * N * layer.axis * (e + n)
    rows = N * (n + edge_columns + angle_columns + 3 * (e + n) + layer.heads * n) + S * edge_columns
    node = Cost(
        forward=self_map + sym_map + node_parts + invariants,
        backward=beyond_first * (self_map + node_parts) + sym_map + 2 * invariants,
        recompute=self_map + sym_map + node_parts + invariants,
        activations=N * n * (k["node_self_mlp"] + k["node_sym_linear"]),
        forward_bytes=2 * size * rows,
        backward_bytes=4 * size * rows,
    )

    # H = sum_j h (x) [e, v], backward to h, e and v; H itself is kept, it has few rows
    symmetric = 2 * 3 * (e + n) * E
    symmetrisation = Cost(forward=symmetric, backward=symmetric + 2 * 3 * E * (e + beyond_first * n))

    second_columns = k.get("edge_angle_linear2", 0) * e
    second_rows = E if layer.keep_far else C
    second = 2 * second_rows * e * second_columns
    edge_map = 2 * E * e * edge_columns
    # of the angle maps: the parts of edge ij and edge ik
    close_parts = 2 * 2 * C * layer.ec * angle_columns
    e_bytes = size * E * e
    alive = "edge_self_linear" in k
    edge = Cost(
        forward=edge_map + close_parts + second,
        backward=edge_map + close_parts + second,
        recompute=edge_map + close_parts + second,
        activations=E * edge_columns + second_rows * second_columns,
        forward_bytes=e_bytes * (1 + alive) + size * _SCALARS_FORWARD * E,
        # gradients of the map's outputs go through memory to be summed over the edges of a neighbor
        backward_bytes=e_bytes * (2 + later_edges)
        + size * E * (_SCALARS_FORWARD + (1 + beyond_first) * edge_columns)
        + 2 * _GRADIENT_BYTES * E,
    )

    products = 2 * A * a * angle_columns
    with_angles = angle_columns > 0
    a_bytes = size * A * a * with_angles
    angle = Cost(
        forward=products,
        backward=products,
        recompute=products,
        activations=A * angle_columns,
        forward_bytes=a_bytes * (1 + ("angle_self_linear" in k))
        + with_angles * size * (A + e * C * (1 + alive)),
        backward_bytes=a_bytes * (2 + later_angles) + with_angles * size * (3 * A + 2 * e * C),
    )
    return {"node": node, "symmetrisation": symmetrisation, "edge": edge, "angle": angle}


def total_cost(parts: Mapping[str, Cost]) -> Cost:
    """Sum over all parts."""
    return sum(parts.values(), Cost())
