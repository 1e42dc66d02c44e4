"""One RepFlow layer of DPA3: node, edge and angle updates on the line-graph series (SPEC section 6)."""

from typing import Final, Required, TypedDict

import torch
from torch import Tensor, nn

from moecalc.nn.config import DescriptorConfig, MoEConfig, RouterConfig
from moecalc.nn.moe import AngleExperts, EdgeExperts, MoERouter, RowExperts


class ExpertOptions(TypedDict, total=False):
    """What the maps of a layer take beside their widths: see `moecalc.nn.moe.ExpertLinear`."""

    activation: Required[str]
    n_expert: int
    router: str
    kind: str


def _expert_options(name: str, activation: str, moe: MoEConfig) -> ExpertOptions:
    """Options of the map `name`; a map that is no position of `moe` is dense."""
    entry = moe.positions.get(name)
    if entry is None:
        return {"activation": activation}
    router = moe.routers[entry.router]
    n_expert = router.n_routed_experts + router.n_shared_experts
    return {"activation": activation, "n_expert": n_expert, "router": entry.router, "kind": entry.kind}


def _router(n_dim: int, options: RouterConfig) -> MoERouter:
    return MoERouter(n_dim, options.n_routed_experts, options.top_k, options.n_shared_experts, options.gate)


class RepFlowLayer(nn.Module):
    """Message passing between nodes, edges and angles, all updates from the layer's input features.

    Only maps that can reach the energy exist (`DescriptorConfig.live_positions`): dead ones would cost time
    and change nothing.

    Args:
        config: descriptor options.
        moe: mixture-of-experts options.
        layer: index of this layer, 0-based.
    """

    n_dim: Final[int]
    n_head: Final[int]
    axis: Final[int]
    edge_norm: Final[float]
    angle_norm: Final[float]
    average: Final[bool]
    with_residual: Final[bool]
    sequential: Final[bool]
    live_edge: Final[bool]
    live_angle: Final[bool]
    with_angles: Final[bool]
    keep_far_edges: Final[bool]
    compress: Final[bool]
    compress_split: Final[bool]
    vc_dim: Final[int]
    ec_dim: Final[int]

    def __init__(self, config: DescriptorConfig, moe: MoEConfig, layer: int) -> None:
        super().__init__()
        c = config
        live = c.live_positions(layer)
        self.n_dim = c.n_dim
        self.n_head = c.n_multi_edge_message
        self.axis = c.axis_neuron
        self.edge_norm = c.edge_normalizer
        self.angle_norm = c.angle_normalizer
        self.average = c.update_style == "res_avg"
        self.with_residual = c.update_style == "res_residual"
        self.sequential = c.sequential_update
        self.live_edge = "edge_self_linear" in live
        self.live_angle = "angle_self_linear" in live
        self.with_angles = "edge_angle_linear1" in live
        # smooth_edge_update=false exists for static selection only (SPEC section 5)
        self.keep_far_edges = not c.smooth_edge_update and not c.use_dynamic_sel
        self.compress = c.a_compress_rate != 0
        self.compress_split = c.a_compress_use_split
        self.vc_dim = c.compressed_node_dim
        self.ec_dim = c.compressed_edge_dim

        used = sorted({moe.positions[name].router for name in live if name in moe.positions})
        self.routers = nn.ModuleDict({name: _router(c.n_dim, moe.routers[name]) for name in used})
        self._make_maps(c, moe)
        if self.with_residual:
            self._make_residuals(c)

    def _make_maps(self, c: DescriptorConfig, moe: MoEConfig) -> None:
        def options(name: str) -> ExpertOptions:
            return _expert_options(name, c.activation_function, moe)

        # in the order in which random weights are drawn
        self.node_self_mlp = RowExperts(c.n_dim, c.n_dim, **options("node_self_mlp"))
        self.node_sym_linear = RowExperts(
            c.axis_neuron * (c.e_dim + c.n_dim), c.n_dim, **options("node_sym_linear")
        )
        self.node_edge_linear = EdgeExperts(
            c.n_dim, c.e_dim, c.n_multi_edge_message * c.n_dim, **options("node_edge_linear")
        )
        if self.live_edge:
            self.edge_self_linear = EdgeExperts(c.n_dim, c.e_dim, c.e_dim, **options("edge_self_linear"))
        angle_inputs = (c.a_dim, self.vc_dim, self.ec_dim)
        if self.with_angles:
            self.edge_angle_linear1 = AngleExperts(*angle_inputs, c.e_dim, **options("edge_angle_linear1"))
            self.edge_angle_linear2 = RowExperts(c.e_dim, c.e_dim, **options("edge_angle_linear2"))
            if self.compress and not self.compress_split:
                self.a_compress_n_linear = nn.Parameter(torch.randn(c.n_dim, self.vc_dim) / c.n_dim**0.5)
                self.a_compress_e_linear = nn.Parameter(torch.randn(c.e_dim, self.ec_dim) / c.e_dim**0.5)
        if self.live_angle:
            self.angle_self_linear = AngleExperts(*angle_inputs, c.a_dim, **options("angle_self_linear"))

    def _make_residuals(self, c: DescriptorConfig) -> None:
        """Residual vectors of the updates: one per update, node, edge and angle features apart."""
        self.n_residual = nn.Parameter(torch.full((2 + self.n_head, c.n_dim), 0.1))
        if self.live_edge:
            self.e_residual = nn.Parameter(torch.full((2 if c.update_angle else 1, c.e_dim), 0.1))
        if self.live_angle:
            self.a_residual = nn.Parameter(torch.full((1, c.a_dim), 0.1))

    def _update(self, x: Tensor, updates: list[Tensor], residual: Tensor) -> Tensor:
        """SPEC section 6, step 8: add the updates (R, D) to x (R, D); `residual` (n, D) for res_residual."""
        if self.with_residual:
            for k, update in enumerate(updates):
                x = x + residual[k] * update
            return x
        total = updates[0]
        for update in updates[1:]:
            total = total + update
        if self.average:
            return (x + total) / float(len(updates) + 1) ** 0.5
        return x + total / float(len(updates)) ** 0.5

    def _symmetrize(
        self, x: Tensor, switch_edge: Tensor, directions: Tensor, centre: Tensor, n_local: int
    ) -> Tensor:
        """Rotation invariants (n, axis*D) of a per-edge feature x (E, D): H^T H, first `axis` columns."""
        weighted = x * switch_edge.unsqueeze(1)
        parts: list[Tensor] = []
        for axis in range(3):
            parts.append(
                x.new_zeros((n_local, x.size(1))).index_add(
                    0, centre, weighted * directions[:, axis : axis + 1]
                )
            )
        moments = torch.stack(parts, dim=1) * self.edge_norm**-0.5
        invariants = torch.bmm(moments[:, :, : self.axis].transpose(1, 2), moments) / 3.0
        return invariants.reshape(n_local, self.axis * x.size(1))

    def _compressed(self, node: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
        """Node and edge parts of the angle input (SPEC section 6, step 5)."""
        if self.with_angles:
            if not self.compress:
                return node, edge
            if self.compress_split:
                return node[:, : self.vc_dim], edge[:, : self.ec_dim]
            return node @ self.a_compress_n_linear, edge @ self.a_compress_e_linear
        return node, edge

    def _angle_to_edge(
        self,
        edge: Tensor,
        angle: Tensor,
        node_part: Tensor,
        edge_part: Tensor,
        switch_angle: Tensor,
        edge_index: Tensor,
        angle_index: Tensor,
        node_splits: list[int],
        edge_splits: list[int],
        angle_splits: list[int],
        routes: dict[str, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Message of the angles to their first edge, (E, e_dim)."""
        if self.with_angles:
            message = self.edge_angle_linear1(
                angle,
                node_part,
                edge_part,
                edge_index,
                angle_index,
                node_splits,
                edge_splits,
                angle_splits,
                routes,
            )
            first = angle_index[0]
            total = (
                torch.zeros_like(edge).index_add(0, first, message * switch_angle.unsqueeze(1))
                * self.angle_norm**-0.5
            )
            if self.keep_far_edges:
                # every close edge has at least the angle with itself (j = k)
                close = torch.zeros((edge.size(0), 1), dtype=torch.bool, device=edge.device).index_fill(
                    0, first, True
                )
                total = torch.where(close, total, edge)
            return self.edge_angle_linear2(total, edge_splits, routes)
        return torch.zeros_like(edge)

    def forward(
        self,
        node: Tensor,
        edge: Tensor,
        angle: Tensor,
        switch_edge: Tensor,
        directions: Tensor,
        switch_angle: Tensor,
        edge_index: Tensor,
        angle_index: Tensor,
        n_local: int,
        node_splits: list[int],
        edge_splits: list[int],
        angle_splits: list[int],
        group_features: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the layer.

        The order of the arguments is part of the package format: the TorchScript backend calls layers one by
        one (cpp/backends/torchscript), those of packages of any age.

        Args:
            node: (n_node, n_dim) node features, ghosts after the first `n_local` rows.
            edge: (E, e_dim) edge features.
            angle: (A, a_dim) angle features.
            switch_edge: (E,).
            directions: (E, 3) switched directions.
            switch_angle: (A,).
            edge_index: (2, E) centre, neighbor; angle_index: (2, A) edges ij, ik. Sorted by centre.
            n_local: number of owned nodes.
            node_splits, edge_splits, angle_splits: (G+1) row offsets of the routing groups.
            group_features: (G, n_dim) router input of every group.

        Returns:
            Updated node features of the owned nodes (n_local, n_dim), edges (E, e_dim), angles (A, a_dim);
            features whose update cannot reach the energy are returned unchanged.
        """
        routes: dict[str, tuple[Tensor, Tensor]] = {}
        for name, router in self.routers.items():
            routes[name] = router(group_features)
        centre = edge_index[0]
        node_local = node[:n_local]
        edge_updates: list[Tensor] = []
        edge_new, angle_new = edge, angle

        if self.live_edge:
            from_own = self.edge_self_linear(
                node, edge, edge_index, n_local, node_splits, edge_splits, routes
            )
            if self.sequential:
                edge_new = edge + self.e_residual[0] * from_own
            else:
                edge_updates.append(from_own)
        node_part, edge_part = self._compressed(node_local, edge_new)
        if self.live_angle:
            angle_update = self.angle_self_linear(
                angle,
                node_part,
                edge_part,
                edge_index,
                angle_index,
                node_splits,
                edge_splits,
                angle_splits,
                routes,
            )
            if self.with_residual:
                angle_new = self._update(angle, [angle_update], self.a_residual)
            else:
                angle_new = self._update(angle, [angle_update], angle_update)
        if self.with_angles:
            angle_read = angle_new if self.sequential else angle
            from_angles = self._angle_to_edge(
                edge_new,
                angle_read,
                node_part,
                edge_part,
                switch_angle,
                edge_index,
                angle_index,
                node_splits,
                edge_splits,
                angle_splits,
                routes,
            )
            if self.sequential:
                edge_new = edge_new + self.e_residual[1] * from_angles
            else:
                edge_updates.append(from_angles)
        if self.live_edge and not self.sequential:
            if self.with_residual:
                edge_new = self._update(edge, edge_updates, self.e_residual)
            else:
                edge_new = self._update(edge, edge_updates, edge)

        # node messages read the layer's input edges, or the updated ones where updates are sequential
        edge_read = edge_new if self.sequential else edge
        from_self = self.node_self_mlp(node_local, node_splits, routes)
        symmetric = torch.cat(
            [
                self._symmetrize(edge_read, switch_edge, directions, centre, n_local),
                self._symmetrize(
                    node.index_select(0, edge_index[1]), switch_edge, directions, centre, n_local
                ),
            ],
            dim=1,
        )
        from_symmetric = self.node_sym_linear(symmetric, node_splits, routes)
        message = self.node_edge_linear(
            node, edge_read, edge_index, n_local, node_splits, edge_splits, routes
        )
        from_edges = node.new_zeros((n_local, message.size(1))).index_add(
            0, centre, message * switch_edge.unsqueeze(1)
        )
        from_edges = from_edges / self.edge_norm
        updates = [from_self, from_symmetric]
        for head in range(self.n_head):
            updates.append(from_edges[:, head * self.n_dim : (head + 1) * self.n_dim])
        if self.with_residual:
            node_new = self._update(node_local, updates, self.n_residual)
        else:
            node_new = self._update(node_local, updates, node_local)
        return node_new, edge_new, angle_new
