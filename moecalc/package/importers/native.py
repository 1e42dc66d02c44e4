"""moecalc's own checkpoint form: a config and a state dict (docs/checkpoints.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from moecalc.errors import CheckpointError
from moecalc.files import to_bytes, write_bytes
from moecalc.nn import ModelConfig, MoEPotential
from moecalc.nn.deepmd_input import first_error, shown
from moecalc.package.importers.checks import check_config, check_finite, check_statistics, check_tensors
from moecalc.package.importers.common import ImportedModel
from moecalc.package.importers.options import check_type_map

KEY = "moecalc_checkpoint"
VERSION = 1


def save_checkpoint(
    path: str | Path, model: MoEPotential, config: ModelConfig, trained_elements: list[str] | None = None
) -> None:
    """Write a model in moecalc's own form.

    Args:
        path: file to write.
        model: the model; its `state_dict` is stored.
        config: its architecture.
        trained_elements: elements that training data covered; None = all of `type_map`.
    """
    content = {
        KEY: VERSION,
        "config": config.model_dump(mode="json"),
        "state_dict": {k: v.detach().cpu() for k, v in model.state_dict().items()},
        "trained_elements": list(config.type_map) if trained_elements is None else list(trained_elements),
    }
    write_bytes(path, to_bytes(content))


def import_native(data: Mapping[str, Any], head: str | None) -> ImportedModel:
    """Import moecalc's own form.

    Raises:
        CheckpointError: newer version, invalid configuration, tensors that do not fit it, or a head was asked
            for.
    """
    version = data[KEY]
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(
            f"{KEY} = {shown(version)}, expected {VERSION}, the version of moecalc's own form"
        )
    if version > VERSION:
        raise CheckpointError(
            f"moecalc checkpoint form {version!r} is newer than this moecalc reads ({VERSION}): upgrade "
            "moecalc"
        )
    if head is not None:
        raise CheckpointError(f"--head {head!r} was given, but this checkpoint is single-task: leave it out")
    config = _config(data.get("config"))
    state = data.get("state_dict")
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"state_dict = {shown(state)}, expected tensors by the names of docs/checkpoints.md"
        )
    state = {str(k): v for k, v in state.items()}
    check_tensors(state, _dtypes(state, config))
    for name, value in state.items():
        check_finite(name, value)
    _check_pairs(state)
    network = {k: v for k, v in state.items() if not k.startswith(("geometry.", "dtype_probe", "pair_mask"))}
    shared = {k for k in network if k.startswith("readout.net.table.")}
    n = sum(v.numel() for k, v in network.items() if k not in shared and "energy_" not in k)
    trained = data.get("trained_elements") or list(config.type_map)
    if not isinstance(trained, list | tuple) or not all(e in config.type_map for e in trained):
        raise CheckpointError(
            f"trained_elements = {shown(trained)}, expected a list of symbols of type_map "
            f"({' '.join(config.type_map)})"
        )
    return ImportedModel(config, state, "moecalc", None, [e for e in config.type_map if e in set(trained)], n)


def _config(value: object) -> ModelConfig:
    """The configuration, with the types that the schema states: nothing is converted.

    Raises:
        CheckpointError: names the option.
    """
    try:
        # JSON has lists where the schema has tuples, and tells numbers from words
        config = ModelConfig.model_validate_json(json.dumps(value), strict=True)
    except (TypeError, ValueError, RecursionError) as error:
        reason = first_error(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        raise CheckpointError(f"config: {reason[:200]}") from None
    check_type_map(config.type_map)
    check_config(config)
    return config


def _dtypes(state: Mapping[str, Any], config: ModelConfig) -> Callable[[str], tuple[torch.dtype, ...]]:
    """Dtypes by name: what the trainer computed in, one for descriptor and one for fitting net."""

    def of(probe: str, precision: str) -> torch.dtype:
        value = state.get(probe)
        dtype = value.dtype if isinstance(value, torch.Tensor) else None
        return dtype if dtype in (torch.float32, torch.float64) else getattr(torch, precision)

    descriptor = of("embedding.edge_matrix", config.descriptor.precision)
    fitting = of("readout.net.out_matrix", config.fitting.precision)

    def dtype_of(name: str) -> tuple[torch.dtype, ...]:
        if name == "pair_mask":
            return (torch.bool,)
        if name.startswith(("geometry.", "readout.energy_")):
            return (torch.float64,)
        if name == "dtype_probe":
            return (torch.float32, torch.float64)
        if name.startswith("readout.net.table."):
            return (descriptor,)
        if name.startswith(("embedding.", "layers.")):
            return (descriptor,)
        # names that have no place in the model are refused as such, later
        return (fitting,) if name.startswith("readout.") else (torch.float32, torch.float64)

    return dtype_of


def _check_pairs(state: Mapping[str, torch.Tensor]) -> None:
    """Refuse two names of one tensor with different values, and deviations that are not positive.

    Raises:
        CheckpointError: names the tensors.
    """
    for name, value in state.items():
        twin = state.get(name.replace("readout.net.table.", "embedding.table."), value)
        if twin.shape != value.shape or not torch.equal(twin, value):
            raise CheckpointError(
                f"tensor {name!r} differs from 'embedding.{name.removeprefix('readout.net.')}', "
                "expected two names of one tensor"
            )
    if "geometry.stddev" in state:
        check_statistics("geometry.stddev", state["geometry.stddev"])
