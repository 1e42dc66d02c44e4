"""Faster activations for training: the formulas of `moecalc.nn`, each derivative in one pass over memory.

Training on forces differentiates twice, and autograd spends most of a step on the many elementwise operations
that the derivatives of an activation fall into. Here the activation, its first and its second derivative are
written out, and `torch.compile` makes one loop of each. `MOECALC_COMPILE=0` turns this off.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import maybe_mark_dynamic

from moecalc.nn.activation import Activation
from moecalc.nn.moe import ExpertLinear

log = logging.getLogger("deepmd.moecalc")

_COMPILED_KINDS = ("silut", "silu", "tanh")


def _derivatives(
    x: Tensor, kind: str, threshold: float, slope: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """phi(x), phi'(x), phi''(x), from one exponential."""
    if kind == "tanh":
        t = torch.tanh(x)
        d = 1.0 - t * t
        return t, d, -2.0 * t * d
    if kind == "silu":
        s = torch.sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s)), s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))
    low = x < threshold
    # tanh(w) = 2 sigmoid(2 w) - 1: one sigmoid serves both branches
    s = torch.sigmoid(torch.where(low, x, 2.0 * slope * (x - threshold)))
    t = 2.0 * s - 1.0
    d = 1.0 - t * t
    value = torch.where(low, x * s, t + offset)
    first = torch.where(low, s * (1.0 + x * (1.0 - s)), slope * d)
    second = torch.where(low, s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s)), -2.0 * slope * slope * t * d)
    return value, first, second


# z (R, K, n): inputs of the activations of K experts; p (K,): their weights; g, g_z, g_p: gradients of the
# result y (R, n), of z, of p
def _forward(z: Tensor, p: Tensor, *phi: Any) -> Tensor:
    return (_derivatives(z, *phi)[0] * p.reshape(1, -1, 1)).sum(1)


def _backward(z: Tensor, p: Tensor, g: Tensor, *phi: Any) -> tuple[Tensor, Tensor]:
    value, first, _ = _derivatives(z, *phi)
    g = g.unsqueeze(1)
    return first * g * p.reshape(1, -1, 1), (value * g).sum(2).sum(0)


def _backward_twice(z: Tensor, p: Tensor, g: Tensor, g_z: Tensor, *phi: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, first, second = _derivatives(z, *phi)
    p, g = p.reshape(1, -1, 1), g.unsqueeze(1)
    first = first * g_z
    return g * p * second * g_z, (first * g).sum(2).sum(0), (p * first).sum(1)


@functools.cache
def _compiled(function: Callable[..., Any], phi: tuple[Any, ...]) -> Callable[..., Any]:
    # every width and number of experts is a compilation of its own
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, 64)
    return torch.compile(functools.partial(_call, function, phi))


def _call(function: Callable[..., Any], phi: tuple[Any, ...], *tensors: Tensor) -> Any:
    return function(*tensors, *phi)


def _run(function: Callable[..., Any], phi: tuple[Any, ...], *tensors: Tensor) -> Any:
    for tensor in tensors:
        if tensor.dim() > 1:  # the number of rows changes at every step
            maybe_mark_dynamic(tensor, 0)
    return _compiled(function, phi)(*tensors)


class _MixtureBackward(torch.autograd.Function):
    """First derivative of a mixture; its own derivative is what the loss on forces needs."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, p: Tensor, g: Tensor, phi: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, p, g)
        ctx.phi = phi
        ctx.set_materialize_grads(False)
        return _run(_backward, phi, z, p, g)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_z: Tensor | None, g_p: Tensor | None) -> tuple[Tensor | None, ...]:
        if g_p is not None:
            raise RuntimeError(
                "third derivatives of a mixture of experts are not available: set MOECALC_COMPILE=0"
            )
        if g_z is None:
            return None, None, None, None
        z, p, g = ctx.saved_tensors
        return *_run(_backward_twice, ctx.phi, z, p, g, g_z.contiguous()), None


class _Mixture(torch.autograd.Function):
    """y = sum_k p_k phi(z_k)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, p: Tensor, phi: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(z, p)
        ctx.phi = phi
        return _run(_forward, phi, z, p)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, p = ctx.saved_tensors
        g_z, g_p = _MixtureBackward.apply(z, p, g.contiguous(), ctx.phi)
        return g_z, g_p, None


def _combine(n_out: int, phi: tuple[Any, ...], z: Tensor, p: Tensor) -> Tensor:
    return _Mixture.apply(z.reshape(z.size(0), -1, n_out), p, phi)


@functools.cache
def _available() -> bool:
    """Whether compiled functions work here; they need a C++ compiler (CPU) or Triton (CUDA)."""
    if os.environ.get("MOECALC_COMPILE", "1") == "0":
        log.info("MOECALC_COMPILE=0: activations are not compiled")
        return False
    try:
        x = torch.linspace(-6.0, 6.0, 8).reshape(2, 2, 2)
        phi = ("silu", 0.0, 0.0, 0.0)
        _run(_forward, phi, x, torch.ones(2))
    except Exception as error:  # noqa: BLE001 # whatever the compiler stumbles over
        reason = str(error).strip().splitlines()
        log.warning(
            "activations are not compiled (%s), so that a training step takes about twice as long: a C++ "
            "compiler (g++) helps",
            reason[0][:150] if reason else type(error).__name__,
        )
        return False
    return True


def accelerate(model: nn.Module) -> None:
    """Let the expert maps of a model use compiled activations, where a compiler is at hand."""
    for experts in model.modules():
        if isinstance(experts, ExpertLinear) and experts.phi.kind in _COMPILED_KINDS and _available():
            phi: Activation = experts.phi
            experts.faster = functools.partial(
                _combine, experts.n_out, (phi.kind, phi.threshold, phi.slope, phi.offset)
            )
