"""Importers of checkpoints of DeePMD-kit, of moecalc's plugin, and of two branches (SPEC section 1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import ValidationError

from moecalc.errors import CheckpointError
from moecalc.nn.config import DescriptorConfig, ModelConfig, MoEConfig, PositionConfig, RouterConfig
from moecalc.nn.deepmd_input import DESCRIPTOR, GROUPS, OptionError, first_error, read_moe, shown
from moecalc.package.importers.checks import (
    check_finite,
    check_kind,
    check_statistics,
    check_tensors,
    deepmd_dtypes,
)
from moecalc.package.importers.common import (
    ImportedModel,
    State,
    Tensors,
    build_config,
    check_supported,
    precision,
    read_common,
    read_fitting_net,
    trained_elements,
    with_stored_default,
)
from moecalc.package.importers.options import check_experts, clean_params, same

# branch `moe`: whether `use_*_moe` is on where it is left out
_MOE_GROUPS = {"node": True, "edge": False, "angle": False}
# branch `0415_moe_pack`: where the experts of a map are, and their router
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
        "no DPA3 descriptor in this checkpoint (no tensor named ...repflows...), expected DPA3 of DeePMD-kit "
        ">= 3.1, "
        "branch moe, branch 0415_moe_pack, or moecalc's own form"
    )


def import_deepmd(state_dict: Mapping[str, Any], head: str | None) -> ImportedModel:
    """Import a DeePMD-kit state dict of any of the four layouts.

    Args:
        state_dict: the `model` entry of the checkpoint, with `_extra_state`.
        head: head of a multi-task checkpoint; None for a single-task one, or for the head with the alias
            `Default`.

    Raises:
        CheckpointError: unknown layout, unsupported option, missing tensor, missing or unknown head.
    """
    params, branch, head, remarks = _choose(_model_params(state_dict), head)
    descriptor = params.get("descriptor") if isinstance(params, Mapping) else None
    plugin = isinstance(descriptor, Mapping) and same(descriptor.get("type"), DESCRIPTOR)
    layout = DESCRIPTOR if plugin else detect_layout([str(name) for name in state_dict])
    params = clean_params(params)
    check_supported(params)
    mine, others = _of_branch(state_dict, branch)
    check_tensors(mine, _dtypes(params))
    check_experts(params, layout)
    tensors = Tensors(mine, f"model.{branch}.")
    readers = {"dpa3": _read_dense, "moe": _read_moe, "0415_moe_pack": _read_pack, DESCRIPTOR: _read_plugin}
    config, state = readers[layout](params, tensors)
    config = with_stored_default(config, tensors)
    if config.fparam_is_charge_spin:
        remarks.append(
            "charge and spin are the two frame parameters, as before DeePMD-kit 3.2 (numb_fparam 2, no "
            "default_chg_spin)"
        )
    trained = trained_elements(params, tensors)
    keys = tensors.names_in_file(state)
    refuse_unread(tensors, config.descriptor)
    _refuse_non_finite(mine, others, keys)
    statistics = (
        *("min_nbor_dist", ".mean", ".stddev", "out_bias", "out_std", "bias_atom_e"),
        *("fparam_avg", "fparam_inv_std", "default_fparam_tensor"),
    )
    network = [k for k in tensors.names() if "._networks." not in k and not k.endswith(statistics)]
    count = sum(tensors[k].numel() for k in network)
    return ImportedModel(config, state, layout, head, trained, count, remarks, keys)


def _dtypes(params: Mapping[str, Any]) -> Callable[[str], tuple[torch.dtype, ...]]:
    d, f = params["descriptor"], params["fitting_net"]
    return deepmd_dtypes(
        precision(d, "descriptor"),
        precision(f, "fitting_net"),
    )


def _refuse_non_finite(mine: Mapping[str, Any], others: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    """Refuse NaN and infinities in any tensor, of any head, used or not: the training diverged."""
    read_as = {key: name for name, key in keys.items()}
    for name, value in {**mine, **others}.items():
        check_kind(name, value)
        check_finite(read_as.get(name, name), value, name)


def _model_params(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """`_extra_state.model_params` of a state dict.

    Raises:
        CheckpointError: missing, or no dictionary.
    """
    extra = state_dict.get("_extra_state")
    if extra is None:
        raise CheckpointError(
            "checkpoint has no _extra_state.model_params, expected a file that `dp --pt train` wrote: "
            "use the model.ckpt-*.pt of the training folder, or a frozen model (.pth)"
        )
    if not isinstance(extra, Mapping):
        raise CheckpointError(f"_extra_state = {shown(extra)}, expected a dictionary with model_params")
    if "model_params" not in extra:
        raise CheckpointError(
            "checkpoint has no _extra_state.model_params, expected a file that `dp --pt train` wrote"
        )
    params = extra["model_params"]
    if not isinstance(params, Mapping):
        raise CheckpointError(
            f"_extra_state.model_params = {shown(params)}, expected a dictionary of options"
        )
    return params


def _choose(params: Mapping[str, Any], head: str | None) -> tuple[Any, str, str | None, list[str]]:
    """Options of the chosen head, its names in the file and for the user (None: single-task), remarks."""
    if "model_dict" not in params:
        if head is not None:
            raise CheckpointError(
                f"--head {head!r} was given, but this checkpoint is single-task: leave it out"
            )
        return params, "Default", None, []
    heads = params["model_dict"]
    if not isinstance(heads, Mapping) or not heads or not all(isinstance(name, str) for name in heads):
        raise CheckpointError(
            f"model_params.model_dict = {shown(heads)}, expected a dictionary of heads by name"
        )
    branch = _choose_head(heads, head)
    remarks = []
    if head is None:
        names = ", ".join(heads)
        remarks = [
            f"head {branch} of {names}, because it has the alias Default; another is chosen with --head"
        ]
    return heads[branch], branch, branch, remarks


def _of_branch(state_dict: Mapping[str, Any], branch: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of one head and those of the others."""
    mine: dict[str, Any] = {}
    others: dict[str, Any] = {}
    heads = (state_dict["_extra_state"]["model_params"].get("model_dict") or {"Default": None}).keys()
    for name, value in state_dict.items():
        if name == "_extra_state":
            continue
        # the name of a head may begin with another's
        owners = [h for h in heads if isinstance(name, str) and name.startswith(f"model.{h}.")]
        if not owners:
            raise CheckpointError(
                f"state dict has {shown(name)}, expected names that begin with "
                f"{' or '.join(f'model.{h}.' for h in heads)}: the file has tensors that moecalc does not "
                "know"
            )
        (mine if max(owners, key=len) == branch else others)[name] = value
    return mine, others


def _aliases(heads: Mapping[str, Any]) -> dict[str, list[str]]:
    """Further names of every head (`model_branch_alias`)."""
    result: dict[str, list[str]] = {}
    for name, params in heads.items():
        alias = params.get("model_branch_alias") if isinstance(params, Mapping) else None
        result[name] = [alias] if isinstance(alias, str) else list(alias) if isinstance(alias, list) else []
    return result


def _choose_head(heads: Mapping[str, Any], head: str | None) -> str:
    """Name of the head that the user means: by name, by alias, or the one that the file calls `Default`."""
    aliases = _aliases(heads)
    names = ", ".join(f"{n} ({', '.join(map(str, a))})" if a else n for n, a in aliases.items())
    wanted = head or "Default"
    matches = [
        name for name, alias in aliases.items() if wanted.lower() in [str(x).lower() for x in (name, *alias)]
    ]
    exact = [name for name in matches if wanted in (name, *aliases[name])]
    named = [name for name in matches if wanted == name]
    found = named or exact or matches
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"head {wanted!r} means {' and '.join(found)} in this checkpoint, expected one: choose with "
            f"--head: {names}"
        )
    if head is None:
        raise CheckpointError(f"multi-task checkpoint: choose one of its heads with --head: {names}")
    raise CheckpointError(f"head {head!r} is not in this checkpoint, expected one of: {names}")


# what a layer holds beside the maps that are read, by the start of its name: dead in the last layers (SPEC
# section 6)
_EDGE = ("edge_self_linear.", "edge_self_linear_moe.", "e_residual.0")
_EDGE_BY_ANGLES = (
    *(f"edge_angle_linear{i}{moe}." for i in (1, 2) for moe in ("", "_moe")),
    "angle_fused_moe.", "moe_phase1.angle_experts.", "angle_router.", "e_residual.1",
)  # fmt: skip
_ANGLE = ("angle_self_linear.", "angle_self_linear_moe.", "a_residual.0")
_COMPRESSION = ("a_compress_n_linear.", "a_compress_e_linear.")
_UNUSED = {"min_nbor_dist", "atomic_model.out_std", "atomic_model.descriptor.pair_mask"}
_UNUSED |= {"atomic_model.descriptor.embedding.table.rows"}


def _cannot_reach_the_energy(name: str, c: DescriptorConfig) -> bool:
    """Whether a tensor belongs to work of a layer that no later layer reads."""
    found = re.fullmatch(r"atomic_model\.descriptor\.repflows\.layers\.(\d+)\.(.*)", name)
    if found is None or int(found[1]) >= c.nlayers:
        return False
    edge, angle = c.layer_is_live(int(found[1]))
    dead: tuple[str, ...] = ()
    if not edge:
        dead += _EDGE
        if c.update_angle:
            dead += _EDGE_BY_ANGLES
            if c.a_compress_rate and not c.a_compress_use_split:
                dead += _COMPRESSION
    if c.update_angle and not angle:
        dead += _ANGLE
    if c.update_style != "res_residual":
        dead = tuple(start for start in dead if "_residual." not in start)
    return found[2].startswith(dead) if dead else False


def refuse_unread(tensors: Tensors, config: DescriptorConfig) -> None:
    """Refuse tensors that no reader asked for: what they do to the energy would be ignored.

    Raises:
        CheckpointError: names the first of them.
    """
    surplus = [
        name
        for name in tensors.unread()
        if name not in _UNUSED and not _cannot_reach_the_energy(name, config)
    ]
    if surplus:
        raise CheckpointError(
            f"tensor {tensors.full(surplus[0])!r} has no place in the model that the options describe "
            f"({len(surplus)} such), expected none: options and tensors are not of one training"
        )


def _dense_position(layer: Tensors, name: str) -> State:
    return {
        "matrix": layer[f"{name}.matrix"].unsqueeze(0),
        "bias": layer[f"{name}.bias"].unsqueeze(0),
    }


def _read_dense(params: Mapping[str, Any], t: Tensors) -> tuple[ModelConfig, State]:
    config = build_config(params, MoEConfig())
    state = read_common(t, config)
    for layer in range(config.descriptor.nlayers):
        src = t.under(f"atomic_model.descriptor.repflows.layers.{layer}.")
        for name in config.descriptor.live_positions(layer):
            for key, value in _dense_position(src, name).items():
                state[f"layers.{layer}.{name}.{key}"] = value
    return config, state


def _read_plugin(params: Mapping[str, Any], t: Tensors) -> tuple[ModelConfig, State]:
    """moecalc's own descriptor in DeePMD-kit, whose tensors have the names of `MoEPotential` already."""
    try:
        moe = read_moe(params["descriptor"].get("moe"))
    except OptionError as error:
        raise CheckpointError(f"descriptor options: {error}") from None
    config = build_config(params, moe)
    d = t.under("atomic_model.descriptor.")
    state: State = {name: d[name] for name in d.names() if name not in {"pair_mask", "embedding.table.rows"}}
    if "geometry.stddev" in state:
        check_statistics(d.full("geometry.stddev"), state["geometry.stddev"])
    for name in list(state):
        if name.startswith("embedding.table."):
            state[f"readout.net.{name.removeprefix('embedding.')}"] = state[name]
        if name.startswith("charge_spin_embedding."):
            state[f"conditions.{name.removeprefix('charge_spin_')}"] = state.pop(name)
    state.update(read_fitting_net(t, config))
    return config, state


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
    keys = [f"experts.{e}.{kind}" for e in range(n_routed)]
    return src.stack(keys + [f"shared_experts.{s}.{kind}" for s in range(n_shared)])


def _read_moe(params: Mapping[str, Any], t: Tensors) -> tuple[ModelConfig, State]:
    """Branch `moe` (SPEC section 1.2)."""
    repflow = params["descriptor"].get("repflow") or {}
    n_shared = repflow.get("share_expert", 0)
    n_routed = repflow.get("n_experts", 1) - n_shared
    top_k = repflow.get("moe_top_k", 1) - n_shared
    positions: dict[str, str] = {}
    for group, default in _MOE_GROUPS.items():
        if repflow.get(f"use_{group}_moe", default):
            positions.update({name: name for name in GROUPS[group]})
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
    config = build_config(params, moe)
    c = config.descriptor
    widths = {"edge_fused": c.n_multi_edge_message * c.n_dim, "angle_fused": c.e_dim}
    state = read_common(t, config)
    for layer in range(c.nlayers):
        src = t.under(f"atomic_model.descriptor.repflows.layers.{layer}.")
        dst = f"layers.{layer}."
        for name in c.live_positions(layer):
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
            gate = experts.shaped("gate.matrix", None, None)
            found = experts.count("experts.")
            if found != gate.shape[1]:
                raise CheckpointError(
                    f"layer {layer}, {name}: {found} experts for a gate of {gate.shape[1]} (option "
                    "moe_ep_size = "
                    f"{repflow.get('moe_ep_size')}): an expert-parallel partial file holds one rank's "
                    "experts only; "
                    "gather the experts of all ranks, or train with moe_ep_size 1"
                )
            state[f"{dst}routers.{positions[name]}.gate"] = gate
            for kind in ("matrix", "bias"):
                stack = _stack(experts, n_routed, n_shared, kind)
                if name in fused_pairs:
                    width = widths[key]
                    stack = stack[..., :width] if name == pair[0] else stack[..., width:]
                state[f"{dst}{name}.{kind}"] = stack
    return config, state


def _pack_experts(src: Tensors, n_routed: int, n_shared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of branch `0415_moe_pack`: expert index last in the packed tensors, or the older list form."""
    if "routing_matrix" in src:
        matrix = src.shaped("routing_matrix", None, None, None).permute(2, 0, 1)
        bias = src.shaped("routing_bias", None, matrix.shape[0]).permute(1, 0)
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
        lists = [f"routing_experts.{e}.mlp." for e in range(n_routed)]
        lists += [f"shared_experts.{s}.mlp." for s in range(n_shared)]
        return src.stack([f"{key}matrix" for key in lists]), src.stack([f"{key}bias" for key in lists])
    if n_shared:
        own = {"matrix": matrix, "bias": bias}
        for kind, routed in own.items():
            shared = [
                src.shaped(f"shared_experts.{s}.mlp.{kind}", *routed.shape[1:]) for s in range(n_shared)
            ]
            own[kind] = src.named(torch.cat([routed, torch.stack(shared)]), f"routing_{kind}")
        matrix, bias = own["matrix"], own["bias"]
    return matrix, bias


def _read_pack(params: Mapping[str, Any], t: Tensors) -> tuple[ModelConfig, State]:
    """Branch `0415_moe_pack` (SPEC section 1.3)."""
    repflow = params["descriptor"].get("repflow") or {}
    n_routed, n_shared = repflow.get("n_routing_experts", 0), repflow.get("n_shared_experts", 0)
    router = _router(n_routed, repflow.get("moe_topk", 0), n_shared)
    moe = _moe_config(
        routers=dict.fromkeys(("node", "edge", "angle"), router),
        positions={name: PositionConfig(router=r) for name, (_, r) in _PACK_EXPERTS.items()},
        route_on_charge_spin=True,
    )
    config = build_config(params, moe)
    c = config.descriptor
    first_width = {"edge_experts": c.n_dim * c.n_multi_edge_message, "angle_experts": c.e_dim}
    state = read_common(t, config)
    for layer in range(c.nlayers):
        src = t.under(f"atomic_model.descriptor.repflows.layers.{layer}.")
        dst = f"layers.{layer}."
        for name in c.live_positions(layer):
            if name == "edge_angle_linear2":  # a plain layer in spite of its name
                state[f"{dst}{name}.matrix"] = src["edge_angle_linear2_moe.matrix"].unsqueeze(0)
                state[f"{dst}{name}.bias"] = src["edge_angle_linear2_moe.bias"].unsqueeze(0)
                continue
            collection, group = _PACK_EXPERTS[name]
            gate = src.shaped(f"{group}_router.gate.matrix", None, None)
            if gate.shape[1] != n_routed:
                raise CheckpointError(
                    f"layer {layer}: {group} gate of {gate.shape[1]} experts, expected n_routing_experts = "
                    f"{n_routed}"
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
    return config, state
