"""Drive LAMMPS from Python and compare it with ASE: no environment variable is needed.

python driver.py
"""

import numpy as np
from ase import Atoms

from moecalc import MoECalculator
from moecalc.lammps import lammps

SETUP = """
units metal
lattice bcc 3.24
region box block 0 2 0 2 0 2
create_box 2 box
create_atoms 1 box
set type 1 type/ratio 2 0.5 29381
mass 1 92.906
mass 2 180.948
pair_style moe dtype float64 device cpu
pair_coeff * * default Nb Ta
velocity all create 1200 4928459 loop geom
fix 1 all nve
timestep 0.002
thermo 10
run 20
"""


def main() -> None:
    """Twenty steps in LAMMPS; then the last frame in both."""
    engine = lammps(cmdargs=["-log", "none", "-screen", "none"])
    engine.commands_string(SETUP)

    energy = engine.get_thermo("pe")
    low, high = engine.extract_box()[:2]
    owned = slice(engine.extract_setting("nlocal"))  # the rest are periodic images
    types = engine.numpy.extract_atom("type")[owned]
    positions = engine.numpy.extract_atom("x")[owned].copy()
    forces = engine.numpy.extract_atom("f")[owned].copy()

    atoms = Atoms([("Nb", "Ta")[t - 1] for t in types], positions, cell=np.subtract(high, low), pbc=True)
    atoms.calc = MoECalculator(dtype="float64", device="cpu")
    print(f"energy in LAMMPS {energy:.8f} eV, in ASE {atoms.get_potential_energy():.8f} eV")
    print(f"largest difference of forces {np.abs(forces - atoms.get_forces()).max():.1e} eV/A")
    engine.close()


if __name__ == "__main__":
    main()
