"""Reading trained checkpoints: the layout is detected from the file, never asked for."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moecalc._clean import clean_torch
from moecalc.errors import CheckpointError
from moecalc.files import CHECKPOINT, describe, load_failure
from moecalc.nn import MoEPotential
from moecalc.package.importers.common import ImportedModel
from moecalc.package.importers.deepmd import import_deepmd
from moecalc.package.importers.native import KEY, import_native, save_checkpoint

__all__ = ["ImportedModel", "build_model", "load_checkpoint", "save_checkpoint"]


@clean_torch()
def load_checkpoint(path: str | Path, head: str | None = None) -> ImportedModel:
    """Read a checkpoint of any supported layout.

    Only tensors and plain containers are unpickled (`weights_only=True`): a checkpoint cannot run code.

    Args:
        path: the `.pt` file.
        head: head of a multi-task checkpoint.

    Raises:
        CheckpointError: missing or unreadable file, unknown layout, unsupported option, missing or unknown head.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {describe(path)}, expected a trained checkpoint (.pt)")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise CheckpointError(
                    f"{path}: a TorchScript archive (a frozen model or a package), expected a trained checkpoint: "
                    "use the .pt file of the training folder"
                )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about pickles of others
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises whatever a file leads it to
        if (what := describe(path)) is not None and what != CHECKPOINT:
            raise CheckpointError(f"{path}: not a readable checkpoint but {what}") from None
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({load_failure(error)}): copy or train it again"
        ) from None
    try:
        if not isinstance(data, Mapping):
            raise CheckpointError(f"holds {type(data).__name__}, expected a dictionary as trainers write it")
        if KEY in data:
            return import_native(data, head)
        state = data.get("model", data)
        if not isinstance(state, Mapping):
            raise CheckpointError("entry 'model' is not a state dict, expected what `dp --pt train` writes")
        return import_deepmd(state, head)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


@clean_torch()
def build_model(imported: ImportedModel, dtype: torch.dtype | None = None) -> MoEPotential:
    """Instantiate the model of an imported checkpoint.

    Args:
        imported: what `load_checkpoint` returned.
        dtype: network precision; None keeps the checkpoint's (descriptor and fitting net may differ).

    Raises:
        CheckpointError: tensors that do not fit the configuration (names them).
    """
    config = imported.config
    model = MoEPotential(config)
    set_precision(model, config.descriptor.precision, config.fitting.precision)
    own = model.state_dict()
    # derived from the configuration, not part of a checkpoint
    derived = {"pair_mask", "dtype_probe", "readout.energy_weight"}
    missing = sorted(set(own) - set(imported.state) - derived)
    surplus = sorted(set(imported.state) - set(own))
    if missing or surplus:
        raise CheckpointError(
            f"tensors do not fit the configuration: missing {missing[:3] or 'none'}, unexpected {surplus[:3] or 'none'}"
        )
    for key, value in imported.state.items():
        if own[key].shape != value.shape:
            raise CheckpointError(
                f"tensor {key!r} has shape {tuple(value.shape)}, expected {tuple(own[key].shape)} by the configuration"
            )
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"tensor {key!r} has non-finite values: the training diverged, use an earlier checkpoint"
            )
    model.load_state_dict(imported.state, strict=False)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        set_precision(model, name, name)
    return model.eval()


def set_precision(model: Any, descriptor: str, fitting: str) -> None:
    """Convert the network of a (scripted) model (embedding and layers, fitting net); geometry and energy shifts stay float64."""
    d, f = getattr(torch, descriptor), getattr(torch, fitting)
    model.readout.net.to(f)
    model.embedding.to(d)
    model.layers.to(d)
    model.dtype_probe = model.dtype_probe.to(d)
