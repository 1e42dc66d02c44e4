"""Argument check of the descriptor `dpa3_moe` in DeePMD-kit's `input.json`."""

from __future__ import annotations

from dargs import Argument
from deepmd.utils.argcheck import descrpt_args_plugin, descrpt_dpa3_args

from moecalc.keys import POSITIONS
from moecalc.nn.config import whole_charge_spin
from moecalc.nn.deepmd_input import DESCRIPTOR, GROUPS, MOE_DEFAULTS, PRECISIONS


def _count(value: int) -> bool:
    return value >= 0


def _is_charge_spin(value: object) -> bool:
    try:
        return value is None or bool(whole_charge_spin(value))
    except ValueError:
        return False


def moe_arguments() -> list[Argument]:
    """The options of the `moe` section."""
    one_of = ", ".join
    return [
        Argument(
            "n_routed_experts",
            int,
            extra_check=_count,
            extra_check_errmsg="expected 0 or more",
            doc="Experts at every position that the router chooses from, shared ones not counted.",
        ),
        Argument(
            "top_k",
            int,
            extra_check=_count,
            extra_check_errmsg="expected 0 or more",
            doc="Routed experts that each element (or structure) uses, at most n_routed_experts.",
        ),
        Argument(
            "n_shared_experts",
            int,
            optional=True,
            default=MOE_DEFAULTS["n_shared_experts"],
            extra_check=_count,
            extra_check_errmsg="expected 0 or more",
            doc="Experts that every element uses with weight 1.",
        ),
        Argument(
            "positions",
            list[str],
            optional=True,
            default=MOE_DEFAULTS["positions"],
            extra_check=lambda value: all(entry in GROUPS or entry in POSITIONS for entry in value),
            extra_check_errmsg=f"expected a list of {one_of(GROUPS)} or of single maps: {one_of(POSITIONS)}",
            doc="Which linear maps of every layer are mixtures of experts: groups of them (node, edge, "
            "angle) or single maps by "
            "name. The maps of a group share one gate; a map that is named alone has its own.",
        ),
        Argument(
            "kind",
            str,
            optional=True,
            default=MOE_DEFAULTS["kind"],
            extra_check=lambda value: value in {"mlp", "linear"},
            extra_check_errmsg="expected mlp or linear",
            doc="mlp: the activation is inside every expert. linear: one activation after the weighted sum "
            "(MoLE); a package "
            "merges such experts into one matrix per element, which costs as much as a dense model.",
        ),
        Argument(
            "gate",
            str,
            optional=True,
            default=MOE_DEFAULTS["gate"],
            extra_check=lambda value: value in {"topk_softmax", "softmax_topk"},
            extra_check_errmsg="expected topk_softmax or softmax_topk",
            doc="topk_softmax: softmax over the chosen logits, weights sum to 1. softmax_topk: softmax over "
            "all of them, of which "
            "the top k are kept, not normalised again.",
        ),
        Argument(
            "routing",
            str,
            optional=True,
            default=MOE_DEFAULTS["routing"],
            extra_check=lambda value: value in {"element", "configuration"},
            extra_check_errmsg="expected element or configuration",
            doc="element: an atom's experts depend on its element. configuration: on the composition of the "
            "structure; unstable "
            "in training with experts of kind mlp (arXiv 2603.07977).",
        ),
    ]


@descrpt_args_plugin.register(
    DESCRIPTOR, doc="(Supported Backend: PyTorch, by moecalc) DPA3 with element-wise mixture of experts. "
)
def descriptor_arguments() -> list[Argument]:
    """DPA3's own arguments, restricted to what moecalc implements, and the `moe` section."""
    arguments = descrpt_dpa3_args()
    for argument in arguments:
        if argument.name == "default_chg_spin":
            argument.extra_check = _is_charge_spin
            argument.extra_check_errmsg = (
                "expected a whole charge from -100 to 99 and a whole multiplicity from 0 to 99, "
                "for example [0, 1]"
            )
        elif argument.name == "precision":
            argument.extra_check = lambda value: value in PRECISIONS
            argument.extra_check_errmsg = f"expected one of {', '.join(PRECISIONS)}"
    moe = Argument(
        "moe",
        dict,
        moe_arguments(),
        optional=True,
        doc="Mixture of experts. Without this section the model is a dense DPA3.",
    )
    return [*arguments, moe]
