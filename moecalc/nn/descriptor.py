"""Geometry and initial features of the DPA3 descriptor (SPEC sections 3, 4)."""

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from moecalc.nn.activation import Activation
from moecalc.nn.config import DescriptorConfig

_ORBITALS = [
    "1s",
    "2s",
    "2p",
    "3s",
    "3p",
    "3d",
    "4s",
    "4p",
    "4d",
    "4f",
    "5s",
    "5p",
    "5d",
    "5f",
    "6s",
    "6p",
    "6d",
    "7s",
    "7p",
]


def switch(r: Tensor, start: float, stop: float, exponential: bool) -> Tensor:
    """Smooth cutoff s(r), 1 at short range, 0 beyond `stop` (SPEC section 3).

    Args:
        r: distances in Angstrom, any shape.
        start, stop: e_rcut_smth and e_rcut (or the angle ones), Angstrom.
        exponential: exp(-exp(20 (r - start)/start)) instead of the quintic polynomial.
    """
    if exponential:
        inside = r <= stop
        # beyond the cutoff the inner exponential may overflow and poison gradients: clamp first
        s = torch.exp(-torch.exp((20.0 / start) * (torch.clamp(r, max=stop) - start)))
        return torch.where(inside, s, torch.zeros_like(s))
    u = torch.clamp((r - start) / (stop - start), 0.0, 1.0)
    return 1.0 + u * u * u * (-10.0 + u * (15.0 - 6.0 * u))


class Geometry(nn.Module):
    """Edge vectors -> invariants and switched directions, always in float64.

    Args:
        config: descriptor options.
        n_types: number of element rows in the environment statistics.
    """

    e_start: Final[float]
    e_stop: Final[float]
    a_start: Final[float]
    a_stop: Final[float]
    exp_switch: Final[bool]
    use_dist: Final[bool]
    protection: Final[float]
    mean: Tensor
    stddev: Tensor

    def __init__(self, config: DescriptorConfig, n_types: int) -> None:
        super().__init__()
        self.e_start, self.e_stop = config.e_rcut_smth, config.e_rcut
        self.a_start, self.a_stop = config.a_rcut_smth, config.a_rcut
        self.exp_switch = config.use_exp_switch
        self.use_dist = config.edge_init_use_dist
        self.protection = config.env_protection
        self.register_buffer("mean", torch.zeros(n_types, 4, dtype=torch.float64))
        self.register_buffer("stddev", torch.full((n_types, 4), 0.3, dtype=torch.float64))

    def forward(
        self, edge_vec: Tensor, types: Tensor, edge_index: Tensor, angle_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Invariants of edges and angles.

        Args:
            edge_vec: (E, 3) float64, r_j - r_i in Angstrom.
            types: (n_node,) int64.
            edge_index: (2, E) int64; angle_index: (2, A) int64 edge ids of ij and ik.

        Returns:
            edge_input (E,), switch_edge (E,), directions (E, 3), cosine (A,), switch_angle (A,), all float64.
        """
        distance = torch.linalg.vector_norm(edge_vec, dim=1)
        switch_edge = switch(distance, self.e_start, self.e_stop, self.exp_switch)
        centre_type = types.index_select(0, edge_index[0])
        mean = self.mean.index_select(0, centre_type)
        stddev = self.stddev.index_select(0, centre_type)
        protected = distance + self.protection
        directions = (switch_edge / (protected * protected)).unsqueeze(1) * edge_vec
        directions = (directions - mean[:, 1:]) / stddev[:, 1:]
        edge_input = distance if self.use_dist else (switch_edge / protected - mean[:, 0]) / stddev[:, 0]
        first, second = angle_index[0], angle_index[1]
        unit = edge_vec / (distance + 1e-6).unsqueeze(1)
        cosine = (unit.index_select(0, first) * unit.index_select(0, second)).sum(1) * (1.0 - 1e-6)
        switch_close = switch(distance, self.a_start, self.a_stop, self.exp_switch)
        switch_angle = switch_close.index_select(0, first) * switch_close.index_select(0, second)
        return edge_input, switch_edge, directions, cosine, switch_angle


def electron_configuration(symbol: str) -> Tensor:
    """The 118 numbers of `use_econf_tebd`: Hund-filled orbitals, (118,) float64 (SPEC section 9).

    Raises:
        ValueError: not an element symbol.
    """
    from ase.data import atomic_numbers

    if symbol not in atomic_numbers or atomic_numbers[symbol] == 0:
        raise ValueError(f"use_econf_tebd: {symbol!r} in type_map, expected an element symbol")
    occupation = _ground_state(atomic_numbers[symbol])
    row: list[float] = []
    for orbital in _ORBITALS:
        slots = {"s": 1, "p": 3, "d": 5, "f": 7}[orbital[1]]
        n = occupation.get(orbital, 0)
        up, down = min(n, slots), max(n - slots, 0)
        for m in range(slots):
            # empty (-1, -1), one electron (-1, +1), two (+1, +1)
            row += [1.0 if m < down else -1.0, 1.0 if m < up else -1.0]
    return torch.tensor(row, dtype=torch.float64) / math.sqrt(118.0)


_AUFBAU = [
    "1s",
    "2s",
    "2p",
    "3s",
    "3p",
    "4s",
    "3d",
    "4p",
    "5s",
    "4d",
    "5p",
    "6s",
    "4f",
    "5d",
    "6p",
    "7s",
    "5f",
    "6d",
    "7p",
]
# ground states that do not follow the aufbau order (NIST Atomic Spectra Database; from 103 on as DeePMD-kit
# has them)
_EXCEPTIONS: dict[int, dict[str, int]] = {
    24: {"4s": 1, "3d": 5},
    29: {"4s": 1, "3d": 10},
    41: {"5s": 1, "4d": 4},
    42: {"5s": 1, "4d": 5},
    44: {"5s": 1, "4d": 7},
    45: {"5s": 1, "4d": 8},
    46: {"5s": 0, "4d": 10},
    47: {"5s": 1, "4d": 10},
    57: {"4f": 0, "5d": 1},
    58: {"4f": 1, "5d": 1},
    64: {"4f": 7, "5d": 1},
    78: {"6s": 1, "5d": 9},
    79: {"6s": 1, "5d": 10},
    89: {"5f": 0, "6d": 1},
    90: {"5f": 0, "6d": 2},
    91: {"5f": 2, "6d": 1},
    92: {"5f": 3, "6d": 1},
    93: {"5f": 4, "6d": 1},
    96: {"5f": 7, "6d": 1},
    110: {"7s": 1, "6d": 9},
    111: {"7s": 1, "6d": 10},
}


def _ground_state(number: int) -> dict[str, int]:
    occupation: dict[str, int] = {}
    left = number
    for orbital in _AUFBAU:
        n = min(left, {"s": 2, "p": 6, "d": 10, "f": 14}[orbital[1]])
        occupation[orbital] = n
        left -= n
    occupation.update(_EXCEPTIONS.get(number, {}))
    return occupation


def with_residual(y: Tensor, x: Tensor) -> Tensor:
    """An embedding layer's output y (R, out) plus its input x (R, in).

    Only where out = in or out = 2 in (SPEC section 4).
    """
    if y.size(1) == x.size(1):
        return y + x
    if y.size(1) == 2 * x.size(1):
        return y + torch.cat([x, x], dim=1)
    return y


class TypeEmbedding(nn.Module):
    """Type embedding table (T, n_dim) as trained: X W (+ b), plus X where the widths allow (SPEC section 4).

    Args:
        type_map: element symbols.
        n_dim: width.
        use_bias, use_econf: options `use_tebd_bias`, `use_econf_tebd`.
    """

    use_bias: Final[bool]
    rows: Tensor

    def __init__(self, type_map: list[str], n_dim: int, use_bias: bool, use_econf: bool) -> None:
        super().__init__()
        if use_econf:
            rows = torch.stack([electron_configuration(symbol) for symbol in type_map])
        else:
            # not torch.eye: on the meta device, where importers compare shapes, that imports torch's compiler
            rows = torch.from_numpy(np.eye(len(type_map)))
        self.use_bias = use_bias
        self.register_buffer("rows", rows, persistent=False)
        self.matrix = nn.Parameter(torch.randn(rows.size(1), n_dim) / (rows.size(1) + n_dim) ** 0.5)
        if use_bias:
            self.bias = nn.Parameter(torch.randn(n_dim) * 0.1)

    def forward(self) -> Tensor:
        """The table, (T, n_dim)."""
        x = self.rows.to(self.matrix.dtype)
        y = x @ self.matrix
        if self.use_bias:
            y = y + self.bias
        return with_residual(y, x)


class TypeTable(nn.Module):
    """The finished type embedding table (T, n_dim): what a package carries."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self) -> Tensor:
        """The table, (T, n_dim)."""
        return self.table


class Embedding(nn.Module):
    """Initial node, edge and angle features (SPEC section 4).

    Args:
        config: descriptor options.
        table: module whose call gives the type embedding table (T, n_dim).
        routed: whether the router input has the charge and spin embedding added (SPEC section 12).
    """

    # constants for TorchScript; not Final, because packaging fixes conditions
    __constants__ = ("own_router_table", "routed")
    use_dist: Final[bool]

    def __init__(self, config: DescriptorConfig, table: nn.Module, routed: bool = False) -> None:
        super().__init__()
        self.use_dist = config.edge_init_use_dist
        self.routed = routed
        # packaging with fixed charge and spin: nodes read another table than routers (`router_table`)
        self.own_router_table = False
        self.table = table
        self.edge_matrix = nn.Parameter(torch.randn(1, config.e_dim) * 0.5)
        self.edge_bias = nn.Parameter(torch.randn(config.e_dim) * 0.1)
        self.angle_matrix = nn.Parameter(torch.randn(1, config.a_dim))
        self.phi = Activation(config.activation_function)

    def forward(
        self,
        types: Tensor,
        edge_input: Tensor,
        cosine: Tensor,
        shift: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of nodes, edges and angles.

        Args:
            types: (n_node,) int64; edge_input: (E,); cosine: (A,).
            shift: (K, n_dim) charge and spin embedding of K conditions (`ConditionInputs.shift`); None: the
                model has none.
            condition: (n_node,) int64, row of `shift` of every node.

        Returns:
            Features of nodes (n_node, n_dim), edges (E, e_dim) and angles (A, a_dim).
        """
        if shift is not None and condition is not None:
            rows = self.table().index_select(0, types)
            node = self.phi(rows + shift.to(rows.dtype).index_select(0, condition))
        else:
            node = self.phi(self.table()).index_select(0, types)
        edge = edge_input.unsqueeze(1) * self.edge_matrix + self.edge_bias
        if not self.use_dist:
            edge = self.phi(edge)
        angle = (cosine * (1.0 / math.pi**0.5)).unsqueeze(1) * self.angle_matrix
        return node, edge, angle

    @torch.jit.export
    def group_features(self, composition: Tensor, shift: Tensor | None = None) -> Tensor:
        """Router input of every routing group, (G, n_dim).

        Args:
            composition: (G, T) fractions of the elements: one row of 1 per element, or that of a structure.
            shift: (G, n_dim) charge and spin embedding of each group; read only where the model routes on it.
        """
        table = self.table()
        if self.own_router_table:
            table = self.router_table()  # type: ignore[operator]
        features = composition @ table
        if self.routed and shift is not None:
            features = features + shift.to(features.dtype)
        return features
