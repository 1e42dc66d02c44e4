"""Energy fitting net and per-element energy shifts (SPEC section 8)."""

from typing import Final

import torch
from torch import Tensor, nn

from moecalc.nn.activation import Activation
from moecalc.nn.config import FittingConfig


class FittingLayer(nn.Module):
    """y = phi(x W + b) [* idt] [+ x, or + [x, x] where the width doubles].

    Args:
        n_in, n_out: widths.
        activation: name of phi.
        use_idt: whether the layer has a residual time step (only kept where a residual exists).
    """

    has_idt: Final[bool]
    residual: Final[int]

    def __init__(self, n_in: int, n_out: int, activation: str, use_idt: bool) -> None:
        super().__init__()
        self.residual = 1 if n_out == n_in else 2 if n_out == 2 * n_in else 0
        self.has_idt = use_idt and self.residual > 0
        self.matrix = nn.Parameter(torch.randn(n_in, n_out) / (n_in + n_out) ** 0.5)
        self.bias = nn.Parameter(torch.randn(n_out) * 0.1)
        if self.has_idt:
            self.idt = nn.Parameter(torch.full((n_out,), 0.1))
        self.phi = Activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """X (R, n_in) -> (R, n_out)."""
        y = self.phi(torch.addmm(self.bias, x, self.matrix))
        if self.has_idt:
            y = y * self.idt
        if self.residual == 1:
            y = y + x
        elif self.residual == 2:
            y = y + torch.cat([x, x], dim=1)
        return y


class FittingNet(nn.Module):
    """Node features -> energies without the per-element shift, one net for all elements.

    Args:
        config: fitting options.
        n_dim: width of the node features.
        table: type embedding table module, concatenated to the features where `concat_table`.
        concat_table: option `concat_output_tebd`.
    """

    concat_table: Final[bool]
    with_case: Final[bool]
    case_embedding: Tensor

    def __init__(self, config: FittingConfig, n_dim: int, table: nn.Module, concat_table: bool) -> None:
        super().__init__()
        self.concat_table = concat_table
        self.with_case = config.dim_case_embd > 0
        self.table = table
        if self.with_case:
            self.register_buffer("case_embedding", torch.zeros(config.dim_case_embd))
        width = n_dim * (2 if concat_table else 1) + config.dim_case_embd
        layers = []
        for n_out in config.neuron:
            layers.append(FittingLayer(width, n_out, config.activation_function, config.resnet_dt))
            width = n_out
        self.layers = nn.ModuleList(layers)
        self.out_matrix = nn.Parameter(torch.randn(width, 1) / width**0.5)
        self.out_bias = nn.Parameter(torch.zeros(1))

    def forward(self, v: Tensor, types: Tensor) -> Tensor:
        """V (R, n_dim), types (R,) -> (R,) energies in eV, in the net's dtype."""
        x = v.to(self.out_bias.dtype)
        if self.concat_table:
            x = torch.cat([x, self.table().to(x.dtype).index_select(0, types)], dim=1)
        if self.with_case:
            x = torch.cat([x, self.case_embedding.unsqueeze(0).expand(x.size(0), -1)], dim=1)
        for layer in self.layers:
            x = layer(x)
        return torch.addmm(self.out_bias, x, self.out_matrix).squeeze(1)


class Readout(nn.Module):
    """Per-atom energies: fitting net plus the shift of the element, summed in float64.

    Args:
        net: the fitting net.
        n_types: number of elements.
        excluded: `atom_exclude_types`, type indices whose atoms have no energy.
    """

    energy_shift: Tensor
    energy_weight: Tensor

    def __init__(self, net: FittingNet, n_types: int, excluded: list[int]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("energy_shift", torch.zeros(n_types, dtype=torch.float64))
        weight = torch.ones(n_types, dtype=torch.float64)
        weight[excluded] = 0.0
        self.register_buffer("energy_weight", weight)

    def forward(self, v: Tensor, types: Tensor) -> Tensor:
        """V (n_local, n_dim), types (n_local,) -> energies (n_local,) float64 in eV."""
        energy = self.net(v, types).to(torch.float64) + self.energy_shift.index_select(0, types)
        return energy * self.energy_weight.index_select(0, types)
