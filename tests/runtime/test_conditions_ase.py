"""Charge, spin and frame parameters through MoECalculator: the independent codes, `atoms.info`, batches, copies, files."""

import copy
import pickle
import warnings

import ase.db
import ase.io
import numpy as np
import pytest
from ase.calculators.mixing import SumCalculator
from helpers import DATA, frames

from moecalc import MoECalculator, testing
from moecalc.conditions import ConditionError
from moecalc.package import package_checkpoint
from moecalc.zbl import guarded

FRAMES = frames("oracle/fixtures", conditional=True)
MODELS = sorted({(f.model, f.head) for f in FRAMES}, key=str)
BACKENDS = ["fused", "plain", "torchscript", "cuda-emulation"]
ELEMENTS = ["Nb", "Mo", "Ta", "W"]
BOTH = {"add_chg_spin_ebd": True, "fitting": {"numb_fparam": 3}, "nlayers": 1}

quiet = pytest.mark.filterwarnings("ignore:.*neighbo", "ignore:no .* given", "ignore:.*evaluated ")


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """Packages of the oracle's checkpoints, conditions open."""
    folder = tmp_path_factory.mktemp("open")
    made = {}

    def get(model, head=None):
        if model not in made:
            made[model] = folder / f"{model}.moe.pt"
            checkpoint = DATA / "oracle" / "models" / f"{model}.pt"
            package_checkpoint(checkpoint, made[model], head=head, dtype="float64")
        return made[model]

    return get


@pytest.fixture(scope="session")
def mandatory(tmp_path_factory):
    """A package of charge, spin and three frame parameters, without defaults."""
    path = tmp_path_factory.mktemp("mandatory") / "mandatory.moe.pt"
    testing.write_random_package(path, testing.random_config(ELEMENTS, **BOTH), "float64")
    return path


@pytest.fixture
def atoms():
    return testing.molecule(["O", "H"], distance=1.6, n_atoms=4)


@pytest.fixture
def calc(oracle):
    """Charge and spin, default 0 and 1."""
    return MoECalculator(oracle("H3_chgspin"), device="cpu")


def info_of(frame):
    info = {} if frame.fparam is None else {"fparam": frame.fparam}
    return info if frame.charge_spin is None else info | {"charge_spin": frame.charge_spin}


def energy(calc, atoms, **info):
    atoms = atoms.copy()
    atoms.info.update(info)
    return calc.get_potential_energy(atoms)


# --- the independent codes -------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m[0])
def test_every_frame_equals_the_independent_code(oracle, monkeypatch, model, backend):
    monkeypatch.setenv("MOECALC_BACKEND", backend)
    calc = MoECalculator(oracle(*model), device="cpu", allow_untrained=True)
    for frame in (f for f in FRAMES if (f.model, f.head) == model):
        atoms = frame.atoms.copy()
        atoms.info.update(info_of(frame))
        atoms.calc = calc
        assert abs(atoms.get_potential_energy() - frame.energy) < testing.ORACLE_ENERGY
        assert np.abs(atoms.get_potential_energies() - frame.energies).max() < testing.ORACLE_ENERGY
        assert np.abs(atoms.get_forces() - frame.forces).max() < testing.ORACLE_FORCES
        if atoms.pbc.all():
            virial = -atoms.get_stress(voigt=False) * atoms.get_volume()
            assert np.abs(virial - 0.5 * (frame.virial + frame.virial.T)).max() < testing.ORACLE_VIRIAL


@quiet
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m[0])
def test_a_batch_of_frames_equals_the_independent_code(oracle, monkeypatch, model, backend):
    monkeypatch.setenv("MOECALC_BACKEND", backend)
    calc = MoECalculator(oracle(*model), device="cpu", allow_untrained=True)
    of_model = [f for f in FRAMES if (f.model, f.head) == model and not f.frame.startswith("tri13")]
    structures = [f.atoms.copy() for f in of_model]
    for atoms, frame in zip(structures, of_model, strict=True):
        atoms.info.update(info_of(frame))
    for frame, found in zip(of_model, calc.calculate_batch(structures), strict=True):
        assert abs(found["energy"] - frame.energy) < testing.ORACLE_ENERGY
        assert np.abs(found["forces"] - frame.forces).max() < testing.ORACLE_FORCES


@quiet
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m[0])
def test_clusters_in_float32_are_within_its_rounding(oracle, monkeypatch, model, backend):
    monkeypatch.setenv("MOECALC_BACKEND", backend)
    calc = MoECalculator(oracle(*model), device="cpu", dtype="float32", allow_untrained=True)
    of_model = [f for f in FRAMES if (f.model, f.head) == model and f.frame.startswith("cluster13")]
    for frame in of_model:
        atoms = frame.atoms.copy()
        atoms.info.update(info_of(frame))
        (result,) = calc.calculate_batch([atoms])
        scale = max(1.0, np.abs(frame.energies).max())
        assert abs(result["energy"] - frame.energy) / len(atoms) < testing.ORACLE_FLOAT32 * scale
        scale = max(1.0, np.abs(frame.forces).max())
        assert np.abs(result["forces"] - frame.forces).max() < testing.ORACLE_FLOAT32 * scale


@quiet
def test_a_folded_package_equals_the_open_one(oracle, tmp_path):
    for frame in FRAMES:
        if frame.frame.rpartition("_")[2] not in {"f", "q-2m3", "x"} or not frame.frame.startswith("tri13"):
            continue
        path = tmp_path / f"{frame.model}.moe.pt"
        package_checkpoint(
            DATA / "oracle" / "models" / f"{frame.model}.pt",
            path, head=frame.head, dtype="float64", **frame.given,
        )  # fmt: skip
        folded = MoECalculator(path, device="cpu", allow_untrained=True)
        opened = MoECalculator(oracle(frame.model, frame.head), device="cpu", allow_untrained=True)
        atoms = frame.atoms.copy()
        (want,) = folded.calculate_batch([atoms])
        atoms.info.update(info_of(frame))
        (got,) = opened.calculate_batch([atoms])
        assert abs(got["energy"] - want["energy"]) < 1e-12 * max(1.0, abs(want["energy"]))
        assert np.abs(got["forces"] - want["forces"]).max() < 1e-12


# --- what is given ---------------------------------------------------------------------------------

GIVEN = {
    "integers": {"charge": -2, "spin": 3},
    "floats": {"charge": -2.0, "spin": 3.0},
    "numpy scalars": {"charge": np.int32(-2), "spin": np.float64(3)},
    "numpy arrays": {"charge": np.array(-2), "spin": np.array([3])},
    "pair": {"charge_spin": [-2, 3]},
    "pair as array": {"charge_spin": np.array([-2.0, 3.0])},
    "both forms, equal": {"charge": -2, "spin": 3, "charge_spin": (-2, 3)},
    "one of them twice": {"charge": -2, "charge_spin": (-2, 3)},
}


@pytest.mark.parametrize("form", GIVEN)
def test_info_is_read_in_every_form(calc, atoms, form):
    want = MoECalculator(calc.path, device="cpu", charge=-2, spin=3).get_potential_energy(atoms.copy())
    assert energy(calc, atoms, **GIVEN[form]) == want
    assert want != energy(calc, atoms, charge=0, spin=1)


@pytest.mark.parametrize("value", [[0.1, 0.2], (0.1, 0.2), np.array([0.1, 0.2])])
def test_frame_parameters_are_read_in_every_form(oracle, atoms, value):
    calc = MoECalculator(oracle("H1_fparam_default"), device="cpu")
    for_all = MoECalculator(calc.path, device="cpu", fparam=value)
    assert energy(calc, atoms, fparam=value) == energy(for_all, atoms)
    assert energy(calc, atoms, fparam=[0.1, 0.3]) != energy(for_all, atoms)


def test_values_of_the_calculator_serve_structures_without(calc, atoms):
    for_all = MoECalculator(calc.path, device="cpu", charge=1)
    assert energy(for_all, atoms, spin=2) == energy(calc, atoms, charge=1, spin=2)
    assert energy(for_all, atoms, charge=1, spin=2) == energy(calc, atoms, charge=1, spin=2)


def test_one_input_of_two_numbers_is_charge_and_spin_and_frame_parameters(oracle, atoms):
    calc = MoECalculator(oracle("J_moe_chgspin"), device="cpu")
    want = energy(calc, atoms, charge=1, spin=2)
    assert energy(calc, atoms, fparam=[1, 2]) == want
    assert energy(calc, atoms, charge_spin=[1, 2], fparam=[1.0, 2.0]) == want
    with pytest.raises(ConditionError, match="charge = 0 but fparam = 1,2, which is charge and spin"):
        energy(calc, atoms, charge=0, fparam=[1, 2])


@pytest.mark.filterwarnings("ignore:no .* given")
@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"charge": 0.5}, "charge = 0.5, expected a whole number from -100 to 99: fractions have no meaning"),
        ({"charge": 100}, "charge = 100, expected a whole number from -100 to 99"),
        ({"charge": -101}, "charge = -101, expected"),
        ({"spin": -1}, "spin = -1, expected a whole number from 0 to 99"),
        ({"spin": 100}, "spin = 100, expected"),
        ({"charge": "1"}, "charge = '1', expected a whole number"),
        ({"charge": True}, "charge = True, expected a whole number"),
        ({"charge": float("nan")}, "charge = nan, expected a whole number"),
        ({"charge": [0, 1]}, r"charge = \[0, 1\], expected a whole number"),
        ({"charge_spin": [1]}, "charge_spin has 1 number, expected two: charge and multiplicity"),
        ({"charge_spin": [1, 2, 3]}, "charge_spin has 3 numbers, expected two"),
        ({"charge_spin": "1 2"}, "charge_spin has entry '1 2', expected numbers in one row"),
        ({"charge_spin": [0.5, 1]}, "charge = 0.5, expected a whole number"),
        ({"charge": 1, "charge_spin": [2, 1]}, "atoms.info has charge = 1 and charge_spin = 2,1: give one of them"),
        ({"spin": 1, "charge_spin": [2, 3]}, "atoms.info has spin = 1 and charge_spin = 2,3: give one of them"),
        ({"fparam": [1.0]}, "fparam = 1 was given, but this model takes no fparam: leave it out"),
    ],
)  # fmt: skip
def test_values_that_the_model_cannot_take_are_refused(calc, atoms, info, message):
    with pytest.raises(ConditionError, match=message):
        energy(calc, atoms, **info)
    bad = atoms.copy()
    bad.info.update(info)
    with pytest.raises(ConditionError, match=f"structure 1: {message}"):
        calc.calculate_batch([atoms, bad])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], r"fparam has 1 number \(1\), expected 2 as this model was trained with"),
        ([1.0, 2.0, 3.0], "fparam has 3 numbers"),
        (1.0, r"fparam has 1 number \(1\)"),
        ([1.0, float("nan")], "fparam has entry nan, expected finite numbers"),
        ([1.0, float("inf")], "fparam has entry inf, expected finite numbers"),
        ("1 2", "fparam has entry '1 2', expected numbers in one row"),
        (["1", "2"], "fparam has entry '1', expected numbers in one row"),
        ([[1.0, 2.0]], r"fparam has entry \[1.0, 2.0\], expected numbers in one row"),
        ([True, False], "fparam has entry True, expected numbers"),
    ],
)
def test_frame_parameters_that_the_model_cannot_take_are_refused(oracle, atoms, value, message):
    path = oracle("H1_fparam_default")
    with pytest.raises(ConditionError, match=message):
        energy(MoECalculator(path, device="cpu"), atoms, fparam=value)
    with pytest.raises(ConditionError, match=message):
        MoECalculator(path, device="cpu", fparam=value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"charge": 100}, "charge = 100, expected a whole number from -100 to 99"),
        ({"spin": 0.5}, "spin = 0.5, expected"),
        ({"fparam": [0, 1]}, "fparam = 0,1 was given, but this model takes no fparam"),
    ],
)
def test_the_calculator_refuses_what_no_structure_could_have(calc, given, message):
    with pytest.raises(ConditionError, match=message):
        MoECalculator(calc.path, device="cpu", **given)
    with pytest.raises(ConditionError, match=message):
        calc.set(**given)


def test_structure_and_calculator_may_not_contradict_each_other(calc, atoms):
    for_all = MoECalculator(calc.path, device="cpu", charge=1, spin=2)
    with pytest.raises(
        ConditionError, match=r"atoms.info has charge = 0, but the calculator was made with charge = 1"
    ):
        energy(for_all, atoms, charge=0)
    with pytest.raises(
        ConditionError, match=r"atoms.info has spin = 1, but the calculator was made with spin = 2"
    ):
        energy(for_all, atoms, charge_spin=[1, 1])


@pytest.mark.parametrize("info", [{"charge": 0}, {"spin": 1}, {"charge_spin": [0, 1]}, {"fparam": [0.0]}])
def test_a_model_without_conditions_refuses_them(info):
    calc = MoECalculator(device="cpu")
    atoms = testing.molecule(calc.elements[:2])
    with pytest.raises(ConditionError, match=r"was given, but this model takes no .*: leave it out"):
        energy(calc, atoms, **info)
    info = {"charge": 0} if "charge_spin" in info else info
    with pytest.raises(ConditionError, match="takes no"):
        MoECalculator(device="cpu", **info)


def test_a_fixed_package_takes_its_values_and_no_others(tmp_path, atoms):
    path = tmp_path / "fixed.moe.pt"
    package_checkpoint(DATA / "oracle" / "models" / "H3_chgspin.pt", path, charge=1, spin=2)
    calc = MoECalculator(path, device="cpu", charge=1)
    assert energy(calc, atoms) == energy(calc, atoms, charge=1, spin=2)
    message = "charge = 0 was given, but this package is fixed at charge 1: package the checkpoint again"
    with pytest.raises(ConditionError, match=message):
        MoECalculator(path, device="cpu", charge=0)
    with pytest.raises(ConditionError, match=message):
        energy(MoECalculator(path, device="cpu"), atoms, charge=0)


# --- defaults --------------------------------------------------------------------------------------


def test_defaults_are_said_once_with_their_values(oracle, atoms):
    calc = MoECalculator(oracle("H5_chgspin_fparam"), device="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        energy(calc, atoms)
        energy(calc, atoms, charge=1)
        calc.calculate_batch([atoms, atoms])
    (warning,) = [w for w in caught if "given" in str(w.message)]
    default = calc.metadata["conditions"]["charge_spin"]["default"]
    numbers = ",".join(f"{x:.15g}" for x in calc.metadata["conditions"]["fparam"]["default"])
    assert str(warning.message) == (
        f"no charge and no spin and no fparam given: the default of the model {calc.metadata['name']} is used, charge = {default[0]}, "
        f'spin = {default[1]}, fparam = {numbers} (set atoms.info["charge"] and atoms.info["spin"] and atoms.info["fparam"], or pass '
        "charge=, spin=, fparam= to MoECalculator)"
    )


def test_one_input_for_both_is_named_once(tmp_path, atoms):
    options = {"add_chg_spin_ebd": True, "fparam_is_charge_spin": True, "nlayers": 1}
    config = testing.random_config(
        ["O", "H"], fitting={"numb_fparam": 2, "default_fparam": [0, 1]}, **options
    )
    testing.write_random_package(tmp_path / "x.moe.pt", config)
    with pytest.warns(UserWarning, match=r"^no charge and no spin given: .* charge = 0, spin = 1 \(set"):
        energy(MoECalculator(tmp_path / "x.moe.pt", device="cpu"), atoms)


@pytest.mark.filterwarnings("error::UserWarning")
def test_nothing_is_said_where_all_is_given(calc, atoms):
    energy(calc, atoms, charge=0, spin=1)


def test_missing_values_without_default_are_an_error_that_says_what_to_give(mandatory):
    calc = MoECalculator(mandatory, device="cpu")
    atoms = testing.molecule(ELEMENTS)
    with pytest.raises(
        ConditionError, match=r"needs charge and spin \(multiplicity 2S\+1\) and has no default: give both"
    ):
        energy(calc, atoms)
    with pytest.raises(ConditionError, match="has no default: give spin"):
        energy(calc, atoms, charge=0)
    with pytest.raises(ConditionError, match="needs 3 frame parameters and has no default: give fparam"):
        energy(calc, atoms, charge=0, spin=1)
    energy(MoECalculator(mandatory, device="cpu", charge=0, fparam=[1, 2, 3]), atoms, spin=1)


# --- a changed info is another calculation ---------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@quiet
def test_a_changed_info_is_a_new_calculation(oracle, atoms, monkeypatch, backend):
    monkeypatch.setenv("MOECALC_BACKEND", backend)
    calc = MoECalculator(oracle("H5_chgspin_fparam"), device="cpu")
    want = {k: energy(calc, atoms, charge=k, fparam=[0.1 * k, 0.2]) for k in (1, 0, 2)}
    assert len(set(want.values())) == 3
    atoms.calc = calc
    searches = []
    for k in (0, 1, 2, 1):
        atoms.info.update(charge=k, fparam=[0.1 * k, 0.2])
        assert atoms.get_potential_energy() == pytest.approx(want[k], abs=1e-12)
        assert not calc.calculation_required(atoms, ["energy"])
        searches.append(calc.neighbor_list.n_rebuilds)
    assert len(set(searches)) == 1  # the list serves them all


def test_a_copy_with_another_info_is_a_new_calculation(calc, atoms):
    atoms.info.update(charge=0, spin=1)
    atoms.calc = calc
    first = atoms.get_potential_energy()
    other = atoms.copy()
    assert not calc.calculation_required(other, ["energy"])
    other.info["charge"] = 1
    assert calc.check_state(other) == ["info"]
    assert calc.get_property("energy", other, allow_calculation=False) is None
    assert calc.get_potential_energy(other) != first
    assert atoms.get_potential_energy() == first


def test_the_same_values_in_another_form_are_no_new_calculation(calc, atoms):
    atoms.info.update(charge=1, spin=2)
    atoms.calc = calc
    atoms.get_potential_energy()
    atoms.info.update(charge=np.float64(1), spin=np.array([2]), note="another entry")
    assert not calc.calculation_required(atoms, ["energy", "forces"])


def test_a_refused_info_leaves_no_results_of_the_one_before(calc, atoms):
    atoms.info.update(charge=0, spin=1)
    atoms.calc = calc
    first = atoms.get_potential_energy()
    atoms.info["charge"] = 1000
    for _ in range(2):
        with pytest.raises(ConditionError):
            atoms.get_potential_energy()
    atoms.info["charge"] = 0
    assert atoms.get_potential_energy() == first


def test_set_changes_the_values_for_all_structures(calc, atoms):
    atoms.calc = MoECalculator(calc.path, device="cpu", charge=0, spin=1)
    first = atoms.get_potential_energy()
    assert atoms.calc.set(charge=2, spin=3) == {"charge": 2, "spin": 3}
    assert atoms.get_potential_energy() == energy(calc, atoms, charge=2, spin=3) != first
    assert atoms.calc.set(charge=2) == {}
    atoms.calc.set(charge=0, spin=1)
    assert atoms.get_potential_energy() == first


def test_set_changes_all_or_nothing(oracle):
    calc = MoECalculator(oracle("J_moe_chgspin"), device="cpu", charge=0, spin=1)
    with pytest.raises(ConditionError, match="spin = -3, expected"):
        calc.set(skin=0.5, charge=1, spin=-3)
    with pytest.raises(ConditionError, match="charge = 0 but fparam = 2,1, which is charge and spin"):
        calc.set(fparam=[2, 1])
    assert (calc.parameters["charge"], calc.parameters["spin"], calc.parameters["skin"]) == (0, 1, 1.0)
    assert calc.parameters["fparam"] is None


def test_calculators_that_share_a_model_keep_their_own_values(calc, atoms):
    calculators = {q: MoECalculator(calc.path, device="cpu", charge=q, spin=1) for q in (0, 1, -3)}
    want = {q: energy(calc, atoms, charge=q, spin=1) for q in calculators}
    for q in (0, 1, 0, -3, 1):
        moved = atoms.copy()
        moved.positions += 0.01
        assert calculators[q].get_potential_energy(moved) == pytest.approx(want[q], abs=1e-10)
        assert calculators[q].get_potential_energy(atoms.copy()) == want[q]


def test_a_sum_with_the_guard_sees_a_changed_info(calc, atoms):
    atoms.info.update(charge=0, spin=1)
    atoms.calc = guarded(calc)
    assert isinstance(atoms.calc, SumCalculator)
    first = atoms.get_potential_energy()
    atoms.info["charge"] = 1
    assert atoms.get_potential_energy() - first == pytest.approx(
        energy(calc, atoms, charge=1) - energy(calc, atoms, charge=0), abs=1e-10
    )
    atoms.info["charge"] = 0
    assert atoms.get_potential_energy() == first


# --- batches ---------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_many_conditions_in_any_order_equals_single_evaluations(oracle, monkeypatch, backend):
    monkeypatch.setenv("MOECALC_BACKEND", backend)
    calc = MoECalculator(oracle("H5_chgspin_fparam"), device="cpu")
    rng = np.random.default_rng(0)
    structures = []
    for k in rng.permutation(120):
        one = testing.molecule(["O", "H"], distance=1.6, n_atoms=2 + k % 3, seed=k)
        one.info.update(charge=k % 60 - 30, spin=k % 60 % 7, fparam=[0.01 * (k % 60), 1.0])
        structures.append(one)
    together = calc.calculate_batch(structures)
    for index in (0, 1, 17, 60, 119):
        (alone,) = calc.calculate_batch([structures[index]])
        assert together[index]["energy"] == pytest.approx(alone["energy"], abs=1e-11)
        assert np.abs(together[index]["forces"] - alone["forces"]).max() < 1e-11
    backward = calc.calculate_batch(structures[::-1])
    difference = [abs(a["energy"] - b["energy"]) for a, b in zip(together, backward[::-1], strict=True)]
    assert max(difference) < 1e-11


def test_a_batch_does_not_touch_the_results_of_the_calculator(calc, atoms):
    atoms.info.update(charge=0, spin=1)
    atoms.calc = calc
    first = atoms.get_potential_energy()
    others = [atoms.copy() for _ in range(2)]
    for q, other in enumerate(others):
        other.info["charge"] = q + 1
    found = calc.calculate_batch(others)
    assert not calc.calculation_required(atoms, ["energy"])
    assert atoms.get_potential_energy() == first
    assert found[0]["energy"] == energy(calc, atoms, charge=1)


# --- copies and files ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_keep_values_and_results(calc, atoms, how):
    original = MoECalculator(calc.path, device="cpu", charge=1, spin=2)
    atoms.calc = original
    first = atoms.get_potential_energy()
    other = how(original)
    assert other.parameters["charge"] == 1
    assert not other.calculation_required(atoms, ["energy"])
    other.set(charge=0)
    assert other.get_potential_energy(atoms) != first
    assert original.get_potential_energy(atoms) == first


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_do_not_say_the_defaults_again(calc, atoms, how):
    with pytest.warns(UserWarning, match="no charge and no spin given"):
        energy(calc, atoms)
    other = how(calc)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        energy(other, atoms, charge=1)


@pytest.mark.parametrize("fparam", [[0.1, 0.2], (0.1, 0.2), np.array([0.1, 0.2])])
@pytest.mark.parametrize("name", ["x.traj", "x.json", "x.db"])
def test_values_survive_trajectories_and_databases(oracle, atoms, tmp_path, fparam, name):
    atoms.calc = MoECalculator(
        oracle("H5_chgspin_fparam"), device="cpu", charge=np.int64(1), spin=2, fparam=fparam
    )
    want = atoms.get_potential_energy()
    if name == "x.traj":
        ase.io.write(tmp_path / name, atoms)
        back = ase.io.read(tmp_path / name)
        parameters = back.calc.parameters if hasattr(back.calc, "parameters") else {}
    else:
        with ase.db.connect(tmp_path / name) as database:
            database.write(atoms)
            row = database.get(1)
        back, parameters = row.toatoms(), row.calculator_parameters
    assert back.get_potential_energy() == want
    if parameters:
        assert (parameters["charge"], parameters["spin"]) == (1, 2)
        assert np.allclose(parameters["fparam"], [0.1, 0.2])


def test_values_of_a_structure_survive_extxyz(calc, atoms, tmp_path):
    atoms.info.update(charge=1, spin=2)
    atoms.calc = calc
    want = atoms.get_potential_energy()
    ase.io.write(tmp_path / "x.extxyz", atoms)
    back = ase.io.read(tmp_path / "x.extxyz")
    assert calc.get_potential_energy(back) == pytest.approx(want, abs=1e-6)
    assert back.info["charge"] == 1


# --- the check at load -----------------------------------------------------------------------------


@quiet
def test_the_check_at_load_leaves_no_conditions_behind(oracle, atoms, monkeypatch):
    for backend in BACKENDS:
        monkeypatch.setenv("MOECALC_BACKEND", backend)
        calc = MoECalculator(oracle("H3_chgspin"), device="cpu", check=False)
        want = energy(calc, atoms, charge=-2, spin=3)
        calc._model.check_reference()
        other = atoms.copy()
        other.rattle(0.01)
        energy(calc, other, charge=-2, spin=3)
        assert energy(calc, atoms, charge=-2, spin=3) == pytest.approx(want, abs=1e-12)
