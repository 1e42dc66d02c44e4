"""What the importers of all checkpoint layouts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from moecalc.errors import CheckpointError
from moecalc.nn.config import DescriptorConfig, FittingConfig, ModelConfig, MoEConfig
from moecalc.nn.deepmd_input import (
    DESCRIPTOR,
    PRECISIONS,
    OptionError,
    first_error,
    read_descriptor,
    read_fitting,
    shown,
)
from moecalc.package.importers.checks import check_config, check_finite, check_kind, check_statistics
from moecalc.package.importers.options import REPFLOW, same

State = dict[str, Tensor]


@dataclass
class ImportedModel:
    """A checkpoint in moecalc's terms.

    Attributes:
        config: architecture.
        state: tensors by the names of `MoEPotential.state_dict()`.
        layout: name of the layout it came from.
        head: head of a multi-task file, or None.
        trained_elements: elements that training data covered, as far as the file tells.
        n_parameters: numbers of network parameters in the file's model (of this head), dead ones included.
        remarks: what the user should know (shown in the report and kept in the metadata).
        keys: names in the file of the tensors in `state`, for messages.
        path: the file, for messages.
    """

    config: ModelConfig
    state: State
    layout: str
    head: str | None = None
    trained_elements: list[str] = field(default_factory=list)
    n_parameters: int = 0
    remarks: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)
    path: str = ""


class Tensors:
    """Read access to the tensors of a state dict under a prefix, with errors that name the key.

    It remembers what was read, so that nothing of a file is left out unnoticed.
    """

    def __init__(self, tensors: Mapping[str, Any], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix
        self._read: set[str] = set()
        self._stored: dict[int, str] = {}  # names by the address of their values

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._tensors

    def __getitem__(self, key: str) -> Tensor:
        name = self._prefix + key
        if name not in self._tensors:
            raise CheckpointError(
                f"checkpoint has no tensor {name!r}, expected by its configuration: retrain or re-save it"
            )
        value = self._tensors[name]
        check_kind(name, value)
        self._read.add(name)
        self._stored[_address(value)] = name
        return value.detach()

    def shaped(self, key: str, *shape: int | None) -> Tensor:
        """A tensor of a known shape; None stands for any size.

        Raises:
            CheckpointError: another shape.
        """
        value = self[key]
        fits = value.dim() == len(shape) and all(
            n in (None, m) for n, m in zip(shape, value.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise CheckpointError(
                f"tensor {self._prefix + key!r} has shape {tuple(value.shape)}, expected ({wanted})"
            )
        return value

    def stack(self, keys: list[str]) -> Tensor:
        """Tensors of one shape along a new first axis.

        Raises:
            CheckpointError: a tensor whose shape differs from the first one's.
        """
        values = [self[keys[0]]]
        values += [self.shaped(key, *values[0].shape) for key in keys[1:]]
        return self.named(torch.stack(values), keys[0])

    def named(self, value: Tensor, key: str) -> Tensor:
        """Let messages about a tensor made from others call it by `key`."""
        self._stored[_address(value)] = self._prefix + key
        return value

    def names_in_file(self, state: State) -> dict[str, str]:
        """Names in the file of an imported state's tensors, where they are known."""
        known = ((name, self._stored.get(_address(value))) for name, value in state.items())
        return {name: key for name, key in known if key is not None}

    def skip(self, key: str) -> None:
        """Count a tensor as read."""
        self._read.add(self._prefix + key)

    def unread(self) -> list[str]:
        """Names below the prefix that nobody asked for."""
        return [name for name in self.names() if self._prefix + name not in self._read]

    def under(self, prefix: str) -> Tensors:
        """The tensors below a further prefix."""
        below = Tensors(self._tensors, self._prefix + prefix)
        below._read, below._stored = self._read, self._stored
        return below

    def full(self, key: str) -> str:
        """The name of a tensor in the file."""
        return self._prefix + key

    def names(self) -> list[str]:
        """Names below the prefix."""
        n = len(self._prefix)
        return [k[n:] for k in self._tensors if k.startswith(self._prefix)]

    def count(self, prefix: str) -> int:
        """How many consecutive indices 0, 1, ... exist directly below `prefix`."""
        n = 0
        while any(key.startswith(f"{prefix}{n}.") for key in self.names()):
            n += 1
        return n


def _address(value: Tensor) -> int:
    return int(value.untyped_storage().data_ptr())


# a value other than these would change the energy in a way moecalc does not implement
_INERT: dict[str, tuple[object, ...]] = {
    "bridging_method": ("None", None, "none", ""),
    "spin": (None, {}),
    "modifier": (None, {}),
    "use_srtab": (None, ""),
    "compress": (None, {}),
}


def _reject(option: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"option {option} = {shown(value)} is not supported, expected {expected}: retrain without it or ask "
        "for it in an issue"
    )


def check_supported(params: Mapping[str, Any]) -> None:
    """Refuse what moecalc cannot evaluate among the options that it knows.

    Args:
        params: a `model_params` dictionary of one head, as `clean_params` returns it.

    Raises:
        CheckpointError: names the option, its value and what was expected.
    """
    for option, inert in _INERT.items():
        if not any(same(params.get(option, inert[0]), value) for value in inert):
            raise _reject(f"model.{option}", params[option], f"{inert[0]!r}")
    fitting = params["fitting_net"]
    if fitting.get("numb_aparam", 0):
        raise _reject("fitting_net.numb_aparam", fitting["numb_aparam"], "0")
    if fitting.get("use_aparam_as_mask"):
        raise _reject("fitting_net.use_aparam_as_mask", True, "false")
    atom_ener = fitting.get("atom_ener") or []
    if any(x is not None for x in atom_ener):
        raise _reject("fitting_net.atom_ener", atom_ener, "an empty list")


def precision(section: Mapping[str, Any], where: str) -> Literal["float32", "float64"]:
    """Precision of a section.

    Raises:
        CheckpointError: a half precision, or no precision at all.
    """
    value = section.get("precision", "default")
    if str(value) not in PRECISIONS:
        raise CheckpointError(
            f"{where}.precision = {value!r} is not supported, expected float32 or float64: retrain with one "
            "of these"
        )
    return PRECISIONS[str(value)]


def _descriptor_config(section: Mapping[str, Any]) -> DescriptorConfig:
    """Architecture of a descriptor section; experts of the two branches are read elsewhere."""
    precision(section, "descriptor")
    repflow = section.get("repflow") or {}
    own = {name: value for name, value in repflow.items() if name in REPFLOW}
    try:
        return read_descriptor({**section, "repflow": own})
    except OptionError as error:
        raise CheckpointError(f"descriptor options: {error}") from None


def _fitting_config(section: Mapping[str, Any], atom_exclude_types: list[int]) -> FittingConfig:
    precision(section, "fitting_net")
    try:
        return read_fitting(section, atom_exclude_types)
    except OptionError as error:
        raise CheckpointError(f"fitting_net options: {error}") from None


def read_common(t: Tensors, config: ModelConfig) -> State:
    """Everything of an official DPA3 state dict but the seven maps of the layers (SPEC section 1.1)."""
    d = t.under("atomic_model.descriptor.")
    flow = d.under("repflows.")
    state: State = {
        "geometry.mean": _statistics(flow, "mean", config),
        "geometry.stddev": _statistics(flow, "stddev", config),
        "embedding.edge_matrix": flow["edge_embd.matrix"],
        "embedding.edge_bias": flow["edge_embd.bias"],
        "embedding.angle_matrix": flow["angle_embd.matrix"],
    }
    table = "type_embedding.embedding.embedding_net.layers.0."
    state["embedding.table.matrix"] = d[table + "matrix"]
    if config.descriptor.use_tebd_bias:
        state["embedding.table.bias"] = d[table + "bias"]
    for name in ("matrix", "bias"):
        if f"embedding.table.{name}" in state:
            state[f"readout.net.table.{name}"] = state[f"embedding.table.{name}"]
    if config.descriptor.add_chg_spin_ebd:
        state.update(read_charge_spin(d))
    c = config.descriptor
    for layer in range(c.nlayers):
        src, dst = flow.under(f"layers.{layer}."), f"layers.{layer}."
        edge, angle = c.layer_is_live(layer)
        if edge and c.update_angle and c.a_compress_rate and not c.a_compress_use_split:
            for name in ("a_compress_n_linear", "a_compress_e_linear"):
                state[dst + name] = src[name + ".matrix"]
        if c.update_style == "res_residual":
            counts = {"n": 2 + c.n_multi_edge_message}
            if edge:
                counts["e"] = 2 if c.update_angle else 1
            if angle:
                counts["a"] = 1
            for kind, n in counts.items():
                state[f"{dst}{kind}_residual"] = src.stack([f"{kind}_residual.{q}" for q in range(n)])
    state.update(read_fitting_net(t, config))
    return state


def _statistics(flow: Tensors, name: str, config: ModelConfig) -> Tensor:
    """Mean or standard deviation of the environment (T, 4), which the file repeats for every neighbor."""
    n_types, n_sel = len(config.type_map), config.descriptor.e_sel
    value = flow.shaped(name, n_types, n_sel, 4)
    check_finite(flow.full(name), value)
    if not torch.equal(value, value[:, :1, :].expand_as(value)):
        raise CheckpointError(
            f"tensor {flow.full(name)!r} differs between neighbors of one element, expected the same values "
            "for all of axis 1"
        )
    if name == "stddev":
        check_statistics(flow.full(name), value)
    return flow.named(value[:, 0, :].to(torch.float64), name)


def read_fitting_net(t: Tensors, config: ModelConfig) -> State:
    """Fitting net and energy shifts of a DeePMD-kit state dict: the same for all descriptors."""
    state: State = {}
    f = t.under("atomic_model.fitting_net.")
    n_types = len(config.type_map)
    shift = t.shaped("atomic_model.out_bias", 1, n_types, 1)[0, :, 0].to(torch.float64)
    if "bias_atom_e" in f:
        shift = shift + f.shaped("bias_atom_e", n_types, 1)[:, 0].to(torch.float64)
    state["readout.energy_shift"] = shift
    if config.fitting.dim_case_embd:
        # models with conditions read it with the frame parameters
        owner = "conditions" if config.takes_conditions else "readout.net"
        state[f"{owner}.case_embedding"] = f["case_embd"]
    if config.fitting.numb_fparam:
        for name in ("fparam_avg", "fparam_inv_std"):
            state[f"conditions.{name}"] = f.shaped(name, config.fitting.numb_fparam)
    layers = _filter_layers(f)
    n_hidden = len(config.fitting.neuron)
    for k in range(n_hidden):
        for name in ("matrix", "bias", "idt"):
            if f"{k}.{name}" in layers:
                state[f"readout.net.layers.{k}.{name}"] = layers[f"{k}.{name}"]
    state["readout.net.out_matrix"] = layers[f"{n_hidden}.matrix"]
    if f"{n_hidden}.bias" in layers:
        state["readout.net.out_bias"] = layers[f"{n_hidden}.bias"]
    else:
        state["readout.net.out_bias"] = torch.zeros(1, dtype=layers[f"{n_hidden}.matrix"].dtype)
    return state


def read_charge_spin(d: Tensors) -> State:
    """The charge and spin embedding of this head, which heads do not share (SPEC section 12)."""
    table = "embedding.embedding.embedding_net.layers.0.matrix"
    return {
        "conditions.embedding.charge_matrix": d[f"chg_{table}"],
        "conditions.embedding.spin_matrix": d[f"spin_{table}"],
        "conditions.embedding.mix_matrix": d["mix_cs_mlp.matrix"],
        "conditions.embedding.mix_bias": d["mix_cs_mlp.bias"],
    }


def with_stored_default(config: ModelConfig, t: Tensors) -> ModelConfig:
    """The configuration with the default frame parameters of the file, which count more than the option."""
    name = "atomic_model.fitting_net.default_fparam_tensor"
    if not config.fitting.numb_fparam or name not in t:
        return config
    values = config.model_dump()
    values["fitting"]["default_fparam"] = t[name].to(torch.float64).reshape(-1).tolist()
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"default_fparam_tensor: {first_error(error)}") from None


def is_fparam_charge_spin(params: Mapping[str, Any]) -> bool:
    """Whether the descriptor reads the two frame parameters as charge and spin (SPEC section 12, G2).

    moecalc's own descriptor exists since DeePMD-kit has a separate input for them.
    """
    descriptor, fitting = params["descriptor"], params["fitting_net"]
    return bool(
        descriptor.get("add_chg_spin_ebd")
        and fitting.get("numb_fparam") == 2
        and descriptor.get("default_chg_spin") is None
        and descriptor.get("type") != DESCRIPTOR
    )


def _filter_layers(f: Tensors) -> Tensors:
    """The fitting net's layers, which files hold under two names.

    Raises:
        CheckpointError: the two differ: which one counts would be a guess.
    """
    layers, again = (f.under(f"filter_layers.{name}.0.layers.") for name in ("networks", "_networks"))
    if not layers.names():
        return again
    for name in again.names():
        check_finite(again.full(name), again[name])
        if name not in layers or not torch.equal(layers[name], again[name]):
            raise CheckpointError(
                f"tensor {again.full(name)!r} differs from {layers.full(name)!r}, expected two names of one "
                "tensor"
            )
    return layers


def build_config(params: Mapping[str, Any], moe: MoEConfig) -> ModelConfig:
    """Model configuration of a DeePMD-kit `model_params` dictionary, as `clean_params` returns it.

    Raises:
        CheckpointError: unsupported or inconsistent options.
    """
    check_supported(params)
    descriptor = _descriptor_config(params["descriptor"])
    fitting = _fitting_config(params["fitting_net"], params.get("atom_exclude_types") or [])
    try:
        config = ModelConfig(
            type_map=list(params["type_map"]),
            descriptor=descriptor,
            fitting=fitting,
            moe=moe,
            pair_exclude_types=params.get("pair_exclude_types") or [],
            fparam_is_charge_spin=is_fparam_charge_spin(params),
        )
    except ValidationError as error:
        raise CheckpointError(f"model options: {first_error(error)}") from None
    check_config(config)
    return config


def trained_elements(params: Mapping[str, Any], t: Tensors) -> list[str]:
    """Elements that training data covered, as far as the checkpoint tells.

    The trainer's own list (`info.observed_type`) where it wrote one; else an element counts as untrained when
    its energy bias is exactly zero, or when per-type statistics were taken and it has none (SPEC section 4).
    """
    type_map = list(params["type_map"])
    observed = (params.get("info") or {}).get("observed_type")
    if observed:
        if not isinstance(observed, list | tuple) or not all(isinstance(e, str) for e in observed):
            raise CheckpointError(
                f"option model.info.observed_type = {shown(observed)}, expected a list of element symbols"
            )
        return [e for e in type_map if e in set(observed)]
    bias = t["atomic_model.out_bias"][0, :, 0]
    trained = bias != 0
    if not bool(trained.any()):  # a model without biases says nothing about its data
        trained = torch.ones_like(trained)
    repflow = params["descriptor"].get("repflow") or {}
    if repflow.get("fix_stat_std", 0.3) == 0:
        d = t.under("atomic_model.descriptor.")
        stddev = d["geometry.stddev"] if "geometry.stddev" in d else d["repflows.stddev"][:, 0, :]
        no_data = (stddev - 0.1).abs().amax(dim=1) < 1e-12
        if not bool(no_data.all()):
            trained = trained & ~no_data
    return [e for e, ok in zip(type_map, trained.tolist(), strict=True) if ok]
