"""Model configuration: what a checkpoint must say so that `MoEPotential` can be built.

The same schema is the `config` entry of moecalc's own checkpoint form (docs/checkpoints.md).
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moecalc.conditions import (
    CHARGE_RANGE,
    SPIN_RANGE,
    ChargeSpinInput,
    ConditionError,
    FrameParameterInput,
    ModelConditions,
    charge_and_spin,
    whole_number,
)
from moecalc.keys import POSITIONS
from moecalc.nn.activation import check_activation

Precision = Literal["float32", "float64"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RouterConfig(_Strict):
    """One gate: which experts the rows of a routing group (element or structure) use.

    `gate` names how logits become weights: `topk_softmax` (softmax over the selected logits, the public
    code) or `softmax_topk` (softmax over all, keep the top k without renormalising, the paper's eq. 5).
    Counts of routed and shared experts are separate; shared experts always have weight 1.
    """

    n_routed_experts: int = Field(ge=0, description="experts that the gate chooses from")
    top_k: int = Field(ge=0, description="routed experts that an atom uses")
    n_shared_experts: int = Field(default=0, ge=0, description="experts that all atoms use, with weight 1")
    gate: Literal["topk_softmax", "softmax_topk"] = Field(
        default="topk_softmax",
        description="softmax over the chosen logits, or over all of which the largest are kept",
    )

    @model_validator(mode="after")
    def _check(self) -> RouterConfig:
        if self.top_k > self.n_routed_experts:
            raise ValueError(
                f"top_k = {self.top_k}, expected at most n_routed_experts = {self.n_routed_experts}"
            )
        if self.top_k + self.n_shared_experts == 0:
            raise ValueError("top_k + n_shared_experts = 0, expected at least one active expert")
        return self


class PositionConfig(_Strict):
    """A mixture of experts at one position: the router that serves it and the kind of experts.

    `mlp`: the activation is inside every expert (MoE); `linear`: one activation after the weighted sum
    (MoLE).
    """

    router: str = Field(description="name of the router; positions with the same one share a gate")
    kind: Literal["mlp", "linear"] = Field(
        default="mlp",
        description="activation inside of every expert (MoE), or after the weighted sum (MoLE)",
    )


class MoEConfig(_Strict):
    """Mixture of experts of every layer. Positions that share a router name share one gate.

    `routing`: `element` (router input is the type embedding of the centre atom) or `configuration` (its mean
    over all atoms of the structure). `route_on_charge_spin`: that input is taken after the charge and spin
    embedding is added to it (branch `0415_moe_pack`), not before (branch `moe`).
    """

    routing: Literal["element", "configuration"] = Field(
        default="element",
        description="what the gate sees: the type embedding of the centre, or its mean over the structure",
    )
    route_on_charge_spin: bool = Field(
        default=False, description="whether the gate sees the embedding of charge and spin as well"
    )
    routers: dict[str, RouterConfig] = Field(default_factory=dict, description="gates by name")
    positions: dict[str, PositionConfig] = Field(
        default_factory=dict, description="mixtures of experts by position; the other positions are dense"
    )

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        for position, entry in self.positions.items():
            if position not in POSITIONS:
                raise ValueError(f"moe position {position!r}, expected one of {', '.join(POSITIONS)}")
            if entry.router not in self.routers:
                raise ValueError(
                    f"moe position {position!r} names router {entry.router!r}, "
                    f"expected one of {', '.join(self.routers) or '(none defined)'}"
                )
        return self


class DescriptorConfig(_Strict):
    """DPA3 descriptor; names and defaults as in the `repflow` section of a DeePMD-kit input.

    Lengths in Angstrom. `e_sel`/`a_sel` enter through the normalisers only (no truncation).
    `default_chg_spin` is charge and multiplicity where a structure gives none; without it they are mandatory.
    """

    n_dim: int = Field(gt=0, description="width of node features")
    e_dim: int = Field(gt=0, description="width of edge features")
    a_dim: int = Field(gt=0, description="width of angle features")
    nlayers: int = Field(gt=0, description="layers")
    e_rcut: float = Field(gt=0, description="cutoff of edges, Angstrom")
    e_rcut_smth: float = Field(gt=0, description="where the switch of edges begins, Angstrom")
    e_sel: int = Field(gt=0, description="expected neighbors, for the normalisation only")
    a_rcut: float = Field(gt=0, description="cutoff of angles, Angstrom")
    a_rcut_smth: float = Field(gt=0, description="where the switch of angles begins, Angstrom")
    a_sel: int = Field(
        gt=0, description="expected neighbors within the angle cutoff, for the normalisation only"
    )
    axis_neuron: int = Field(
        default=4, gt=0, description="columns of the moments that the symmetrisation multiplies by"
    )
    n_multi_edge_message: int = Field(default=1, gt=0, description="messages per edge")
    a_compress_rate: int = Field(
        default=0, ge=0, description="compression of the node and edge part of the angle input; 0: none"
    )
    a_compress_e_rate: int = Field(
        default=1, gt=0, description="factor on the width of the compressed edge part"
    )
    a_compress_use_split: bool = Field(
        default=False, description="compress by taking the first columns, not by a learnt matrix"
    )
    update_angle: bool = Field(default=True, description="whether there are angle features")
    update_style: Literal["res_residual", "res_avg", "res_incr"] = Field(
        default="res_residual", description="residuals with learnt vectors, averaged, or added"
    )
    smooth_edge_update: bool = Field(
        default=False,
        description="false, with static selection: edges beyond the angle cutoff keep their features",
    )
    edge_init_use_dist: bool = Field(
        default=False,
        description="edge features start from the distance itself, not from the scaled inverse distance",
    )
    use_exp_switch: bool = Field(default=False, description="exponential switch functions, not polynomials")
    use_dynamic_sel: bool = Field(
        default=False, description="normalise by `e_sel` and `a_sel` over `sel_reduce_factor`"
    )
    sel_reduce_factor: float = Field(default=10.0, gt=0, description="see `use_dynamic_sel`")
    sequential_update: bool = Field(
        default=False, description="updates of a layer see the updates before them in the same layer"
    )
    activation_function: str = Field(default="silu", description="as DeePMD-kit names it")
    precision: Precision = Field(default="float64", description="of the network; geometry is float64")
    concat_output_tebd: bool = Field(
        default=False, description="the fitting net gets the type embedding as well"
    )
    use_tebd_bias: bool = Field(default=False, description="bias in the type embedding")
    use_econf_tebd: bool = Field(default=False, description="type embedding from electron configurations")
    env_protection: float = Field(default=0.0, description="added to distances that divide, Angstrom")
    exclude_types: list[tuple[int, int]] = Field(
        default_factory=list, description="pairs of types without edges"
    )
    add_chg_spin_ebd: bool = Field(
        default=False, description="whether the model takes charge and spin multiplicity"
    )
    default_chg_spin: tuple[int, int] | None = Field(
        default=None, description="charge and multiplicity where a structure gives none"
    )

    @field_validator("activation_function")
    @classmethod
    def _known_activation(cls, value: str) -> str:
        check_activation(value)
        return value

    @field_validator("default_chg_spin", mode="before")
    @classmethod
    def _whole_default(cls, value: object) -> object:
        return None if value is None else whole_charge_spin(value)

    @model_validator(mode="after")
    def _check(self) -> DescriptorConfig:
        if self.sequential_update and self.update_style != "res_residual":
            raise ValueError(
                f"sequential_update with update_style {self.update_style!r}, expected res_residual"
            )
        if self.a_rcut > self.e_rcut:
            raise ValueError(f"a_rcut = {self.a_rcut}, expected at most e_rcut = {self.e_rcut}")
        for smooth, cut in (("e_rcut_smth", "e_rcut"), ("a_rcut_smth", "a_rcut")):
            if getattr(self, smooth) >= getattr(self, cut):
                raise ValueError(
                    f"{smooth} = {getattr(self, smooth)}, expected below {cut} = {getattr(self, cut)}"
                )
        if self.axis_neuron > min(self.e_dim, self.n_dim):
            raise ValueError(f"axis_neuron = {self.axis_neuron}, expected at most min(e_dim, n_dim)")
        if self.a_compress_rate:
            if self.compressed_node_dim > self.n_dim or self.compressed_edge_dim > self.e_dim:
                raise ValueError(
                    f"a_compress_rate = {self.a_compress_rate}: compressed widths "
                    f"{self.compressed_node_dim}, "
                    f"{self.compressed_edge_dim} exceed n_dim = {self.n_dim}, e_dim = {self.e_dim}"
                )
            if self.compressed_node_dim == 0 or self.compressed_edge_dim == 0:
                raise ValueError(
                    f"a_compress_rate = {self.a_compress_rate} leaves no columns of a_dim = {self.a_dim}"
                )
        return self

    @property
    def compressed_node_dim(self) -> int:
        """Width of the node part of the angle input (SPEC: vc)."""
        return self.a_dim // self.a_compress_rate if self.a_compress_rate else self.n_dim

    @property
    def compressed_edge_dim(self) -> int:
        """Width of each edge part of the angle input (SPEC: ec)."""
        if not self.a_compress_rate:
            return self.e_dim
        return self.a_dim // (2 * self.a_compress_rate) * self.a_compress_e_rate

    @property
    def angle_dim(self) -> int:
        """Width of the whole angle input [a, vc, ec, ec]."""
        return self.a_dim + self.compressed_node_dim + 2 * self.compressed_edge_dim

    @property
    def edge_normalizer(self) -> float:
        """N_e: expected number of neighbors, divides edge sums."""
        return self.e_sel / self.sel_reduce_factor if self.use_dynamic_sel else float(self.e_sel)

    @property
    def angle_normalizer(self) -> float:
        """N_a: expected number of angle neighbors, divides angle sums."""
        return self.a_sel / self.sel_reduce_factor if self.use_dynamic_sel else float(self.a_sel)

    def live_positions(self, layer: int) -> tuple[str, ...]:
        """Maps of `layer` whose output can reach the energy; the others are dead work and are never built.

        All updates read the layer's input, so edges of the last layer and angles of the last two are read by
        nobody. Sequential updates read what the layer itself has made: there all maps count.
        """
        edge = self.sequential_update or layer < self.nlayers - 1
        angle = self.sequential_update or layer < self.nlayers - 2
        names = ["node_self_mlp", "node_sym_linear", "node_edge_linear"]
        if edge:
            names.append("edge_self_linear")
        if edge and self.update_angle:
            names += ["edge_angle_linear1", "edge_angle_linear2"]
        if angle and self.update_angle:
            names.append("angle_self_linear")
        return tuple(names)

    def layer_is_live(self, layer: int) -> tuple[bool, bool]:
        """Whether the edge and the angle update of `layer` can reach the energy."""
        live = self.live_positions(layer)
        return "edge_self_linear" in live, "angle_self_linear" in live

    @property
    def needs_angles(self) -> bool:
        """Whether any angle reaches the energy."""
        return "edge_angle_linear1" in self.live_positions(0)


class FittingConfig(_Strict):
    """Energy fitting net: hidden widths, activation, residual time steps, frame parameters.

    `default_fparam` is used where a structure gives no frame parameters; without it they are mandatory.
    """

    neuron: list[int] = Field(description="widths of the hidden layers")
    activation_function: str = Field(default="tanh", description="as DeePMD-kit names it")
    resnet_dt: bool = Field(default=True, description="learnt time steps of the residual connections")
    dim_case_embd: int = Field(
        default=0, ge=0, description="width of the embedding of the head, in multi-task training"
    )
    numb_fparam: int = Field(default=0, ge=0, description="number of frame parameters")
    default_fparam: list[float] | None = Field(
        default=None, description="frame parameters where a structure gives none"
    )
    precision: Precision = Field(default="float64", description="of the fitting net")
    atom_exclude_types: list[int] = Field(
        default_factory=list, description="types whose atoms have no energy of the network"
    )

    @field_validator("activation_function")
    @classmethod
    def _known_activation(cls, value: str) -> str:
        check_activation(value)
        return value

    @model_validator(mode="after")
    def _check(self) -> FittingConfig:
        if self.default_fparam is None:
            return self
        if len(self.default_fparam) != self.numb_fparam:
            raise ValueError(
                f"default_fparam = {self.default_fparam}, expected numb_fparam = {self.numb_fparam} numbers"
            )
        if not all(math.isfinite(x) for x in self.default_fparam):
            raise ValueError(f"default_fparam = {self.default_fparam}, expected finite numbers")
        return self


def whole_charge_spin(value: object) -> tuple[int, int]:
    """Default charge and multiplicity of a configuration as integers.

    Raises:
        ValueError: not two whole numbers within the tables.
    """
    try:
        charge, spin = charge_and_spin(value)
        return whole_number("charge", charge, CHARGE_RANGE), whole_number("spin", spin, SPIN_RANGE)
    except ConditionError as error:
        raise ValueError(str(error)) from None


class ModelConfig(_Strict):
    """Everything that fixes the architecture of a potential.

    `fparam_is_charge_spin`: the two frame parameters are charge and multiplicity, and the descriptor reads
    them too (SPEC section 12, generation G2).
    """

    type_map: list[str] = Field(description="elements, in the order of the types")
    descriptor: DescriptorConfig = Field(description="DPA3, see below")
    fitting: FittingConfig = Field(description="energy of an atom from its features, see below")
    moe: MoEConfig = Field(
        default_factory=MoEConfig, description="mixture of experts, see below; without it the model is dense"
    )
    pair_exclude_types: list[tuple[int, int]] = Field(
        default_factory=list, description="pairs of types that do not see each other"
    )
    fparam_is_charge_spin: bool = Field(
        default=False, description="the two frame parameters are charge and spin multiplicity"
    )

    @property
    def takes_conditions(self) -> bool:
        """Whether structures give charge and spin, or frame parameters."""
        return self.descriptor.add_chg_spin_ebd or self.fitting.numb_fparam > 0

    @property
    def routes_on_charge_spin(self) -> bool:
        """Whether the experts of an atom depend on charge and spin."""
        return self.descriptor.add_chg_spin_ebd and self.moe.route_on_charge_spin and bool(self.moe.positions)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if not self.type_map or len(set(self.type_map)) != len(self.type_map):
            raise ValueError(f"type_map = {self.type_map}, expected distinct element symbols")
        if self.fparam_is_charge_spin:
            if not self.descriptor.add_chg_spin_ebd or self.fitting.numb_fparam != 2:
                raise ValueError(
                    f"fparam_is_charge_spin with add_chg_spin_ebd = {self.descriptor.add_chg_spin_ebd} and "
                    "numb_fparam = "
                    f"{self.fitting.numb_fparam}, expected true and 2"
                )
            if self.descriptor.default_chg_spin is not None:
                raise ValueError(
                    "fparam_is_charge_spin with default_chg_spin, expected default_fparam as its default"
                )
            if self.fitting.default_fparam is not None:
                try:
                    whole_charge_spin(self.fitting.default_fparam)
                except ValueError as error:
                    raise ValueError(f"default_fparam is charge and spin here: {error}") from None
        return self

    def conditions(self) -> ModelConditions | None:
        """What structures give, as a package's metadata have it; None where nothing is taken."""
        if not self.takes_conditions:
            return None
        charge_spin = fparam = None
        if self.descriptor.add_chg_spin_ebd:
            default = self.descriptor.default_chg_spin
            if self.fparam_is_charge_spin and self.fitting.default_fparam is not None:
                default = whole_charge_spin(self.fitting.default_fparam)
            charge_spin = ChargeSpinInput(default=default)
        if self.fitting.numb_fparam:
            fparam = FrameParameterInput(size=self.fitting.numb_fparam, default=self.fitting.default_fparam)
        return ModelConditions(
            charge_spin=charge_spin,
            fparam=fparam,
            routed=self.routes_on_charge_spin,
            fparam_is_charge_spin=self.fparam_is_charge_spin,
        )
