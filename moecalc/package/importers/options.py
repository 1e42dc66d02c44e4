"""What a checkpoint's `model_params` may hold: every option that is known, its type, and what is made of it.

`clean_params` looks at all options before a reader sees one: a wrong type, an option nobody knows, and old
names are dealt with here, so that readers can use plain dictionaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moecalc.errors import CheckpointError
from moecalc.nn.deepmd_input import DESCRIPTOR, shown

_LARGEST = 10**7
"""No whole number of a model (widths, layers, neighbors, experts) is larger; more is a damaged file."""


class _WrongValueError(Exception):
    """A value of another type than its option has."""


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _WrongValueError
    return value


def _int(value: Any) -> int:
    # trainers in other languages write 4.0 for 4
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST:
        raise _WrongValueError
    return value


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _WrongValueError
    return float(value)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise _WrongValueError
    return value


def _list(entry: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    def check(value: Any) -> list[Any]:
        if not isinstance(value, list | tuple):
            raise _WrongValueError
        return [entry(x) for x in value]

    return check


def _pair(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _WrongValueError
    return _int(value[0]), _int(value[1])


def _strings(value: Any) -> list[str]:
    # DeePMD-kit reads a lone word as a list of one
    return _list(_str)([value] if isinstance(value, str) else value)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _WrongValueError
    return dict(value)


def _anything(value: Any) -> Any:
    return value


_CHECKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "bool": (_bool, "true or false"),
    "int": (_int, f"a whole number up to {_LARGEST:,}"),
    "float": (_float, "a finite number"),
    "str": (_str, "a word"),
    "strings": (_list(_str), "a list of words"),
    "names": (_strings, "a list of words"),
    "ints": (_list(_int), f"a list of whole numbers up to {_LARGEST:,}"),
    "floats": (_list(_float), "a list of finite numbers"),
    "pairs": (_list(_pair), "a list of pairs of type indices"),
    "list": (_list(_anything), "a list"),
    "dict": (_mapping, "a dictionary"),
    "any": (_anything, "any value"),
}


@dataclass(frozen=True)
class Option:
    """One known option.

    Attributes:
        kind: its type, a key of `_CHECKS`; "any" where it is not read, or where a reader looks at it itself.
        null: what None means: "refuse", or "leave out" where the code that wrote it takes None for its
            default.
        required: whether it must be there.
    """

    kind: str
    null: Literal["refuse", "leave out"] = "refuse"
    required: bool = False


TRAINING = Option("any")
"""For training, initial weights or the order of operations only: any value gives the same energies."""


def _required(kind: str) -> Option:
    return Option(kind, required=True)


def _nullable(kind: str) -> Option:
    return Option(kind, null="leave out")


# Sources: argument lists of deepmd-kit 3.2.0 (`model_args`, `standard_model_args`, `descrpt_dpa3_args`,
# `dpa3_repflow_args`, `fitting_ener`), of the branches `moe` and `0415_moe_pack` where said so, and of
# moecalc's plugin (moecalc/deepmd).

MODEL: dict[str, Option] = {
    "type": Option("any"),  # standard_model_args; looked at by `check_supported`, like the next five
    "use_srtab": Option("any"),  # model_args: a pair table below the model
    "modifier": Option("any"),  # model_args: adds energies of its own
    "compress": Option("any"),  # model_args: tabulated networks
    "spin": Option("any"),  # model_args: magnetic moments
    "bridging_method": Option("any"),  # standard_model_args: a ZBL part
    "type_map": _required("strings"),  # model_args
    "descriptor": _required("dict"),  # standard_model_args
    "fitting_net": _required("dict"),  # standard_model_args
    "pair_exclude_types": _nullable("pairs"),  # model_args
    "atom_exclude_types": _nullable("ints"),  # model_args
    "info": _nullable("dict"),  # standard_model_args; the trainer writes `observed_type` into it
    "model_branch_alias": _nullable("names"),  # standard_model_args
    "smin_alpha": TRAINING,  # model_args; these three belong to use_srtab, which is refused
    "sw_rmin": TRAINING,
    "sw_rmax": TRAINING,
    "srtab_add_bias": TRAINING,  # model_args: biases beside a pair table
    "bridging_r_inner": TRAINING,  # standard_model_args; of bridging_method, which is refused
    "bridging_r_outer": TRAINING,
    "preset_out_bias": TRAINING,  # model_args: starts of out_bias, which the file holds as trained
    "data_stat_nbatch": TRAINING,  # model_args: statistics of the training data
    "data_stat_protect": TRAINING,
    "data_bias_nsample": TRAINING,
    "finetune_head": TRAINING,  # model_args
    "hessian_mode": TRAINING,  # an output of training, no term of the energy
    "type_embedding": TRAINING,  # model_args: DPA3 has its own and reads none
}

DESCRIPTOR_OPTIONS: dict[str, Option] = {
    "type": _required("str"),  # descrpt_variant_type_args
    "repflow": _required("dict"),  # descrpt_dpa3_args, as all that follow
    "concat_output_tebd": Option("bool"),
    "activation_function": Option("str"),
    "precision": Option("str"),
    "exclude_types": _nullable("pairs"),
    "env_protection": Option("float"),
    "use_econf_tebd": Option("bool"),
    "use_tebd_bias": Option("bool"),
    "add_chg_spin_ebd": Option("bool"),
    "default_chg_spin": _nullable("floats"),
    "trainable": TRAINING,
    "seed": TRAINING,
    "use_loc_mapping": TRAINING,
    "ntypes": TRAINING,  # the length of type_map and the type_map again, which DeePMD-kit's code passes on
    "type_map": TRAINING,
}

REPFLOW: dict[str, Option] = {
    "n_dim": _required("int"),  # dpa3_repflow_args, as all that follow
    "e_dim": _required("int"),
    "a_dim": _required("int"),
    "nlayers": _required("int"),
    "e_rcut": _required("float"),
    "e_rcut_smth": _required("float"),
    "e_sel": _required("int"),
    "a_rcut": _required("float"),
    "a_rcut_smth": _required("float"),
    "a_sel": _required("int"),
    "axis_neuron": Option("int"),
    "n_multi_edge_message": Option("int"),
    "a_compress_rate": Option("int"),
    "a_compress_e_rate": Option("int"),
    "a_compress_use_split": Option("bool"),
    "update_angle": Option("bool"),
    "update_style": Option("str"),
    "fix_stat_std": Option("float"),  # says where the statistics in the file come from
    "smooth_edge_update": Option("bool"),
    "edge_init_use_dist": Option("bool"),
    "use_exp_switch": Option("bool"),
    "use_dynamic_sel": Option("bool"),
    "sel_reduce_factor": Option("float"),
    "sequential_update": Option("bool"),
    "skip_stat": TRAINING,
    "optim_update": TRAINING,  # order of operations
    "update_residual": TRAINING,  # initial weights
    "update_residual_init": TRAINING,
}
# branch `moe`; n_experts and what follows count only where they make experts, see `check_experts`
REPFLOW_MOE: dict[str, Option] = {
    "n_experts": Option("int"),
    "moe_top_k": Option("int"),
    "share_expert": Option("int"),
    "use_node_moe": Option("bool"),
    "use_edge_moe": Option("bool"),
    "use_angle_moe": Option("bool"),
    "fuse_moe_mlps": Option("bool"),
    "moe_ep_size": TRAINING,  # how the experts were spread over GPUs
    "moe_gpu_level_a2a": TRAINING,
}
# branch `0415_moe_pack`
REPFLOW_PACK: dict[str, Option] = {
    "use_moe": Option("bool"),
    "n_routing_experts": Option("int"),
    "moe_topk": Option("int"),
    "n_shared_experts": Option("int"),
}
# the `moe` section of moecalc's plugin; unknown entries are refused by `read_moe`
PLUGIN_MOE: dict[str, Option] = {
    "n_routed_experts": Option("int"),
    "top_k": Option("int"),
    "n_shared_experts": Option("int"),
    "positions": Option("strings"),
    "kind": Option("str"),
    "gate": Option("str"),
    "routing": Option("str"),
}

FITTING: dict[str, Option] = {
    "neuron": _required("ints"),  # fitting_ener, as all that follow
    "type": Option("str"),
    "activation_function": Option("str"),
    "resnet_dt": Option("bool"),
    "precision": Option("str"),
    "dim_case_embd": Option("int"),
    "numb_fparam": Option("int"),
    "default_fparam": _nullable("floats"),
    "numb_aparam": Option("int"),
    "use_aparam_as_mask": Option("bool"),
    "atom_ener": _nullable("list"),  # looked at by `check_supported`
    "trainable": TRAINING,
    "rcond": TRAINING,
    "seed": TRAINING,
    "layer_name": TRAINING,  # which layers heads share while they are trained
}

# names of older versions (aliases in dpa3_repflow_args and fitting_ener)
_OLD_NAMES = {
    "repflow": {"use_env_envelope": "use_exp_switch", "edge_use_dist": "edge_init_use_dist"},
    "fitting_net": {"n_neuron": "neuron"},
}
_OTHER_NAMES = {"repflow_args": "repflow"}


def same(a: object, b: object) -> bool:
    """Whether two values are of one type and equal; never raises, as tensors do when they are compared."""
    return type(a) is type(b) and not hasattr(a, "shape") and a == b


def _is_neutral(value: object) -> bool:
    """Whether an unknown option says "off": none of these values switches anything on."""
    if isinstance(value, str):
        return value.strip().lower() in {"", "none"}
    if isinstance(value, list | tuple | dict):
        return not value
    return value is None or (isinstance(value, bool | int | float) and value == 0)


def _translate(section: dict[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """Old option names by their present ones.

    Raises:
        CheckpointError: both given, and not the same.
    """
    result = {key: value for key, value in section.items() if key not in names}
    for old, new in names.items():
        if old not in section:
            continue
        if new in section and not same(section[new], section[old]):
            raise CheckpointError(
                f"option {where}.{old} = {shown(section[old])} contradicts {where}.{new} = "
                f"{shown(section[new])}, "
                "expected two names of one option to agree: take one out"
            )
        result[new] = section[old]
    return result


def _clean_section(section: Mapping[str, Any], known: Mapping[str, Option], where: str) -> dict[str, Any]:
    """A section with checked values.

    Raises:
        CheckpointError: wrong types, missing options, unknown ones that are not neutral.
    """
    result: dict[str, Any] = {}
    for key, value in section.items():
        if key not in known:
            if not _is_neutral(value):
                raise CheckpointError(
                    f"option {where}.{key} = {shown(value)} is not known to moecalc and may change energies, "
                    "expected it to be absent or off: train without it or ask for it in an issue"
                )
            continue
        option = known[key]
        if value is None and option.null == "leave out":
            continue
        check, expected = _CHECKS[option.kind]
        try:
            result[key] = check(value)
        except _WrongValueError:
            raise CheckpointError(f"option {where}.{key} = {shown(value)}, expected {expected}") from None
    for key, option in known.items():
        if option.required and key not in section:
            raise CheckpointError(
                f"option {where}.{key} is missing, expected {_CHECKS[option.kind][1]}: "
                "model_params of the checkpoint is incomplete"
            )
    return result


def clean_params(params: object, where: str = "model") -> dict[str, Any]:
    """Check the type of every option of one head, translate old names, refuse what is not known.

    Args:
        params: `model_params` of a single-task checkpoint, or an entry of its `model_dict`.
        where: how messages call the dictionary.

    Returns:
        A copy with the sections `descriptor`, `descriptor.repflow` and `fitting_net` as plain dictionaries.

    Raises:
        CheckpointError: names the option by its path, its value and what was expected.
    """
    if not isinstance(params, Mapping) or not all(isinstance(key, str) for key in params):
        raise CheckpointError(f"{where} = {shown(params)}, expected a dictionary of options by name")
    # a model of another kind has other options: say the kind, not the first of them
    kind = params.get("type", "standard")
    if not isinstance(kind, str) or kind != "standard":
        raise CheckpointError(
            f"option model.type = {shown(kind)} is not supported, expected 'standard': moecalc runs DPA3"
        )
    model = _clean_section(params, MODEL, "model")
    check_type_map(model["type_map"])
    kind = model["descriptor"].get("type")
    if not isinstance(kind, str) or kind not in {"dpa3", DESCRIPTOR}:
        raise CheckpointError(
            f"option descriptor.type = {shown(kind)} is not supported, expected 'dpa3' or {DESCRIPTOR!r}: "
            "moecalc runs DPA3"
        )
    plugin = kind == DESCRIPTOR
    known = DESCRIPTOR_OPTIONS | ({"moe": _nullable("dict")} if plugin else {})
    descriptor = _clean_section(
        _translate(model["descriptor"], _OTHER_NAMES, "descriptor"), known, "descriptor"
    )
    repflow = _translate(descriptor["repflow"], _OLD_NAMES["repflow"], "descriptor.repflow")
    known = REPFLOW | ({} if plugin else REPFLOW_MOE | REPFLOW_PACK)
    descriptor["repflow"] = _clean_section(repflow, known, "descriptor.repflow")
    if descriptor.get("moe"):
        # entries that are not known stay: `read_moe` lists what it expects
        section = descriptor["moe"]
        typed = {key: value for key, value in section.items() if key in PLUGIN_MOE}
        descriptor["moe"] = section | _clean_section(typed, PLUGIN_MOE, "descriptor.moe")
    fitting = _translate(model["fitting_net"], _OLD_NAMES["fitting_net"], "fitting_net")
    kind = fitting.get("type", "ener")
    if not isinstance(kind, str) or kind != "ener":
        raise CheckpointError(f"option fitting_net.type = {shown(kind)} is not supported, expected 'ener'")
    fitting = _clean_section(fitting, FITTING, "fitting_net")
    return model | {"descriptor": descriptor, "fitting_net": fitting}


def check_type_map(type_map: list[str]) -> None:
    """Refuse an empty list and names that are there twice.

    Raises:
        CheckpointError: shows the list.
    """
    # names that are no element symbols can be left out of a package (`--elements`), so they are refused later
    if not type_map or not all(type_map) or len(set(type_map)) != len(type_map):
        what = (
            "one is there twice"
            if type_map and all(type_map)
            else "one is empty"
            if type_map
            else "it is empty"
        )
        raise CheckpointError(
            f"option model.type_map = {shown(type_map)}, expected a list of distinct element symbols: {what}"
        )


def check_experts(params: Mapping[str, Any], layout: str) -> None:
    """Refuse expert options that the tensors of the file do not bear out.

    Raises:
        CheckpointError: experts of another branch than the layout's, or none where the layout has them.
    """
    repflow = params["descriptor"].get("repflow") or {}
    moe, pack = repflow.get("n_experts", 1) > 1, bool(repflow.get("use_moe", False))
    for here, option, active in (("moe", "n_experts", moe), ("0415_moe_pack", "use_moe", pack)):
        value = repflow.get(option)
        if active and layout != here:
            raise CheckpointError(
                f"option descriptor.repflow.{option} = {value!r} asks for experts of branch {here}, "
                f"but the tensors are those of layout {layout!r}: expected options and tensors of one "
                "training"
            )
        if not active and layout == here:
            raise CheckpointError(
                f"option descriptor.repflow.{option} = {value!r} asks for no experts, "
                f"but the tensors are those of branch {here}: expected options and tensors of one training"
            )
