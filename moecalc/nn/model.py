"""The whole potential: geometry -> embedding -> layers -> readout, and its energies, forces and virials."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moecalc.nn.conditions import ConditionInputs
from moecalc.nn.config import ModelConfig
from moecalc.nn.descriptor import Embedding, Geometry, TypeEmbedding
from moecalc.nn.fitting import FittingNet, Readout
from moecalc.nn.repflow import RepFlowLayer


def _offsets(group: Tensor, n_group: int) -> list[int]:
    """Cumulative row counts of groups 0..n_group-1, length n_group + 1."""
    ends: list[int] = torch.cumsum(torch.bincount(group, minlength=n_group), 0).tolist()
    offsets = [0]
    for end in ends:
        offsets.append(int(end))
    return offsets


def angle_pairs(centre: Tensor, close: Tensor, n_node: int) -> Tensor:
    """All ordered pairs of close edges of one centre, j = k included (SPEC section 2).

    Args:
        centre: (E,) int64, sorted.
        close: (E,) bool, edges shorter than the angle cutoff.
        n_node: number of possible centres.

    Returns:
        (2, A) int64 edge ids, sorted by the first and then by the second.
    """
    ids = torch.nonzero(close).squeeze(1)
    close_centre = centre.index_select(0, ids)
    count = torch.bincount(close_centre, minlength=n_node)
    start = torch.cumsum(count, 0) - count
    per_edge = count.index_select(0, close_centre)
    first = torch.repeat_interleave(torch.arange(ids.size(0), device=ids.device), per_edge)
    row_start = torch.cumsum(per_edge, 0) - per_edge
    rank = torch.arange(first.size(0), device=ids.device) - row_start.index_select(0, first)
    second = start.index_select(0, close_centre.index_select(0, first)) + rank
    return torch.stack([ids.index_select(0, first), ids.index_select(0, second)])


def prepare_graph(
    types: Tensor,
    edge_index: Tensor,
    edge_vec: Tensor,
    group: Tensor,
    n_group: int,
    cutoff: float,
    angle_cutoff: float,
    pair_mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[int], list[int], list[int]]:
    """Sort nodes by routing group and edges by centre, drop edges beyond the cutoff, list the angles.

    Args:
        types: (n,) int64; edge_index: (2, E); edge_vec: (E, 3).
        group: (n,) int64 routing group of every node; n_group: how many there are.
        cutoff, angle_cutoff: Angstrom; pair_mask: (T, T) bool, False where a pair makes no edge.

    Returns:
        order (n,) old index of every new node, edge_order (E',) old index of every new edge, types (n,),
        edge_index (2, E'), angle_index (2, A), and node, edge and angle offsets of the groups.
    """
    order = torch.argsort(group, stable=True)
    new_index = torch.empty_like(order)
    new_index[order] = torch.arange(order.size(0), device=order.device)
    distance = torch.linalg.vector_norm(edge_vec.detach(), dim=1)
    pair_kept = pair_mask[types.index_select(0, edge_index[0]), types.index_select(0, edge_index[1])]
    kept = torch.nonzero((distance <= cutoff) & pair_kept).squeeze(1)
    centre = new_index.index_select(0, edge_index[0].index_select(0, kept))
    by_centre = torch.argsort(centre, stable=True)
    edge_order = kept.index_select(0, by_centre)
    new_edges = torch.stack(
        [
            centre.index_select(0, by_centre),
            new_index.index_select(0, edge_index[1].index_select(0, edge_order)),
        ]
    )
    close = distance.index_select(0, edge_order) < angle_cutoff
    angles = angle_pairs(new_edges[0], close, types.size(0))
    new_group = group.index_select(0, order)
    edge_group = new_group.index_select(0, new_edges[0])
    return (
        order,
        edge_order,
        types.index_select(0, order),
        new_edges,
        angles,
        _offsets(new_group, n_group),
        _offsets(edge_group, n_group),
        _offsets(edge_group.index_select(0, angles[0]), n_group),
    )


class MoEPotential(nn.Module):
    """Element-wise mixture-of-experts potential with a DPA3 backbone.

    Differentiable twice, scriptable. The four kinds of submodules are what the C++ evaluator walks.

    Args:
        config: the architecture.
    """

    pair_mask: Tensor
    dtype_probe: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.descriptor
        n_types = len(config.type_map)
        table = TypeEmbedding(config.type_map, c.n_dim, c.use_tebd_bias, c.use_econf_tebd)
        self.elements: list[str] = list(config.type_map)
        self.cutoff: float = c.e_rcut
        self.angle_cutoff: float = c.a_rcut if c.needs_angles else 0.0
        self.routing_level: str = config.moe.routing if config.moe.positions else "element"
        mask = torch.ones(n_types, n_types, dtype=torch.bool)
        for i, j in [*c.exclude_types, *config.pair_exclude_types]:
            mask[i, j] = mask[j, i] = False
        self.register_buffer("pair_mask", mask)
        self.register_buffer("dtype_probe", torch.zeros(()))
        self.conditions = ConditionInputs(config)
        self.geometry = Geometry(c, n_types)
        self.embedding = Embedding(c, table, config.routes_on_charge_spin)
        self.layers = nn.ModuleList([RepFlowLayer(c, config.moe, i) for i in range(c.nlayers)])
        net = FittingNet(config.fitting, c.n_dim, table, c.concat_output_tebd, config.takes_conditions)
        self.readout = Readout(net, n_types, config.fitting.atom_exclude_types)

    def forward(
        self,
        types: Tensor,
        edge_index: Tensor,
        edge_vec: Tensor,
        system_index: Tensor,
        n_systems: int,
        charge_spin: Tensor | None = None,
        fparam: Tensor | None = None,
    ) -> Tensor:
        """Per-atom energies.

        Args:
            types: (n,) int64 indices into `elements`.
            edge_index: (2, E) int64 centre, neighbor (both < n; images mapped to owned atoms).
            edge_vec: (E, 3) float64, r_j - r_i in Angstrom; edges beyond the cutoff are dropped.
            system_index: (n,) int64, structure of every atom; n_systems: how many.
            charge_spin: (n_systems, 2) int64 charge and multiplicity, checked by the caller
                (`moecalc.conditions`); None where the model takes none.
            fparam: (n_systems, n_fparam) float64 frame parameters, likewise.

        Returns:
            (n,) float64 energies in eV.
        """
        by_element = self.routing_level == "element"
        n_types = len(self.elements)
        n_group = n_types if by_element else n_systems
        group = types if by_element else system_index
        shift, fitting_inputs, condition = self._conditions(charge_spin, fparam, system_index, n_systems)
        if by_element and self.conditions.routed:
            n_group = n_systems * n_types
            group = system_index * n_types + types
        dtype = self.dtype_probe.dtype
        order, edge_order, sorted_types, edges, angles, node_splits, edge_splits, angle_splits = (
            prepare_graph(
                types, edge_index, edge_vec, group, n_group, self.cutoff, self.angle_cutoff, self.pair_mask
            )
        )
        if by_element:
            composition = torch.eye(n_types, dtype=dtype, device=types.device)
            if self.conditions.routed:
                composition = composition.repeat([n_systems, 1])
        else:
            flat = torch.bincount(system_index * n_types + types, minlength=n_systems * n_types)
            counts = flat.reshape(n_systems, n_types).to(dtype)
            composition = counts / counts.sum(1, keepdim=True).clamp(min=1.0)
        edge_input, switch_edge, directions, cosine, switch_angle = self.geometry(
            edge_vec.index_select(0, edge_order), sorted_types, edges, angles
        )
        switch_edge = switch_edge.to(dtype)
        directions = directions.to(dtype)
        switch_angle = switch_angle.to(dtype)
        if condition is not None:
            condition = condition.index_select(0, order)
        node, edge, angle = self.embedding(
            sorted_types, edge_input.to(dtype), cosine.to(dtype), shift, condition
        )
        of_group = shift
        if shift is not None and by_element and self.conditions.routed:
            of_group = shift.repeat_interleave(n_types, 0)
        features = self.embedding.group_features(composition, of_group)
        n_atom = types.size(0)
        for layer in self.layers:
            node, edge, angle = layer(
                node,
                edge,
                angle,
                switch_edge,
                directions,
                switch_angle,
                edges,
                angles,
                n_atom,
                node_splits,
                edge_splits,
                angle_splits,
                features,
            )
        energies = self.readout(node, sorted_types, condition, fitting_inputs, shift)
        return torch.zeros_like(energies).index_copy(0, order, energies)

    def _conditions(
        self, charge_spin: Tensor | None, fparam: Tensor | None, system_index: Tensor, n_systems: int
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the given values add to a structure.

        shift (S, n_dim), constant inputs of the fitting net, and the condition of every atom.
        """
        shift: Tensor | None = None
        fitting_inputs: Tensor | None = None
        condition: Tensor | None = None
        if self.conditions.takes_charge_spin:
            if charge_spin is None or charge_spin.size(0) != n_systems:
                raise RuntimeError("this model takes charge and spin: expected charge_spin (n_systems, 2)")
            shift = self.conditions.shift(charge_spin)
            condition = system_index
        if self.conditions.n_fparam > 0 and (
            fparam is None or fparam.size(0) != n_systems or fparam.size(1) != self.conditions.n_fparam
        ):
            raise RuntimeError("this model takes frame parameters: expected fparam (n_systems, n_fparam)")
        if self.conditions.n_fparam + self.conditions.n_case > 0:
            if fparam is None:
                fparam = torch.zeros((n_systems, 0), dtype=torch.float64, device=system_index.device)
            fitting_inputs = self.conditions.fitting_input(fparam)
            condition = system_index
        return shift, fitting_inputs, condition


@dataclass
class ModelOutput:
    """Energies of structures (n_systems,) and atoms (n,), forces (n, 3), virial (n_systems, 3, 3).

    In eV and Angstrom.
    """

    energy: Tensor
    energies: Tensor
    forces: Tensor
    virial: Tensor


def evaluate(
    model: nn.Module,
    types: Tensor,
    edge_index: Tensor,
    edge_vec: Tensor,
    system_index: Tensor | None = None,
    n_systems: int = 1,
    create_graph: bool = False,
    charge_spin: Tensor | None = None,
    fparam: Tensor | None = None,
) -> ModelOutput:
    """Energies, forces and virial of a model through autograd: the reference for every faster path.

    With d = dE/d(edge_vec): f_i += d, f_j -= d, virial = -sum edge_vec (x) d = -dE/d(strain).

    Args:
        model: `MoEPotential` or its scripted form.
        types, edge_index, edge_vec, system_index, n_systems, charge_spin, fparam: as in
            `MoEPotential.forward`.
        create_graph: keep the graph, so that a loss on forces can be differentiated.
    """
    n = types.size(0)
    if system_index is None:
        system_index = torch.zeros_like(types)
    vectors = edge_vec.detach().clone().requires_grad_(True) if not edge_vec.requires_grad else edge_vec
    # models of packages of format 1 have no such arguments
    given = {k: x for k, x in (("charge_spin", charge_spin), ("fparam", fparam)) if x is not None}
    energies = model(types, edge_index, vectors, system_index, n_systems, **given)
    energy = energies.new_zeros(n_systems).index_add(0, system_index, energies)
    if vectors.size(0) and energy.requires_grad:
        (d_vectors,) = torch.autograd.grad(
            energy.sum(), vectors, create_graph=create_graph, allow_unused=True
        )
    else:
        d_vectors = None
    d_vectors = torch.zeros_like(vectors) if d_vectors is None else d_vectors
    forces = (
        vectors.new_zeros((n, 3))
        .index_add(0, edge_index[0], d_vectors)
        .index_add(0, edge_index[1], -d_vectors)
    )
    outer = -(vectors.unsqueeze(2) * d_vectors.unsqueeze(1)).reshape(-1, 9)
    per_edge = system_index.index_select(0, edge_index[0])
    virial = vectors.new_zeros((n_systems, 9)).index_add(0, per_edge, outer).reshape(n_systems, 3, 3)
    if not create_graph:
        energy, energies, virial, forces = (x.detach() for x in (energy, energies, virial, forces))
    return ModelOutput(energy, energies, forces, virial)
