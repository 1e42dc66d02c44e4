"""What users do with a pair style: dynamics, minimisation, Monte Carlo, changes between runs. ASE re-evaluates the frames."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from lammps_runs import METAL_PRESSURE, alloy, from_dump, succeed, write_data
from stages import ENERGY, FORCES, FRAME, METALS, STAGES, START

from moecalc import MoECalculator

SERIAL = {"npt_triclinic", "nvt", "minimize", "box_relax", "displace"}  # several ranks add nothing to these


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_frames_equal_the_calculator(ranks, shared_calculator, tmp_path):
    write_data(tmp_path / "data.alloy", alloy(METALS, (2, 2, 2)), METALS)
    script = START.format(before="", inputs="", temperature=2000)
    stages = {s: STAGES[s] for s in STAGES if ranks == 1 or s not in SERIAL}
    for stage, commands in stages.items():
        script += f"\n{commands}\n" + FRAME.format(stage=stage)
    run = succeed(script, tmp_path, ranks=ranks, limit=250)
    in_time = run.output.split("frame no_skin")[0]  # before the list is renewed rarely
    assert "when the neighbor list was built" not in in_time
    for stage in stages:
        frame = run.dump(f"dump.{stage}")[-1]
        atoms = from_dump(frame, METALS)
        printed = next(line.split() for line in run.output.splitlines() if line.startswith(f"frame {stage} "))
        expected = shared_calculator.calculate_batch([atoms])[0]
        assert int(printed[3]) == len(atoms)
        assert abs(float(printed[2]) - expected["energy"]) <= ENERGY * len(atoms), stage
        assert np.abs(frame.array("fx", "fy", "fz") - expected["forces"]).max() <= FORCES, stage
    if ranks > 1:
        return
    relaxed = run.dump("dump.minimize")[-1].array("fx", "fy", "fz")
    assert np.abs(relaxed).max() < np.abs(run.dump("dump.swap")[-1].array("fx", "fy", "fz")).max() / 3


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_grand_canonical(ranks, shared_calculator, tmp_path):
    """Insertions and deletions; the energy of every frame is that of the atoms that are there."""
    script = """
    units metal
    lattice bcc 3.3
    region box block 0 2 0 2 0 4
    region low block 0 2 0 2 0 2
    create_box 2 box
    create_atoms 1 region low
    mass 1 92.9
    mass 2 6.94
    pair_style moe dtype float64 device cpu
    pair_coeff * * default Nb Li
    group lithium type 2
    fix 1 lithium gcmc 1 8 0 2 29494 6000.0 -9.0 0.1
    thermo_style custom step atoms pe f_1[3] f_1[4] f_1[5] f_1[6]
    thermo_modify format float %.17g
    thermo 1
    dump 1 all custom 1 dump.gcmc id type x y z
    dump_modify 1 format float %.17g
    run 6
    """
    run = succeed(script, tmp_path, ranks=ranks)
    table, frames = run.thermo()[0], run.dump("dump.gcmc")
    assert table[-1, 4] > 0, "no insertion"
    assert table[-1, 6] > 0, "no deletion"
    for row, frame in zip(table, frames, strict=True):
        atoms = from_dump(frame, ["Nb", "Li"])
        assert len(atoms) == row[1]
        energy = shared_calculator.calculate_batch([atoms])[0]["energy"]
        assert abs(row[2] - energy) <= ENERGY * len(atoms)


def test_hidden_atoms_are_absent(shared_calculator, tmp_path):
    """fix gcmc hides an atom by excluding it from all neighbours: nothing of it may stay, also not its isolated energy."""
    atoms = alloy(METALS, (2, 2, 2))
    write_data(tmp_path / "data.alloy", atoms, METALS)
    hide = "group hidden id 2 5\nneigh_modify exclude group hidden all\nrun 0\n"
    script = START.format(before="", inputs="", temperature=300) + hide + FRAME.format(stage="hidden")
    run = succeed(script, tmp_path)
    frame = run.dump("dump.hidden")[0]
    rest = np.array([k for k in range(len(atoms)) if k not in {1, 4}])
    expected = shared_calculator.calculate_batch([atoms[rest]])[0]
    assert float(run.output.split("frame hidden ")[-1].split()[0]) == pytest.approx(
        expected["energy"], abs=1e-8
    )
    forces = frame.array("fx", "fy", "fz")
    assert np.abs(forces[rest] - expected["forces"]).max() < FORCES
    assert np.abs(forces[[1, 4]]).max() == 0


RESTART = """
{start}
fix 1 all nve
{thermo}
run 5
write_restart file.restart
run 10
write_dump all custom dump.long id type x y z vx vy vz modify format float %.17g
clear
read_restart file.restart
{again}
fix 1 all nve
timestep 0.002
run 10
write_dump all custom dump.continued id type x y z vx vy vz modify format float %.17g
info styles pair
"""


@pytest.mark.parametrize(
    ("ranks", "again"),
    [(1, ""), (2, ""), (1, "pair_style moe dtype float64 device cpu\npair_coeff * * default Nb Mo Ta W")],
)
def test_restart_continues(ranks, again, tmp_path):
    """Style, options, file and elements survive; given again, they are accepted."""
    write_data(tmp_path / "data.alloy", alloy(METALS, (2, 2, 2)), METALS)
    start = START.format(before="", inputs="", temperature=1500)
    run = succeed(RESTART.format(start=start, thermo="", again=again), tmp_path, ranks=ranks)
    long, continued = run.dump("dump.long")[0], run.dump("dump.continued")[0]
    for names in (("x", "y", "z"), ("vx", "vy", "vz")):
        assert np.abs(long.array(*names) - continued.array(*names)).max() < 1e-10
    assert run.output.count("float64 on cpu") == 2


def test_rerun(tmp_path):
    write_data(tmp_path / "data.alloy", alloy(METALS, (2, 2, 2)), METALS)
    script = START.format(before="", inputs="", temperature=3000)
    script += """
    thermo 2
    dump 1 all custom 2 dump.run id type x y z
    dump_modify 1 format float %.17g
    fix 1 all nve
    run 6
    undump 1
    unfix 1
    rerun dump.run every 2 dump x y z
    """
    first, second = succeed(script, tmp_path).thermo()
    assert np.abs(first[:, 2] - second[:, 2]).max() < 1e-9
    assert np.ptp(first[:, 2]) > 1e-3


@pytest.mark.slow
def test_energy_is_conserved_while_atoms_migrate(tmp_path):
    """float32 on 4 ranks, hot: total energy against that of the start, and atoms that changed owner."""
    hot = alloy(METALS, (2, 2, 2), amplitude=0.05)
    hot.positions += 0.01  # close to the borders of the ranks
    write_data(tmp_path / "data.alloy", hot, METALS)
    script = START.format(before="processors 1 1 4", inputs="", temperature=6000).replace(
        "float64", "float32"
    )
    script += """
    timestep 0.001
    neigh_modify every 5 delay 0 check no
    dump 1 all custom 20 dump.owners id type proc
    fix 1 all nve
    thermo_style custom step etotal
    thermo 5
    run 120
    """
    run = succeed(script, tmp_path, ranks=4, limit=250)
    energy = run.thermo()[0][:, 1]
    assert (
        np.abs(energy - energy[0]).max() / 16 < 1e-4 * 3
    )  # eV/atom; the integration error of this step oscillates
    slope = np.polyfit(np.arange(len(energy)), energy, 1)[0] * len(energy) / 16
    assert abs(slope) < 1e-4
    frames = run.dump("dump.owners")
    assert (frames[0]["proc"] != frames[-1]["proc"]).any(), "no atom migrated"


def test_pressure_is_minus_the_volume_derivative(tmp_path):
    atoms, width, script = alloy(METALS, (2, 2, 2), shear=0.2), 1e-4, ""
    # the exponential switch of DPA3 ends at about 1e-8, not at 0: no neighbour may cross a cutoff here
    atoms.set_cell(1.0012 * atoms.cell.array, scale_atoms=True)
    for k in (-2, -1, 0, 1, 2):
        scaled = atoms.copy()
        scaled.set_cell(atoms.cell.array * (1 + k * width), scale_atoms=True)
        write_data(tmp_path / f"data.{k}", scaled, METALS)
        script += START.format(before="box tilt large", inputs="", temperature=300).replace("alloy", str(k))
        script += "velocity all set 0 0 0\nrun 0\n"
        script += 'print "result $(pe:%.17g) $(vol:%.17g) $(press:%.17g)"\n'
    rows = np.array(succeed(script, tmp_path).values("result"))
    energy, volume, pressure = rows.T
    weights = (
        np.array([1 / 12, -2 / 3, 0, 2 / 3, -1 / 12]) / width
    )  # derivative with respect to the scale of lengths
    derivative = (weights @ energy) / (weights @ volume)
    assert pressure[2] == pytest.approx(-derivative * METAL_PRESSURE, rel=1e-6)


def test_heat_flux(shared_calculator, tmp_path):
    """compute heat/flux of the centroid virial against the definition, from ASE's numbers."""
    atoms = alloy(METALS, (2, 2, 2))
    write_data(tmp_path / "data.alloy", atoms, METALS)
    script = START.format(before="", inputs="", temperature=1500)
    script += """
    compute ke all ke/atom
    compute pe all pe/atom
    compute c all centroid/stress/atom NULL virial
    compute j all heat/flux ke pe c
    dump 1 all custom 1 dump.flux id type x y z vx vy vz c_ke c_pe c_c[*]
    dump_modify 1 format float %.17g
    thermo_style custom step c_j[1] c_j[2] c_j[3] c_j[4] c_j[5] c_j[6]
    thermo_modify format float %.17g
    run 0
    """
    run = succeed(script, tmp_path, ranks=2)
    flux, frame = run.thermo()[0][0, 1:], run.dump("dump.flux")[0]
    velocity = frame.array("vx", "vy", "vz")
    raw = atom_virials(shared_calculator, from_dump(frame, METALS))
    named = frame.array(*(f"c_c[{k}]" for k in (1, 4, 5, 7, 2, 6, 8, 9, 3))).reshape(-1, 3, 3)
    assert np.abs(-raw * METAL_PRESSURE - named).max() < 1e-6 * np.abs(named).max()
    convected = ((frame["c_ke"] + frame["c_pe"])[:, None] * velocity).sum(axis=0)
    conducted = np.einsum("nab,nb->a", raw, velocity)
    assert np.abs(flux[3:] - convected).max() < 1e-8 * np.abs(convected).max()
    assert np.abs(flux[:3] - convected - conducted).max() < 1e-6 * np.abs(flux).max()


def atom_virials(calculator: MoECalculator, atoms: Atoms) -> np.ndarray:
    """(n, 3, 3) of the native evaluator, eV: first index position, second force."""
    from moecalc._lib import load
    from moecalc.neighbors import SkinNeighborList

    evaluator = load().Evaluator(str(calculator.path), "cpu", "float64")
    types = np.array([calculator.elements.index(s) for s in atoms.symbols])
    pairs, positions = SkinNeighborList(calculator.cutoff, 0.0).pairs(atoms)
    evaluator.set_list(types, pairs.edge_index, pairs.edge_shift, pairs.system_index)
    return evaluator.evaluate(positions, atoms.cell.array[None], atom_virial=True)["atom_virial"]
