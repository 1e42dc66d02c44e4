"""Charge, multiplicity and frame parameters of an ASE structure, in `info` or in its calculator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from ase import Atoms

from moecalc.conditions import (
    ConditionError,
    Conditions,
    ModelConditions,
    charge_and_spin,
    format_numbers,
    resolve,
)

NAMES: Final = ("charge", "spin", "fparam")
PAIR: Final = "charge_spin"
"""DeePMD's name for charge and multiplicity together."""


def conditions_of(atoms: Atoms, model: ModelConditions, general: Mapping[str, Any]) -> Conditions:
    """Conditions of a structure, checked.

    Read are `atoms.info["charge"]`, `["spin"]` (the multiplicity 2S+1, as in OMol and fairchem),
    `["charge_spin"]` (both, as in DeePMD) and `["fparam"]`. What is missing there comes from `general`, then
    from the model's defaults.

    Args:
        atoms: the structure.
        model: what the model takes.
        general: `charge`, `spin`, `fparam` for all structures; None or absent: not given.

    Raises:
        ConditionError: values that contradict each other, or that the model cannot take (see
            `moecalc.conditions.resolve`).
    """
    given = {name: general.get(name) for name in NAMES}
    for name, value in _of_info(atoms.info).items():
        if given[name] is not None and not _equal(value, given[name]):
            raise ConditionError(
                f"atoms.info has {name} = {_shown(value)}, but the calculator was made with "
                f"{name} = {_shown(given[name])}: give one of them, or equal values"
            )
        given[name] = value
    if model == _NOTHING and all(value is None for value in given.values()):
        return _NONE
    return resolve(model, **given)


def same_info(atoms: Atoms, other: Atoms) -> bool:
    """Whether two structures carry the same charge, spin and frame parameters, whatever a model takes."""
    for name in (*NAMES, PAIR):
        one, two = atoms.info.get(name), other.info.get(name)
        if not (one is two is None or (one is not None and two is not None and _equal(one, two))):
            return False
    return True


def defaults_used(conditions: Conditions, model: ModelConditions, model_name: str) -> str | None:
    """What to tell the user about values that were not given; None where all were."""
    names = [name for name in NAMES if name in conditions.defaulted]
    if model.fparam_is_charge_spin:
        names = [name for name in names if name != "fparam"]
    if not names:
        return None
    values = ", ".join(f"{name} = {_shown(getattr(conditions, name))}" for name in names)
    hints = " and ".join(f'atoms.info["{name}"]' for name in names)
    return (
        f"no {' and no '.join(names)} given: the default of the model {model_name} is used, {values} "
        f"(set {hints}, or pass {', '.join(f'{name}=' for name in names)} to MoECalculator)"
    )


_NOTHING: Final = ModelConditions()
_NONE: Final = Conditions()


def _of_info(info: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: info[name] for name in NAMES if info.get(name) is not None}
    if info.get(PAIR) is None:
        return found
    for name, value in zip(("charge", "spin"), charge_and_spin(info[PAIR]), strict=True):
        if name in found and not _equal(found[name], value):
            raise ConditionError(
                f"atoms.info has {name} = {_shown(found[name])} and {PAIR} = {_shown(info[PAIR])}: "
                "give one of them, or equal values"
            )
        found.setdefault(name, value)
    return found


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(np.array_equal(np.ravel(one).astype(float), np.ravel(other).astype(float)))
    except (TypeError, ValueError):
        return False


def _shown(value: Any) -> str:
    try:
        return format_numbers([float(x) for x in np.ravel(value)])
    except (TypeError, ValueError):
        return repr(value)
