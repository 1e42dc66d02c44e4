"""Reference check and commands with packages that take charge, spin or frame parameters."""

import os

import ase.io
import numpy as np
import pytest
from alterations import records_of
from ase.calculators.singlepoint import SinglePointCalculator
from helpers import DATA
from typer.testing import CliRunner

from moecalc import MoECalculator, _lib, testing
from moecalc._jit import jit_load
from moecalc.benchmark import alloy, benchmark
from moecalc.cli import app
from moecalc.conditions import ConditionError
from moecalc.errors import MoecalcError, PackageError
from moecalc.package import package_checkpoint, verify_package
from moecalc.package.archive import write_archive
from moecalc.report import evaluate

ELEMENTS = ["Nb", "W"]
OPTIONS = {
    "default": {"add_chg_spin_ebd": True, "default_chg_spin": (0, 1), "nlayers": 1},
    "mandatory": {"add_chg_spin_ebd": True, "fitting": {"numb_fparam": 3}, "nlayers": 1},
    "routed": {"add_chg_spin_ebd": True, "n_routed": 4, "route_on_charge_spin": True, "nlayers": 2},
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    made = {}

    def get(name):
        if name not in made:
            made[name] = folder / f"{name}.moe.pt"
        if name == "H1" and not made[name].exists():
            package_checkpoint(DATA / "oracle" / "models" / "H1_fparam_default.pt", made[name])
        elif not made[name].exists():
            testing.write_random_package(made[name], testing.random_config(ELEMENTS, **OPTIONS[name]))
        return made[name]

    return get


def altered(path, target, change):
    """A package whose module was changed, stamped again."""
    model = jit_load(path)
    change(model)
    records = records_of(path)
    extra = {name.split("extra/", 1)[1]: text.decode() for name, text in records.items() if "/extra/" in name}
    write_archive(target, model, extra)
    return target


ALTERATIONS = {
    "charges": ("default", lambda m: m.conditions.embedding.charge_matrix.data.mul_(1.01)),
    "the charge of the frame": (
        "default",
        lambda m: m.conditions.embedding.charge_matrix.data[100].add_(0.1),
    ),
    "spins": ("routed", lambda m: m.conditions.embedding.spin_matrix.data.mul_(1.05)),
    "mix": ("mandatory", lambda m: m.conditions.embedding.mix_matrix.data.mul_(1.01)),
    "mean": ("mandatory", lambda m: m.conditions.fparam_avg.add_(0.1)),
    # seen in frames with other values than the mean, which complete packages have
    "spread": ("H1", lambda m: m.conditions.fparam_inv_std.mul_(1.1)),
}


@pytest.mark.parametrize("what", ALTERATIONS)
def test_an_altered_table_is_refused_by_the_calculator_and_the_evaluator(packages, tmp_path, what):
    name, change = ALTERATIONS[what]
    path = altered(packages(name), tmp_path / "altered.moe.pt", change)
    with pytest.raises(PackageError, match="of the stored reference frame deviates by"):
        MoECalculator(path, device="cpu")
    with pytest.raises(_lib.load().Error, match="of the stored reference frame deviates by"):
        _lib.load().Evaluator(os.fsencode(path)).check_reference()


def test_the_unaltered_package_passes_the_check(packages, tmp_path):
    for name in OPTIONS:
        path = altered(packages(name), tmp_path / f"{name}.moe.pt", lambda _: None)
        MoECalculator(path, device="cpu")


@pytest.mark.parametrize("name", OPTIONS)
def test_verify_passes(packages, name):
    report = verify_package(packages(name))
    assert report.passed, [c for c in report.checks if not c.passed]
    assert {"evaluator float64 on cpu", "evaluator float32 on cpu"} <= {c.name for c in report.checks}


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("default", ["taken (spin is the multiplicity 2S+1), default 0 and 1"]),
        ("mandatory", ["no default, must be given", "3 taken, no default"]),
        ("routed", ["routed by element, charge and spin"]),
    ],
)
def test_inspect_says_what_is_taken(packages, name, texts):
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["inspect", str(packages(name))]).output
    for text in texts:
        assert text in shown


def small_alloy(tmp_path, **info):
    path = tmp_path / "alloy.extxyz"
    atoms = alloy(ELEMENTS, n=2)
    atoms.info.update(info)
    ase.io.write(path, atoms)
    return path


@pytest.mark.parametrize(
    ("name", "info"),
    [
        ("default", {}),
        ("default", {"charge": 1}),
        ("mandatory", {"charge": 0, "spin": 1, "fparam": [1.0, 2.0, 3.0]}),
    ],
)  # fmt: skip
def test_bench_takes_values_of_the_structure_or_defaults(packages, tmp_path, name, info):
    report = benchmark(packages(name), small_alloy(tmp_path, **info), steps=1, threads=1)
    assert report.sizes[0].atoms == 16


def test_bench_says_what_is_missing(packages, tmp_path):
    message = r"has no default: give both, in `info` of the structure \(--structure"
    with pytest.raises(ConditionError, match=message):
        benchmark(packages("mandatory"), small_alloy(tmp_path), steps=1)
    done = CliRunner().invoke(app, ["bench", str(packages("mandatory"))])
    assert done.exit_code == 2
    assert "error: this model needs charge and spin" in done.stderr


def frames(calculator, conditions):
    found = []
    for k, given in enumerate(conditions):
        atoms = testing.molecule(ELEMENTS, n_atoms=4, seed=k)
        atoms.info.update(given)
        (result,) = calculator.calculate_batch([atoms])
        atoms.calc = SinglePointCalculator(atoms, **result)
        found.append(atoms)
    return found


def test_report_reads_the_conditions_of_every_frame(packages):
    calculator = MoECalculator(packages("default"), device="cpu", dtype="float64")
    found = frames(calculator, [{"charge": q, "spin": 1 + abs(q)} for q in (0, 1, -2, 1)])
    result = evaluate(calculator, found)
    assert np.abs(result.energy - result.energy_model).max() < 1e-10
    assert np.abs(result.forces - result.forces_model).max() < 1e-10


def test_report_names_the_frame_whose_conditions_are_refused(packages):
    calculator = MoECalculator(packages("default"), device="cpu")
    found = frames(calculator, [{"charge": q, "spin": 1} for q in (0, 1, -2)])
    found[2].info["charge"] = 0.5
    with pytest.raises(MoecalcError, match=r"^frame 2: charge = 0.5, expected a whole number"):
        evaluate(calculator, found)


def test_zbl_prints_lines_for_a_package_with_conditions(packages):
    done = CliRunner().invoke(app, ["zbl", str(packages("mandatory"))])
    assert done.exit_code == 0, done.output
    assert "pair_style hybrid/overlay moe" in done.output
