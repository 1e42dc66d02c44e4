"""Checks on the tensors of a checkpoint and on a whole configuration, before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moecalc.errors import CheckpointError
from moecalc.nn.config import ModelConfig
from moecalc.nn.deepmd_input import shown

_LARGEST = 10**7
_MOST_REPEATED = 10**8
"""An expanded tensor claims more elements than the file holds: up to this number, memory stays small."""


def check_tensors(tensors: Mapping[str, Any], dtype_of: Callable[[str], tuple[torch.dtype, ...]]) -> None:
    """Check kind and dtype of all tensors of a state dict.

    Args:
        tensors: by their names in the file.
        dtype_of: the dtypes that a tensor of a name may have.

    Raises:
        CheckpointError: names the tensor, what it is and what was expected.
    """
    for name, value in tensors.items():
        check_kind(name, value)
        allowed = dtype_of(name)
        if value.dtype not in allowed:
            wanted = " or ".join(str(t).removeprefix("torch.") for t in allowed)
            raise CheckpointError(
                f"tensor {name!r} is {str(value.dtype).removeprefix('torch.')}, expected {wanted} by the "
                "checkpoint's "
                "precision: save it as it was trained"
            )


def check_kind(name: object, value: object) -> None:
    """Refuse what is no plain tensor in memory.

    Raises:
        CheckpointError: no tensor, or a sparse, quantized or meta one, or one that claims more elements than
            the file holds.
    """
    if not isinstance(name, str):
        raise CheckpointError(f"state dict has an entry named {shown(name)}, expected names of tensors")
    if not isinstance(value, Tensor):
        raise CheckpointError(f"checkpoint entry {name!r} is {shown(value)}, expected a tensor")
    special = (
        "sparse" if value.layout is not torch.strided else "quantized" if value.is_quantized else
        "meta" if value.is_meta else "nested" if value.is_nested else ""
    )  # fmt: skip
    if special:
        raise CheckpointError(f"tensor {name!r} is a {special} tensor, expected a plain one with values")
    stored, distinct = value.untyped_storage().nbytes(), _distinct(value).numel() * value.element_size()
    if value.numel() > _MOST_REPEATED and value.numel() * value.element_size() > stored:
        raise CheckpointError(
            f"tensor {name!r} of shape {tuple(value.shape)} repeats {stored:,} bytes, expected at most "
            f"{_MOST_REPEATED:,} elements"
        )
    if distinct > max(stored, 1):
        raise CheckpointError(
            f"tensor {name!r} of shape {tuple(value.shape)} has overlapping elements, expected one value for "
            "each"
        )


def _distinct(value: Tensor) -> Tensor:
    """The same values without the repetitions of an expanded tensor: its size is bounded by the file's."""
    for axis, stride in enumerate(value.stride()):
        if stride == 0 and value.size(axis) > 1:
            value = value.narrow(axis, 0, 1)
    return value


def check_finite(name: str, value: Tensor, in_file: str = "") -> None:
    """Refuse NaN and infinities anywhere, used or not.

    `in_file` is another name that the file has for the tensor.

    Raises:
        CheckpointError: names the tensor.
    """
    if not value.is_floating_point():
        return
    values = _distinct(value.detach())
    if name.endswith("min_nbor_dist"):
        bad = bool(torch.isnan(values).any())  # infinite for training data of isolated atoms, and not used
    else:
        bad = not bool(torch.isfinite(values).all())
    if bad:
        raise CheckpointError(
            f"tensor {name!r} has non-finite values: the training diverged, use an earlier "
            f"checkpoint{_also(in_file, name)}"
        )


def _also(in_file: str, name: str) -> str:
    return f" (in the file: {in_file!r})" if in_file not in ("", name) else ""


def check_shape(name: str, value: Tensor, expected: tuple[int, ...], in_file: str = "") -> None:
    """Refuse another shape than `expected`; `in_file` is another name that the file has for the tensor.

    Raises:
        CheckpointError: names tensor and shapes.
    """
    if tuple(value.shape) != expected:
        raise CheckpointError(
            f"tensor {name!r} has shape {tuple(value.shape)}, expected {expected} by the "
            f"configuration{_also(in_file, name)}"
        )


def check_statistics(name: str, value: Tensor) -> None:
    """Refuse standard deviations that are not positive: features are divided by them.

    Raises:
        CheckpointError: names the tensor and the value.
    """
    if value.numel() and float(value.min()) <= 0.0:
        raise CheckpointError(
            f"tensor {name!r} has a standard deviation of {float(value.min()):g}, expected positive ones"
        )


def check_config(config: ModelConfig) -> None:
    """Bounds that the schema does not state: finite numbers, sane sizes, indices of types that exist.

    Raises:
        CheckpointError: names the option by its path.
    """
    _check_numbers(config.model_dump(), "")
    n = len(config.type_map)
    lists = {
        "descriptor.exclude_types": [i for pair in config.descriptor.exclude_types for i in pair],
        "pair_exclude_types": [i for pair in config.pair_exclude_types for i in pair],
        "atom_exclude_types": list(config.fitting.atom_exclude_types),
    }
    for where, indices in lists.items():
        for index in indices:
            if not 0 <= index < n:
                raise CheckpointError(
                    f"option {where} has type index {index}, expected 0 to {n - 1} for a type_map of {n} "
                    "elements"
                )
    for where, name in (
        ("descriptor", config.descriptor.activation_function),
        ("fitting_net", config.fitting.activation_function),
    ):
        threshold = name.partition(":")[2]
        if threshold and not math.isfinite(float(threshold)):
            raise CheckpointError(
                f"option {where}.activation_function = {shown(name)}, expected a finite threshold after the "
                "colon"
            )
    for width in config.fitting.neuron:
        if width <= 0:
            raise CheckpointError(
                f"option fitting_net.neuron = {shown(config.fitting.neuron)}, expected widths above 0"
            )


def _check_numbers(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_numbers(entry, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for entry in value:
            _check_numbers(entry, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"option {where} = {value}, expected a finite number")
    elif isinstance(value, float) and abs(value) > _LARGEST:
        raise CheckpointError(f"option {where} = {value:g}, expected a number up to {_LARGEST:,}")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise CheckpointError(f"option {where} = {shown(value)}, expected a whole number up to {_LARGEST:,}")


def deepmd_dtypes(descriptor: str, fitting: str) -> Callable[[str], tuple[torch.dtype, ...]]:
    """Dtypes in a DeePMD-kit state dict (SPEC section 1), by name.

    Args:
        descriptor, fitting: precision of the two sections, "float32" or "float64".
    """
    d, f = getattr(torch, descriptor), getattr(torch, fitting)
    always_double = (
        "min_nbor_dist",
        "atomic_model.out_bias",
        "atomic_model.out_std",
        "fitting_net.bias_atom_e",
        # of moecalc's descriptor in DeePMD-kit
        "descriptor.geometry.mean",
        "descriptor.geometry.stddev",
    )

    def dtype_of(name: str) -> tuple[torch.dtype, ...]:
        if name.endswith(".descriptor.pair_mask"):
            return (torch.bool,)
        if name.endswith(".descriptor.embedding.table.rows"):
            return (torch.float32, torch.float64)
        if name.endswith(always_double):
            return (torch.float64,)
        return (f,) if ".fitting_net." in name else (d,)

    return dtype_of
