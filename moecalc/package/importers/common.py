"""What the importers of all checkpoint layouts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from moecalc.deepmd.options import DESCRIPTOR
from moecalc.errors import CheckpointError
from moecalc.nn.config import DescriptorConfig, FittingConfig, ModelConfig, MoEConfig

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
    """

    config: ModelConfig
    state: State
    layout: str
    head: str | None = None
    trained_elements: list[str] = field(default_factory=list)
    n_parameters: int = 0
    remarks: list[str] = field(default_factory=list)


class Tensors:
    """Read access to the tensors of a state dict under a prefix, with errors that name the key."""

    def __init__(self, tensors: Mapping[str, Any], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._tensors

    def __getitem__(self, key: str) -> Tensor:
        name = self._prefix + key
        if name not in self._tensors:
            raise CheckpointError(
                f"checkpoint has no tensor {name!r}, expected by its configuration: retrain or re-save it"
            )
        value = self._tensors[name]
        if not isinstance(value, Tensor):
            raise CheckpointError(f"checkpoint entry {name!r} is {type(value).__name__}, expected a tensor")
        return value.detach()

    def under(self, prefix: str) -> Tensors:
        """The tensors below a further prefix."""
        return Tensors(self._tensors, self._prefix + prefix)

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


PRECISIONS = {
    "float64": "float64",
    "double": "float64",
    "default": "float64",
    "float32": "float32",
    "single": "float32",
}


def precision(value: object, where: str) -> Any:
    """Translate a DeePMD-kit precision; half precisions are refused."""
    if str(value) not in PRECISIONS:
        raise CheckpointError(
            f"{where}.precision = {value!r} is not supported, expected float32 or float64: retrain with one of these"
        )
    return PRECISIONS[str(value)]


# options of the descriptor's `repflow` section that training alone needs
_TRAINING_ONLY = {
    "update_residual",
    "update_residual_init",
    "skip_stat",
    "optim_update",
    "fix_stat_std",
    "smooth_edge_update",
    "moe_ep_size",
    "moe_gpu_level_a2a",
}
_KNOWN_MODEL_KEYS = {
    "type_map",
    "descriptor",
    "fitting_net",
    "type",
    "info",
    "pair_exclude_types",
    "atom_exclude_types",
    "preset_out_bias",
    "model_branch_alias",
    "data_stat_nbatch",
    "data_stat_protect",
    "data_bias_nsample",
    "srtab_add_bias",
    "finetune_head",
    "type_embedding",
    "hessian_mode",
}
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
        f"option {option} = {value!r} is not supported, expected {expected}: retrain without it or ask for it in an issue"
    )


def check_supported(params: Mapping[str, Any]) -> list[str]:
    """Refuse what moecalc cannot evaluate; list options that it does not know.

    Args:
        params: a `model_params` dictionary of one head.

    Returns:
        Remarks on unknown options.

    Raises:
        CheckpointError: names the option, its value and what was expected.
    """
    remarks = []
    kind = params.get("type", "standard")
    if kind != "standard":
        raise _reject("model.type", kind, "'standard'")
    for option, inert in _INERT.items():
        if params.get(option, inert[0]) not in inert:
            raise _reject(f"model.{option}", params[option], f"{inert[0]!r}")
    descriptor, fitting = params["descriptor"], params["fitting_net"]
    if descriptor.get("type") not in {"dpa3", DESCRIPTOR}:
        raise _reject("descriptor.type", descriptor.get("type"), f"'dpa3' or {DESCRIPTOR!r}")
    if fitting.get("type", "ener") != "ener":
        raise _reject("fitting_net.type", fitting.get("type"), "'ener'")
    if fitting.get("numb_aparam", 0):
        raise _reject("fitting_net.numb_aparam", fitting["numb_aparam"], "0")
    if fitting.get("use_aparam_as_mask"):
        raise _reject("fitting_net.use_aparam_as_mask", True, "false")
    if any(x is not None for x in fitting.get("atom_ener") or []):
        raise _reject("fitting_net.atom_ener", fitting["atom_ener"], "an empty list")
    unknown = sorted(set(params) - _KNOWN_MODEL_KEYS - set(_INERT) - {"bridging_r_inner", "bridging_r_outer"})
    remarks += [
        f"unknown option model.{key} = {params[key]!r} was not used" for key in unknown if params[key]
    ]
    return remarks


def descriptor_config(descriptor: Mapping[str, Any], skip: set[str]) -> tuple[DescriptorConfig, list[str]]:
    """Build the descriptor configuration; `skip` names repflow options that the caller handles.

    Returns:
        The configuration, and remarks on options that are not known.
    """
    repflow = descriptor.get("repflow") or {}
    known = set(DescriptorConfig.model_fields)
    values = {k: v for k, v in repflow.items() if k in known}
    unknown = sorted(set(repflow) - known - _TRAINING_ONLY - skip)
    remarks = [
        f"unknown option repflow.{key} = {repflow[key]!r} was not used" for key in unknown if repflow[key]
    ]
    for key in ("concat_output_tebd", "use_tebd_bias", "use_econf_tebd", "env_protection", "exclude_types"):
        if descriptor.get(key) is not None:
            values[key] = descriptor[key]
    for key in ("add_chg_spin_ebd", "default_chg_spin"):
        values.pop(key, None)  # options of the descriptor, not of repflow
        if descriptor.get("add_chg_spin_ebd") and descriptor.get(key) is not None:
            values[key] = descriptor[key]
    values["activation_function"] = descriptor.get("activation_function", "silu")
    values["precision"] = precision(descriptor.get("precision", "float64"), "descriptor")
    try:
        return DescriptorConfig.model_validate(values), remarks
    except ValidationError as error:
        raise CheckpointError(f"descriptor options: {first_error(error)}") from None


def fitting_config(fitting: Mapping[str, Any], atom_exclude_types: list[int]) -> FittingConfig:
    """Build the fitting configuration."""
    try:
        return FittingConfig(
            neuron=list(fitting["neuron"]),
            activation_function=fitting.get("activation_function", "tanh"),
            resnet_dt=fitting.get("resnet_dt", True),
            dim_case_embd=fitting.get("dim_case_embd", 0),
            numb_fparam=fitting.get("numb_fparam") or 0,
            default_fparam=(fitting.get("default_fparam") or None) if fitting.get("numb_fparam") else None,
            precision=precision(fitting.get("precision", "float64"), "fitting_net"),
            atom_exclude_types=list(atom_exclude_types),
        )
    except ValidationError as error:
        raise CheckpointError(f"fitting_net options: {first_error(error)}") from None
    except KeyError as error:
        raise CheckpointError(
            f"fitting_net option {error} is missing, expected in the checkpoint's model_params"
        ) from None


def first_error(error: ValidationError) -> str:
    """One line for the first problem that pydantic found."""
    first = error.errors()[0]
    where = ".".join(str(x) for x in first["loc"])
    return f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"


def read_common(t: Tensors, config: ModelConfig) -> State:
    """Everything of an official DPA3 state dict but the seven maps of the layers (SPEC section 1.1)."""
    d = t.under("atomic_model.descriptor.")
    flow = d.under("repflows.")
    state: State = {
        "geometry.mean": flow["mean"][:, 0, :].to(torch.float64),
        "geometry.stddev": flow["stddev"][:, 0, :].to(torch.float64),
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
                state[f"{dst}{kind}_residual"] = torch.stack([src[f"{kind}_residual.{q}"] for q in range(n)])
    state.update(read_fitting(t, config))
    return state


def read_fitting(t: Tensors, config: ModelConfig) -> State:
    """The fitting net and the energy shifts of a DeePMD-kit state dict, which are the same for all descriptors."""
    state: State = {}
    f = t.under("atomic_model.fitting_net.")
    shift = t["atomic_model.out_bias"][0, :, 0].to(torch.float64)
    if "bias_atom_e" in f:
        shift = shift + f["bias_atom_e"][:, 0].to(torch.float64)
    state["readout.energy_shift"] = shift
    if config.fitting.dim_case_embd:
        # models with conditions read it with the frame parameters
        owner = "conditions" if config.takes_conditions else "readout.net"
        state[f"{owner}.case_embedding"] = f["case_embd"]
    if config.fitting.numb_fparam:
        for name in ("fparam_avg", "fparam_inv_std"):
            state[f"conditions.{name}"] = f[name]
    layers = f.under("filter_layers.networks.0.layers.")
    if "0.matrix" not in layers:
        layers = f.under("filter_layers._networks.0.layers.")
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
    """The charge and spin embedding of a DPA3 descriptor: of this head, for heads do not share it (SPEC section 12)."""
    table = "embedding.embedding.embedding_net.layers.0.matrix"
    return {
        "conditions.embedding.charge_matrix": d[f"chg_{table}"],
        "conditions.embedding.spin_matrix": d[f"spin_{table}"],
        "conditions.embedding.mix_matrix": d["mix_cs_mlp.matrix"],
        "conditions.embedding.mix_bias": d["mix_cs_mlp.bias"],
    }


def with_stored_default(config: ModelConfig, t: Tensors) -> ModelConfig:
    """The configuration with the default frame parameters that the tensors have, which count more than the option."""
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
    """Whether the descriptor reads the two frame parameters as charge and spin (SPEC section 12, generation G2).

    moecalc's own descriptor exists since DeePMD-kit has a separate input for them.
    """
    descriptor, fitting = params["descriptor"], params["fitting_net"]
    return bool(
        descriptor.get("add_chg_spin_ebd")
        and fitting.get("numb_fparam") == 2
        and descriptor.get("default_chg_spin") is None
        and descriptor.get("type") != DESCRIPTOR
    )


def live_positions(config: DescriptorConfig, layer: int) -> list[str]:
    """Positions of a layer that can reach the energy."""
    edge, angle = config.layer_is_live(layer)
    names = ["node_self_mlp", "node_sym_linear", "node_edge_linear"]
    if edge:
        names.append("edge_self_linear")
    if edge and config.update_angle:
        names += ["edge_angle_linear1", "edge_angle_linear2"]
    if angle:
        names.append("angle_self_linear")
    return names


def build_config(params: Mapping[str, Any], moe: MoEConfig, skip: set[str]) -> tuple[ModelConfig, list[str]]:
    """Model configuration of a DeePMD-kit `model_params` dictionary.

    Raises:
        CheckpointError: unsupported or inconsistent options.
    """
    remarks = check_supported(params)
    descriptor, more = descriptor_config(params["descriptor"], skip)
    fitting = fitting_config(params["fitting_net"], params.get("atom_exclude_types") or [])
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
    if config.fparam_is_charge_spin:
        more.append(
            "charge and spin are the two frame parameters, as before DeePMD-kit 3.2 (numb_fparam 2, no default_chg_spin)"
        )
    return config, remarks + more


def trained_elements(params: Mapping[str, Any], t: Tensors) -> list[str]:
    """Elements that training data covered, as far as the checkpoint tells.

    The trainer's own list (`info.observed_type`) where it wrote one; else an element counts as untrained when its
    energy bias is exactly zero, or when per-type statistics were taken and it has none (SPEC section 4).
    """
    type_map = list(params["type_map"])
    observed = (params.get("info") or {}).get("observed_type")
    if observed:
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
