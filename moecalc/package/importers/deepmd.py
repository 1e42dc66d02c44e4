"""Importers of checkpoints written by DeePMD-kit, with moecalc's plugin or without, and by the two public MoE branches (SPEC section 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from moecalc.deepmd.options import DESCRIPTOR, OptionError, moe_config
from moecalc.errors import CheckpointError
from moecalc.nn.config import ModelConfig, MoEConfig, PositionConfig, RouterConfig
from moecalc.package.importers.common import (
    ImportedModel,
    State,
    Tensors,
    build_config,
    first_error,
    live_positions,
    read_common,
    read_fitting,
    trained_elements,
    with_stored_default,
)

_MOE_GROUPS = {
    "use_node_moe": ("node_self_mlp", "node_sym_linear", "node_edge_linear"),
    "use_edge_moe": ("edge_self_linear", "edge_angle_linear2"),
    "use_angle_moe": ("edge_angle_linear1", "angle_self_linear"),
}
_MOE_KEYS = {
    "n_experts",
    "moe_top_k",
    "use_node_moe",
    "use_edge_moe",
    "use_angle_moe",
    "share_expert",
    "fuse_moe_mlps",
}
_PACK_KEYS = {"use_moe", "n_routing_experts", "moe_topk", "n_shared_experts"}
_PACK_EXPERTS = {
    "node_self_mlp": ("node_self_experts", "node"),
    "node_sym_linear": ("node_sym_experts", "node"),
    "node_edge_linear": ("edge_experts", "edge"),
    "edge_self_linear": ("edge_experts", "edge"),
    "edge_angle_linear1": ("angle_experts", "angle"),
    "angle_self_linear": ("angle_experts", "angle"),
}


def detect_layout(keys: list[str]) -> str:
    """Name the layout of a state dict: `dpa3`, `moe` or `0415_moe_pack`.

    Raises:
        CheckpointError: neither of them.
    """
    if any(".moe_phase1." in k for k in keys):
        return "0415_moe_pack"
    if any("_moe.gate." in k or ".fused_moe." in k for k in keys):
        return "moe"
    if any(".repflows." in k for k in keys):
        return "dpa3"
    raise CheckpointError(
        "no DPA3 descriptor in this checkpoint (no tensor named ...repflows...), expected DPA3 of DeePMD-kit >= 3.1, "
        "branch moe, branch 0415_moe_pack, or moecalc's own form"
    )


def import_deepmd(state_dict: Mapping[str, Any], head: str | None) -> ImportedModel:
    """Import a DeePMD-kit state dict of any of the four layouts.

    Args:
        state_dict: the `model` entry of the checkpoint, with `_extra_state`.
        head: head of a multi-task checkpoint; None for a single-task one.

    Raises:
        CheckpointError: unknown layout, unsupported option, missing tensor, missing or unknown head.
    """
    extra = state_dict.get("_extra_state")
    if not isinstance(extra, Mapping) or "model_params" not in extra:
        raise CheckpointError(
            "checkpoint has no _extra_state.model_params, expected a file that `dp --pt train` wrote: "
            "a frozen model (.pth) has lost it, use the .pt checkpoint of the training folder"
        )
    params = extra["model_params"]
    branch = "Default"
    if "model_dict" in params:
        branch = _choose_head(params["model_dict"], head)
        params = params["model_dict"][branch]
        head = branch
    elif head is not None:
        raise CheckpointError(f"--head {head!r} was given, but this checkpoint is single-task: leave it out")
    tensors = Tensors(state_dict, f"model.{branch}.")
    plugin = (params.get("descriptor") or {}).get("type") == DESCRIPTOR
    layout = DESCRIPTOR if plugin else detect_layout(tensors.names())
    readers = {"dpa3": _read_dense, "moe": _read_moe, "0415_moe_pack": _read_pack, DESCRIPTOR: _read_plugin}
    reader = readers[layout]
    config, state, remarks = reader(params, tensors)
    config = with_stored_default(config, tensors)
    network = [
        k
        for k in tensors.names()
        if "._networks." not in k and isinstance(state_dict[f"model.{branch}.{k}"], torch.Tensor)
    ]
    statistics = (
        *("min_nbor_dist", ".mean", ".stddev", "out_bias", "out_std", "bias_atom_e"),
        *("fparam_avg", "fparam_inv_std", "default_fparam_tensor"),
    )
    count = sum(tensors[k].numel() for k in network if not k.endswith(statistics))
    return ImportedModel(config, state, layout, head, trained_elements(params, tensors), count, remarks)


def _choose_head(heads: Mapping[str, Any], head: str | None) -> str:
    names = ", ".join(heads)
    if head is None:
        raise CheckpointError(f"multi-task checkpoint: choose one of its heads with --head: {names}")
    matches = [
        name
        for name, params in heads.items()
        if head.lower() in [name.lower(), *(str(a).lower() for a in params.get("model_branch_alias") or [])]
    ]
    exact = [name for name in matches if name == head]
    if len(exact or matches) != 1:
        raise CheckpointError(f"head {head!r} is not in this checkpoint, expected one of: {names}")
    return (exact or matches)[0]


def _dense_position(layer: Tensors, name: str) -> State:
    return {
        "matrix": layer[f"{name}.matrix"].unsqueeze(0),
        "bias": layer[f"{name}.bias"].unsqueeze(0),
    }


def _read_dense(params: Mapping[str, Any], t: Tensors) -> tuple[ModelConfig, State, list[str]]:
    config, remarks = build_config(params, MoEConfig(), _MOE_KEYS | _PACK_KEYS)
    state = read_common(t, config)
    for layer in range(config.descriptor.nlayers):
        src = t.under(f"atomic_model.descriptor.repflows.layers.{layer}.")
        for name in live_positions(config.descriptor, layer):
            for key, value in _dense_position(src, name).items():
                state[f"layers.{layer}.{name}.{key}"] = value
    return config, state, remarks


def _read_plugin(params: Mapping[str, Any], t: Tensors) -> tuple[ModelConfig, State, list[str]]:
    """moecalc's own descriptor in DeePMD-kit (`moecalc.deepmd`): its tensors have the names of `MoEPotential` already."""
    try:
        moe = moe_config(params["descriptor"].get("moe"))
    except OptionError as error:
        raise CheckpointError(f"descriptor options: {error}") from None
    config, remarks = build_config(params, moe, set())
    d = t.under("atomic_model.descriptor.")
    state: State = {name: d[name] for name in d.names() if name not in {"pair_mask", "embedding.table.rows"}}
    for name in list(state):
        if name.startswith("embedding.table."):
            state[f"readout.net.{name.removeprefix('embedding.')}"] = state[name]
        if name.startswith("charge_spin_embedding."):
            state[f"conditions.{name.removeprefix('charge_spin_')}"] = state.pop(name)
    state.update(read_fitting(t, config))
    return config, state, remarks


def _moe_config(**kwargs: Any) -> MoEConfig:
    try:
        return MoEConfig(**kwargs)
    except ValidationError as error:
        raise CheckpointError(f"mixture-of-experts options: {first_error(error)}") from None


def _router(n_routed: int, top_k: int, n_shared: int) -> RouterConfig:
    try:
        return RouterConfig(n_routed_experts=n_routed, top_k=top_k, n_shared_experts=n_shared)
    except ValidationError as error:
        raise CheckpointError(f"mixture-of-experts options: {first_error(error)}") from None


def _stack(src: Tensors, n_routed: int, n_shared: int, kind: str) -> torch.Tensor:
    """Experts, then shared experts, of branch `moe`: (E, in, out) or (E, out)."""
    parts = [src[f"experts.{e}.{kind}"] for e in range(n_routed)]
    parts += [src[f"shared_experts.{s}.{kind}"] for s in range(n_shared)]
    return torch.stack(parts)


def _read_moe(params: Mapping[str, Any], t: Tensors) -> tuple[ModelConfig, State, list[str]]:
    """Branch `moe` (SPEC section 1.2)."""
    repflow = params["descriptor"].get("repflow") or {}
    n_shared = repflow.get("share_expert", 0)
    n_routed = repflow.get("n_experts", 1) - n_shared
    top_k = repflow.get("moe_top_k", 1) - n_shared
    defaults = {"use_node_moe": True, "use_edge_moe": False, "use_angle_moe": False}
    positions: dict[str, str] = {}
    for option, names in _MOE_GROUPS.items():
        if repflow.get(option, defaults[option]):
            positions.update({name: name for name in names})
    fused = bool(repflow.get("fuse_moe_mlps", False))
    # fused partners share one gate; each fuses only where both are mixtures
    fused_pairs: dict[str, tuple[str, tuple[str, str]]] = {}
    if fused:
        for key, pair in (
            ("edge_fused", ("node_edge_linear", "edge_self_linear")),
            ("angle_fused", ("edge_angle_linear1", "angle_self_linear")),
        ):
            if all(name in positions for name in pair):
                for name in pair:
                    positions[name] = key
                    fused_pairs[name] = (key, pair)
    routers = {router: _router(n_routed, top_k, n_shared) for router in positions.values()}
    moe = _moe_config(routers=routers, positions={n: PositionConfig(router=r) for n, r in positions.items()})
    config, remarks = build_config(params, moe, _MOE_KEYS | _PACK_KEYS)
    c = config.descriptor
    widths = {"edge_fused": c.n_multi_edge_message * c.n_dim, "angle_fused": c.e_dim}
    state = read_common(t, config)
    for layer in range(c.nlayers):
        src = t.under(f"atomic_model.descriptor.repflows.layers.{layer}.")
        dst = f"layers.{layer}."
        for name in live_positions(c, layer):
            if name not in positions:
                for key, value in _dense_position(src, name).items():
                    state[f"{dst}{name}.{key}"] = value
                continue
            if name in fused_pairs:
                key, pair = fused_pairs[name]
                experts = src.under(f"{key}_moe.fused_moe.")
            else:
                key, pair = name, (name, "")
                experts = src.under(f"{name}_moe.")
            gate = experts["gate.matrix"]
            found = experts.count("experts.")
            if found != gate.shape[1]:
                raise CheckpointError(
                    f"layer {layer}, {name}: {found} experts for a gate of {gate.shape[1]} (option moe_ep_size = "
                    f"{repflow.get('moe_ep_size')}): an expert-parallel partial file holds one rank's experts only; "
                    "gather the experts of all ranks, or train with moe_ep_size 1"
                )
            state[f"{dst}routers.{positions[name]}.gate"] = gate
            for kind in ("matrix", "bias"):
                stack = _stack(experts, n_routed, n_shared, kind)
                if name in fused_pairs:
                    width = widths[key]
                    stack = stack[..., :width] if name == pair[0] else stack[..., width:]
                state[f"{dst}{name}.{kind}"] = stack
    return config, state, remarks


def _pack_experts(src: Tensors, n_routed: int, n_shared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of branch `0415_moe_pack`: expert index last in the packed tensors, or the older list form."""
    if "routing_matrix" in src:
        matrix = src["routing_matrix"].permute(2, 0, 1)
        bias = src["routing_bias"].permute(1, 0)
        if matrix.shape[0] != n_routed:
            raise CheckpointError(
                f"{matrix.shape[0]} routed experts in the file, expected n_routing_experts = {n_routed}: "
                "an expert-parallel partial file; gather the experts of all ranks"
            )
    else:
        found = src.count("routing_experts.")
        if found != n_routed:
            raise CheckpointError(
                f"{found} routed experts in the file, expected n_routing_experts = {n_routed}: "
                "an expert-parallel partial file; gather the experts of all ranks"
            )
        matrix = torch.stack([src[f"routing_experts.{e}.mlp.matrix"] for e in range(n_routed)])
        bias = torch.stack([src[f"routing_experts.{e}.mlp.bias"] for e in range(n_routed)])
    if n_shared:
        shared = [src.under(f"shared_experts.{s}.mlp.") for s in range(n_shared)]
        matrix = torch.cat([matrix, torch.stack([s["matrix"] for s in shared])])
        bias = torch.cat([bias, torch.stack([s["bias"] for s in shared])])
    return matrix, bias


def _read_pack(params: Mapping[str, Any], t: Tensors) -> tuple[ModelConfig, State, list[str]]:
    """Branch `0415_moe_pack` (SPEC section 1.3)."""
    repflow = params["descriptor"].get("repflow") or {}
    n_routed, n_shared = repflow.get("n_routing_experts", 0), repflow.get("n_shared_experts", 0)
    router = _router(n_routed, repflow.get("moe_topk", 0), n_shared)
    moe = _moe_config(
        routers=dict.fromkeys(("node", "edge", "angle"), router),
        positions={name: PositionConfig(router=r) for name, (_, r) in _PACK_EXPERTS.items()},
        route_on_charge_spin=True,
    )
    config, remarks = build_config(params, moe, _MOE_KEYS | _PACK_KEYS)
    c = config.descriptor
    first_width = {"edge_experts": c.n_dim * c.n_multi_edge_message, "angle_experts": c.e_dim}
    state = read_common(t, config)
    for layer in range(c.nlayers):
        src = t.under(f"atomic_model.descriptor.repflows.layers.{layer}.")
        dst = f"layers.{layer}."
        for name in live_positions(c, layer):
            if name == "edge_angle_linear2":  # a plain layer in spite of its name
                state[f"{dst}{name}.matrix"] = src["edge_angle_linear2_moe.matrix"].unsqueeze(0)
                state[f"{dst}{name}.bias"] = src["edge_angle_linear2_moe.bias"].unsqueeze(0)
                continue
            collection, group = _PACK_EXPERTS[name]
            gate = src[f"{group}_router.gate.matrix"]
            if gate.shape[1] != n_routed:
                raise CheckpointError(
                    f"layer {layer}: {group} gate of {gate.shape[1]} experts, expected n_routing_experts = {n_routed}"
                )
            state[f"{dst}routers.{group}.gate"] = gate
            matrix, bias = _pack_experts(src.under(f"moe_phase1.{collection}."), n_routed, n_shared)
            if collection in first_width:
                width = first_width[collection]
                columns = (
                    slice(None, width)
                    if name in ("node_edge_linear", "edge_angle_linear1")
                    else slice(width, None)
                )
                matrix, bias = matrix[..., columns], bias[..., columns]
            state[f"{dst}{name}.matrix"] = matrix
            state[f"{dst}{name}.bias"] = bias
    return config, state, remarks
