"""Charge, multiplicity and frame parameters that a frame of training data carries."""

from __future__ import annotations

from ase import Atoms

from moecalc.conditions import CHARGE_RANGE, SPIN_RANGE, charge_and_spin, frame_parameters, whole_number


def given_conditions(atoms: Atoms) -> dict[str, tuple[float, ...]]:
    """Charge and multiplicity (`charge_spin`), and frame parameters (`fparam`), where a frame has them.

    Read are `info["charge_spin"]`, or `info["charge"]` and `info["spin"]`; and `info["fparam"]`.

    Raises:
        ConditionError: values that no model can be trained on.
    """
    info = atoms.info
    found: dict[str, tuple[float, ...]] = {}
    pair = None
    if "charge_spin" in info:
        pair = charge_and_spin(info["charge_spin"])
    elif "charge" in info and "spin" in info:
        pair = info["charge"], info["spin"]
    if pair is not None:
        charge = whole_number("charge", pair[0], CHARGE_RANGE)
        spin = whole_number("spin", pair[1], SPIN_RANGE)
        found["charge_spin"] = (float(charge), float(spin))
    if "fparam" in info:
        found["fparam"] = frame_parameters(info["fparam"])
    return found
