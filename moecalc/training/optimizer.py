"""The optimizer of a fit: orthogonal steps for matrices, Adam for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from moecalc.training.options import OptimizerName

_ADAM_BETAS: Final = (0.9, 0.99)
_ADAM_EPSILON: Final = 1e-8
_MOMENTUM: Final = 0.95
_NARROWEST: Final = 8  # of a matrix that is worth a direction of its own

ITERATIONS: Final = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Coefficients a, b, c of x -> a x + b x^3 + c x^5, which take singular values from 1e-3 to 1 close to 1."""


def orthogonalized(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to every matrix, about: its singular vectors, and values near 1.

    The iteration X -> X (a + b X^T X + c (X^T X)^2) is taken on the smaller Gram matrix alone, since all its
    factors commute.

    Args:
        matrices: (..., rows, columns).
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        return orthogonalized(matrices.mT).mT
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-12)
    gram = x.mT @ x
    one = torch.eye(gram.shape[-1], dtype=x.dtype)
    product = one
    for a, b, c in ITERATIONS:
        factor = a * one + b * gram + c * (gram @ gram)
        product = product @ factor
        gram = gram @ factor @ factor
    return x @ product


class Muon(torch.optim.Optimizer):
    """Momentum that is made orthogonal, for matrices; Adam for all other parameters.

    Every matrix of a stack (experts) is one of its own. The step of a matrix has the root mean square that
    Adam's has about, 0.2 of the learning rate, so that both take the same rate. (K. Jordan and others, Muon,
    2024; J. Liu and others, arXiv:2502.16982. `torch.optim.Muon` takes no stacks of matrices.)

    Args:
        parameters: of the model.
        lr: learning rate.
        is_matrix: whether a parameter is a matrix or a stack of them.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, is_matrix: Callable[[Tensor], bool]) -> None:
        super().__init__(parameters, {"lr": lr})
        self.is_matrix = is_matrix

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the gradients of the parameters that have one."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if self.is_matrix(parameter):
                    self._step_matrix(parameter, parameter.grad, group["lr"])
                else:
                    self._step_adam(parameter, parameter.grad, group["lr"])

    def _step_matrix(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1.0 - _MOMENTUM)
        direction = orthogonalized(gradient.lerp(momentum, _MOMENTUM))
        parameter.add_(direction, alpha=-0.2 * rate * max(parameter.shape[-2:]) ** 0.5)

    def _step_adam(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["steps"] = torch.zeros(())
        state["steps"] += 1
        of_mean, of_square = (1.0 - beta ** float(state["steps"]) for beta in _ADAM_BETAS)
        mean = state["mean"].lerp_(gradient, 1.0 - _ADAM_BETAS[0])
        square = state["square"].lerp_(gradient * gradient, 1.0 - _ADAM_BETAS[1])
        parameter.addcdiv_(mean / of_mean, (square / of_square).sqrt_().add_(_ADAM_EPSILON), value=-rate)


def make_optimizer(name: OptimizerName, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """The optimizer of that name for the parameters that a model trains.

    Args:
        name: `adam`, or `muon`: see `Muon`; tables of elements and gates have steps of Adam even so.
        model: `moecalc.nn.MoEPotential`.
        rate: learning rate.
    """
    named = [(path, parameter) for path, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    if name == "adam":
        return torch.optim.Adam(parameters, lr=rate, betas=_ADAM_BETAS)
    matrices = {
        id(parameter)
        for path, parameter in named
        if path.startswith(("layers.", "readout."))
        and path.endswith(".matrix")
        and min(parameter.shape[-2:]) >= _NARROWEST
    }
    return Muon(parameters, rate, lambda parameter: id(parameter) in matrices)
