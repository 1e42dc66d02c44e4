"""DeePMD-kit's options in moecalc's terms: the one translator, for plugin and importers of checkpoints.

Needs no DeePMD-kit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

from moecalc.keys import POSITIONS
from moecalc.nn.config import DescriptorConfig, FittingConfig, MoEConfig, PositionConfig, RouterConfig

DESCRIPTOR = "dpa3_moe"
"""Value of `descriptor.type` for moecalc's own descriptor in DeePMD-kit."""

GROUPS: dict[str, tuple[str, ...]] = {
    "node": ("node_self_mlp", "node_sym_linear", "node_edge_linear"),
    "edge": ("edge_self_linear", "edge_angle_linear2"),
    "angle": ("edge_angle_linear1", "angle_self_linear"),
}
"""Short names for groups of maps: those that update nodes, that work on edges, that read angles."""

PRECISIONS: dict[str, Literal["float32", "float64"]] = {
    "default": "float64",
    "float64": "float64",
    "double": "float64",
    "float32": "float32",
    "single": "float32",
}
"""Names that DeePMD-kit has for the precisions that moecalc computes in."""

MOE_DEFAULTS: dict[str, Any] = {
    "n_shared_experts": 0,
    "positions": ["node", "edge", "angle"],
    "kind": "mlp",
    "gate": "topk_softmax",
    "routing": "element",
}
"""Options of the `moe` section that may be left out."""

TRAINING_OPTIONS: dict[str, Any] = {
    "fix_stat_std": 0.3,
    "skip_stat": False,
    "update_residual": 0.1,
    "update_residual_init": "const",
    "optim_update": True,
}
"""Options of `repflow` that fix initial weights or the order of operations only, with DPA3's defaults."""

# sizes that DPA3 has defaults for and `DescriptorConfig` has not
_SIZES = {"n_dim": 128, "e_dim": 64, "a_dim": 64, "nlayers": 6}

# options of a descriptor section beside `repflow`; where None stands for one, its default counts
_BESIDE_REPFLOW = (
    "activation_function",
    "concat_output_tebd",
    "use_tebd_bias",
    "use_econf_tebd",
    "env_protection",
    "exclude_types",
)


class OptionError(ValueError):
    """An option of the input that cannot be used: names it, its value, and what was expected."""


def shown(value: object) -> str:
    """A value in a message: its text in one line, shortened, and its type."""
    text = " ".join(repr(value).split()) if not hasattr(value, "shape") else "a tensor"
    text = "".join(c for c in text if c.isprintable())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def first_error(error: ValidationError) -> str:
    """One line for the first problem that pydantic found."""
    first = error.errors()[0]
    where = ".".join(str(x) for x in first["loc"])
    got = (
        ""
        if first["type"] in {"missing", "value_error", "extra_forbidden"}
        else f", got {shown(first['input'])}"
    )
    return f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}{got}"


def read_precision(value: object) -> Any:
    """moecalc's name of a precision; what is not in `PRECISIONS` stays as it is, for the schema to refuse."""
    return PRECISIONS.get(str(value), value)


def read_descriptor(section: Mapping[str, Any]) -> DescriptorConfig:
    """Architecture of a `descriptor` section: its `repflow` section and the options beside it.

    `TRAINING_OPTIONS` are left out; so are options beside `repflow` that fix no architecture (`type`, `seed`,
    ...).

    Args:
        section: of the type `dpa3` or `dpa3_moe`.

    Raises:
        OptionError: options of `repflow` that are unknown, missing or inconsistent, values of another type.
    """
    repflow = section.get("repflow") or {}
    values = {**_SIZES, **{name: x for name, x in repflow.items() if name not in TRAINING_OPTIONS}}
    values |= {name: section[name] for name in _BESIDE_REPFLOW if section.get(name) is not None}
    values["precision"] = read_precision(section.get("precision", "default"))
    with_charge = bool(section.get("add_chg_spin_ebd"))
    values["add_chg_spin_ebd"] = with_charge
    values["default_chg_spin"] = section.get("default_chg_spin") if with_charge else None
    try:
        return DescriptorConfig.model_validate(values)
    except ValidationError as error:
        raise OptionError(first_error(error)) from None


def read_fitting(section: Mapping[str, Any], atom_exclude_types: list[int]) -> FittingConfig:
    """Architecture of a `fitting_net` section.

    Args:
        section: of the type `ener`; `neuron` is mandatory.
        atom_exclude_types: the model's option of that name.

    Raises:
        OptionError: inconsistent options, or values of another type.
    """
    n_fparam = section.get("numb_fparam") or 0
    try:
        return FittingConfig(
            neuron=list(section["neuron"]),
            activation_function=section.get("activation_function", "tanh"),
            resnet_dt=section.get("resnet_dt", True),
            dim_case_embd=section.get("dim_case_embd", 0),
            numb_fparam=n_fparam,
            default_fparam=(section.get("default_fparam") or None) if n_fparam else None,
            precision=read_precision(section.get("precision", "default")),
            atom_exclude_types=list(atom_exclude_types),
        )
    except ValidationError as error:
        raise OptionError(first_error(error)) from None


def read_moe(section: Mapping[str, Any] | None) -> MoEConfig:
    """Routers and positions of a `moe` section; None or an empty one makes a dense model.

    Each entry of `positions` is a group of maps (`GROUPS`) or one map (`POSITIONS`), and has one router of
    its own in each layer, named like the entry: the maps of a group share their gate.

    Raises:
        OptionError: unknown, missing or inconsistent options.
    """
    if not section:
        return MoEConfig()
    _check_names(section)
    options = {**MOE_DEFAULTS, **section}
    try:
        router = RouterConfig(**{name: options[name] for name in RouterConfig.model_fields})
        return MoEConfig(
            routing=options["routing"],
            routers=dict.fromkeys(options["positions"], router),
            positions=_positions(options["positions"], options["kind"]),
        )
    except ValidationError as error:
        raise OptionError(f"moe: {first_error(error)}") from None


def _check_names(section: Mapping[str, Any]) -> None:
    required = ("n_routed_experts", "top_k")
    unknown = sorted(set(section) - set(MOE_DEFAULTS) - set(required))
    if unknown:
        expected = ", ".join([*required, *MOE_DEFAULTS])
        raise OptionError(f"moe.{unknown[0]} is not an option, expected {expected}")
    for name in required:
        if name not in section:
            raise OptionError(f"moe.{name} is missing, expected a number")


def _positions(entries: list[str], kind: Any) -> dict[str, PositionConfig]:
    """Positions by map, each with a router named like its entry."""
    positions: dict[str, PositionConfig] = {}
    for entry in entries:
        if entry not in GROUPS and entry not in POSITIONS:
            expected = f"{', '.join(GROUPS)} or one of {', '.join(POSITIONS)}"
            raise OptionError(f"moe.positions has {entry!r}, expected {expected}")
        for name in GROUPS.get(entry, (entry,)):
            if name in positions:
                raise OptionError(f"moe.positions {entries} names {name} twice, expected each map once")
            positions[name] = PositionConfig(router=entry, kind=kind)
    return positions
