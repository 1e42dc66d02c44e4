"""Masses and labels of atom types beside the elements of pair_coeff; texts that are not ASCII."""

from __future__ import annotations

import pytest
from lammps_cases import Case, run_cases
from lammps_runs import succeed

SETUP = """
units metal
region box block 0 12 0 12 0 12
create_box 2 box
create_atoms 1 single 3 3 3
create_atoms 2 single 5.2 3 3
{lines}
pair_style {style}
{coeff}
run 0
run 0
"""
MOE = "moe dtype float64 device cpu"


def setup(
    lines: str, elements: str = "Nb Mo", style: str = MOE, coeff: str = "pair_coeff * * default {}"
) -> str:
    return SETUP.format(lines=lines, style=style, coeff=coeff.format(elements))


ORDER = ": check the order of the elements"
CASES = {
    "right": (setup("mass 1 92.906\nmass 2 95.95"), []),
    "swapped": (
        setup("mass 1 183.84\nmass 2 92.906", "Nb W"),
        [
            f"atom type 1 has mass 183.84 (W), but pair_coeff says Nb (mass 92.9064){ORDER}",
            f"atom type 2 has mass 92.906 (Nb), but pair_coeff says W (mass 183.84){ORDER}",
        ],
    ),
    "all of one element": (setup("mass * 92.906", "Nb W"), [f"atom type 2 has mass 92.906 (Nb), but pair_coeff says W (mass 183.84){ORDER}"]),
    "no element's": (setup("mass 1 92.906\nmass 2 150", "Nb W"), [f"atom type 2 has mass 150 (Sm), but pair_coeff says W (mass 183.84){ORDER}"]),
    "ones": (setup("mass * 1.0"), []),
    "one dummy for all": (setup("mass * 50"), []),
    "isotopes": (setup("mass 1 6.0151\nmass 2 15.0001", "Li N"), []),
    "not of the model": (
        setup("mass 1 92.906\nmass 2 1.008", style=f"hybrid {MOE} zero 6.0",
              coeff="pair_coeff * * moe default Nb NULL\npair_coeff 2 2 zero\npair_coeff 1 2 zero"), []),
    "labels": (setup("mass 1 92.906\nmass 2 95.95\nlabelmap atom 1 Nb 2 Mo"), []),
    "swapped labels": (
        setup("mass 1 92.906\nmass 2 95.95\nlabelmap atom 1 Mo 2 Nb"),
        [f"atom type 2 has label Nb, but pair_coeff says Mo{ORDER}", f"atom type 1 has label Mo, but pair_coeff says Nb{ORDER}"],
    ),
    "label of another element": (
        setup("mass 1 92.906\nmass 2 95.95\nlabelmap atom 1 Nb 2 Fe"), [f"atom type 2 has label Fe, but pair_coeff says Mo{ORDER}"]),
    "other labels": (setup("mass 1 92.906\nmass 2 95.95\nlabelmap atom 1 bulk 2 Mo2"), []),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Case]:
    return run_cases({name: script for name, (script, _) in CASES.items()}, tmp_path_factory.mktemp("types"))


@pytest.mark.parametrize("name", CASES)
def test_types_that_contradict_their_elements_are_told_once(name, results):
    case = results[name]
    assert case.error == ""
    warnings = [
        line.removeprefix("WARNING: Pair style moe: ").rsplit(" (type_check", 1)[0]
        for line in case.warnings()
    ]
    assert warnings == CASES[name][1]


@pytest.mark.parametrize("element", ["H", "O"])
def test_heavy_hydrogen_is_hydrogen(element, packages, tmp_path):
    """Deuterium and tritium are; a mass of 2 is no oxygen."""
    package = packages("E1_moe_all")
    script = setup(
        "mass 1 2.014\nmass 2 3.016", f"{element} {element}", coeff=f"pair_coeff * * {package} {{}}"
    )
    output = succeed(script, tmp_path).output
    assert output.count("but pair_coeff says") == (0 if element == "H" else 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_folders_that_are_not_ascii(ranks, metals, tmp_path):
    """Under LANG=C, as working folder and in LAMMPS_POTENTIALS."""
    folder = tmp_path / "größe Ångström"
    folder.mkdir()
    (folder / "model.moe.pt").write_bytes(metals.read_bytes())
    script = setup("mass * 50", coeff="pair_coeff * * model.moe.pt {}")
    environment = {"LANG": "C", "LC_ALL": "C"}
    assert "model metals10 from model.moe.pt" in succeed(script, folder, ranks=ranks, env=environment).output
    environment["LAMMPS_POTENTIALS"] = str(folder)
    assert (
        "model metals10 from model.moe.pt" in succeed(script, tmp_path, ranks=ranks, env=environment).output
    )


def test_name_that_lammps_alters(metals, tmp_path):
    (tmp_path / "modèle.moe.pt").write_bytes(metals.read_bytes())
    script = setup("mass * 50", coeff="pair_coeff * * modèle.moe.pt {}")
    (case,) = run_cases({"name": script}, tmp_path).values()
    assert (
        "mod?le.moe.pt: no such file, for LAMMPS alters characters of an input that are not ASCII"
        in case.error
    )
    assert "give its folder as LAMMPS_POTENTIALS, start in its folder, or rename it" in case.error
