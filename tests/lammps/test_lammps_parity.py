"""LAMMPS gives what the ASE calculator gives, on any number of ranks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
from ase import Atoms
from ase.build import bcc100, bulk
from helpers import DATA
from lammps_runs import METAL_PRESSURE, alloy, succeed, write_data

from moecalc import MoECalculator

METALS = ["Nb", "Mo", "Ta", "W"]
RELATIVE = 1e-9  # float64
FORCES_FLOAT32 = 2e-5  # eV/A


@dataclass
class Case:
    """A structure, the model to evaluate it with, and how LAMMPS is to set it up."""

    name: str
    atoms: Atoms
    package: str
    elements: list[str]
    dtype: str = "float64"
    boundary: str = "p p p"
    bounds: np.ndarray | None = None
    replicate: str = ""
    grids: dict[int, list[str]] = field(default_factory=dict)  # `processors` arguments by number of ranks

    @property
    def whole(self) -> Atoms:
        return self.atoms.repeat([int(n) for n in self.replicate.split()]) if self.replicate else self.atoms


def oracle(name: str, frame: str, folder: str = "oracle/fixtures") -> Case:
    data = np.load(DATA / folder / f"{name}__{frame}.npz")
    atoms = Atoms(data["symbols"], data["positions"], cell=data["cell"], pbc=data["pbc"])
    if name != "G_float32":  # whose reference is rounded: compared with the calculator only
        atoms.info["energy"], atoms.info["forces"] = float(data["energy"]), data["forces"]
    return Case(f"{name} {frame}", atoms, name, sorted(set(atoms.symbols)), dtype="float64")


def slab() -> Case:
    """The atoms are all in the lowest part of the box: of 4 ranks along z, some own none."""
    atoms = bcc100("Nb", (4, 4, 3), a=3.3, periodic=True)
    rng = np.random.default_rng(3)
    atoms.symbols[:] = rng.choice(METALS, len(atoms))
    atoms.positions += rng.uniform(-0.1, 0.1, (len(atoms), 3)) - [0, 0, atoms.positions[:, 2].min() - 0.5]
    atoms.set_cell([*atoms.cell.lengths()[:2], 60.0])
    atoms.pbc = True
    return Case("slab", atoms, "default", METALS, grids={2: ["1 1 2"], 4: ["1 1 4", "2 1 2"]})


def cluster() -> Case:
    atoms = bulk("W", "bcc", a=3.2, cubic=True) * (2, 2, 2)
    rng = np.random.default_rng(4)
    atoms.symbols[:] = rng.choice(METALS, len(atoms))
    atoms.positions += rng.uniform(-0.1, 0.1, (len(atoms), 3))
    atoms.pbc = False
    atoms.cell = None
    bounds = np.array([[-1.0, 20.0]] * 3)
    return Case("cluster", atoms, "default", METALS, boundary="f s m", bounds=bounds)


def cases() -> list[Case]:
    primitive = bulk("W", "bcc", a=3.2) * (2, 1, 1)
    primitive.symbols[:] = ["Mo", "W"]
    primitive.positions[1] += [0.1, 0.05, -0.08]
    big = alloy(METALS, (4, 4, 4), shear=0.15)
    periodic = sorted(p.stem for p in (DATA / "oracle/fixtures").glob("[!HJ]*__tri*.npz"))
    return [
        *(oracle(*stem.split("__")) for stem in periodic),
        oracle("econf", "tri20", "deepmd"),  # routed by composition: needs a sum over the ranks
        oracle("exclude", "tri13", "deepmd"),  # some pairs of elements make no edge
        oracle("l1", "tri13", "deepmd"),  # one layer: no exchange
        oracle("seq", "tri13", "deepmd"),  # not covered by the fused kernels: the plain backend
        Case("alloy", big, "default", METALS, grids={4: ["4 1 1", "1 2 2"], 2: ["1 2 1"], 3: ["1 1 3"]}),
        Case("alloy32", big, "default", METALS, dtype="float32"),
        slab(),
        cluster(),
        Case("two atoms", primitive, "default", METALS, replicate="2 3 3"),
        Case("two atoms alone", primitive, "default", METALS),
    ]


def odd_cases() -> list[Case]:
    """Those where a rank in the middle, or one without atoms, makes a difference; the others run on 1, 2 and 4 ranks."""
    return [case for case in cases() if case.package == "default" or case.name == "econf tri20"]


SCRIPT = """
clear
units metal
processors {grid}
boundary {boundary}
box tilt large
read_data {data}
{replicate}
pair_style moe dtype {dtype} device cpu untrained yes
pair_coeff * * {package} {elements}
compute e all pe/atom
compute s all stress/atom NULL virial
compute c all centroid/stress/atom NULL virial
compute sum all reduce sum c_c[*] c_s[*] c_e
dump d all custom 1 {dump} id type x y z fx fy fz c_e c_s[*] c_c[*]
dump_modify d format float %.17g
thermo_style custom step pe press c_sum[*]
run 0
variable v equal vol
print "result $(pe:%.17g) $(v_v:%.17g) $(pxx:%.17g) $(pyy:%.17g) $(pzz:%.17g) $(pxy:%.17g) $(pxz:%.17g) $(pyz:%.17g)"
print "sums $(c_sum[1]:%.17g) $(c_sum[2]:%.17g) $(c_sum[3]:%.17g) $(c_sum[4]:%.17g) $(c_sum[5]:%.17g) $(c_sum[6]:%.17g) &
$(c_sum[7]:%.17g) $(c_sum[8]:%.17g) $(c_sum[9]:%.17g) $(c_sum[10]:%.17g) $(c_sum[11]:%.17g) $(c_sum[12]:%.17g) &
$(c_sum[13]:%.17g) $(c_sum[14]:%.17g) $(c_sum[15]:%.17g) $(c_sum[16]:%.17g)"
"""


@pytest.fixture(scope="module")
def expected(packages, metals):
    """Answers of the ASE calculator, by the name of the case."""
    answers = {}
    for case in cases():
        path = metals if case.package == "default" else packages(case.package)
        atoms = case.whole.copy()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*evaluated by the plain backend")
            calculator = MoECalculator(path, dtype="float64", device="cpu", check=False, allow_untrained=True)
        atoms.calc = calculator
        answers[case.name] = (
            atoms.get_potential_energy(),
            atoms.get_potential_energies(),
            atoms.get_forces(),
        )
        if atoms.pbc.all():
            answers[case.name] += (-atoms.get_stress(voigt=False) * atoms.get_volume(),)
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_the_calculator(ranks, packages, metals, expected, tmp_path):
    script, done = "", []
    for case in cases() if ranks != 3 else odd_cases():
        data = tmp_path / f"data.{case.name.replace(' ', '_')}"
        rotation = write_data(data, case.atoms, case.elements, case.bounds)
        path = "default" if case.package == "default" else packages(case.package)
        for grid in case.grids.get(ranks, ["* * *"]):
            dump = f"dump.{len(done)}"
            replicate = f"replicate {case.replicate}" if case.replicate else ""
            script += SCRIPT.format(
                grid=grid, boundary=case.boundary, data=data, dtype=case.dtype, package=path,
                elements=" ".join(case.elements), dump=dump, replicate=replicate,
            )  # fmt: skip
            done.append((case, rotation, dump))
    run = succeed(script, tmp_path, ranks=ranks, limit=300)
    results, sums = run.values("result"), run.values("sums")
    assert len(results) == len(sums) == len(done)
    for (case, rotation, dump), result, total in zip(done, results, sums, strict=True):
        energy, energies, forces, *virial = expected[case.name]
        frame = run.dump(dump)[0]
        found = frame.array("fx", "fy", "fz") @ rotation.T
        if case.replicate:  # replicas are numbered in another order
            forces = forces[_match(frame, case, rotation)]
            energies = energies[_match(frame, case, rotation)]
        scale = np.abs(forces).max()
        close = RELATIVE if case.dtype == "float64" else 1e-6
        assert result[0] == pytest.approx(energy, rel=close), case.name
        tolerance = RELATIVE * max(scale, 1.0) if case.dtype == "float64" else FORCES_FLOAT32
        assert np.abs(found - forces).max() <= tolerance, case.name
        assert np.abs(frame["c_e"] - energies).max() <= close * np.abs(energies).max(), case.name
        if virial:
            pressure = rotation.T @ virial[0] @ rotation / result[1] * METAL_PRESSURE
            voigt = pressure[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
            assert np.abs(result[2:] - voigt).max() <= 1e-8 * np.abs(voigt).max() + (
                0 if case.dtype == "float64" else 30
            ), case.name
        # Sums of the per-atom virials are the global one, and the sum of all atoms' energies is the energy.
        trace = -result[2:] * result[1]
        size = np.abs(trace).max()
        symmetric = 0.5 * (total[[3, 4, 5]] + total[[6, 7, 8]])
        assert np.abs(total[:3] - trace[:3]).max() <= RELATIVE * size, case.name
        assert np.abs(symmetric - trace[3:]).max() <= RELATIVE * size, case.name
        assert np.abs(total[9:15] - trace).max() <= RELATIVE * size, case.name
        assert total[15] == pytest.approx(result[0], rel=1e-10)
        if "energy" in case.atoms.info:  # the code that the checkpoint was trained with
            assert result[0] == pytest.approx(case.atoms.info["energy"], rel=RELATIVE)
            assert np.abs(found - case.atoms.info["forces"]).max() <= 1e-8
    empty = [line for line in run.output.splitlines() if line.startswith("Nlocal")]
    if ranks == 4:
        assert any(" 0 min" in line for line in empty), "no rank without atoms"


def _match(frame, case: Case, rotation: np.ndarray) -> np.ndarray:
    """For each atom of a dump, its index in the repeated structure."""
    scaled = case.whole.cell.scaled_positions(frame.array("x", "y", "z") @ rotation.T)
    difference = scaled[:, None, :] - case.whole.get_scaled_positions()[None, :, :]
    difference -= np.round(difference)
    distance = np.abs(difference).max(axis=2)
    assert distance.min(axis=1).max() < 1e-9
    return distance.argmin(axis=1)
