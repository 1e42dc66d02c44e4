"""Charge, spin and frame parameters of pair_style moe: what ASE gives, on any number of ranks, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from helpers import DATA
from lammps_cases import run_cases
from lammps_runs import alloy, lmp, succeed, write_data

from moecalc import MoECalculator, testing
from moecalc._lib import load
from moecalc.conditions import ConditionError, resolve
from moecalc.package import package_checkpoint, read_metadata

METALS = ["Nb", "Mo", "Ta", "W"]
PACK = {"n_routed": 4, "route_on_charge_spin": True, "add_chg_spin_ebd": True, "default_chg_spin": (0, 1)}

SCRIPT = """
clear
units metal
atom_modify map array
{processors}
boundary {boundary}
box tilt large
read_data {data}
pair_style {style}
pair_coeff * * {package} {elements}
compute e all pe/atom
compute s all stress/atom NULL virial
compute sum all reduce sum c_s[*]
thermo_style custom step pe press c_sum[*]
run 0
write_dump all custom {dump} id type x y z fx fy fz c_e modify format float %.17g
print "result $(pe:%.17g)"
print "virial $(c_sum[1]:%.17g) $(c_sum[2]:%.17g) $(c_sum[3]:%.17g) $(c_sum[4]:%.17g) $(c_sum[5]:%.17g) $(c_sum[6]:%.17g)"
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory, packages):
    """Packages by name, in float64."""
    folder = tmp_path_factory.mktemp("conditions")
    random = {
        "pack": testing.random_config(METALS, **PACK),
        "both": testing.random_config(
            METALS, n_routed=4, add_chg_spin_ebd=True, fitting={"numb_fparam": 3}, nlayers=2
        ),
        "plain": testing.random_config(METALS, nlayers=1),
    }
    found = {
        "H1": packages("H1_fparam_default"),
        "H3": packages("H3_chgspin"),
        "H5": packages("H5_chgspin_fparam"),
        "J": packages("J_moe_chgspin"),
    }
    for name, config in random.items():
        found[name] = folder / f"{name}.moe.pt"
        testing.write_random_package(found[name], config, "float64")
    return found


# what LAMMPS is told, and what ASE
VALUES = {
    "H1": [("fparam 0.3 -0.4", {"fparam": [0.3, -0.4]}), ("", {})],
    "H3": [("charge 1 spin 2", {"charge": 1, "spin": 2}), ("spin 3 charge -2", {"charge": -2, "spin": 3}), ("", {})],
    "H5": [("charge -1 spin 2 fparam 0.3 1e-3", {"charge": -1, "spin": 2, "fparam": [0.3, 1e-3]})],
    "J": [("charge 1 spin 2", {"charge": 1, "spin": 2}), ("fparam +1 2", {"fparam": [1, 2]}), ("charge 1.0", {"charge": 1})],
    "pack": [("charge 2 spin 3", {"charge": 2, "spin": 3}), ("charge -1", {"charge": -1}), ("", {})],
    "both": [("fparam 0.1 0.2 -0.3 charge 1 spin 0", {"charge": 1, "spin": 0, "fparam": [0.1, 0.2, -0.3]})],
}  # fmt: skip


def structures(name: str) -> dict[str, Atoms]:
    """A sheared periodic one, and one that is not periodic and all at one end of the box: rank 1 owns none."""
    elements = METALS if name in {"pack", "both"} else ["O", "H"]
    periodic = alloy(METALS, (2, 2, 3), shear=0.15)
    cluster = testing.molecule(METALS, distance=2.3)
    for atoms in (periodic, cluster):
        symbols = np.array(elements)[[METALS.index(s) % len(elements) for s in atoms.symbols]]
        atoms.symbols[:] = symbols
    if elements != METALS:
        periodic.set_cell(periodic.cell.array * 0.75, scale_atoms=True)
        cluster.positions *= 0.7
    return {"periodic": periodic, "cluster": cluster}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "backend"),
    [(1, ""), (2, ""), (4, ""), (2, "plain"), (2, "torchscript"), (2, "cuda-emulation")],
)
@pytest.mark.parametrize("group", [("H1", "H3", "H5", "J"), ("pack", "both")], ids=["oracle", "random"])
def test_equals_the_calculator(group, ranks, backend, models, tmp_path):
    script, expected = "", []
    for name in group:
        for shape, atoms in structures(name).items():
            periodic = shape == "periodic"
            elements = sorted(set(atoms.symbols))
            data = f"data.{name}_{shape}"
            bounds = None if periodic else np.array([[-2.0, 38.0]] * 3)
            rotation = write_data(tmp_path / data, atoms, elements, bounds)
            for keywords, given in VALUES[name]:
                script += SCRIPT.format(
                    boundary="p p p" if periodic else "f f f",
                    processors="" if periodic else "processors * 1 1",
                    style=f"moe dtype float64 device cpu {keywords}",
                    data=data,
                    package=models[name],
                    elements=" ".join(elements),
                    dump=f"dump.{len(expected)}",
                )
                expected.append((*_calculated(models[name], atoms, given), rotation))
    run = succeed(script, tmp_path, ranks=ranks, env={"MOECALC_BACKEND": backend or None})
    assert len(run.values("result")) == len(expected)
    for k, (energy, energies, forces, virial, rotation) in enumerate(expected):
        assert run.values("result")[k][0] == pytest.approx(energy, rel=1e-9)
        frame = run.dump(f"dump.{k}")[0]
        assert np.abs(frame["c_e"] - energies).max() <= testing.ROUNDING
        assert np.abs(frame.array("fx", "fy", "fz") @ rotation.T - forces).max() <= testing.ROUNDING
        if virial is not None:
            xx, yy, zz, xy, xz, yz = run.values("virial")[k] / 1.6021765e6
            found = rotation @ np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]) @ rotation.T
            assert np.abs(found - virial).max() <= 1e-7


def _calculated(package: Path, atoms: Atoms, given: dict):
    atoms = atoms.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no .* given: the default")
        atoms.calc = MoECalculator(package, dtype="float64", device="cpu", check=False, **given)
        return (
            atoms.get_potential_energy(),
            atoms.get_potential_energies(),
            atoms.get_forces(),
            atoms.get_stress(voigt=False) * atoms.get_volume() if atoms.pbc.all() else None,
        )


# --- what the log says, and what keeps the values ---------------------------------------------------------------

BOX = """
units metal
region box block 0 12 0 12 0 12
create_box 2 box
create_atoms 1 single 3 3 3
create_atoms 2 single 4.1 3.2 3
create_atoms 2 single 2.4 3.8 3
mass 1 15.999
mass 2 1.008
"""


def water(package: Path, keywords: str = "", lines: str = "run 0", before: str = BOX) -> str:
    return (
        f"{before}pair_style moe dtype float64 device cpu {keywords}\npair_coeff * * {package} O H\n{lines}\n"
    )


ENERGY = 'print "result $(pe:%.17g)"\n'


def energies(package: Path, *given: dict) -> list[float]:
    """eV of the atoms of BOX, for each of the conditions."""
    atoms = Atoms("OHH", [[3, 3, 3], [4.1, 3.2, 3], [2.4, 3.8, 3]], cell=[12] * 3, pbc=True)
    return [_calculated(package, atoms, g)[0] for g in given]


def test_values_are_in_the_log(models, tmp_path):
    output = succeed(
        water(models["H5"], "charge 1 spin 2 fparam 0.25 -4", "run 0\nrun 0"), tmp_path, ranks=2
    ).output
    assert output.count("\n  charge 1, spin 2, fparam 0.25 -4\n") == 1
    assert "WARNING: Pair style moe" not in output


def test_defaults_are_told_once(models, tmp_path):
    output = " ".join(
        succeed(water(models["H3"], "spin 3", "run 0\nrun 0"), tmp_path, ranks=2).output.split()
    )
    assert output.count("charge 0, spin 3") == 1
    message = (
        "Pair style moe: charge 0 not given by pair_style, so the default of the model H3_chgspin is used"
    )
    assert output.count(message) == 1


def test_values_fixed_in_a_package_are_in_the_log(tmp_path):
    package_checkpoint(DATA / "oracle/models/H3_chgspin.pt", tmp_path / "fixed.moe.pt", charge=1, spin=2)
    output = succeed(water(Path("fixed.moe.pt"), "charge 1"), tmp_path).output
    assert "\n  charge 1, spin 2, which is fixed in this package\n" in output


def test_another_pair_style_command_changes_the_values(models, tmp_path):
    """Between runs, without another pair_coeff."""
    again = "run 0\n" + ENERGY
    lines = again + "pair_style moe dtype float64 device cpu charge -2 spin 3\n" + again
    lines += "pair_style moe dtype float64 device cpu\n" + again
    run = succeed(water(models["H3"], "charge 1 spin 2", lines), tmp_path, ranks=2)
    expected = energies(models["H3"], {"charge": 1, "spin": 2}, {"charge": -2, "spin": 3}, {})
    assert len(set(expected)) == 3
    assert np.ravel(run.values("result")) == pytest.approx(expected, rel=1e-10)
    assert run.output.count("charge -2, spin 3") == 1
    assert run.output.count("model H3_chgspin from") == 1  # the file was not read again


@pytest.mark.parametrize("change", ["charge 1", "", "again"])
def test_a_changed_model_needs_an_initialised_run(change, models, tmp_path):
    style = f"pair_style moe device cpu dtype {'float64' if change else 'float32'} {change}\n"
    if change == "again":
        style = f"pair_coeff * * {models['H3']} O H\n"
    run = lmp(water(models["H3"], "charge 0 spin 1", "run 0\n" + style + "run 1 pre no"), tmp_path)
    assert run.code == 1
    assert "changed the model since the last run: expected a run with `pre yes`, got `pre no`" in run.error()


@pytest.mark.parametrize("ranks", [1, 2])
def test_restart_files_keep_the_values(ranks, models, tmp_path):
    keywords = "charge -3 spin 2 fparam 0.1 -1e-300"
    lines = f"run 0\n{ENERGY}write_restart file.restart\nclear\nread_restart file.restart\nrun 0\n{ENERGY}"
    run = succeed(water(models["H5"], keywords, lines), tmp_path, ranks=ranks)
    first, second = run.values("result")
    assert first[0] == pytest.approx(
        energies(models["H5"], {"charge": -3, "spin": 2, "fparam": [0.1, -1e-300]})[0], rel=1e-10
    )
    assert second[0] == pytest.approx(first[0], rel=1e-13)
    assert run.output.count("charge -3, spin 2, fparam 0.1 -1e-300") == 2


def test_values_after_a_restart_file_replace_its_own(models, tmp_path):
    again = "pair_style moe dtype float64 device cpu spin 2\n"
    lines = f"run 0\nwrite_restart file.restart\nclear\nread_restart file.restart\n{again}"
    lines += f"pair_coeff * * {models['H3']} O H\nrun 0\n{ENERGY}"
    run = succeed(water(models["H3"], "charge -3 spin 4", lines), tmp_path)
    assert run.values("result")[0][0] == pytest.approx(energies(models["H3"], {"spin": 2})[0], rel=1e-10)


def test_restart_files_of_before_can_be_read(models, tmp_path):
    """Without values, a file is what it was before there were any."""
    lines = "run 0\nwrite_restart file.restart"
    succeed(water(models["plain"], "untrained yes", lines).replace("O H", "Nb W"), tmp_path)
    content = (tmp_path / "file.restart").read_bytes()
    assert (3).to_bytes(4, "little") + b"yes" + len(str(models["plain"])).to_bytes(4, "little") in content


@pytest.mark.parametrize(("old", "new"), [(b" charge -3", b" chargf -3"), (b" charge -3", b" charge x3")])
def test_damaged_restart_files_are_refused(old, new, models, tmp_path):
    succeed(water(models["H3"], "charge -3", "run 0\nwrite_restart file.restart"), tmp_path)
    file = tmp_path / "file.restart"
    file.write_bytes(file.read_bytes().replace(old, new))
    run = lmp("read_restart file.restart", tmp_path, ranks=2, limit=60)
    assert run.code == 1
    assert "Pair style moe: damaged restart file: expected a" in run.error()


@pytest.mark.parametrize("ranks", [1, 2])
def test_models_of_different_charge_in_one_hybrid_style(ranks, models, tmp_path):
    moe = "moe dtype float64 device cpu charge"
    script = f"""{BOX}
    pair_style hybrid/scaled 0.25 {moe} 1 spin 2 0.5 {moe} -2 spin 3 0.25 zero 5.0
    pair_coeff * * moe 1 {models["H3"]} O H
    pair_coeff * * moe 2 {models["H3"]} O H
    pair_coeff * * zero
    run 0
    {ENERGY}
    """
    run = succeed(script, tmp_path, ranks=ranks)
    one, two = energies(models["H3"], {"charge": 1, "spin": 2}, {"charge": -2, "spin": 3})
    assert run.values("result")[0][0] == pytest.approx(0.25 * one + 0.5 * two, rel=1e-10)


def test_frame_parameters_in_a_hybrid_style_end_at_the_next_style(models, tmp_path):
    script = f"""{BOX}
    pair_style hybrid/overlay moe dtype float64 device cpu fparam 0.3 -0.4 zero 5.0
    pair_coeff * * moe {models["H1"]} O H
    pair_coeff * * zero
    run 0
    {ENERGY}
    """
    run = succeed(script, tmp_path)
    expected = energies(models["H1"], {"fparam": [0.3, -0.4]})[0]
    assert run.values("result")[0][0] == pytest.approx(expected, rel=1e-10)


# --- what is refused --------------------------------------------------------------------------------------------

RANGE = "expected a whole number from -100 to 99"
REFUSED = {
    "a fraction of a charge": ("H3", "charge 0.5", f"charge = 0.5, {RANGE}: fractions have no meaning"),
    "a fraction of a multiplicity": ("H3", "spin 1.5", "spin = 1.5, expected a whole number from 0 to 99: fractions"),
    "a charge above": ("H3", "charge 100", f"charge = 100, {RANGE}"),
    "a charge below": ("J", "charge -101", f"charge = -101, {RANGE}"),
    "a multiplicity above": ("pack", "spin 100", "spin = 100, expected a whole number from 0 to 99"),
    "a multiplicity below": ("H5", "charge 0 spin -1 fparam 1 2", "spin = -1, expected a whole number from 0 to 99"),
    "a huge charge": ("H3", "charge 1e300", f"charge = 1e+300, {RANGE}"),
    "a charge that is NaN": ("H3", "charge nan", f"charge = nan, {RANGE}"),
    "too few parameters": ("H1", "fparam 1", "fparam has 1 number (1), expected 2 as this model was trained with"),
    "too many parameters": ("H1", "fparam 1 2 3", "fparam has 3 numbers (1 2 3), expected 2"),
    "an infinite parameter": ("H1", "fparam 1 inf", "fparam has entry inf, expected finite numbers"),
    "a charge where there is none": ("plain", "charge 0", "charge = 0 was given, but this model takes no charge: leave it out"),
    "a charge where frame parameters are": ("H1", "charge 1", "this model takes no charge: give fparam, if its two"),
    "parameters where there are none": ("H3", "fparam 1 2", "fparam = 1 2 was given, but this model takes no fparam: leave it out"),
    "nothing where both are needed": ("both", "fparam 1 2 3", "needs charge and spin (multiplicity 2S+1) and has no default: give both"),
    "nothing where one is needed": ("both", "charge 1 fparam 1 2 3", "has no default: give spin"),
    "no parameters where they are needed": ("both", "charge 1 spin 1", "this model needs 3 frame parameters and has no default: give fparam"),
    "contradicting values": ("J", "charge 1 fparam 0 2", "charge = 1 but fparam = 0 2, which is charge and spin in this model"),
    "a word": ("H3", "charge one", "expected a whole number after keyword charge, got one"),
    "a number with a unit": ("H3", "charge 1e", "expected a whole number after keyword charge, got 1e"),
    "a number beyond double precision": ("H1", "fparam 1e999 1", "expected numbers separated by blanks after keyword fparam, got 1e999"),
    "commas": ("H1", "fparam 0.3,0.4", "expected numbers separated by blanks after keyword fparam, got 0.3,0.4"),
    "a mistyped keyword": ("H1", "fparam 0.3 0.4 chrg 1", "expected numbers separated by blanks after keyword fparam, got chrg"),
    "two charges": ("H3", "charge 0 1", "expected keyword device, dtype, precision, untrained, charge, spin, fparam, out_file, out_freq, relative, relative_v or atomic, got 1"),
    "a keyword without value": ("H3", "charge", "expected a value after keyword charge"),
    "a keyword before another": ("H3", "charge spin 1", "expected a value after keyword charge"),
    "parameters without value": ("H1", "fparam", "expected a value after keyword fparam"),
    "a repeated keyword": ("H3", "charge 1 spin 2 charge 1", "expected keyword charge once, got it twice"),
    "repeated parameters": ("H1", "fparam 1 2 fparam 1 2", "expected keyword fparam once, got it twice"),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusals(models, tmp_path_factory):
    scripts = {name: _refused(models, model, keywords) for name, (model, keywords, _) in REFUSED.items()}
    return run_cases(scripts, tmp_path_factory.mktemp("refused"))


def _refused(models, model: str, keywords: str) -> str:
    elements = "Nb W" if model in {"plain", "pack", "both"} else "O H"
    return water(models[model], keywords).replace("O H", elements)


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_values_are_named_in_one_line(name, refusals):
    error = refusals[name].error
    assert "Pair style moe: " in error
    assert REFUSED[name][2] in error
    assert len([line for line in error.splitlines() if "Last input" not in line and line.strip()]) == 1


@pytest.mark.parametrize("name", ["a fraction of a charge", "nothing where both are needed", "a word"])
def test_all_ranks_end(name, models, tmp_path):
    model, keywords, message = REFUSED[name]
    run = lmp(_refused(models, model, keywords), tmp_path, ranks=2, limit=60)
    assert run.code == 1
    assert message in run.error()
    assert run.output.count("ERROR") == 1


def test_values_given_later_are_checked_as_well(models, tmp_path):
    """A pair_style command between runs, on all ranks."""
    later = "run 0\npair_style moe dtype float64 device cpu charge 0.5\nrun 0"
    run = lmp(water(models["H3"], "charge 1 spin 2", later), tmp_path, ranks=2, limit=60)
    assert run.code == 1
    assert f"charge = 0.5, {RANGE}" in run.error()


# --- the same rules as in Python --------------------------------------------------------------------------------

GIVEN = [
    {}, {"charge": 1}, {"spin": 2}, {"charge": -100, "spin": 0}, {"charge": 99, "spin": 99}, {"charge": 100},
    {"charge": -101}, {"charge": 0.5}, {"charge": float("nan")}, {"spin": -1}, {"spin": 100}, {"spin": float("inf")},
    {"fparam": []}, {"fparam": [1]}, {"fparam": [1, 2]}, {"fparam": [1, 2, 3]}, {"fparam": [1, float("nan")]},
    {"fparam": [0.5, 1]}, {"charge": 1, "fparam": [1, 2]}, {"charge": 1, "fparam": [0, 2]},
    {"charge": 1, "spin": 2, "fparam": [1, 2]}, {"charge": 1, "spin": 2, "fparam": [1, 2, 3]},
]  # fmt: skip


@pytest.mark.parametrize("name", ["H1", "H3", "H5", "J", "pack", "both", "plain", "fixed"])
def test_cpp_and_python_decide_alike(name, models, tmp_path):
    """What either refuses, the other refuses, with the same beginning; what they accept has the same values."""
    if name == "fixed":
        path = tmp_path / "fixed.moe.pt"
        package_checkpoint(DATA / "oracle/models/J_moe_chgspin.pt", path, charge=1, spin=2)
    else:
        path = models[name]
    taken = read_metadata(path).conditions
    evaluator = load().Evaluator(str(path), "cpu", "float64")
    accepted = 0
    for given in GIVEN:
        message = ""
        try:
            expected = resolve(taken, **given)
        except ConditionError as error:
            message = str(error)
        if message:
            with pytest.raises(Exception, match=r"\w") as caught:
                evaluator.give_conditions(**given)
            assert _words(str(caught.value)) == _words(message), given
            continue
        accepted += 1
        values, defaults = evaluator.give_conditions(**given)
        shown = "" if str(expected) == "none" else str(expected)
        if name == "J":  # shown once, not as frame parameters too
            shown = shown.split(", fparam")[0]
        assert _words(values) == _words(shown), given
        assert {part.split()[0] for part in defaults.split(", ") if part} == (
            set(expected.defaulted) - ({"fparam"} if name == "J" else set())
        )
    assert accepted > 0


def _words(text: str) -> list[str]:
    """Numbers in a row are separated by commas in Python, by blanks in LAMMPS."""
    return text.translate(str.maketrans(",[]", "   ")).split()
