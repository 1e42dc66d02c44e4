"""moecalc's own checkpoint form: a config and a state dict (docs/checkpoints.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from moecalc.errors import CheckpointError
from moecalc.nn import ModelConfig, MoEPotential
from moecalc.package.importers.common import ImportedModel, first_error

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
    torch.save(
        {
            KEY: VERSION,
            "config": config.model_dump(mode="json"),
            "state_dict": {k: v.detach().cpu() for k, v in model.state_dict().items()},
            "trained_elements": list(config.type_map) if trained_elements is None else list(trained_elements),
        },
        path,
    )


def import_native(data: Mapping[str, Any], head: str | None) -> ImportedModel:
    """Import moecalc's own form.

    Raises:
        CheckpointError: newer version, invalid configuration, tensors that do not fit it, or a head was asked for.
    """
    version = data[KEY]
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"moecalc checkpoint form {version!r} is newer than this moecalc reads ({VERSION}): upgrade moecalc"
        )
    if head is not None:
        raise CheckpointError(f"--head {head!r} was given, but this checkpoint is single-task: leave it out")
    try:
        config = ModelConfig.model_validate(data.get("config"))
    except ValidationError as error:
        raise CheckpointError(f"config: {first_error(error)}") from None
    state = data.get("state_dict")
    if not isinstance(state, Mapping):
        raise CheckpointError(
            "checkpoint has no state_dict, expected tensors by the names of docs/checkpoints.md"
        )
    network = {k: v for k, v in state.items() if not k.startswith(("geometry.", "dtype_probe", "pair_mask"))}
    shared = {k for k in network if k.startswith("readout.net.table.")}
    n = sum(v.numel() for k, v in network.items() if k not in shared and "energy_" not in k)
    trained = data.get("trained_elements") or list(config.type_map)
    return ImportedModel(
        config, dict(state), "moecalc", None, [e for e in config.type_map if e in set(trained)], n
    )
