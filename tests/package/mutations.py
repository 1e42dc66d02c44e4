"""Random damage to checkpoints, repeatable by its seed: options and tensors that no trainer writes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers
from helpers import DATA, evaluate_atoms

from moecalc import testing
from moecalc.conditions import Conditions
from moecalc.errors import CheckpointError, ElementError, PackageError
from moecalc.nn.config import ModelConfig
from moecalc.package.importers import build_model, load_checkpoint, save_checkpoint

ORACLE = DATA / "oracle" / "models"
MOE = {"n_routed_experts": 3, "top_k": 2, "n_shared_experts": 1, "positions": ["node", "edge_self_linear"]}


def write_native(folder: Path) -> Path:
    """A checkpoint in moecalc's own form."""
    config = testing.random_config()
    save_checkpoint(folder / "native.pt", testing.random_potential(config), config)
    return folder / "native.pt"


def write_plugin(folder: Path) -> Path:
    """A checkpoint of the descriptor dpa3_moe, as `moecalc upcycle` makes it."""
    import json

    from moecalc.training.upcycle import upcycle

    dense = ORACLE / "A3_dyn_3layers.pt"
    params = copy.deepcopy(torch.load(dense, weights_only=True)["model"]["_extra_state"]["model_params"])
    params["descriptor"] |= {"type": "dpa3_moe", "moe": MOE}
    (folder / "input.json").write_text(json.dumps({"model": params}))
    upcycle(dense, folder / "input.json", folder / "plugin.pt")
    return folder / "plugin.pt"


LAYOUTS: dict[str, tuple[Any, str | None]] = {
    "dpa3": (ORACLE / "C1_polysw_tebdbias_concat_heads2_norm.pt", None),
    "dpa3_float32": (ORACLE / "G_float32.pt", None),
    "dpa3_multitask": (ORACLE / "D1_multitask.pt", "water_a"),
    "dpa3_fparam": (ORACLE / "H1_fparam_default.pt", None),
    "dpa3_charge_spin": (ORACLE / "H3_chgspin.pt", None),
    "dpa3_charge_spin_fparam": (ORACLE / "H5_chgspin_fparam.pt", None),
    "dpa3_charge_spin_multitask": (ORACLE / "H8_multi_chgspin.pt", "OMol"),
    "moe": (ORACLE / "E1_moe_all.pt", None),
    "moe_fused": (DATA / "deepmd" / "moe_fused_heads.pt", None),
    "moe_charge_spin": (ORACLE / "J_moe_chgspin.pt", None),
    "0415_moe_pack": (ORACLE / "F1_pack_moe.pt", None),
    "dpa3_moe": (write_plugin, None),
    "moecalc": (write_native, None),
}
"""Source and head of one checkpoint of every layout."""


def source_of(layout: str, folder: Path) -> Path:
    """The unchanged checkpoint of a layout."""
    source = LAYOUTS[layout][0]
    return source(folder) if callable(source) else source


def _wrong_values(value: Any, rng: np.random.Generator) -> Any:
    """Something else in the place of an option's value."""
    choices = [
        None, "", "banana", "1", -1, 0, 1, 2, 3.5, 10**9, 10**30, -7.25, float("nan"), float("inf"), -1e300, True, False,
        [], {}, [None], [1, "a"], {"a": 1}, [[0]], [[0, 99]], [[-1, 0]], {1: 2}, (1, 2), torch.zeros(2), "float16",
        "resnet", ["H", "H"], ["Xx", "O"], [["O"]], "\x1b[31mred\nline",
    ]  # fmt: skip
    if isinstance(value, bool):
        choices += [not value, int(value), str(value)]
    elif isinstance(value, int | float):
        choices += [value + 1, -value, value * 2, value * 1000, str(value), [value], float(value) + 0.5]
    elif isinstance(value, str):
        choices += [value + "x", value.upper(), [value], value[::-1]]
    elif isinstance(value, list) and value:
        choices += [
            value[::-1],
            value[:-1],
            [*value, value[-1]],
            dict.fromkeys(map(str, value)),
            value[0],
            [value],
        ]
    return choices[int(rng.integers(len(choices)))]


def _paths(section: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(section, dict):
        for key, value in section.items():
            yield (*path, key)
            yield from _paths(value, (*path, key))


def _wrong_tensors(value: torch.Tensor, rng: np.random.Generator) -> tuple[str, Any]:
    """Something else in the place of a tensor, and what it is."""
    flat = value.clone()
    nan, inf = flat.clone(), flat.clone()
    if value.numel() and value.is_floating_point():
        at = int(rng.integers(value.numel()))
        nan.view(-1)[at], inf.view(-1)[at] = math.nan, -math.inf
    other = torch.float32 if value.dtype == torch.float64 else torch.float64
    choices: dict[str, Any] = {
        "nan": nan, "inf": inf, "int": flat.to(torch.int64), "bool": flat.to(torch.bool), "half": flat.to(torch.half),
        "bfloat16": flat.to(torch.bfloat16), "complex": flat.to(torch.complex64), "other precision": flat.to(other),
        "transposed": flat.t().contiguous() if value.dim() == 2 else flat.flatten(),
        "0-dim": torch.zeros((), dtype=value.dtype), "empty": value[:0].clone() if value.dim() else value.flatten()[:0],
        "longer": torch.cat([flat, flat]) if value.dim() else flat.expand(3), "more axes": flat.unsqueeze(0),
        "shorter": flat[: max(0, value.shape[0] - 1)] if value.dim() else flat.expand(1, 1), "flat": flat.flatten(),
        "list": value.tolist(), "text": "weights", "none": None, "number": 1.0, "scaled": flat * 2,
        "sparse": flat.to_sparse() if value.dim() else None, "strided": torch.stack([flat, flat], -1)[..., 0],
        "huge": torch.zeros((), dtype=value.dtype).expand(10**6, 10**6), "negative": -flat.abs() if value.is_floating_point() else flat,
    }  # fmt: skip
    name = list(choices)[int(rng.integers(len(choices)))]
    return name, choices[name]


def fresh(data: Any) -> Any:
    """A copy of a loaded checkpoint that shares the tensors, which `mutate` replaces and never changes."""
    if isinstance(data, dict):
        return {key: fresh(value) for key, value in data.items()}
    return [fresh(value) for value in data] if isinstance(data, list) else data


def mutate(data: dict[str, Any], head: str | None, rng: np.random.Generator) -> str:
    """Damage a loaded checkpoint in one place.

    Returns:
        What was done.
    """
    if "moecalc_checkpoint" in data:
        state, options, rest = data["state_dict"], data["config"], data
    else:
        state = data.get("model", data)
        rest = state["_extra_state"]
        options = rest["model_params"]
        if head is not None:
            options = options["model_dict"][head]
    kind = rng.random()
    if kind < 0.08:  # the frame around options and tensors
        target, name = (rest, str(rng.choice(list(rest))))
        value = _wrong_values(rest[name], rng)
        if rng.random() < 0.3:
            del target[name]
            return f"delete {name}"
        target[name] = value
        return f"{name} = {value!r}"[:80]
    if kind < 0.55:
        paths = list(_paths(options))
        path = paths[int(rng.integers(len(paths)))]
        target = options
        for key in path[:-1]:
            target = target[key]
        name = ".".join(map(str, path))
        what = rng.random()
        if what < 0.15:
            del target[path[-1]]
            return f"delete option {name}"
        if what < 0.2:
            target[path[-1] + "_more"] = 3
            return f"add option {name}_more"
        target[path[-1]] = _wrong_values(target[path[-1]], rng)
        return f"option {name} = {target[path[-1]]!r}"[:100]
    keys = [k for k in state if k != "_extra_state"]
    key = keys[int(rng.integers(len(keys)))]
    if rng.random() < 0.15:
        del state[key]
        return f"delete tensor {key}"
    if rng.random() < 0.1:
        state[key + "_more"] = state[key].clone()
        return f"add tensor {key}_more"
    name, state[key] = _wrong_tensors(state[key], rng)
    return f"tensor {key}: {name}"


def _some_conditions(config: ModelConfig) -> Conditions:
    """Values for whatever a model takes."""
    charge, spin = (-1, 3) if config.descriptor.add_chg_spin_ebd else (None, None)
    return Conditions(charge, spin, (0.5,) * config.fitting.numb_fparam or None)


def reference_of(path: Path, head: str | None) -> tuple[Any, Any]:
    """Configuration and model of an unchanged file."""
    imported = load_checkpoint(path, head)
    return imported.config, build_model(imported, torch.float64)


def outcome(path: Path, head: str | None, reference: Any) -> tuple[str, str]:
    """What becomes of a damaged checkpoint.

    Args:
        path: the file.
        head: head of it to import.
        reference: configuration and model of the unchanged file.

    Returns:
        "refused" and the message; "harmless" where the model is the unchanged one; "changed" for another, finite model.

    Raises:
        AssertionError: a message of several lines or without the file's name, or a model that is not finite.
    """
    try:
        imported = load_checkpoint(path, head)
        model = build_model(imported, torch.float64)
    except (CheckpointError, ElementError, PackageError) as error:
        message = str(error)
        assert str(path) in message, message
        assert len(message.splitlines()) == 1, message
        assert message.isprintable(), message
        assert len(message) < 900, message
        return "refused", message
    a, b = model.state_dict(), reference[1].state_dict()
    if imported.config == reference[0] and all(torch.equal(a[k], b[k]) for k in a):
        return "harmless", ""
    assert all(bool(torch.isfinite(x).all()) for x in a.values())
    if model.cutoff < 100 and all(name in atomic_numbers for name in model.elements):
        first, last = model.elements[0], model.elements[-1]
        atoms = testing.molecule()
        atoms.symbols = [first if i % 2 else last for i in range(len(atoms))]
        out = evaluate_atoms(model, atoms, _some_conditions(imported.config))
        assert bool(torch.isfinite(out.forces).all())
        assert bool(torch.isfinite(out.energy).all())
    return "changed", ""
