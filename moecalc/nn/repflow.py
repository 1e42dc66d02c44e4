"""One RepFlow layer of DPA3: node, edge and angle updates on the line-graph series (SPEC section 6)."""

from typing import Final

import torch
from torch import Tensor, nn

from moecalc.nn.config import DescriptorConfig, MoEConfig
from moecalc.nn.moe import AngleExperts, EdgeExperts, MoERouter, RowExperts


class RepFlowLayer(nn.Module):
    """Message passing between nodes, edges and angles, all updates from the layer's input features.

    Only the updates that can reach the energy exist (`DescriptorConfig.layer_is_live`): the last layer has no
    edge update, the last two no angle update; dead ones would cost time and change nothing.

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
        self.n_dim = c.n_dim
        self.n_head = c.n_multi_edge_message
        self.axis = c.axis_neuron
        self.edge_norm = c.edge_normalizer
        self.angle_norm = c.angle_normalizer
        self.average = c.update_style == "res_avg"
        self.with_residual = c.update_style == "res_residual"
        self.sequential = c.sequential_update
        self.live_edge, self.live_angle = c.layer_is_live(layer)
        self.with_angles = c.update_angle and self.live_edge
        # smooth_edge_update=false exists for static selection only (SPEC section 5)
        self.keep_far_edges = not c.smooth_edge_update and not c.use_dynamic_sel
        self.compress = c.a_compress_rate != 0
        self.compress_split = c.a_compress_use_split
        self.vc_dim = c.compressed_node_dim
        self.ec_dim = c.compressed_edge_dim

        live = ["node_self_mlp", "node_sym_linear", "node_edge_linear"]
        if self.live_edge:
            live.append("edge_self_linear")
        if self.with_angles:
            live += ["edge_angle_linear1", "edge_angle_linear2"]
        if self.live_angle:
            live.append("angle_self_linear")
        used = sorted({moe.positions[name].router for name in live if name in moe.positions})
        self.routers = nn.ModuleDict(
            {
                name: MoERouter(c.n_dim, r.n_routed_experts, r.top_k, r.n_shared_experts, r.gate)
                for name, r in ((name, moe.routers[name]) for name in used)
            }
        )

        def experts(name: str) -> dict[str, object]:
            if name not in moe.positions:
                return {"activation": c.activation_function}
            entry = moe.positions[name]
            router = moe.routers[entry.router]
            return {
                "activation": c.activation_function,
                "n_expert": router.n_routed_experts + router.n_shared_experts,
                "router": entry.router,
                "kind": entry.kind,
            }

        width = c.e_dim + c.n_dim
        self.node_self_mlp = RowExperts(c.n_dim, c.n_dim, **experts("node_self_mlp"))  # type: ignore[arg-type]
        self.node_sym_linear = RowExperts(c.axis_neuron * width, c.n_dim, **experts("node_sym_linear"))  # type: ignore[arg-type]
        self.node_edge_linear = EdgeExperts(
            c.n_dim,
            c.e_dim,
            c.n_multi_edge_message * c.n_dim,
            **experts("node_edge_linear"),  # type: ignore[arg-type]
        )
        if self.live_edge:
            self.edge_self_linear = EdgeExperts(c.n_dim, c.e_dim, c.e_dim, **experts("edge_self_linear"))  # type: ignore[arg-type]
        if self.with_angles:
            self.edge_angle_linear1 = AngleExperts(
                c.a_dim,
                self.vc_dim,
                self.ec_dim,
                c.e_dim,
                **experts("edge_angle_linear1"),  # type: ignore[arg-type]
            )
            self.edge_angle_linear2 = RowExperts(c.e_dim, c.e_dim, **experts("edge_angle_linear2"))  # type: ignore[arg-type]
            if self.compress and not self.compress_split:
                self.a_compress_n_linear = nn.Parameter(torch.randn(c.n_dim, self.vc_dim) / c.n_dim**0.5)
                self.a_compress_e_linear = nn.Parameter(torch.randn(c.e_dim, self.ec_dim) / c.e_dim**0.5)
        if self.live_angle:
            self.angle_self_linear = AngleExperts(
                c.a_dim,
                self.vc_dim,
                self.ec_dim,
                c.a_dim,
                **experts("angle_self_linear"),  # type: ignore[arg-type]
            )
        if self.with_residual:
            self.n_residual = nn.Parameter(torch.full((2 + self.n_head, c.n_dim), 0.1))
            if self.live_edge:
                self.e_residual = nn.Parameter(torch.full((2 if c.update_angle else 1, c.e_dim), 0.1))
            if self.live_angle:
                self.a_residual = nn.Parameter(torch.full((1, c.a_dim), 0.1))

    def _update(self, x: Tensor, updates: list[Tensor], residual: Tensor) -> Tensor:
        """SPEC section 6, step 8: add the updates (R, D) to x (R, D); `residual` (n, D) for res_residual."""
        if self.with_residual:
            for q, u in enumerate(updates):
                x = x + residual[q] * u
            return x
        total = updates[0]
        for u in updates[1:]:
            total = total + u
        if self.average:
            return (x + total) / float(len(updates) + 1) ** 0.5
        return x + total / float(len(updates)) ** 0.5

    def _symmetrize(self, x: Tensor, sw: Tensor, h: Tensor, centre: Tensor, n_local: int) -> Tensor:
        """Rotation invariants of a per-edge feature x (E, D): H^T H over the first `axis` columns, (n, axis*D)."""
        weighted = x * sw.unsqueeze(1)
        parts: list[Tensor] = []
        for c in range(3):
            parts.append(x.new_zeros((n_local, x.size(1))).index_add(0, centre, weighted * h[:, c : c + 1]))
        big_h = torch.stack(parts, dim=1) * self.edge_norm**-0.5
        s = torch.bmm(big_h[:, :, : self.axis].transpose(1, 2), big_h) / 3.0
        return s.reshape(n_local, self.axis * x.size(1))

    def _compressed(self, v: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Node and edge parts of the angle input (SPEC section 6, step 5)."""
        if self.with_angles:
            if not self.compress:
                return v, e
            if self.compress_split:
                return v[:, : self.vc_dim], e[:, : self.ec_dim]
            return v @ self.a_compress_n_linear, e @ self.a_compress_e_linear
        return v, e

    def _angle_to_edge(self, e: Tensor, a: Tensor, vc: Tensor, ec: Tensor, asw: Tensor, edge_index: Tensor,
                       angle_index: Tensor, node_splits: list[int], edge_splits: list[int],
                       angle_splits: list[int], routes: dict[str, tuple[Tensor, Tensor]]) -> Tensor:  # fmt: skip
        """Message of the angles to their first edge, (E, e_dim)."""
        if self.with_angles:
            message = self.edge_angle_linear1(
                a, vc, ec, edge_index, angle_index, node_splits, edge_splits, angle_splits, routes
            )
            first = angle_index[0]
            m = torch.zeros_like(e).index_add(0, first, message * asw.unsqueeze(1)) * self.angle_norm**-0.5
            if self.keep_far_edges:
                # every angle neighbour has at least the angle with itself (j = k)
                near = torch.zeros((e.size(0), 1), dtype=torch.bool, device=e.device).index_fill(
                    0, first, True
                )
                m = torch.where(near, m, e)
            return self.edge_angle_linear2(m, edge_splits, routes)
        return torch.zeros_like(e)

    def forward(self, v: Tensor, e: Tensor, a: Tensor, sw: Tensor, h: Tensor, asw: Tensor, edge_index: Tensor,
                angle_index: Tensor, n_local: int, node_splits: list[int], edge_splits: list[int],
                angle_splits: list[int], group_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Apply the layer.

        Args:
            v: (n_node, n_dim) node features, ghosts after the first `n_local` rows.
            e: (E, e_dim) edge features; a: (A, a_dim) angle features.
            sw: (E,) edge switch; h: (E, 3) switched direction; asw: (A,) angle switch.
            edge_index: (2, E) centre, neighbour; angle_index: (2, A) edges ij, ik. Sorted by centre.
            n_local: number of owned nodes.
            node_splits, edge_splits, angle_splits: (G+1) row offsets of the routing groups.
            group_features: (G, n_dim) router input of every group.

        Returns:
            Updated v of the owned nodes (n_local, n_dim), e (E, e_dim), a (A, a_dim); features whose update
            cannot reach the energy are returned unchanged.
        """
        routes: dict[str, tuple[Tensor, Tensor]] = {}
        for name, router in self.routers.items():
            routes[name] = router(group_features)
        centre = edge_index[0]
        v_local = v[:n_local]
        edge_updates: list[Tensor] = []
        e_new, a_new = e, a

        if self.live_edge:
            e1 = self.edge_self_linear(v, e, edge_index, n_local, node_splits, edge_splits, routes)
            if self.sequential:
                e_new = e + self.e_residual[0] * e1
            else:
                edge_updates.append(e1)
        vc, ec = self._compressed(v_local, e_new)
        if self.live_angle:
            a1 = self.angle_self_linear(
                a, vc, ec, edge_index, angle_index, node_splits, edge_splits, angle_splits, routes
            )
            if self.with_residual:
                a_new = self._update(a, [a1], self.a_residual)
            else:
                a_new = self._update(a, [a1], a1)
        if self.with_angles:
            a_in = a_new if self.sequential else a
            e2 = self._angle_to_edge(
                e_new,
                a_in,
                vc,
                ec,
                asw,
                edge_index,
                angle_index,
                node_splits,
                edge_splits,
                angle_splits,
                routes,
            )
            if self.sequential:
                e_new = e_new + self.e_residual[1] * e2
            else:
                edge_updates.append(e2)
        if self.live_edge and not self.sequential:
            if self.with_residual:
                e_new = self._update(e, edge_updates, self.e_residual)
            else:
                e_new = self._update(e, edge_updates, e)

        # node messages read the layer's input edges, or the updated ones where updates are sequential
        e_read = e_new if self.sequential else e
        n1 = self.node_self_mlp(v_local, node_splits, routes)
        sym = torch.cat(
            [
                self._symmetrize(e_read, sw, h, centre, n_local),
                self._symmetrize(v.index_select(0, edge_index[1]), sw, h, centre, n_local),
            ],
            dim=1,
        )
        n2 = self.node_sym_linear(sym, node_splits, routes)
        message = self.node_edge_linear(v, e_read, edge_index, n_local, node_splits, edge_splits, routes)
        n3 = v.new_zeros((n_local, message.size(1))).index_add(0, centre, message * sw.unsqueeze(1))
        n3 = n3 / self.edge_norm
        updates = [n1, n2]
        for head in range(self.n_head):
            updates.append(n3[:, head * self.n_dim : (head + 1) * self.n_dim])
        if self.with_residual:
            v_new = self._update(v_local, updates, self.n_residual)
        else:
            v_new = self._update(v_local, updates, v_local)
        return v_new, e_new, a_new
