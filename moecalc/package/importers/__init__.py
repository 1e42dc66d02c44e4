"""Reading trained checkpoints: the layout is detected from the file, never asked for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from moecalc._clean import clean_torch
from moecalc.errors import CheckpointError
from moecalc.files import describe
from moecalc.nn import ModelConfig, MoEPotential
from moecalc.package.importers.checks import check_config, check_finite, check_shape
from moecalc.package.importers.common import ImportedModel
from moecalc.package.importers.container import check_container, is_torchscript, load_plain
from moecalc.package.importers.deepmd import import_deepmd
from moecalc.package.importers.frozen import read_frozen
from moecalc.package.importers.native import KEY, import_native, save_checkpoint

__all__ = ["ImportedModel", "build_model", "load_checkpoint", "read_data", "save_checkpoint"]


@clean_torch()
def load_checkpoint(path: str | Path, head: str | None = None) -> ImportedModel:
    """Read a checkpoint of any supported layout.

    Only tensors and plain containers are unpickled, so that a checkpoint cannot run code.

    Args:
        path: the `.pt` file of a training, or the `.pth` file of `dp --pt freeze`.
        head: head of a multi-task checkpoint; None takes the one with the alias `Default`.

    Raises:
        CheckpointError: missing or unreadable file, unknown layout, unsupported option, missing or unknown
            head.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {describe(path)}, expected a trained checkpoint (.pt)")
    try:
        imported = _import(read_data(path), head)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    imported.path = str(path)
    return imported


def read_data(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint or of a frozen model, by entries as a trainer writes them.

    Raises:
        CheckpointError: unreadable, foreign, or with more than tensors and plain containers in it.
    """
    names = check_container(path)
    if is_torchscript(names):
        return read_frozen(path)
    data = load_plain(path)
    if not isinstance(data, Mapping):
        raise CheckpointError(f"holds {type(data).__name__}, expected a dictionary as trainers write it")
    return data


def _import(data: Mapping[str, Any], head: str | None) -> ImportedModel:
    if KEY in data:
        return import_native(data, head)
    state = data.get("model", data)
    if not isinstance(state, Mapping):
        raise CheckpointError("entry 'model' is not a state dict, expected what `dp --pt train` writes")
    imported = import_deepmd(state, head)
    if data.get("frozen"):
        imported.remarks.append("read from a frozen model (.pth)")
    return imported


@clean_torch()
def build_model(imported: ImportedModel, dtype: torch.dtype | None = None) -> MoEPotential:
    """Instantiate the model of an imported checkpoint.

    Args:
        imported: what `load_checkpoint` returned.
        dtype: network precision; None keeps the checkpoint's (descriptor and fitting net may differ).

    Raises:
        CheckpointError: tensors that do not fit the configuration (names them).
    """
    try:
        return _build(imported, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{imported.path}: {error}" if imported.path else str(error)) from None


def _build(imported: ImportedModel, dtype: torch.dtype | None) -> MoEPotential:
    config = imported.config
    check_config(config)
    _check_against(imported)
    model = MoEPotential(config)
    set_precision(model, config.descriptor.precision, config.fitting.precision)
    own = model.state_dict()
    for key in _DERIVED & set(imported.state):
        if key != "dtype_probe" and not torch.equal(own[key], imported.state[key].to(own[key])):
            raise CheckpointError(f"tensor {key!r} contradicts the configuration that it is made from")
    model.load_state_dict({k: v for k, v in imported.state.items() if k not in _DERIVED}, strict=False)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        set_precision(model, name, name)
    return model.eval()


# made from the configuration, not part of a checkpoint
_DERIVED = {"pair_mask", "dtype_probe", "readout.energy_weight"}


_FEW_NUMBERS = 2**24


def _most_numbers(config: ModelConfig) -> int:
    """An upper bound of the numbers in a model, from its options alone."""
    c, neuron = (
        config.descriptor,
        [*config.fitting.neuron, config.fitting.numb_fparam + config.fitting.dim_case_embd],
    )
    experts = max((r.n_routed_experts + r.n_shared_experts for r in config.moe.routers.values()), default=1)
    rows = c.axis_neuron * (c.n_dim + c.e_dim) + 2 * c.n_dim + c.e_dim + c.angle_dim
    columns = (2 + c.n_multi_edge_message) * c.n_dim + 3 * c.e_dim + c.a_dim + experts
    fitting = (len(neuron) + 1) * (max(neuron) + 2 * c.n_dim) ** 2
    tables = (len(config.type_map) + 318) * (c.n_dim + len(config.type_map)) + 2 * c.n_dim**2
    return c.nlayers * experts * rows * columns + fitting + tables


def _check_against(imported: ImportedModel) -> None:
    """Compare names and shapes of the tensors with the configuration, without the memory that it asks for.

    Raises:
        CheckpointError: names a tensor that is missing, has no place or another shape.
    """
    config, state = imported.config, imported.state
    if max(config.descriptor.nlayers, len(config.fitting.neuron)) > len(state) + 100:
        raise CheckpointError(
            f"option nlayers = {config.descriptor.nlayers} or the {len(config.fitting.neuron)} entries of "
            "neuron, expected "
            f"fewer for a checkpoint of {len(state)} tensors"
        )
    # on the meta device, torch imports its compiler, which takes seconds: only where memory is at stake
    with torch.device("meta") if _most_numbers(config) > _FEW_NUMBERS else nullcontext():
        own = MoEPotential(config).state_dict()
    missing = sorted(set(own) - set(state) - _DERIVED)
    surplus = sorted(set(state) - set(own))
    if missing or surplus:
        raise CheckpointError(
            f"tensors do not fit the configuration: missing {missing[:3] or 'none'}, unexpected "
            f"{surplus[:3] or 'none'}"
        )
    for key, value in state.items():
        in_file = imported.keys.get(key, key)
        check_shape(key, value, tuple(own[key].shape), in_file)
        check_finite(key, value, in_file)


def set_precision(model: Any, descriptor: str, fitting: str) -> None:
    """Convert the network of a (scripted) model (embedding and layers, fitting net).

    Geometry, energy shifts and condition inputs are float64 always.
    """
    d, f = getattr(torch, descriptor), getattr(torch, fitting)
    model.readout.net.to(f)
    model.embedding.to(d)
    model.layers.to(d)
    if hasattr(model, "conditions"):  # not in packages of format 1
        model.conditions.to(torch.float64)
    model.dtype_probe = model.dtype_probe.to(d)
