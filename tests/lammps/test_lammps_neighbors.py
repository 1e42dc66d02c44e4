"""Whatever takes atoms or pairs out of LAMMPS' neighbour list: the energy of the model is right, or the run is refused."""

from __future__ import annotations

import pytest
from ase import Atoms
from lammps_cases import Case, run_cases
from lammps_runs import lmp, succeed

POSITIONS = [[3.0, 3.0, 3.0], [3.0, 3.0, 5.5], [3.0, 5.2, 4.0]]

MOLECULE = """three atoms

3 atoms
2 bonds

Coords

1 3.0 3.0 3.0
2 3.0 3.0 5.5
3 3.0 5.2 4.0

Types

1 1
2 1
3 1

Bonds

1 1 1 2
2 1 2 3

Special Bond Counts

1 1 1 0
2 2 0 0
3 1 1 0

Special Bonds

1 2 3
2 1 3
3 2 1
"""

LOOSE = MOLECULE.split("Bonds", maxsplit=1)[0].replace(
    "2 bonds\n", ""
)  # no bonds: a molecule for fix deposit

# box: what create_box takes; atoms: how they come
START = """
units metal
{before}
atom_style {style}
region b block 0 14 0 14 0 14
create_box 2 b {box}
{atoms}
mass * 183.84
{bonds}
pair_style {pair}
{coeff}
"""
ATOMS = "".join("create_atoms 1 single {} {} {}\n".format(*x) for x in POSITIONS)
BOX = "bond/types 1 extra/bond/per/atom 4 extra/special/per/atom 8"
BONDS = "bond_style zero nocoeff\nbond_coeff *"
MOE = "moe dtype float64 device cpu"
COEFF = "pair_coeff * * default W W"
TWO_BONDS = "create_bonds single/bond 1 1 2\ncreate_bonds single/bond 1 1 3\n"


def atomic(lines: str, style: str = "atomic", **words: str) -> str:
    """Three atoms without bonds."""
    values = {"before": "", "box": "", "atoms": ATOMS, "bonds": "", "pair": MOE, "coeff": COEFF} | words
    return START.format(style=style, **values) + lines


def bonded(lines: str, style: str = "bond", **words: str) -> str:
    """Three atoms in a box with a bond type."""
    return atomic(lines, style, **({"box": BOX, "bonds": BONDS} | words))


def template(lines: str) -> str:
    return atomic(
        lines, "template three", before="molecule three molecule.txt", box="bond/types 1", bonds=BONDS,
        atoms="create_atoms 0 single 3 3 3 mol three 1 rotate 0 0 0 1",
    )  # fmt: skip


RUN = "run 0\n"
ONES = "special_bonds lj/coul 1.0 1.0 1.0\n"
HYBRID = {
    "pair": f"hybrid {MOE} lj/cut 5.0",
    "coeff": "pair_coeff * * moe default W NULL\npair_coeff 2 2 lj/cut 0.1 2.0\npair_coeff 1 2 lj/cut 0.0 2.0",
}

RIGHT = {
    "atomic": atomic(RUN),
    "full_without_bonds": atomic(RUN, "full"),
    "bonds_with_ones": bonded(TWO_BONDS + ONES + RUN),
    "bonds_with_fractions": bonded(TWO_BONDS + "special_bonds lj/coul 0.3 0.5 0.7\n" + RUN),
    "bonds_with_one_of_both": bonded(TWO_BONDS + "special_bonds lj 0 0 0 coul 1e-9 1e-9 1e-9\n" + RUN),
    "bonds_with_dihedral_yes": bonded(
        TWO_BONDS + "special_bonds lj/coul 1 1 1 angle yes dihedral yes\n" + RUN, "full"
    ),
    "bonds_listed_for_kspace": bonded(
        f"kspace_style ewald 1e-4\nset type 1 charge 0\nkspace_modify gewald 0.3\n{TWO_BONDS}{RUN}", "full",
        pair=f"hybrid/overlay {MOE} coul/long 6.0", coeff="pair_coeff * * moe default W W\npair_coeff * * coul/long",
    ),
    "bonds_created_later": bonded(ONES + RUN + TWO_BONDS + "run 1 pre no\n"),
    "bonds_created_by_a_fix": bonded(ONES + "fix 1 all bond/create 1 1 1 2.55 1\nrun 3\n"),
    "bonds_deleted": bonded(TWO_BONDS + ONES + RUN + "delete_bonds all bond 1 remove special\n" + RUN),
    "template": template(ONES + RUN),
    "first_group": atomic("group g id 2 3\natom_modify first g\n" + RUN, before="atom_modify map yes"),
    "short_ghosts": atomic("comm_modify cutoff 1.0\n" + RUN),
    "multi": atomic("neighbor 1.0 multi\ncomm_modify mode multi cutoff/multi 1 2.0\n" + RUN),
    "exclusions_undone": atomic("neigh_modify exclude type 1 1\nneigh_modify exclude none\n" + RUN),
    "exclude_unseen_types": atomic("neigh_modify exclude type 2 2\nneigh_modify exclude type 1 2\n" + RUN, **HYBRID),
    "exclude_empty_group": atomic("group g type 2\nneigh_modify exclude group g g\n" + RUN),
    "newton_on_off": atomic(RUN, before="newton on off"),
}  # fmt: skip

BONDED = "Use `special_bonds lj/coul 1.0 1.0 1.0`"
NO_SUM = "the model's energy is no sum over pairs"
REFUSED = {
    "default_weights": (bonded(TWO_BONDS + RUN), BONDED),
    "default_weights_full": (bonded(TWO_BONDS + RUN, "full"), "got special_bonds lj 0 0 0 coul 0 0 0 with atom_style full"),
    "first_weight": (bonded(TWO_BONDS + "special_bonds lj/coul 0 1 1\n" + RUN), "special_bonds lj 0 1 1 coul 0 1 1"),
    "last_weight": (bonded(TWO_BONDS + "special_bonds lj/coul 1 1 0\n" + RUN), "special_bonds lj 1 1 0 coul 1 1 0"),
    "no_bonds_yet": (bonded(RUN + TWO_BONDS + "run 1 pre no\n"), BONDED),
    "bond_create": (bonded("fix 1 all bond/create 1 1 1 2.55 1\nrun 2\n"), BONDED),
    "bond_react": (
        bonded("molecule three molecule.txt\nfix 1 all bond/react react r all 1 0.0 2.0 three three map.txt\n" + RUN,
               "molecular"), BONDED),
    "deposit_molecules": (
        atomic("region top block 0 14 0 14 10 13\nfix 1 all deposit 1 0 1 991 region top mol loose near 1.0\n" + RUN,
               "molecular", before="molecule loose loose.txt"), BONDED),
    "template": (template(RUN), BONDED),
    "hybrid_style": (bonded(TWO_BONDS + RUN, "hybrid charge bond"), BONDED),
    "changed_between_runs": (bonded(TWO_BONDS + ONES + RUN + "special_bonds lj/coul 0 1 1\n" + RUN), BONDED),
    "restart": (
        bonded(TWO_BONDS + ONES + RUN + "special_bonds lj/coul 0 1 1\nwrite_restart r\nclear\nread_restart r\n" + RUN), BONDED),
    "hybrid": (
        bonded(TWO_BONDS + RUN, pair=f"hybrid/overlay {MOE} zero 6.0", coeff="pair_coeff * * moe default W W\npair_coeff * * zero"), BONDED),
    "ghost_group": (
        atomic("group g id 1\natom_modify first g\ncomm_modify group g\n" + RUN, before="atom_modify map yes"),
        "expected all atoms as ghosts, got comm_modify group g"),
    "include": (
        atomic("group g id 1\natom_modify first g\nneigh_modify include g\n" + RUN, before="atom_modify map yes"),
        "expected all atoms in the neighbor list, got neigh_modify include g: use `neigh_modify include all`"),
    "include_without_init": (
        atomic("group g id 1\natom_modify first g\n" + RUN + "neigh_modify include g\nrun 1 pre no\n", before="atom_modify map yes"),
        "got neigh_modify include g"),
    "exclude_type": (atomic("neigh_modify exclude type 1 1\n" + RUN), f"got neigh_modify exclude type 1 1: {NO_SUM}"),
    "exclude_absent_type": (atomic("neigh_modify exclude type 2 1\n" + RUN), "got neigh_modify exclude type 2 1"),
    "exclude_group": (
        atomic("group g id 2 3\nneigh_modify exclude group g g\n" + RUN),
        (f"got neigh_modify exclude group g g: {NO_SUM}, so a pair that is left out changes the others as well: use "
        "`neigh_modify exclude none`")),
    "exclude_two_groups": (
        atomic("group g id 2\ngroup h id 3\nneigh_modify exclude group g h\n" + RUN), "got neigh_modify exclude group g h"),
    "exclude_group_without_init": (
        atomic("group g id 2 3\n" + RUN + "neigh_modify exclude group g g\nrun 1 pre no\n"), "got neigh_modify exclude group g g"),
    "exclude_molecule_intra": (
        atomic("set atom * mol 1\nneigh_modify exclude molecule/intra all\n" + RUN, "full"),
        "got neigh_modify exclude molecule/intra all"),
    "exclude_molecule_inter": (
        atomic("set atom * mol 1\nneigh_modify exclude molecule/inter all\n" + RUN, "full"),
        "got neigh_modify exclude molecule/inter all"),
    "pair_of_another_style": (
        atomic(RUN, pair=f"hybrid {MOE} lj/cut 5.0", coeff="pair_coeff * * moe default W W\npair_coeff 1 2 lj/cut 0.1 2.0"),
        "got a pair_coeff that takes types 1 2 from it"),
    "pair_of_no_style": (
        atomic(RUN, pair=f"hybrid {MOE} lj/cut 5.0", coeff="pair_coeff * * moe default W W\npair_coeff 2 2 lj/cut 0.1 2.0\npair_coeff 1 2 none"),
        "got a pair_coeff that takes types 1 2 from it",
    ),
    "type_of_another_style": (
        atomic(RUN, pair=f"hybrid {MOE} lj/cut 5.0",
               coeff="pair_coeff * * moe default W W\npair_coeff 1*2 2 lj/cut 0.1 2.0"),
        "use NULL for a type that another style describes"),
}  # fmt: skip

BOND_MAP = """map

3 equivalences

InitiatorIDs

1
2

Equivalences

1 1
2 2
3 3
"""


def _write_inputs(folder) -> None:
    (folder / "molecule.txt").write_text(MOLECULE)
    (folder / "loose.txt").write_text(LOOSE)
    (folder / "map.txt").write_text(BOND_MAP)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("cases")
    _write_inputs(folder)
    scripts = {f"right {name}": script for name, script in RIGHT.items()}
    scripts |= {f"refused {name}": script for name, (script, _) in REFUSED.items()}
    return run_cases(scripts, folder)


@pytest.fixture(scope="module")
def energy(shared_calculator) -> float:
    atoms = Atoms("W3", POSITIONS, cell=[14] * 3, pbc=True)
    return float(shared_calculator.calculate_batch([atoms])[0]["energy"])


@pytest.mark.parametrize("name", RIGHT)
def test_all_pairs_count(name, results, energy):
    case = results[f"right {name}"]
    assert case.error == ""
    assert case.energy == pytest.approx(energy, abs=1e-8)
    assert case.warnings() == []


@pytest.mark.parametrize("name", REFUSED)
def test_hidden_pairs_are_refused(name, results):
    case = results[f"refused {name}"]
    assert REFUSED[name][1] in case.error
    assert case.error.startswith("ERROR: Pair style moe: expected")


@pytest.mark.parametrize("name", ["bond_create", "template", "ghost_group", "exclude_group"])
def test_hidden_pairs_are_refused_on_two_ranks(name, tmp_path):
    _write_inputs(tmp_path)
    script, message = REFUSED[name]
    run = lmp(script, tmp_path, ranks=2)
    assert run.code not in {0, -9, -11}
    assert message in run.error()


@pytest.mark.parametrize("name", ["bonds_created_by_a_fix", "multi"])
def test_all_pairs_count_on_two_ranks(name, energy, tmp_path):
    run = succeed(RIGHT[name] + 'print "result $(pe:%.17g)"\n', tmp_path, ranks=2)
    assert run.values("result")[0][0] == pytest.approx(energy, abs=1e-8)


# --- lists that are too old ---------------------------------------------------------------------------

FLIGHT = """
neighbor 0.5 bin
{modify}
velocity all set 0 0 0
group flying id 3
velocity flying set 0 20 0
fix 1 all nve
timestep 0.005
run 8
run 2
"""
LISTS = {
    "default": "",
    "rarely but soon enough": "neigh_modify every 2 delay 0 check no",
    "once": "neigh_modify once yes",
    "rarely": "neigh_modify every 100 delay 100 check no",
}


@pytest.fixture(scope="module")
def flights(tmp_path_factory) -> dict[str, Case]:
    scripts = {name: atomic(FLIGHT.format(modify=modify)) for name, modify in LISTS.items()}
    return run_cases(scripts, tmp_path_factory.mktemp("flights"))


@pytest.mark.parametrize("name", LISTS)
def test_lists_that_are_too_old_are_told_once_per_run(name, flights):
    case = flights[name]
    assert case.error == ""
    expected = 1 if name in {"once", "rarely"} else 0
    assert len(case.warnings()) == expected
    if expected:
        assert (
            "at step 3 an atom is 0.326 A from where it was when the neighbor list was built"
            in case.warnings()[0]
        )
        assert "more than half of the skin of 0.5 A" in case.warnings()[0]
        assert "`neigh_modify every 1 delay 0 check yes once no`" in case.warnings()[0]
