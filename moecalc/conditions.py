"""Charge, spin multiplicity and frame parameters of a structure: what a model takes, and what a user gives.

One place decides whether given values fit a model (`resolve`); engines only collect them. Every run imports
this: no torch and no pydantic here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from moecalc.errors import MoecalcError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHARGE_RANGE = (-100, 99)
"""Charges (units of e) that the embedding of DPA3 has rows for."""
SPIN_RANGE = (0, 99)
"""Multiplicities 2S+1 that it has rows for."""


class ConditionError(MoecalcError, ValueError):
    """Charge, spin or frame parameters that a model does not take, that are missing or in contradiction."""


@dataclass(frozen=True)
class ChargeSpinInput:
    """A model that reads charge and multiplicity; `default` is used where none are given, None: mandatory."""

    default: tuple[int, int] | None = None
    charge_range: tuple[int, int] = CHARGE_RANGE
    spin_range: tuple[int, int] = SPIN_RANGE


@dataclass(frozen=True)
class FrameParameterInput:
    """A model that reads `size` frame parameters; `default` is used where none are given, None: mandatory."""

    size: int
    default: list[float] | None = None


@dataclass(frozen=True)
class FixedConditions:
    """Values that were folded into the weights at packaging; None: not fixed, or never taken."""

    charge: int | None = None
    spin: int | None = None
    fparam: list[float] | None = None


@dataclass(frozen=True)
class ModelConditions:
    """`conditions` of a package's metadata.

    Attributes:
        charge_spin, fparam: what can be given at run time; None: cannot.
        routed: whether the experts depend on charge and spin (layout `0415_moe_pack`).
        fparam_is_charge_spin: one input of two numbers is both (SPEC section 12, generation G2).
        fixed: what was folded at packaging.
    """

    charge_spin: ChargeSpinInput | None = None
    fparam: FrameParameterInput | None = None
    routed: bool = False
    fparam_is_charge_spin: bool = False
    fixed: FixedConditions | None = None

    @property
    def open(self) -> bool:
        """Whether anything can be given at run time."""
        return self.charge_spin is not None or self.fparam is not None


def read_conditions(record: Any) -> ModelConditions:
    """`conditions` of a metadata.json; unknown keys are passed over.

    Args:
        record: what JSON made of it; None: the model takes nothing.

    Raises:
        ValueError: the place, what was expected there and what was found.
    """
    taken = _record("conditions", record)
    charge_spin, fparam, fixed = (taken.get(name) for name in ("charge_spin", "fparam", "fixed"))
    return ModelConditions(
        charge_spin=None if charge_spin is None else _read_charge_spin(charge_spin),
        fparam=None if fparam is None else _read_frame_parameters(fparam),
        routed=_flag(taken, "routed"),
        fparam_is_charge_spin=_flag(taken, "fparam_is_charge_spin"),
        fixed=None if fixed is None else _read_fixed(fixed),
    )


def _read_charge_spin(record: Any) -> ChargeSpinInput:
    taken = _record("charge_spin", record)
    pairs = {name: _pair(name, taken[name]) for name in ("charge_range", "spin_range") if name in taken}
    default = taken.get("default")
    return ChargeSpinInput(None if default is None else _pair("default", default), **pairs)


def _read_frame_parameters(record: Any) -> FrameParameterInput:
    taken = _record("fparam", record)
    size, default = _whole("size", taken.get("size")), taken.get("default")
    numbers = None if default is None else _real_numbers("default", default)
    if numbers is not None and len(numbers) != size:
        raise ValueError(f"fparam: expected {size} defaults, got {len(numbers)}")
    return FrameParameterInput(size, numbers)


def _read_fixed(record: Any) -> FixedConditions:
    held = _record("fixed", record)
    charge, spin, fparam = (held.get(name) for name in ("charge", "spin", "fparam"))
    return FixedConditions(
        charge=None if charge is None else _whole("charge", charge),
        spin=None if spin is None else _whole("spin", spin),
        fparam=None if fparam is None else _real_numbers("fparam", fparam),
    )


def _record(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        # content of a file, not an argument
        raise ValueError(f"{name}: expected an object, got {type(value).__name__}")  # noqa: TRY004
    return value


def _flag(record: Mapping[str, Any], name: str) -> bool:
    value = record.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {type(value).__name__}")  # noqa: TRY004
    return value


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected an integer, got {type(value).__name__}")  # noqa: TRY004
    return value


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name}: expected two integers")
    return _whole(name, value[0]), _whole(name, value[1])


def _real_numbers(name: str, value: Any) -> list[float]:
    numbers: Sequence[Any] = value if isinstance(value, list | tuple) else [None]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers):
        raise ValueError(f"{name}: expected a list of finite numbers")
    return [float(x) for x in numbers]


@dataclass(frozen=True)
class Conditions:
    """Checked conditions of one structure; None where the model takes none (or has them fixed).

    Attributes:
        charge: units of e; spin: multiplicity 2S+1.
        fparam: frame parameters.
        defaulted: names among charge, spin, fparam whose value is the model's default.
    """

    charge: int | None = None
    spin: int | None = None
    fparam: tuple[float, ...] | None = None
    defaulted: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def charge_spin(self) -> tuple[int, int] | None:
        """Charge and multiplicity, if the model takes them."""
        return None if self.charge is None or self.spin is None else (self.charge, self.spin)

    def filled_from(self, other: Conditions) -> Conditions:
        """These, with what is None here taken from others."""
        return Conditions(
            other.charge if self.charge is None else self.charge,
            other.spin if self.spin is None else self.spin,
            other.fparam if self.fparam is None else self.fparam,
        )

    def __str__(self) -> str:
        parts = [
            f"{name} {value}"
            for name, value in (("charge", self.charge), ("spin", self.spin))
            if value is not None
        ]
        if self.fparam is not None:
            parts.append(f"fparam {format_numbers(self.fparam)}")
        return ", ".join(parts) or "none"


def format_numbers(values: Sequence[float]) -> str:
    """Numbers as a user would give them: `0.1,2`."""
    return ",".join(f"{value:.15g}" for value in values)


def parsed_numbers(name: str, text: str, count: int | None = None) -> Any:
    """Numbers of a command-line option, separated by commas: a list, or one number where `count` is 1.

    Args:
        name: of the option, for the message.

    Raises:
        ConditionError: an entry that is not a number, or more than one where one is expected.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or (count == 1 and len(numbers) != 1):
        expected = "one number" if count == 1 else "numbers separated by commas"
        raise ConditionError(f"{name} {text!r}, expected {expected}")
    return numbers[0] if count == 1 else numbers


def whole_number(name: str, value: Any, limits: tuple[int, int]) -> int:
    """A charge or multiplicity as an integer.

    Args:
        name: for the message.
        value: any number that is whole, also 1.0.
        limits: smallest and largest allowed value.

    Raises:
        ConditionError: not a number, not whole, or out of range.
    """
    low, high = limits
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConditionError(f"{name} = {value!r}, expected a whole number from {low} to {high}")
    if isinstance(value, float) and not value.is_integer():
        why = ": fractions have no meaning in this embedding" if math.isfinite(value) else ""
        raise ConditionError(f"{name} = {value:g}, expected a whole number from {low} to {high}{why}")
    if not low <= value <= high:
        shown = (
            f"{value:g}" if isinstance(value, float) or abs(value) < 10**15 else "an integer of many digits"
        )
        raise ConditionError(f"{name} = {shown}, expected a whole number from {low} to {high}")
    return int(value)


def frame_parameters(value: Any, size: int | None = None) -> tuple[float, ...]:
    """Frame parameters as `size` finite numbers; None: any number of them.

    Args:
        value: a sequence of numbers, or one number.

    Raises:
        ConditionError: wrong count, or an entry that is not a finite number.
    """
    numbers = _numbers("fparam", value)
    if size is not None and len(numbers) != size:
        raise ConditionError(
            f"fparam has {len(numbers)} number{'s' * (len(numbers) != 1)} ({format_numbers(numbers)}), "
            f"expected {size} as this model was trained with"
        )
    return numbers


def charge_and_spin(value: Any) -> tuple[Any, Any]:
    """The two entries of a `charge_spin` pair, unchecked but for their count.

    Raises:
        ConditionError: not two numbers.
    """
    numbers = _numbers("charge_spin", value)
    if len(numbers) != 2:
        raise ConditionError(
            f"charge_spin has {len(numbers)} number{'s' * (len(numbers) != 1)}, "
            "expected two: charge and multiplicity"
        )
    return numbers[0], numbers[1]


def _scalar(value: Any) -> Any:
    """NumPy scalars and arrays of one element as Python numbers; anything else unchanged."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return value.item()
    return value


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    entries = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, Real):
            raise ConditionError(f"{name} has entry {entry!r}, expected numbers in one row")
    try:
        numbers = tuple(float(entry) for entry in entries)
    except OverflowError:
        numbers = (math.inf,)
    for number in numbers:
        if not math.isfinite(number):
            raise ConditionError(f"{name} has entry {number}, expected finite numbers")
    return numbers


def resolve(
    model: ModelConditions | Mapping[str, Any] | None,
    charge: Any = None,
    spin: Any = None,
    fparam: Any = None,
) -> Conditions:
    """The conditions of a structure: what was given, else the model's defaults.

    Charge and multiplicity that are left out fall back to their defaults separately.

    Args:
        model: `conditions` of the package's metadata, as record or dictionary; None: the model takes nothing.
        charge: units of e; spin: multiplicity 2S+1; fparam: frame parameters. None: not given.

    Raises:
        ConditionError: a value that the model does not take, that is missing, out of range or not whole, a
            wrong count, or values that contradict each other or what is fixed in the package.
    """
    record = model if isinstance(model, ModelConditions) else read_conditions(model)
    given = {"charge": charge, "spin": spin, "fparam": fparam}
    if record.fparam_is_charge_spin:
        return _resolve_shared(record, given)
    _check_fixed(record, given)
    defaulted: set[str] = set()
    q = s = None
    if record.charge_spin is not None:
        q, s = _charge_spin(record.charge_spin, given, defaulted)
    values: tuple[float, ...] | None = None
    if record.fparam is not None:
        if fparam is not None:
            values = frame_parameters(fparam, record.fparam.size)
        elif record.fparam.default is not None:
            values = tuple(record.fparam.default)
            defaulted.add("fparam")
        else:
            raise ConditionError(
                f"this model needs {record.fparam.size} frame parameters and has no default: give fparam"
            )
    return Conditions(q, s, values, frozenset(defaulted))


def fix(
    model: ModelConditions | None, charge: Any = None, spin: Any = None, fparam: Any = None
) -> tuple[Conditions, ModelConditions | None]:
    """Values to fold into a model at packaging, and what the model still takes then.

    Charge and multiplicity are fixed together: with one of them given, the other is the model's default. What
    is not given stays open.

    Args:
        model: what the checkpoint's model takes; None: nothing.
        charge, spin, fparam: as for `resolve`.

    Raises:
        ConditionError: as `resolve`.
    """
    record = model or ModelConditions()
    given = {"charge": charge, "spin": spin, "fparam": fparam}
    if all(value is None for value in given.values()):
        return Conditions(), model
    if record.fparam_is_charge_spin:
        values = resolve(record, charge, spin, fparam)
    else:
        _check_fixed(record, given)
        defaulted: set[str] = set()
        q = s = None
        numbers = None
        if record.charge_spin is not None and not (charge is None and spin is None):
            q, s = _charge_spin(record.charge_spin, given, defaulted)
        if record.fparam is not None and fparam is not None:
            numbers = frame_parameters(fparam, record.fparam.size)
        values = Conditions(q, s, numbers, frozenset(defaulted))
    held = FixedConditions(
        charge=values.charge, spin=values.spin, fparam=None if values.fparam is None else list(values.fparam)
    )
    left = replace(record, fixed=held)
    if values.charge is not None:
        left = replace(left, charge_spin=None, routed=False)
    if values.fparam is not None:
        left = replace(left, fparam=None)
    return values, left


def check_general(model: ModelConditions, general: Mapping[str, Any]) -> None:
    """Refuse values for all structures that the model cannot take; what is missing may come with structures.

    Args:
        model: what the model takes.
        general: `charge`, `spin`, `fparam` for all structures; None or absent: not given.

    Raises:
        ConditionError: as `resolve`, but not for missing values.
    """
    complete = model
    if model.charge_spin is not None and model.charge_spin.default is None:
        complete = replace(complete, charge_spin=replace(model.charge_spin, default=(0, 1)))
    if model.fparam is not None and model.fparam.default is None:
        complete = replace(complete, fparam=replace(model.fparam, default=[0.0] * model.fparam.size))
    resolve(complete, **{name: general.get(name) for name in ("charge", "spin", "fparam")})


def arrays_of(
    conditions: Sequence[Conditions],
) -> tuple[NDArray[np.int64] | None, NDArray[np.float64] | None]:
    """Charge and multiplicity (n, 2), and frame parameters (n, size), for the evaluator; None: not taken."""
    import numpy as np  # not above: `moecalc --help` needs none

    pairs = [one.charge_spin for one in conditions]
    fparam = [one.fparam for one in conditions]
    return (
        None if pairs[0] is None else np.array(pairs, dtype=np.int64),
        None if fparam[0] is None else np.array(fparam, dtype=np.float64),
    )


def _charge_spin(taken: ChargeSpinInput, given: Mapping[str, Any], defaulted: set[str]) -> tuple[int, int]:
    found = []
    for k, (name, limits) in enumerate((("charge", taken.charge_range), ("spin", taken.spin_range))):
        value = given[name]
        if value is None and taken.default is None:
            raise ConditionError(
                "this model needs charge and spin (multiplicity 2S+1) and has no default: "
                f"give {'both' if given['charge'] is given['spin'] is None else name}"
            )
        if value is None:
            assert taken.default is not None
            value = taken.default[k]
            defaulted.add(name)
        found.append(whole_number(name, value, limits))
    return found[0], found[1]


def _resolve_shared(record: ModelConditions, given: Mapping[str, Any]) -> Conditions:
    """Generation G2: charge and multiplicity are the two frame parameters."""
    if record.charge_spin is None:  # fixed
        _check_fixed(record, given)
        return Conditions()
    values = dict(given)
    if given["fparam"] is not None:
        pair = frame_parameters(given["fparam"], 2)
        for name, value in zip(("charge", "spin"), pair, strict=True):
            if given[name] is not None and _number_or_none(given[name]) != value:
                raise ConditionError(
                    f"{name} = {_shown(given[name])} but fparam = {format_numbers(pair)}, "
                    "which is charge and spin in this "
                    "model: give one of them, or equal values"
                )
            values[name] = value
    defaulted: set[str] = set()
    q, s = _charge_spin(record.charge_spin, values, defaulted)
    if len(defaulted) == 2:
        defaulted.add("fparam")
    return Conditions(q, s, (float(q), float(s)), frozenset(defaulted))


def _number_or_none(value: Any) -> float | None:
    value = _scalar(value)
    return float(value) if isinstance(value, Real) else None


def _check_fixed(record: ModelConditions, given: Mapping[str, Any]) -> None:
    """Refuse values for what the model does not take, and others than those that are fixed."""
    fixed = record.fixed or FixedConditions()
    takes = {
        "charge": record.charge_spin is not None,
        "spin": record.charge_spin is not None,
        "fparam": record.fparam is not None,
    }
    for name, value in given.items():
        if value is None or takes[name]:
            continue
        held = getattr(fixed, name)
        if held is None:
            hint = "leave it out"
            if name != "fparam" and record.fparam is not None and record.fparam.size == 2:
                hint = "give fparam, if its two frame parameters are charge and multiplicity"
            raise ConditionError(
                f"{name} = {_shown(value)} was given, but this model takes no {name}: {hint}"
            )
        if name == "fparam":
            same = frame_parameters(value, len(held)) == tuple(held)
        else:
            same = whole_number(name, value, CHARGE_RANGE if name == "charge" else SPIN_RANGE) == held
        if not same:
            raise ConditionError(
                f"{name} = {_shown(value)} was given, but this package is fixed at {name} {_shown(held)}: "
                f"package the checkpoint again for other values"
            )


def _shown(value: Any) -> str:
    try:
        return format_numbers(_numbers("", value))
    except ConditionError:
        return repr(value)
