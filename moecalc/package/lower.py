"""From a trained model to what a run needs: prune elements and experts, merge what routing makes constant."""

from __future__ import annotations

import copy

import torch
from ase.data import atomic_numbers
from torch import Tensor, nn

from moecalc.errors import ElementError
from moecalc.nn import POSITIONS, ModelConfig, MoEPotential
from moecalc.nn.descriptor import TypeTable
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
                f"type_map entry {symbol!r} is not an element symbol, which ASE needs: keep the others (--elements {known})"
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
    model: MoEPotential, config: ModelConfig, elements: list[str] | None = None
) -> tuple[MoEPotential, Routing]:
    """Prune a model to some elements and replace its routers by tables.

    At element level the weights of a mixture depend on the element only: gates become a table, experts that no
    kept element uses go, linear experts (MoLE) merge into one matrix per element. At configuration level gates and
    experts stay.

    Args:
        model: the full model; not changed.
        config: its architecture.
        elements: symbols to keep, in their new order; None = all.

    Returns:
        The lowered model, same class and same answers on the kept elements, and its routing.

    Raises:
        ElementError: unknown or repeated element.
    """
    keep = torch.tensor(choose_elements(config.type_map, elements))
    low = copy.deepcopy(model)
    with torch.no_grad():
        table = model.embedding.table()[keep]
        net_table = model.readout.net.table()[keep]
        low.elements = [config.type_map[i] for i in keep.tolist()]
        low.pair_mask = model.pair_mask[keep][:, keep]
        low.geometry.mean = model.geometry.mean[keep]
        low.geometry.stddev = model.geometry.stddev[keep]
        low.readout.energy_shift = model.readout.energy_shift[keep]
        low.readout.energy_weight = model.readout.energy_weight[keep]
        low.embedding.table = TypeTable(table)
        low.readout.net.table = TypeTable(net_table if low.readout.net.concat_table else net_table[:0])
        routing = Routing.model_validate({"level": low.routing_level})
        for layer in repflow_layers(low):
            routing.layers.append(_lower_layer(layer, table, config, low.routing_level))
    for parameter in low.parameters():
        parameter.requires_grad_(False)
    return low.eval(), routing


def _lower_layer(
    layer: RepFlowLayer, table: Tensor, config: ModelConfig, level: str
) -> dict[str, PositionRouting]:
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
        if level == "configuration":
            continue
        ids, weights = layer.routers[entry.router](table)
        described[name].experts = ids.tolist()
        described[name].weights = weights.to(torch.float64).tolist()
        new_ids, new_weights = _merge(position, ids, weights)
        if position.routed:
            tables[name] = RoutingTable(new_ids, new_weights)
    if level == "element":
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
