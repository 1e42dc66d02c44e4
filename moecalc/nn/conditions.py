"""Charge, spin multiplicity and frame parameters as a model reads them (SPEC section 12).

They depend on no coordinate: an engine calls `ConditionInputs` once per set of values, never per step.
"""

from typing import Final

import torch
from torch import Tensor, nn

from moecalc.conditions import CHARGE_RANGE, SPIN_RANGE
from moecalc.nn.activation import Activation
from moecalc.nn.config import ModelConfig
from moecalc.nn.descriptor import with_residual

N_CHARGE = CHARGE_RANGE[1] - CHARGE_RANGE[0] + 1
N_SPIN = SPIN_RANGE[1] - SPIN_RANGE[0] + 1


class ConditionEmbedding(nn.Module):
    """Charge and multiplicity -> what is added to every row of the type table.

    c = phi([C[q + 100], S[s]] W_mix + b_mix)

    Args:
        n_dim: width of the node features.
        activation: name of phi.
    """

    charge_offset: Final[int]

    def __init__(self, n_dim: int, activation: str) -> None:
        super().__init__()
        self.charge_offset = -CHARGE_RANGE[0]
        self.charge_matrix = nn.Parameter(torch.randn(N_CHARGE, n_dim) / (N_CHARGE + n_dim) ** 0.5)
        self.spin_matrix = nn.Parameter(torch.randn(N_SPIN, n_dim) / (N_SPIN + n_dim) ** 0.5)
        self.mix_matrix = nn.Parameter(torch.randn(2 * n_dim, n_dim) / (3 * n_dim) ** 0.5)
        self.mix_bias = nn.Parameter(torch.randn(n_dim) * 0.1)
        self.phi = Activation(activation)

    def _rows(self, matrix: Tensor, index: Tensor) -> Tensor:
        """Rows of a table whose input is one-hot, with the residual of an embedding layer."""
        rows = matrix.index_select(0, index)
        one_hot = torch.nn.functional.one_hot(index, matrix.size(0)).to(rows.dtype)
        return with_residual(rows, one_hot)

    def forward(self, charge_spin: Tensor) -> Tensor:
        """Charge and multiplicity (S, 2) int64 -> (S, n_dim)."""
        charge = self._rows(self.charge_matrix, charge_spin[:, 0] + self.charge_offset)
        spin = self._rows(self.spin_matrix, charge_spin[:, 1])
        return self.phi(torch.addmm(self.mix_bias, torch.cat([charge, spin], dim=1), self.mix_matrix))


class ConditionInputs(nn.Module):
    """What a model takes beside a structure. Every model has it; most take nothing.

    Tensors are float64 in a package: they are read once per condition, and the reader rounds.

    Args:
        config: the architecture.
    """

    # constants for TorchScript; not Final, because packaging fixes conditions
    __constants__ = ("n_case", "n_fparam", "routed", "takes_charge_spin", "takes_fparam", "with_case")
    n_dim: Final[int]
    fparam_avg: Tensor
    fparam_inv_std: Tensor
    case_embedding: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_dim = config.descriptor.n_dim
        self.takes_charge_spin = config.descriptor.add_chg_spin_ebd
        self.n_fparam = config.fitting.numb_fparam
        self.routed = config.routes_on_charge_spin
        # without conditions the case embedding is the fitting net's own
        self.n_case = config.fitting.dim_case_embd if config.takes_conditions else 0
        # TorchScript leaves out a branch only where its condition is one constant
        self.takes_fparam, self.with_case = self.n_fparam > 0, self.n_case > 0
        if self.takes_charge_spin:
            self.embedding = ConditionEmbedding(self.n_dim, config.descriptor.activation_function)
        if self.takes_fparam:
            self.register_buffer("fparam_avg", torch.zeros(self.n_fparam))
            self.register_buffer("fparam_inv_std", torch.ones(self.n_fparam))
        if self.with_case:
            self.register_buffer("case_embedding", torch.zeros(self.n_case))

    @torch.jit.export
    def shift(self, charge_spin: Tensor) -> Tensor:
        """Charge and multiplicity (S, 2) int64 -> what every row of the type table gains, (S, n_dim).

        Zeros where the model takes none.
        """
        if self.takes_charge_spin:
            return self.embedding(charge_spin)
        return torch.zeros((charge_spin.size(0), self.n_dim), dtype=torch.float64, device=charge_spin.device)

    @torch.jit.export
    def fitting_input(self, fparam: Tensor) -> Tensor:
        """Frame parameters (S, n_fparam) -> constant inputs of the fitting net, (S, n_fparam + n_case)."""
        if self.takes_fparam:
            parts = (fparam.to(self.fparam_avg.dtype) - self.fparam_avg) * self.fparam_inv_std
        else:
            parts = fparam[:, :0]
        if self.with_case:
            case = self.case_embedding.unsqueeze(0).expand(fparam.size(0), -1)
            parts = torch.cat([parts.to(case.dtype), case], dim=1)
        return parts
