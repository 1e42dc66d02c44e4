"""The short-range guard in LAMMPS: pair_style hybrid/overlay moe ... zbl ..., beside the same guard in ASE."""

from __future__ import annotations

import numpy as np
import pytest
from lammps_runs import METAL_PRESSURE, alloy, from_dump, succeed, write_data

from moecalc import MoECalculator
from moecalc.zbl import ZBL, guard_radii, guarded, lammps_commands, shortest_distances

METALS = ["Nb", "Mo", "Ta", "W"]
STATIC = """
units metal
{before}
read_data data.alloy
{styles}
thermo_style custom step pe pxx pyy pzz pxy pxz pyz
thermo_modify format float %.17g
fix 1 all nve
run 0
write_dump all custom dump.static id type x y z fx fy fz modify format float %.17g
"""


def compressed(shear: float = 0.02):
    """Volume per atom a quarter of that of the crystal: many pairs lie within the radii."""
    return alloy(METALS, (2, 2, 2), a=2.05, amplitude=0.1, shear=shear)


def stresses(run) -> np.ndarray:
    """Stress (eV/A^3) in ASE's order and sign from the first thermo row."""
    return -run.thermo()[0][0][[2, 3, 4, 7, 6, 5]] / METAL_PRESSURE


def test_zbl_alone_equals_lammps(tmp_path):
    atoms = compressed()
    radii = guard_radii(METALS)
    rotation = write_data(tmp_path / "data.alloy", atoms, METALS)
    lines = lammps_commands(METALS, radii).splitlines()
    style = lines[0].replace("hybrid/overlay moe", "hybrid/overlay")
    run = succeed(STATIC.format(before="", styles="\n".join([style, *lines[2:]])), tmp_path)
    atoms.set_cell(atoms.cell.array @ rotation)
    atoms.positions = atoms.positions @ rotation
    atoms.calc = ZBL(radii)
    forces = run.dump("dump.static")[0].array("fx", "fy", "fz")
    assert np.abs(forces).max() > 10
    assert run.thermo()[0][0, 1] == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    assert np.abs(forces - atoms.get_forces()).max() < 1e-8
    assert np.abs(stresses(run) - atoms.get_stress()).max() < 1e-8


@pytest.mark.filterwarnings("ignore:an atom has:UserWarning")
@pytest.mark.parametrize("ranks", [1, 2])
def test_model_with_guard_equals_ase(ranks, tmp_path):
    atoms = compressed()
    radii = guard_radii(METALS)
    rotation = write_data(tmp_path / "data.alloy", atoms, METALS)
    styles = lammps_commands(METALS, radii, options="dtype float64 device cpu")
    run = succeed(STATIC.format(before="", styles=styles), tmp_path, ranks=ranks)
    atoms.set_cell(atoms.cell.array @ rotation)
    atoms.positions = atoms.positions @ rotation
    atoms.calc = guarded(MoECalculator(dtype="float64", device="cpu"))
    forces = run.dump("dump.static")[0].array("fx", "fy", "fz")
    assert run.thermo()[0][0, 1] == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    assert np.abs(forces - atoms.get_forces()).max() < 1e-8
    assert np.abs(stresses(run) - atoms.get_stress()).max() < 1e-8


def test_bonded_atoms_count_with_special_bonds_one(tmp_path):
    """The weights of special_bonds act on zbl as on any pair style; 1 1 1, which moe asks for, leaves all pairs in."""
    script = """
    units metal
    atom_style molecular
    region box block 0 12 0 12 0 12
    create_box 1 box bond/types 1 extra/bond/per/atom 1 extra/special/per/atom 2
    create_atoms 1 single 3 3 3
    create_atoms 1 single 4.5 3 3
    mass 1 183.84
    bond_style zero
    bond_coeff *
    special_bonds lj/coul 1.0 1.0 1.0
    {styles}
    create_bonds single/bond 1 1 2
    run 0
    print "energy $(pe:%.17g)"
    """
    radii = guard_radii(["W"])
    commands = lammps_commands(["W"], radii, options="dtype float64 device cpu")
    run = succeed(script.format(styles=commands), tmp_path)
    from ase import Atoms

    atoms = Atoms(
        "W2", [[0, 0, 0], [1.5, 0, 0]], calculator=guarded(MoECalculator(dtype="float64", device="cpu"))
    )
    assert run.values("energy")[-1][0] == pytest.approx(atoms.get_potential_energy(), abs=1e-8)


HOT = """
units metal
read_data data.alloy
{styles}
velocity all create {temperature} 4928459 loop geom
timestep 0.001
thermo 10
thermo_style custom step atoms temp pe etotal ecouple econserve
thermo_modify format float %.17g lost error
{commands}
write_dump all custom dump.hot id type x y z fx fy fz modify format float %.17g
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_3000_kelvin(ranks, tmp_path):
    atoms = alloy(METALS, (3, 3, 3), amplitude=0.02)
    write_data(tmp_path / "data.alloy", atoms, METALS)
    commands = "fix 1 all nvt temp 3000 3000 0.1\nrun 300"
    styles = lammps_commands(METALS, guard_radii(METALS))
    run = succeed(
        HOT.format(styles=styles, temperature=6000, commands=commands), tmp_path, ranks=ranks, limit=250
    )
    table = run.thermo()[0]
    assert (table[:, 1] == len(atoms)).all()
    assert np.isfinite(table).all()
    assert 2000 < table[-10:, 2].mean() < 4000
    assert (
        np.abs(table[:, 6] - table[0, 6]).max() / len(atoms) < 0.01
    )  # eV/atom, model and thermostat together
    assert min(shortest_distances([from_dump(run.dump("dump.hot")[-1], METALS)]).values()) > 1.3


@pytest.mark.slow
def test_half_the_volume(tmp_path):
    """Squeezed to half of its volume, relaxed, and let go at 3000 K."""
    atoms = alloy(METALS, (3, 3, 3), amplitude=0.02)
    write_data(tmp_path / "data.alloy", atoms, METALS)
    commands = """
    change_box all x scale 0.7937005 y scale 0.7937005 z scale 0.7937005 remap
    minimize 0 0.1 50 100
    velocity all create 3000 991 loop geom
    reset_timestep 0
    fix 1 all nve
    run 200
    """
    styles = lammps_commands(METALS, guard_radii(METALS))
    run = succeed(HOT.format(styles=styles, temperature=300, commands=commands), tmp_path, limit=250)
    relaxation, table = run.thermo()
    assert relaxation[-1, 3] < relaxation[0, 3]
    assert (table[:, 1] == len(atoms)).all()
    assert np.isfinite(table).all()
    assert np.abs(table[:, 4] - table[0, 4]).max() / len(atoms) < 0.01
    assert min(shortest_distances([from_dump(run.dump("dump.hot")[-1], METALS)]).values()) > 1.3
