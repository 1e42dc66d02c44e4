"""Sparse upcycling: a start for training a mixture of experts that equals a trained dense DPA3.

For `dp --pt train --init-model` or `--finetune`.

Every expert starts from the dense weights. With c = sum of the routed weights and S shared experts, a mixture
of copies gives (c + S) phi(x W + b), or phi((c + S)(x W + b)) with linear experts, in place of phi(x W + b).
The factor is taken out

- of linear experts: from their weights;
- of mlp experts: from the residual vector that the map's output meets next, or, for edge_angle_linear1, from
  the rows of edge_angle_linear2. This needs update_style res_residual, and for the latter that no edge skips
  the angles (smooth_edge_update).

For that, c must be the same for all elements. It is 1 with gate topk_softmax. With softmax_topk the gates are
solved for: the logits of every element are the same numbers in another order, which also spreads the elements
evenly over the experts. This cannot be done for compositions, which are mixtures of elements, so routing by
configuration with softmax_topk is exact with top_k = n_routed_experts only.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecalc._clean import clean_torch
from moecalc.errors import CheckpointError
from moecalc.files import check_outputs, to_bytes, write_bytes
from moecalc.nn.config import DescriptorConfig, MoEConfig, RouterConfig
from moecalc.nn.deepmd_input import (
    DESCRIPTOR,
    MOE_DEFAULTS,
    TRAINING_OPTIONS,
    OptionError,
    read_moe,
    read_precision,
)
from moecalc.nn.descriptor import TypeEmbedding
from moecalc.nn.moe import MoERouter
from moecalc.package.importers import ImportedModel, load_checkpoint, read_data

# how much the sum of routed weights may differ between elements before the start counts as inexact
_CONSTANT = 1e-12

# map -> residual vector that multiplies its output, and rows of it
_RESIDUALS = {
    "node_self_mlp": ("n_residual", slice(0, 1)),
    "node_sym_linear": ("n_residual", slice(1, 2)),
    "node_edge_linear": ("n_residual", slice(2, None)),
    "edge_self_linear": ("e_residual", slice(0, 1)),
    "edge_angle_linear2": ("e_residual", slice(1, 2)),
    "angle_self_linear": ("a_residual", slice(0, 1)),
}
# options of the input that may differ from the dense model's: they do not change what it computes
_FREE = {"type", "moe", "seed", "trainable", "ntypes", "type_map", *TRAINING_OPTIONS} - {"fix_stat_std"}


@clean_torch()
def upcycle(
    dense: str | Path,
    input_file: str | Path,
    out: str | Path,
    head: str | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Write a start for training with the `moe` section of `input_file`, equal to the dense checkpoint.

    Args:
        dense: checkpoint of a dense DPA3, as `dp --pt train` wrote it.
        input_file: the training input (`input.json`), whose descriptor is `dpa3_moe`.
        out: checkpoint to write, for `dp --pt train input.json --init-model OUT`.
        head: head of a multi-task checkpoint.
        noise: relative standard deviation of a perturbation of the routed experts; 0 keeps the start exact.
        seed: of gates and perturbation.

    Returns:
        Remarks for the user.

    Raises:
        CheckpointError: a checkpoint that is not a dense DPA3, options that differ from it, or that make an
            exact start impossible.
    """
    check_outputs([("--out", out)], [("dense checkpoint", dense), ("--input", input_file)])
    imported = load_checkpoint(dense, head)
    if imported.config.moe.positions or imported.layout not in {"dpa3", DESCRIPTOR}:
        raise CheckpointError(f"{dense}: layout {imported.layout!r}, expected a dense DPA3 of DeePMD-kit")
    target = _read_input(input_file)
    moe_section = {**MOE_DEFAULTS, **(target["descriptor"].get("moe") or {})}
    try:
        moe = read_moe(target["descriptor"].get("moe"))
    except OptionError as error:
        raise CheckpointError(f"{input_file}: {error}") from None
    if not moe.positions:
        raise CheckpointError(
            f"{input_file}: model.descriptor has no moe section with positions, expected what to upcycle to"
        )

    tensors, params = _single_task(dense, imported)
    _compare(target["descriptor"], params["descriptor"], "descriptor")
    _compare(target.get("fitting_net") or {}, params["fitting_net"], "fitting_net")
    remarks = _compare_conditions(input_file, target, params, imported)
    params["descriptor"] |= {"type": DESCRIPTOR, "moe": moe_section}

    generator = torch.Generator().manual_seed(seed)
    descriptor = _descriptor_state(imported, moe, noise, generator)
    state: OrderedDict[str, Any] = OrderedDict()
    for name, value in tensors.items():
        if not name.startswith("atomic_model.descriptor."):
            state[f"model.Default.{name}"] = value
    for name, value in descriptor.items():
        state[f"model.Default.atomic_model.descriptor.{name}"] = value
    state["_extra_state"] = {"model_params": params, "train_infos": {"lr": 0.0, "step": 0}}
    # without an entry "model": that form is for checkpoints with an optimizer
    write_bytes(out, to_bytes(state))

    wanted = list(target.get("type_map") or params["type_map"])
    if wanted != list(params["type_map"]):
        remarks.append(
            f"type_map of {input_file} differs from the checkpoint's: train with --finetune {out}, not with "
            "--init-model"
        )
    return remarks


def _compare_conditions(
    input_file: str | Path, target: Mapping[str, Any], dense: Mapping[str, Any], imported: ImportedModel
) -> list[str]:
    """Refuse an input that takes other conditions than the dense model, also by leaving an option out."""
    for section, option in (("descriptor", "add_chg_spin_ebd"), ("fitting_net", "numb_fparam")):
        wanted = (target.get(section) or {}).get(option) or 0
        found = dense[section].get(option) or 0
        if wanted != found:
            raise CheckpointError(
                f"{section}.{option} = {wanted!r} in the input, expected {found!r} as the dense checkpoint "
                "has"
            )
    if not imported.config.fparam_is_charge_spin:
        return []
    remark = (
        f"the dense checkpoint reads charge and spin from fparam; {DESCRIPTOR} has an input of its own for "
        "them: "
        f"train {input_file} with data that have charge_spin.npy beside an equal fparam.npy"
    )
    return [remark]


def _read_input(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        model = content["model"]
        kind = model["descriptor"]["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a single-task training input ({type(error).__name__}: {error}), expected JSON with "
            "model.descriptor"
        ) from None
    if kind != DESCRIPTOR:
        raise CheckpointError(f"{path}: model.descriptor.type = {kind!r}, expected {DESCRIPTOR!r}")
    return dict(model)


def _single_task(path: str | Path, imported: ImportedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of the chosen head by their names below it, and its model_params."""
    data = read_data(Path(path))
    state = data.get("model", data)
    params = copy.deepcopy(state["_extra_state"]["model_params"])
    if imported.head is not None:
        params = params["model_dict"][imported.head]
    prefix = f"model.{imported.head or 'Default'}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, params


def _compare(wanted: Mapping[str, Any], dense: Mapping[str, Any], where: str) -> None:
    """Refuse options of the input that would make another model of the same weights."""
    for option, value in wanted.items():
        if option in _FREE:
            continue
        if isinstance(value, Mapping):
            _compare(value, dense.get(option) or {}, f"{where}.{option}")
            continue
        if option in dense and read_precision(value) != read_precision(dense[option]):
            raise CheckpointError(
                f"{where}.{option} = {value!r} in the input, expected {dense[option]!r} as the dense "
                "checkpoint has"
            )


def _gate(table: Tensor, router: RouterConfig, generator: torch.Generator) -> Tensor:
    """A gate (n_dim, E) that gives every element the same logits in another order.

    As far as the table (T, n_dim) allows.
    """
    n = router.n_routed_experts
    ladder = torch.linspace(1.0, -1.0, n, dtype=torch.float64)
    order = torch.randperm(n, generator=generator)
    start = torch.randperm(table.size(0), generator=generator)
    # consecutive experts in a random order, so that the first choices of the elements go round
    logits = torch.empty(table.size(0), n, dtype=torch.float64)
    for element in range(table.size(0)):
        logits[element, order] = ladder.roll(int(start[element]))
    return torch.linalg.pinv(table.to(torch.float64)) @ logits


def _routed_sum(gate: Tensor, table: Tensor, router: RouterConfig, routing: str) -> float:
    """Sum of the routed weights of a router, which must be one number for all inputs that it can get.

    Raises:
        CheckpointError: where it is not.
    """
    if router.top_k == 0:
        return 0.0
    if router.gate == "topk_softmax" or router.top_k == router.n_routed_experts:
        return 1.0
    if routing == "configuration":
        raise CheckpointError(
            f"moe.routing configuration with gate softmax_topk and top_k = {router.top_k} of "
            f"{router.n_routed_experts}: the weights' sum "
            "depends on the composition, so no start equals the dense model; use gate topk_softmax or "
            "routing element"
        )
    module = MoERouter(table.size(1), router.n_routed_experts, router.top_k, 0, router.gate).to(gate)
    with torch.no_grad():
        module.gate.copy_(gate)
        sums = module(table.to(gate))[1].sum(1).to(torch.float64)
    spread = float(sums.max() - sums.min())
    if spread > _CONSTANT and gate.dtype == torch.float64:
        raise CheckpointError(
            f"moe.gate softmax_topk: the sums of the weights differ by {spread:.1e} between elements, "
            "because the type embedding "
            f"({table.size(0)} elements, n_dim = {table.size(1)}) has dependent rows; use gate topk_softmax"
        )
    return float(sums.mean())


def _descriptor_state(
    imported: ImportedModel, moe: MoEConfig, noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Tensors of the descriptor by the plugin's names."""
    config = imported.config.descriptor
    state = {
        name: value.clone()
        for name, value in imported.state.items()
        if name.startswith(("geometry.", "embedding.", "layers."))
    }
    for name, value in imported.state.items():
        if name.startswith("conditions.embedding."):
            state[f"charge_spin_{name.removeprefix('conditions.')}"] = value.clone()
    type_map = imported.config.type_map
    embedding = TypeEmbedding(type_map, config.n_dim, config.use_tebd_bias, config.use_econf_tebd)
    dtype = state["embedding.table.matrix"].dtype
    embedding.to(dtype)
    embedding.load_state_dict(
        {k.removeprefix("embedding.table."): v for k, v in state.items() if k.startswith("embedding.table.")}
    )
    with torch.no_grad():
        table = embedding()
    mask = torch.ones(len(type_map), len(type_map), dtype=torch.bool)
    for i, j in config.exclude_types:
        mask[i, j] = mask[j, i] = False
    state |= {"pair_mask": mask, "embedding.table.rows": embedding.rows}
    for layer in range(config.nlayers):
        _upcycle_layer(
            state, f"layers.{layer}.", config.live_positions(layer), config, moe, table, noise, generator
        )
    return state


def _upcycle_layer(
    state: dict[str, Tensor],
    prefix: str,
    live: tuple[str, ...],
    config: DescriptorConfig,
    moe: MoEConfig,
    table: Tensor,
    noise: float,
    generator: torch.Generator,
) -> None:
    """Turn the maps of one layer that are positions of `moe` into experts, in place."""
    factors: dict[str, float] = {}
    positions = {name: moe.positions[name] for name in live if name in moe.positions}
    for name in sorted({entry.router for entry in positions.values()}):
        router = moe.routers[name]
        gate = _gate(table, router, generator).to(table.dtype)
        state[f"{prefix}routers.{name}.gate"] = gate
        factors[name] = 1.0 / (_routed_sum(gate, table, router, moe.routing) + router.n_shared_experts)
    for name, entry in positions.items():
        router, factor = moe.routers[entry.router], factors[entry.router]
        n = router.n_routed_experts + router.n_shared_experts
        for kind in ("matrix", "bias"):
            value = state[f"{prefix}{name}.{kind}"]
            stack = value.expand(n, *value.shape[1:]).clone()
            if noise > 0.0:
                routed = stack[: router.n_routed_experts]
                routed *= 1.0 + noise * torch.randn(
                    routed.shape, generator=generator, dtype=torch.float64
                ).to(routed)
            if entry.kind == "linear":
                stack *= factor
            state[f"{prefix}{name}.{kind}"] = stack
    for name, entry in positions.items():
        if entry.kind == "mlp" and factors[entry.router] != 1.0:
            _take_out(state, prefix, name, factors[entry.router], config)


def _take_out(
    state: dict[str, Tensor], prefix: str, name: str, factor: float, config: DescriptorConfig
) -> None:
    """Multiply what reads the output of map `name` by `factor`."""
    if name == "edge_angle_linear1":
        if not config.smooth_edge_update and not config.use_dynamic_sel:
            raise CheckpointError(
                "edge_angle_linear1 as experts whose weights do not sum to 1, with smooth_edge_update = "
                "false: edges without angles "
                "skip it, so no start equals the dense model; use n_shared_experts = 0 with gate "
                "topk_softmax, or kind linear"
            )
        state[f"{prefix}edge_angle_linear2.matrix"] *= factor
        return
    if config.update_style != "res_residual":
        raise CheckpointError(
            f"experts of kind mlp whose weights do not sum to 1, with update_style {config.update_style!r}: "
            "there is no residual vector "
            "to take the factor out of; use n_shared_experts = 0 with gate topk_softmax, or kind linear"
        )
    vector, rows = _RESIDUALS[name]
    state[f"{prefix}{vector}"][rows] *= factor
