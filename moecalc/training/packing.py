"""From the parameters of a model to the blocks that the fused kernels multiply with, differentiably.

The kernels (`moecalc._C.Trainer`) know weights per routing group: active experts side by side, inputs split
into blocks. These functions build them with ordinary tensor operations, so that autograd takes the kernels'
gradients back to experts, gates and tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moecalc.nn import MoEPotential
from moecalc.nn.repflow import RepFlowLayer

Arrays: TypeAlias = list[NDArray[np.floating[Any]]]
LayerArrays: TypeAlias = tuple[Arrays, list[Arrays]]
"""Update coefficients, and arrays of every routing group in the order of `GROUP_TENSORS` ([]: no atoms)."""

GroupTensors: TypeAlias = dict[str, Tensor]
"""Weights of a routing group by the names in `GROUP_TENSORS`, as far as the layer has them."""

GROUP_TENSORS = (
    "node", "node_b", "p_node", "sym", "sym_b", "p_sym",
    "edge_c", "edge_b", "edge_n", "edge_e", "p_message", "p_edge",
    "angle_c", "angle_b", "angle_j", "angle_k", "angle_a", "p_angle1", "p_angle",
    "angle2", "angle2_b", "p_angle2",
)  # fmt: skip
"""Order of a group's arrays for the kernels, as `moecalc._C.TRAINING_TENSORS`."""


@dataclass
class PackedLayer:
    """Tensors of one layer: coefficients of node, edge and angle updates, weights per type ({}: no atoms)."""

    updates: list[Tensor]
    groups: list[GroupTensors]

    def in_order(self) -> list[list[Tensor]]:
        """Weights per type in the order of `GROUP_TENSORS`; zero elements where the layer has none."""
        empty = self.updates[0].new_zeros((0,))
        return [[group.get(name, empty) for name in GROUP_TENSORS] if group else [] for group in self.groups]


@dataclass
class Packed:
    """All that the kernels need.

    edge matrix and bias (e,), angle direction (a,), table of node features (T, n), layers.
    """

    embedding: list[Tensor]
    layers: list[PackedLayer]

    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        out = list(self.embedding)
        for layer in self.layers:
            out += layer.updates
            for group in layer.in_order():
                out += group
        return out

    def arrays(self) -> tuple[Arrays, list[LayerArrays]]:
        """The arguments of `Trainer.set_weights`."""
        layers = [
            (_arrays(layer.updates), [_arrays(group) for group in layer.in_order()]) for layer in self.layers
        ]
        return _arrays(self.embedding), layers

    def flat(self, gradients: tuple[Arrays, list[LayerArrays]]) -> Arrays:
        """What `Trainer.backward_to_weights` returns, in the order of `tensors`."""
        embedding, layers = gradients
        out = list(embedding)
        for (updates, groups), layer in zip(layers, self.layers, strict=True):
            # rows of padding of the update coefficients have no tensor
            out += [np.ascontiguousarray(u[: len(t)]) for u, t in zip(updates, layer.updates, strict=True)]
            for arrays, tensors in zip(groups, layer.in_order(), strict=True):
                out += arrays[: len(tensors)]
        return out


def _arrays(tensors: list[Tensor]) -> Arrays:
    return [tensor.detach().numpy() for tensor in tensors]


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
        model.embedding.angle_matrix[0] * (1.0 / math.pi**0.5),
        model.embedding.phi(table),
    ]
    layers = []
    for layer in model.layers:
        assert isinstance(layer, RepFlowLayer)
        routes = {name: router(table) for name, router in layer.routers.items()}
        groups = [_group(layer, kind, routes) if kind in present else {} for kind in range(table.size(0))]
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


def _group(layer: RepFlowLayer, group: int, routes: dict[str, tuple[Tensor, Tensor]]) -> GroupTensors:
    """Weights of a routing group: active experts side by side, so are maps that share an input."""
    n = layer.n_dim
    tensors: GroupTensors = {}
    tensors["node"], tensors["node_b"], tensors["p_node"] = layer.node_self_mlp.group_weights(group, routes)
    tensors["sym"], tensors["sym_b"], tensors["p_sym"] = layer.node_sym_linear.group_weights(group, routes)
    matrix, bias, tensors["p_message"] = layer.node_edge_linear.group_weights(group, routes)
    if layer.live_edge:
        own, own_bias, tensors["p_edge"] = layer.edge_self_linear.group_weights(group, routes)
        matrix, bias = torch.cat([matrix, own], 1), torch.cat([bias, own_bias])
    tensors["edge_c"], tensors["edge_n"], tensors["edge_e"] = matrix[:n], matrix[n : 2 * n], matrix[2 * n :]
    tensors["edge_b"] = bias
    if layer.with_angles:
        tensors |= _angle_tensors(layer, group, routes)
    return tensors


def _angle_tensors(layer: RepFlowLayer, group: int, routes: dict[str, tuple[Tensor, Tensor]]) -> GroupTensors:
    tensors: GroupTensors = {}
    first = layer.edge_angle_linear1
    matrix, bias, tensors["p_angle1"] = first.group_weights(group, routes)
    if layer.live_angle:
        own, own_bias, tensors["p_angle"] = layer.angle_self_linear.group_weights(group, routes)
        matrix, bias = torch.cat([matrix, own], 1), torch.cat([bias, own_bias])
    # the angle of edges ij and ik reads k before j (SPEC section 6, step 5)
    blocks = matrix.split([first.a_dim, first.n_dim, first.e_dim, first.e_dim])
    tensors["angle_a"], tensors["angle_c"], tensors["angle_k"], tensors["angle_j"] = blocks
    tensors["angle_b"] = bias
    second = layer.edge_angle_linear2.group_weights(group, routes)
    tensors["angle2"], tensors["angle2_b"], tensors["p_angle2"] = second
    return tensors
