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

    def constant_part(self, constants: Tensor) -> tuple[Tensor, Tensor]:
        """What inputs that many rows share give: constants (K, n_c) -> bias, skip (K, n_out)."""
        n_own = self.matrix.size(0) - constants.size(1)
        bias = torch.addmm(self.bias, constants, self.matrix[n_own:])
        skip = torch.zeros_like(bias)
        if self.residual > 0:
            padded = torch.cat([constants.new_zeros((constants.size(0), n_own)), constants], dim=1)
            skip = padded if self.residual == 1 else torch.cat([padded, padded], dim=1)
        return bias, skip

    def with_constants(self, x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
        """`forward` of [x, constants]: x (R, n_in - n_c), `constant_part` of every row (R, n_out) each."""
        y = self.phi(x @ self.matrix[: x.size(1)] + bias)
        if self.has_idt:
            y = y * self.idt
        if self.residual > 0:
            padded = torch.cat([x, x.new_zeros((x.size(0), self.matrix.size(0) - x.size(1)))], dim=1)
            y = y + (padded if self.residual == 1 else torch.cat([padded, padded], dim=1)) + skip
        return y


class FittingNet(nn.Module):
    """Node features -> energies without the per-element shift, one net for all elements.

    Inputs: node features, type embedding where it is concatenated, frame parameters, case embedding.

    Args:
        config: fitting options.
        n_dim: width of the node features.
        table: type embedding table module, concatenated to the features where `concat_table`.
        concat_table: option `concat_output_tebd`.
        conditional: whether the model takes conditions: then frame parameters and case embedding come with
            the call (`ConditionInputs.fitting_input`); else the net holds the case embedding.
    """

    # constants for TorchScript; not Final, because packaging fixes conditions
    __constants__ = ("n_constant", "with_case")
    concat_table: Final[bool]
    n_hidden: Final[int]
    case_embedding: Tensor

    def __init__(
        self,
        config: FittingConfig,
        n_dim: int,
        table: nn.Module,
        concat_table: bool,
        conditional: bool = False,
    ) -> None:
        super().__init__()
        self.concat_table = concat_table
        self.with_case = config.dim_case_embd > 0 and not conditional
        self.n_constant = config.numb_fparam + config.dim_case_embd if conditional else 0
        self.n_hidden = len(config.neuron)
        self.table = table
        if self.with_case:
            self.register_buffer("case_embedding", torch.zeros(config.dim_case_embd))
        width = n_dim * (2 if concat_table else 1) + config.numb_fparam + config.dim_case_embd
        layers = []
        for n_out in config.neuron:
            layers.append(FittingLayer(width, n_out, config.activation_function, config.resnet_dt))
            width = n_out
        self.layers = nn.ModuleList(layers)
        self.out_matrix = nn.Parameter(torch.randn(width, 1) / width**0.5)
        self.out_bias = nn.Parameter(torch.zeros(1))

    @torch.jit.export
    def first_layer(self, fitting_inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What constant inputs give in the first layer, once per condition.

        phi(d W_d + bias[k]) [* idt] + (d where the layer has a skip path) + skip[k]

        Args:
            fitting_inputs: (K, n_constant) from `ConditionInputs.fitting_input`.

        Returns:
            bias, skip (K, n_0), in the net's dtype; skip is zero without a skip path. (K, 0) without hidden
            layers.
        """
        constants = fitting_inputs.to(self.out_bias.dtype)
        bias, skip = constants[:, :0], constants[:, :0]
        for k, layer in enumerate(self.layers):
            if k == 0:
                bias, skip = layer.constant_part(constants)  # type: ignore[operator]
        return bias, skip

    def forward(
        self,
        node: Tensor,
        types: Tensor,
        condition: Tensor | None = None,
        fitting_inputs: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Energies (R,) in eV, in the net's dtype.

        Args:
            node: (R, n_dim) node features; types: (R,) int64.
            condition, fitting_inputs, shift: as in `Readout.forward`.
        """
        x = node.to(self.out_bias.dtype)
        if self.concat_table:
            rows = self.table().to(x.dtype).index_select(0, types)
            if shift is not None and condition is not None:
                rows = rows + shift.to(x.dtype).index_select(0, condition)
            x = torch.cat([x, rows], dim=1)
        if self.with_case:
            x = torch.cat([x, self.case_embedding.unsqueeze(0).expand(x.size(0), -1)], dim=1)
        if self.n_constant > 0:
            if condition is None or fitting_inputs is None:
                raise RuntimeError(
                    "the fitting net needs frame parameters or the case embedding: none were given"
                )
            if self.n_hidden > 0:
                bias, skip = self.first_layer(fitting_inputs)
                bias, skip = bias.index_select(0, condition), skip.index_select(0, condition)
                for k, layer in enumerate(self.layers):
                    x = layer.with_constants(x, bias, skip) if k == 0 else layer(x)  # type: ignore[operator]
            else:
                x = torch.cat([x, fitting_inputs.to(x.dtype).index_select(0, condition)], dim=1)
        else:
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

    def forward(
        self,
        node: Tensor,
        types: Tensor,
        condition: Tensor | None = None,
        fitting_inputs: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Energies (n_local,) float64 in eV.

        Args:
            node: (n_local, n_dim) node features; types: (n_local,) int64.
            condition: (n_local,) int64, which of K conditions every atom has; None where the model takes
                none.
            fitting_inputs: (K, n_fparam + n_case) from `ConditionInputs.fitting_input`.
            shift: (K, n_dim) from `ConditionInputs.shift`, for models that concatenate the type embedding.
        """
        net = self.net(node, types, condition, fitting_inputs, shift)
        energy = net.to(torch.float64) + self.energy_shift.index_select(0, types)
        return energy * self.energy_weight.index_select(0, types)
