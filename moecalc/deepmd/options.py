"""The options of the descriptor `dpa3_moe`, in moecalc's terms. Needs no DeePMD-kit: `moecalc package` reads checkpoints with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from moecalc.keys import POSITIONS
from moecalc.nn.config import DescriptorConfig, MoEConfig, PositionConfig, RouterConfig

DESCRIPTOR = "dpa3_moe"
"""Value of `descriptor.type`."""

GROUPS: dict[str, tuple[str, ...]] = {
    "node": ("node_self_mlp", "node_sym_linear", "node_edge_linear"),
    "edge": ("edge_self_linear", "edge_angle_linear2"),
    "angle": ("edge_angle_linear1", "angle_self_linear"),
}
"""Short names for `moe.positions`: the maps that update nodes, that work on edges, that read angles."""

MOE_DEFAULTS: dict[str, Any] = {
    "n_shared_experts": 0,
    "positions": ["node", "edge", "angle"],
    "kind": "mlp",
    "gate": "topk_softmax",
    "routing": "element",
}

# options of DPA3's `repflow` section that fix the initial weights or the order of operations only
TRAINING_OPTIONS: dict[str, Any] = {
    "fix_stat_std": 0.3,
    "skip_stat": False,
    "update_residual": 0.1,
    "update_residual_init": "const",
    "optim_update": True,
}
# sizes that DPA3 has defaults for and `DescriptorConfig` has not
_SIZES = {"n_dim": 128, "e_dim": 64, "a_dim": 64, "nlayers": 6}


class OptionError(ValueError):
    """An option of the input that cannot be used: names it, its value, and what was expected."""


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(x) for x in first["loc"])
    return f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"


def moe_config(section: Mapping[str, Any] | None) -> MoEConfig:
    """Routers and positions of a `moe` section; None or an empty one makes a dense model.

    Each entry of `positions` is a group of maps (`GROUPS`) or one map (`POSITIONS`), and has one router of its own in each
    layer, named like the entry: the maps of a group share their gate.

    Raises:
        OptionError: unknown, missing or inconsistent options.
    """
    if not section:
        return MoEConfig()
    unknown = sorted(set(section) - set(MOE_DEFAULTS) - {"n_routed_experts", "top_k"})
    if unknown:
        raise OptionError(
            f"moe.{unknown[0]} is not an option, expected n_routed_experts, top_k, {', '.join(MOE_DEFAULTS)}"
        )
    missing = [name for name in ("n_routed_experts", "top_k") if name not in section]
    if missing:
        raise OptionError(f"moe.{missing[0]} is missing, expected a number")
    options = {**MOE_DEFAULTS, **section}
    try:
        router = RouterConfig(**{name: options[name] for name in RouterConfig.model_fields})
        positions: dict[str, PositionConfig] = {}
        for entry in options["positions"]:
            if entry not in GROUPS and entry not in POSITIONS:
                raise OptionError(
                    f"moe.positions has {entry!r}, expected {', '.join(GROUPS)} or one of {', '.join(POSITIONS)}"
                )
            for name in GROUPS.get(entry, (entry,)):
                if name in positions:
                    raise OptionError(
                        f"moe.positions {options['positions']} names {name} twice, expected each map once"
                    )
                positions[name] = PositionConfig(router=entry, kind=options["kind"])
        return MoEConfig(
            routing=options["routing"],
            routers=dict.fromkeys(options["positions"], router),
            positions=positions,
        )
    except ValidationError as error:
        raise OptionError(f"moe: {_reason(error)}") from None


def descriptor_config(repflow: Mapping[str, Any], **options: Any) -> DescriptorConfig:
    """Architecture of a `repflow` section and of the options beside it (precision, activation_function, ...).

    Raises:
        OptionError: unknown, missing or inconsistent options, or ones that moecalc does not implement.
    """
    values = {**_SIZES, **{k: v for k, v in repflow.items() if k not in TRAINING_OPTIONS}, **options}
    precision = {"default": "float64", "double": "float64", "single": "float32"}
    values["precision"] = precision.get(values.get("precision", "default"), values.get("precision"))
    if values.get("use_dynamic_sel") and not values.get("smooth_edge_update"):
        raise OptionError(
            "repflow.smooth_edge_update = false with use_dynamic_sel, expected true (as for dpa3)"
        )
    try:
        config = DescriptorConfig.model_validate(values)
    except ValidationError as error:
        raise OptionError(f"descriptor: {_reason(error)}") from None
    if config.a_sel > config.e_sel:
        raise OptionError(f"repflow.a_sel = {config.a_sel}, expected at most e_sel = {config.e_sel}")
    return config
