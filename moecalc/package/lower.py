"""From a trained model to what a run needs: prune elements and experts, merge what routing makes constant."""

from __future__ import annotations

import copy

import torch
from ase.data import atomic_numbers
from torch import Tensor, nn

from moecalc.conditions import Conditions
from moecalc.errors import ElementError
from moecalc.nn import POSITIONS, ModelConfig, MoEPotential
from moecalc.nn.descriptor import TypeTable
from moecalc.nn.fitting import FittingLayer
from moecalc.nn.moe import ExpertLinear, MoERouter, RoutingTable
from moecalc.nn.repflow import RepFlowLayer
from moecalc.package.metadata import PositionRouting, Routing


def choose_elements(type_map: list[str], elements: list[str] | None) -> list[int]:
    """Indices of the chosen elements, in the order chosen; all for None.

    Raises:
        ElementError: names an element that the model does not know, or that was given twice.
    """
    for symbol in type_map if elements is None else elements:
        if symbol in type_map and atomic_numbers.get(symbol, 0) == 0:
            known = ",".join(s for s in type_map if atomic_numbers.get(s, 0))
            raise ElementError(
                f"type_map entry {symbol!r} is not an element symbol, which ASE needs: keep the others "
                f"(--elements {known})"
            )
    if elements is None:
        return list(range(len(type_map)))
    for element in elements:
        if element not in type_map:
            raise ElementError(
                f"element {element!r} is not in this model, expected some of: {', '.join(type_map)}"
            )
    if not elements or len(set(elements)) != len(elements):
        raise ElementError(f"elements {','.join(elements)!r}, expected distinct symbols, at least one")
    return [type_map.index(element) for element in elements]


def repflow_layers(model: MoEPotential) -> list[RepFlowLayer]:
    """The layers of a model, typed."""
    return [layer for layer in model.layers if isinstance(layer, RepFlowLayer)]


def _positions(layer: nn.Module) -> dict[str, ExpertLinear]:
    return {name: getattr(layer, name) for name in POSITIONS if hasattr(layer, name)}


def lower(
    model: MoEPotential,
    config: ModelConfig,
    elements: list[str] | None = None,
    fixed: Conditions | None = None,
) -> tuple[MoEPotential, Routing]:
    """Prune a model to some elements, fold fixed conditions, and replace its routers by tables.

    At element level the weights of a mixture depend on the element only: gates become a table, experts that
    no kept element uses go, linear experts (MoLE) merge into one matrix per element. At configuration level,
    and where experts depend on charge and spin that stay open, gates and experts stay.

    Args:
        model: the full model; not changed.
        config: its architecture.
        elements: symbols to keep, in their new order; None = all.
        fixed: charge, spin and frame parameters to fold (`moecalc.conditions.fix`); what is None there stays
            open.

    Returns:
        The lowered model, same class and same answers on the kept elements, and its routing.

    Raises:
        ElementError: unknown or repeated element.
    """
    keep = torch.tensor(choose_elements(config.type_map, elements))
    low = copy.deepcopy(model)
    fixed = fixed or Conditions()
    with torch.no_grad():
        table = model.embedding.table()[keep]
        net_table = model.readout.net.table()[keep]
        low.elements = [config.type_map[i] for i in keep.tolist()]
        low.pair_mask = model.pair_mask[keep][:, keep]
        low.geometry.mean = model.geometry.mean[keep]
        low.geometry.stddev = model.geometry.stddev[keep]
        low.readout.energy_shift = model.readout.energy_shift[keep]
        low.readout.energy_weight = model.readout.energy_weight[keep]
        shift = torch.zeros_like(table[:1])
        if fixed.charge_spin is not None:
            shift = model.conditions.shift(torch.tensor([fixed.charge_spin])).to(table.dtype)
            _close_charge_spin(low)
        router_table = table + shift if config.routes_on_charge_spin else table
        low.embedding.table = TypeTable(table + shift)
        if low.routing_level == "configuration" and not torch.equal(router_table, table + shift):
            low.embedding.router_table = TypeTable(router_table)
            low.embedding.own_router_table = True
        low.readout.net.table = TypeTable(
            net_table + shift.to(net_table.dtype) if low.readout.net.concat_table else net_table[:0]
        )
        _close_fitting_inputs(low, fixed)
        open_routing = low.conditions.routed
        routing = Routing.model_validate({"level": low.routing_level, "on_charge_spin": open_routing})
        rows = router_table if low.routing_level == "element" and not open_routing else None
        for layer in repflow_layers(low):
            routing.layers.append(_lower_layer(layer, rows, config))
    for parameter in low.parameters():
        parameter.requires_grad_(False)
    make_contiguous(low)
    return low.eval(), routing


def make_contiguous(model: nn.Module) -> None:
    """Let every tensor of a (scripted) model have a row-major record of its own in the file."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)


def with_finished_tables(model: MoEPotential) -> MoEPotential:
    """A copy of a model that is not lowered, with finished type tables: what can be written as a package."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        net = copied.readout.net
        table = net.table().clone()
        copied.embedding.table = TypeTable(copied.embedding.table().clone())
        net.table = TypeTable(table if net.concat_table else table[:0].clone())
    make_contiguous(copied)
    return copied


def _close_charge_spin(low: MoEPotential) -> None:
    """Let a model take no charge and spin: the type tables have them."""
    conditions = low.conditions
    conditions.takes_charge_spin = conditions.routed = low.embedding.routed = False
    del conditions.embedding


def _close_fitting_inputs(low: MoEPotential, fixed: Conditions) -> None:
    """Fold frame parameters and case embedding into the fitting net where constant (SPEC section 12)."""
    conditions, net = low.conditions, low.readout.net
    if fixed.fparam is None and (conditions.takes_fparam or conditions.takes_charge_spin):
        return
    if net.n_constant == 0:
        return
    given = torch.tensor([fixed.fparam or []], dtype=torch.float64)
    constants = conditions.fitting_input(given).to(net.out_bias.dtype)
    first = net.layers[0] if net.n_hidden else None
    if isinstance(first, FittingLayer):
        if first.residual:  # the skip path carries the values too: they stay inputs, as a case embedding does
            net.register_buffer("case_embedding", constants[0].clone())
            net.with_case = True
        else:
            bias, _ = first.constant_part(constants)
            first.bias = nn.Parameter(bias[0].clone())
            first.matrix = nn.Parameter(first.matrix[: -net.n_constant].clone())
    else:
        net.out_bias = nn.Parameter(net.out_bias + (constants @ net.out_matrix[-net.n_constant :])[0])
        net.out_matrix = nn.Parameter(net.out_matrix[: -net.n_constant].clone())
    net.n_constant = 0
    for name in ("fparam_avg", "fparam_inv_std", "case_embedding"):
        if hasattr(conditions, name):
            delattr(conditions, name)
    conditions.n_fparam = conditions.n_case = 0
    conditions.takes_fparam = conditions.with_case = False


def _lower_layer(
    layer: RepFlowLayer, table: Tensor | None, config: ModelConfig
) -> dict[str, PositionRouting]:
    """Replace the routers of a layer by what they say for the rows of `table`; None keeps them."""
    described: dict[str, PositionRouting] = {}
    tables: dict[str, nn.Module] = {}
    for name, position in _positions(layer).items():
        if not position.routed:
            continue
        entry = config.moe.positions[name]
        router = config.moe.routers[entry.router]
        described[name] = PositionRouting(
            kind=entry.kind,
            gate=router.gate,
            n_routed=router.n_routed_experts,
            n_shared=router.n_shared_experts,
            top_k=router.top_k,
        )
        if table is None:
            continue
        ids, weights = layer.routers[entry.router](table)
        described[name].experts = ids.tolist()
        described[name].weights = weights.to(torch.float64).tolist()
        new_ids, new_weights = _merge(position, ids, weights)
        if position.routed:
            tables[name] = RoutingTable(new_ids, new_weights)
    if table is not None:
        layer.routers = nn.ModuleDict(tables)
        for name, position in _positions(layer).items():
            position.router = name if position.routed else ""
    return described


def _merge(position: ExpertLinear, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Keep only the experts of a position that some row of the table uses; merge linear ones per element."""
    if position.merge:
        # combine in float64: the merged matrix is then the rounded exact sum, whatever the dtype
        w = weights.to(torch.float64)
        matrix = torch.einsum("tk,tkio->tio", w, position.matrix.to(torch.float64)[ids])
        bias = torch.einsum("tk,tko->to", w, position.bias.to(torch.float64)[ids])
        position.merge = False
        ids = torch.arange(ids.size(0)).unsqueeze(1)
        weights = torch.ones_like(weights[:, :1])
    else:
        used, flat = torch.unique(ids, return_inverse=True)
        matrix, bias = position.matrix[used], position.bias[used]
        ids = flat.reshape(ids.shape)
    dtype = position.matrix.dtype
    position.matrix = nn.Parameter(matrix.to(dtype))
    position.bias = nn.Parameter(bias.to(dtype))
    # one expert of weight 1 for every element: nothing is left to route
    if position.matrix.size(0) == 1 and bool((weights == 1.0).all()) and weights.size(1) == 1:
        position.routed = False
    return ids, weights


def count_parameters(model: MoEPotential) -> tuple[int, int]:
    """Network parameters of a lowered model: total, and touched for one atom (mean over elements).

    Statistics, energy shifts and routing tables are not counted.
    """
    tables = [m.table for m in (model.embedding.table, model.readout.net.table) if isinstance(m, TypeTable)]
    total = sum(int(t.numel()) for t in [*model.parameters(), *tables])
    # of every table one row is looked up
    idle = sum(int(t.numel()) - t.size(1) for t in tables if t.size(0))
    if model.conditions.takes_charge_spin:
        tables = [model.conditions.embedding.charge_matrix, model.conditions.embedding.spin_matrix]
        idle += sum(int(t.numel()) - t.size(1) for t in tables)
    for layer in repflow_layers(model):
        for position in _positions(layer).values():
            if not position.routed:
                continue
            router = layer.routers[position.router]
            if isinstance(router, MoERouter):
                active = router.top_k + router.n_shared
            else:
                assert isinstance(router, RoutingTable)
                active = router.ids.size(1)
            per_expert = position.matrix[0].numel() + position.bias[0].numel()
            idle += (position.matrix.size(0) - active) * per_expert
    return total, total - idle
