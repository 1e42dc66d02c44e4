"""Element-wise mixture of experts: routers, routing tables and expert linear maps.

Rows (nodes, edges, angles) come grouped: rows `splits[g]:splits[g+1]` belong to routing group g (an element,
or a structure of the batch). All rows of a group use the same experts with the same weights, so every group
is one GEMM whose columns are its active experts side by side. Experts that no row routes to are never
touched. Formulas: SPEC section 7 (public codes) and section 10 (arXiv 2603.07977, eqs. 4-6).
"""

from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from moecalc.nn.activation import Activation


class MoERouter(nn.Module):
    """Gate of a mixture of experts: group features -> active experts and their weights.

    Routed experts have ids 0 .. n_routed_experts-1, shared ones follow and always get weight 1.

    Args:
        n_in: width of the router input (n_dim).
        n_routed_experts, n_shared_experts, top_k, gate: see `RouterConfig`.
    """

    top_k: Final[int]
    n_shared: Final[int]
    n_routed: Final[int]
    softmax_first: Final[bool]

    def __init__(
        self,
        n_in: int,
        n_routed_experts: int,
        top_k: int,
        n_shared_experts: int = 0,
        gate: str = "topk_softmax",
    ) -> None:
        super().__init__()
        self.n_routed = n_routed_experts
        self.top_k = top_k
        self.n_shared = n_shared_experts
        self.softmax_first = gate == "softmax_topk"
        self.gate = nn.Parameter(torch.randn(n_in, n_routed_experts) / max(n_in, 1) ** 0.5)

    def forward(self, group_features: Tensor) -> tuple[Tensor, Tensor]:
        """Route groups.

        Args:
            group_features: (G, n_in), type embedding rows or their mean over a structure.

        Returns:
            ids (G, top_k + n_shared) int64 and weights of the same shape.
        """
        logits = group_features @ self.gate
        if self.softmax_first:
            weights, ids = torch.topk(torch.softmax(logits, dim=1), self.top_k, dim=1)
        else:
            selected, ids = torch.topk(logits, self.top_k, dim=1)
            weights = torch.softmax(selected, dim=1)
        if self.n_shared > 0:
            n_group = logits.size(0)
            shared = torch.arange(self.n_routed, self.n_routed + self.n_shared, device=ids.device)
            ids = torch.cat([ids, shared.unsqueeze(0).expand(n_group, self.n_shared)], dim=1)
            ones = torch.ones((n_group, self.n_shared), dtype=weights.dtype, device=weights.device)
            weights = torch.cat([weights, ones], dim=1)
        return ids, weights


class RoutingTable(nn.Module):
    """A router whose answer is already known: one row per element (what a package carries).

    Args:
        ids: (T, K) int64 expert ids.
        weights: (T, K) their weights.
    """

    ids: Tensor
    weights: Tensor

    def __init__(self, ids: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids)
        self.register_buffer("weights", weights)

    def forward(self, group_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the table; `group_features` (G, n_in) is not looked at."""
        return self.ids, self.weights


class ExpertLinear(nn.Module):
    """Base of the linear maps of a layer: a stack of experts, of which a dense map is the case of one.

    mlp:    y = sum_k p_k phi(x W_k + b_k)
    linear: y = phi(sum_k p_k (x W_k + b_k))

    Args:
        n_in, n_out: widths.
        n_expert: experts in the stack (routed, then shared); 1 for a dense map.
        router: name of the router in `routes`; "" for a dense map.
        kind: "mlp" or "linear".
        activation: name of phi.
    """

    # What training puts in the place of `combine` (moecalc.deepmd.compiled): the same numbers, in eager mode
    # only. Without a type, because TorchScript would want to understand it.
    faster = cast(Any, None)
    # constants for TorchScript; not Final, because packaging turns routed maps into dense ones
    __constants__ = ("merge", "routed", "router")
    n_in: Final[int]
    n_out: Final[int]

    def __init__(
        self,
        n_in: int,
        n_out: int,
        activation: str,
        n_expert: int = 1,
        router: str = "",
        kind: str = "mlp",
    ) -> None:
        super().__init__()
        self.n_in = n_in
        self.n_out = n_out
        self.router = router
        self.routed = router != ""
        self.merge = kind == "linear"
        self.matrix = nn.Parameter(torch.randn(n_expert, n_in, n_out) / (n_in + n_out) ** 0.5)
        self.bias = nn.Parameter(torch.randn(n_expert, n_out) * 0.1)
        self.phi = Activation(activation)

    def group_weights(
        self, group: int, routes: dict[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Active experts of a group side by side.

        Returns:
            matrix (n_in, K*n_out), bias (K*n_out,), weights (K,). K = 1 for dense and merged maps.
        """
        if not self.routed:
            return self.matrix[0], self.bias[0], torch.ones_like(self.bias[0, :1])
        ids, weights = routes[self.router]
        routing = weights[group]
        matrix = self.matrix.index_select(0, ids[group])
        bias = self.bias.index_select(0, ids[group])
        if self.merge:
            merged = (routing.reshape(-1, 1, 1) * matrix).sum(0)
            return merged, (routing.unsqueeze(1) * bias).sum(0), torch.ones_like(routing[:1])
        return matrix.permute(1, 0, 2).reshape(self.n_in, -1), bias.reshape(-1), routing

    def combine(self, pre_activation: Tensor, routing: Tensor) -> Tensor:
        """Activate and sum over experts: pre_activation (R, K*n_out), routing (K,) -> (R, n_out)."""
        # nested, so that TorchScript never looks at `faster`
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.faster is not None:
                return self.faster(pre_activation, routing)
        y = self.phi(pre_activation)
        if not self.routed or self.merge:
            return y
        return (y.reshape(pre_activation.size(0), -1, self.n_out) * routing.reshape(1, -1, 1)).sum(1)

    def gather(self, outputs: list[Tensor], like: Tensor) -> Tensor:
        """Concatenate the outputs of the non-empty groups (rows are sorted by group)."""
        if len(outputs) == 0:
            return like.new_zeros((0, self.n_out))
        return torch.cat(outputs, dim=0)


class RowExperts(ExpertLinear):
    """Experts on rows that carry their whole input (nodes, or edges of edge_angle_linear2)."""

    def forward(self, x: Tensor, splits: list[int], routes: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """X (R, n_in), splits (G+1) row offsets of the groups -> (R, n_out)."""
        if not self.routed:
            matrix, bias, routing = self.group_weights(0, routes)
            return self.combine(torch.addmm(bias, x, matrix), routing)
        outputs: list[Tensor] = []
        for group in range(len(splits) - 1):
            begin, end = splits[group], splits[group + 1]
            if end > begin:
                matrix, bias, routing = self.group_weights(group, routes)
                outputs.append(self.combine(torch.addmm(bias, x[begin:end], matrix), routing))
        return self.gather(outputs, x)


class EdgeExperts(ExpertLinear):
    """Experts on the edge input [v_i, v_j, e_ij], never concatenated: each block has its own GEMM.

    Args:
        n_dim, e_dim: widths of node and edge features; the others as in `ExpertLinear`.
    """

    n_dim: Final[int]

    def __init__(
        self,
        n_dim: int,
        e_dim: int,
        n_out: int,
        activation: str,
        n_expert: int = 1,
        router: str = "",
        kind: str = "mlp",
    ) -> None:
        super().__init__(2 * n_dim + e_dim, n_out, activation, n_expert, router, kind)
        self.n_dim = n_dim

    def _group(
        self,
        node: Tensor,
        edge: Tensor,
        centre: Tensor,
        neighbor: Tensor,
        node_begin: int,
        node_end: int,
        group: int,
        routes: dict[str, tuple[Tensor, Tensor]],
    ) -> Tensor:
        matrix, bias, routing = self.group_weights(group, routes)
        at_centre = torch.addmm(bias, node[node_begin:node_end], matrix[: self.n_dim])
        at_neighbor = node @ matrix[self.n_dim : 2 * self.n_dim]
        pre_activation = edge @ matrix[2 * self.n_dim :]
        pre_activation = (
            pre_activation
            + at_centre.index_select(0, centre - node_begin)
            + at_neighbor.index_select(0, neighbor)
        )
        return self.combine(pre_activation, routing)

    def forward(
        self,
        node: Tensor,
        edge: Tensor,
        edge_index: Tensor,
        n_local: int,
        node_splits: list[int],
        edge_splits: list[int],
        routes: dict[str, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Node (n_node, n_dim), edge (E, e_dim), edge_index (2, E), splits (G+1) -> (E, n_out)."""
        if not self.routed:
            return self._group(node, edge, edge_index[0], edge_index[1], 0, n_local, 0, routes)
        outputs: list[Tensor] = []
        for group in range(len(edge_splits) - 1):
            begin, end = edge_splits[group], edge_splits[group + 1]
            if end > begin:
                outputs.append(
                    self._group(
                        node,
                        edge[begin:end],
                        edge_index[0, begin:end],
                        edge_index[1, begin:end],
                        node_splits[group],
                        node_splits[group + 1],
                        group,
                        routes,
                    )
                )
        return self.gather(outputs, edge)


class AngleExperts(ExpertLinear):
    """Experts on the angle input [a_ijk, vc_i, ec_ik, ec_ij] (k before j), never concatenated.

    Args:
        a_dim, n_dim, e_dim: widths of the angle part and of the (compressed) node and edge parts.
    """

    a_dim: Final[int]
    n_dim: Final[int]
    e_dim: Final[int]

    def __init__(
        self,
        a_dim: int,
        n_dim: int,
        e_dim: int,
        n_out: int,
        activation: str,
        n_expert: int = 1,
        router: str = "",
        kind: str = "mlp",
    ) -> None:
        super().__init__(a_dim + n_dim + 2 * e_dim, n_out, activation, n_expert, router, kind)
        self.a_dim = a_dim
        self.n_dim = n_dim
        self.e_dim = e_dim

    def _group(
        self,
        angle: Tensor,
        node_part: Tensor,
        edge_part: Tensor,
        centre: Tensor,
        angle_index: Tensor,
        node_begin: int,
        edge_begin: int,
        group: int,
        routes: dict[str, tuple[Tensor, Tensor]],
    ) -> Tensor:
        matrix, bias, routing = self.group_weights(group, routes)
        node_row = self.a_dim
        second_row = node_row + self.n_dim
        first_row = second_row + self.e_dim
        at_centre = torch.addmm(bias, node_part, matrix[node_row:second_row])
        # the node part is added per edge j, not per angle: every angle of edge j has the same centre
        at_first = edge_part @ matrix[first_row:] + at_centre.index_select(0, centre - node_begin)
        at_second = edge_part @ matrix[second_row:first_row]
        local = angle_index - edge_begin
        pre_activation = (
            angle @ matrix[: self.a_dim]
            + at_first.index_select(0, local[0])
            + at_second.index_select(0, local[1])
        )
        return self.combine(pre_activation, routing)

    def forward(
        self,
        angle: Tensor,
        node_part: Tensor,
        edge_part: Tensor,
        edge_index: Tensor,
        angle_index: Tensor,
        node_splits: list[int],
        edge_splits: list[int],
        angle_splits: list[int],
        routes: dict[str, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Angle (A, a_dim), node_part (n_local, n_dim), edge_part (E, e_dim) -> (A, n_out).

        angle_index is (2, A), splits are (G+1) row offsets of the groups.
        """
        if not self.routed:
            return self._group(angle, node_part, edge_part, edge_index[0], angle_index, 0, 0, 0, routes)
        outputs: list[Tensor] = []
        for group in range(len(angle_splits) - 1):
            begin, end = angle_splits[group], angle_splits[group + 1]
            if end > begin:
                node_begin, node_end = node_splits[group], node_splits[group + 1]
                edge_begin, edge_end = edge_splits[group], edge_splits[group + 1]
                outputs.append(
                    self._group(
                        angle[begin:end],
                        node_part[node_begin:node_end],
                        edge_part[edge_begin:edge_end],
                        edge_index[0, edge_begin:edge_end],
                        angle_index[:, begin:end],
                        node_begin,
                        edge_begin,
                        group,
                        routes,
                    )
                )
        return self.gather(outputs, angle)
