"""From the parameters of a model to the blocks that the fused kernels multiply with, differentiably.

The kernels (`moecalc._C.Trainer`) know weights per routing group: active experts side by side, inputs split into blocks. These
functions build them with ordinary tensor operations, so that autograd takes the kernels' gradients back to experts, gates and
tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moecalc.nn import MoEPotential
from moecalc.nn.repflow import RepFlowLayer

GROUP_TENSORS = (
    "node", "node_b", "p_node", "sym", "sym_b", "p_sym", "edge_c", "edge_b", "edge_n", "edge_e", "p_message", "p_edge",
    "angle_c", "angle_b", "angle_j", "angle_k", "angle_a", "p_angle1", "p_angle", "angle2", "angle2_b", "p_angle2",
)  # fmt: skip
"""Order of a group's tensors, as `moecalc._C.TRAINING_TENSORS`."""


@dataclass
class PackedLayer:
    """Tensors of one layer: update coefficients (n, e, a), and per type a list in the order of `GROUP_TENSORS` (empty: absent)."""

    updates: list[Tensor]
    groups: list[list[Tensor]]


@dataclass
class Packed:
    """All that the kernels need: edge matrix and bias (e,), angle direction (a,), table of node features (T, n), layers."""

    embedding: list[Tensor]
    layers: list[PackedLayer]

    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        out = list(self.embedding)
        for layer in self.layers:
            out += layer.updates
            for group in layer.groups:
                out += group
        return out

    def arrays(self) -> tuple[list[np.ndarray], list[tuple[list[np.ndarray], list[list[np.ndarray]]]]]:
        """The arguments of `Trainer.set_weights`."""
        layers = [
            (
                [t.detach().numpy() for t in layer.updates],
                [[t.detach().numpy() for t in group] for group in layer.groups],
            )
            for layer in self.layers
        ]
        return [t.detach().numpy() for t in self.embedding], layers


def pack(model: MoEPotential, present: list[int]) -> Packed:
    """Blocks of the types in `present`.

    Args:
        model: with routing by element, uncompressed angles and no sequential update.
        present: type indices that have atoms in the batch.

    Returns:
        Tensors attached to the graph of autograd.
    """
    table = model.embedding.table()
    embedding = [
        model.embedding.edge_matrix[0],
        model.embedding.edge_bias,
        model.embedding.angle_matrix[0] * (1.0 / np.pi**0.5),
        model.embedding.phi(table),
    ]
    layers = []
    for layer in model.layers:
        assert isinstance(layer, RepFlowLayer)
        routes = {name: router(table) for name, router in layer.routers.items()}
        groups: list[list[Tensor]] = [
            _group(layer, kind, routes) if kind in present else [] for kind in range(table.size(0))
        ]
        layers.append(PackedLayer(_updates(layer, table), groups))
    return Packed(embedding, layers)


def _updates(layer: RepFlowLayer, like: Tensor) -> list[Tensor]:
    empty = like.new_zeros((0,))
    if layer.with_residual:
        edge = layer.e_residual if layer.live_edge else empty
        return [layer.n_residual, edge, layer.a_residual if layer.live_angle else empty]

    def constant(n: int, width: int) -> Tensor:
        return like.new_full((n, width), (n + 1 if layer.average else n) ** -0.5)

    a_dim = layer.edge_angle_linear1.a_dim if layer.with_angles else 0
    e_dim = layer.node_edge_linear.n_in - 2 * layer.n_dim
    return [
        constant(2 + layer.n_head, layer.n_dim),
        constant(2 if layer.with_angles else 1, e_dim) if layer.live_edge else empty,
        constant(1, a_dim) if layer.live_angle else empty,
    ]


def _group(layer: RepFlowLayer, group: int, routes: dict[str, tuple[Tensor, Tensor]]) -> list[Tensor]:
    n = layer.n_dim
    node, node_b, p_node = layer.node_self_mlp.group_weights(group, routes)
    sym, sym_b, p_sym = layer.node_sym_linear.group_weights(group, routes)
    edge, edge_b, p_message = layer.node_edge_linear.group_weights(group, routes)
    empty = edge.new_zeros((0,))
    p_edge = p_angle1 = p_angle = p_angle2 = angle2 = angle2_b = empty
    if layer.live_edge:
        own, own_b, p_edge = layer.edge_self_linear.group_weights(group, routes)
        edge, edge_b = torch.cat([edge, own], 1), torch.cat([edge_b, own_b])
    angle = [empty] * 5
    if layer.with_angles:
        first = layer.edge_angle_linear1
        matrix, bias, p_angle1 = first.group_weights(group, routes)
        if layer.live_angle:
            own, own_b, p_angle = layer.angle_self_linear.group_weights(group, routes)
            matrix, bias = torch.cat([matrix, own], 1), torch.cat([bias, own_b])
        a, vc, k, j = matrix.split([first.a_dim, first.n_dim, first.e_dim, first.e_dim])
        angle = [vc, bias, j, k, a]
        angle2, angle2_b, p_angle2 = layer.edge_angle_linear2.group_weights(group, routes)
    return [
        node, node_b, p_node, sym, sym_b, p_sym, edge[:n], edge_b, edge[n : 2 * n], edge[2 * n :], p_message, p_edge,
        *angle, p_angle1, p_angle, angle2, angle2_b, p_angle2,
    ]  # fmt: skip
