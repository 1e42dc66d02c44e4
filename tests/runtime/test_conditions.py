"""Which charge, spin and frame parameters a model accepts: values, defaults, messages."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from moecalc.conditions import (
    ChargeSpinInput,
    ConditionError,
    Conditions,
    FixedConditions,
    FrameParameterInput,
    ModelConditions,
    fix,
    parsed_numbers,
    read_conditions,
    resolve,
)
from moecalc.package.metadata import Metadata

CHARGE_SPIN = ModelConditions(charge_spin=ChargeSpinInput(default=(0, 1)))
MANDATORY = ModelConditions(charge_spin=ChargeSpinInput())
FPARAM = ModelConditions(fparam=FrameParameterInput(size=2, default=[0.1, 0.2]))
NO_DEFAULT = ModelConditions(fparam=FrameParameterInput(size=3))
SHARED = ModelConditions(
    charge_spin=ChargeSpinInput(default=(0, 1)),
    fparam=FrameParameterInput(size=2, default=[0.0, 1.0]),
    fparam_is_charge_spin=True,
)
FIXED = ModelConditions(fixed=FixedConditions(charge=1, spin=2, fparam=[0.5]))


def test_given_values_are_taken():
    assert resolve(CHARGE_SPIN, -2, 3) == Conditions(-2, 3)
    assert resolve(FPARAM, fparam=[1, 2.5]) == Conditions(fparam=(1.0, 2.5))


def test_omitted_values_are_the_defaults_and_named():
    found = resolve(CHARGE_SPIN)
    assert found == Conditions(0, 1)
    assert found.defaulted == {"charge", "spin"}
    assert resolve(FPARAM).fparam == (0.1, 0.2)


def test_charge_and_spin_fall_back_separately():
    found = resolve(CHARGE_SPIN, charge=1)
    assert found.charge_spin == (1, 1)
    assert found.defaulted == {"spin"}


def test_metadata_may_come_as_a_dictionary():
    assert resolve(asdict(CHARGE_SPIN), 1, 2) == Conditions(1, 2)
    assert resolve(None) == Conditions()


@pytest.mark.parametrize("name", ["CHARGE_SPIN", "MANDATORY", "FPARAM", "NO_DEFAULT", "SHARED", "FIXED"])
def test_what_a_package_says_is_read_as_it_was_written(name):
    given = globals()[name]
    text = Metadata.model_construct(conditions=given).model_dump_json(include={"conditions"})
    assert read_conditions(json.loads(text)["conditions"]) == given
    assert read_conditions({**asdict(given), "other": 1}) == given


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "conditions: expected an object, got list"),
        ({"routed": 1}, "routed: expected true or false, got int"),
        ({"charge_spin": "yes"}, "charge_spin: expected an object, got str"),
        ({"charge_spin": {"default": [0]}}, "default: expected two integers"),
        ({"charge_spin": {"default": [0, 1.5]}}, "default: expected an integer, got float"),
        ({"charge_spin": {"spin_range": [True, 9]}}, "spin_range: expected an integer, got bool"),
        ({"fparam": {}}, "size: expected an integer, got NoneType"),
        ({"fparam": {"size": 2, "default": [1.0]}}, "fparam: expected 2 defaults, got 1"),
        ({"fparam": {"size": 1, "default": [float("inf")]}}, "default: expected a list of finite numbers"),
        ({"fixed": {"fparam": 1.0}}, "fparam: expected a list of finite numbers"),
    ],
)
def test_what_a_package_says_wrongly_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        read_conditions(record)


@pytest.mark.parametrize("value", [1.0, np.int32(1), np.float32(1), np.array([1.0]), np.array(1)])
def test_whole_numbers_of_any_kind_are_accepted(value):
    assert resolve(CHARGE_SPIN, value, 2).charge == 1


@pytest.mark.parametrize("value", [np.array([0.3, 4.0]), (0.3, 4), np.array([0.3, 4.0]).tolist()])
def test_frame_parameters_of_any_kind_are_accepted(value):
    assert resolve(FPARAM, fparam=value).fparam == (0.3, 4.0)


def test_one_frame_parameter_may_be_a_plain_number():
    assert resolve(ModelConditions(fparam=FrameParameterInput(size=1)), fparam=2.5).fparam == (2.5,)


@pytest.mark.parametrize(("charge", "spin"), [(-100, 0), (99, 99)])
def test_limits_are_allowed(charge, spin):
    assert resolve(CHARGE_SPIN, charge, spin).charge_spin == (charge, spin)


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (CHARGE_SPIN, {"charge": 0.5}, r"charge = 0.5, expected a whole number from -100 to 99: fractions"),
        (CHARGE_SPIN, {"spin": 1.5}, r"spin = 1.5, expected a whole number from 0 to 99: fractions"),
        (CHARGE_SPIN, {"charge": 100}, "charge = 100, expected a whole number from -100 to 99"),
        (CHARGE_SPIN, {"charge": -101.0}, "charge = -101, expected a whole number from -100 to 99"),
        (CHARGE_SPIN, {"spin": -1}, "spin = -1, expected a whole number from 0 to 99"),
        (CHARGE_SPIN, {"charge": 10**400}, "charge = an integer of many digits, expected a whole"),
        (CHARGE_SPIN, {"charge": math.nan}, "charge = nan, expected a whole number"),
        (CHARGE_SPIN, {"spin": math.inf}, "spin = inf, expected a whole number"),
        (CHARGE_SPIN, {"charge": "one"}, "charge = 'one', expected a whole number"),
        (CHARGE_SPIN, {"charge": True}, "charge = True, expected a whole number"),
        (CHARGE_SPIN, {"charge": [1, 2]}, r"charge = \[1, 2\], expected a whole number"),
        (CHARGE_SPIN, {"fparam": [1, 2]}, "fparam = 1,2 was given, but this model takes no fparam: leave it"),
        (FPARAM, {"charge": 1}, "charge = 1 was given, but this model takes no charge: give fparam, if its two"),
        (NO_DEFAULT, {"fparam": [1, 2, 3], "spin": 1}, "this model takes no spin: leave it out"),
        (None, {"charge": 0}, "charge = 0 was given, but this model takes no charge: leave it out"),
        (FPARAM, {"fparam": [1]}, r"fparam has 1 number \(1\), expected 2"),
        (FPARAM, {"fparam": [1, 2, 3]}, r"fparam has 3 numbers \(1,2,3\), expected 2"),
        (FPARAM, {"fparam": [1, math.nan]}, "fparam has entry nan, expected finite numbers"),
        (FPARAM, {"fparam": [[1, 2]]}, r"fparam has entry \[1, 2\], expected numbers in one row"),
        (FPARAM, {"fparam": "12"}, "fparam has entry '12', expected numbers"),
        (MANDATORY, {}, "needs charge and spin .* no default: give both"),
        (MANDATORY, {"charge": 1}, "needs charge and spin .* no default: give spin"),
        (NO_DEFAULT, {}, "this model needs 3 frame parameters and has no default: give fparam"),
        (SHARED, {"charge": 1, "fparam": [0, 2]}, "charge = 1 but fparam = 0,2, which is charge and spin"),
        (SHARED, {"fparam": [0.5, 1]}, "charge = 0.5, expected a whole number"),
        (FIXED, {"charge": 0}, "charge = 0 was given, but this package is fixed at charge 1: package the"),
        (FIXED, {"fparam": [0.6]}, "fparam = 0.6 was given, but this package is fixed at fparam 0.5"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_with_what_to_give(model, given, message):
    with pytest.raises(ConditionError, match=message) as caught:
        resolve(model, **given)
    assert "\n" not in str(caught.value)


def test_one_input_for_both_is_given_by_either_name():
    expected = Conditions(1, 2, (1.0, 2.0))
    assert resolve(SHARED, 1, 2) == expected
    assert resolve(SHARED, fparam=[1, 2]) == expected
    assert resolve(SHARED, 1, 2, [1.0, 2.0]) == expected
    assert resolve(SHARED).defaulted == {"charge", "spin", "fparam"}


def test_values_equal_to_the_fixed_ones_may_be_given():
    assert resolve(FIXED, 1, 2, [0.5]) == Conditions()


def test_fixing_closes_what_was_given_and_leaves_the_rest_open():
    both = ModelConditions(charge_spin=ChargeSpinInput(default=(0, 1)), fparam=FPARAM.fparam, routed=True)
    values, left = fix(both, charge=1)
    assert values == Conditions(1, 1)
    assert values.defaulted == {"spin"}
    assert left == ModelConditions(fparam=FPARAM.fparam, fixed=FixedConditions(charge=1, spin=1))
    values, left = fix(both, fparam=[3, 4])
    assert values == Conditions(fparam=(3.0, 4.0))
    assert left.charge_spin == both.charge_spin
    assert left.routed


def test_fixing_one_input_for_both_fixes_both():
    values, left = fix(SHARED, charge=1, spin=2)
    assert values == Conditions(1, 2, (1.0, 2.0))
    assert not left.open
    with pytest.raises(ConditionError, match="fixed at charge 1"):
        resolve(left, charge=0)
    assert resolve(left, fparam=[1, 2]) == Conditions()


def test_nothing_given_fixes_nothing():
    assert fix(CHARGE_SPIN) == (Conditions(), CHARGE_SPIN)
    assert fix(None) == (Conditions(), None)


def test_fixing_what_a_model_does_not_take_is_refused():
    with pytest.raises(ConditionError, match="charge = 1 was given, but this model takes no charge"):
        fix(None, charge=1)


def test_options_of_the_command_line_are_read_as_numbers():
    assert parsed_numbers("--charge", "-1", 1) == -1.0
    assert parsed_numbers("--fparam", "0.5, -2") == [0.5, -2.0]
    with pytest.raises(ConditionError, match="--charge '1,2', expected one number"):
        parsed_numbers("--charge", "1,2", 1)
    with pytest.raises(ConditionError, match="--fparam 'a,2', expected numbers separated by commas"):
        parsed_numbers("--fparam", "a,2")
