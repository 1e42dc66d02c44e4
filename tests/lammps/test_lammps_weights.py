"""Elements that first occur in the middle of a run: their weights are laid out then."""

import numpy as np
import pytest
from lammps_runs import alloy, from_dump, succeed, write_data

from moecalc import MoECalculator, keys, testing

ELEMENTS = ["H", "O", "Al", "Fe", "Nb", "Mo", "W", "Au"]

SCRIPT = """
units metal
read_data data.alloy
pair_style moe dtype float64 device cpu
pair_coeff * * universal.moe.pt W Nb Au
variable e equal pe
thermo_style custom step pe
run 0
set atom 3 type 3
run 0
print "energy $(pe:%.17g)"
write_dump all custom dump.changed id type x y z fx fy fz modify format float %.17g
"""


@pytest.mark.parametrize("backend", ["fused", "cuda-emulation"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_element_that_appears_in_a_run(ranks, backend, tmp_path):
    package = tmp_path / "universal.moe.pt"
    config = testing.random_config(ELEMENTS, n_routed=40, top_k=4)
    testing.write_random_package(package, config, "float64")
    write_data(tmp_path / "data.alloy", alloy(["W", "Nb"], (2, 2, 2)), ["W", "Nb", "Au"])
    run = succeed(SCRIPT, tmp_path, ranks=ranks, env={"MOECALC_BACKEND": backend})
    (frame,) = run.dump("dump.changed")
    atoms = from_dump(frame, ["W", "Nb", "Au"])
    assert atoms.symbols[2] == "Au"
    expected = MoECalculator(package, device="cpu", check=False).calculate_batch([atoms])[0]
    assert abs(run.values("energy")[0][0] - expected[keys.ENERGY]) <= testing.SAME_MODEL * len(atoms) * 100
    assert np.abs(frame.array("fx", "fy", "fz") - expected[keys.FORCES]).max() <= testing.ROUNDING


EXCHANGE = """
units metal
read_data data.alloy
pair_style moe dtype float64 device cpu
pair_coeff * * universal.moe.pt W Nb Au H
group host type 1 2
group hydrogen type 4
thermo_style custom step atoms pe
thermo_modify norm no format float %.17g
thermo 1
{fix}
run 0
dump 1 all custom 1 dump.run id type x y z
dump_modify 1 format float %.17g
run 4
"""

FIXES = {
    "gcmc": "fix 1 hydrogen gcmc 1 6 0 4 29494 90000.0 8.0 0.1 group all overlap_cutoff 0.9",
    "swap": "set atom 1 type 3\nfix 1 all atom/swap 1 6 29494 90000.0 ke no types 1 3",
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fused", "cuda-emulation"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fix", FIXES)
def test_exchanges_with_an_element_that_was_not_there(fix, ranks, backend, tmp_path):
    """Every energy of the run is that of a fresh evaluation of the atoms that are there."""
    package = tmp_path / "universal.moe.pt"
    config = testing.random_config(ELEMENTS, n_routed=40, top_k=4)
    testing.write_random_package(package, config, "float64")
    types = ["W", "Nb", "Au", "H"]
    write_data(tmp_path / "data.alloy", alloy(["W", "Nb"], (2, 2, 2)), types)
    script = EXCHANGE.format(fix=FIXES[fix])
    run = succeed(script, tmp_path, ranks=ranks, env={"MOECALC_BACKEND": backend})
    rows, frames = run.thermo()[1], run.dump("dump.run")
    structures = [from_dump(frame, types) for frame in frames]
    new = "H" if fix == "gcmc" else "Au"
    assert new in structures[-1].symbols
    assert len({str(s.symbols) for s in structures}) > 1, "nothing was exchanged"
    expected = MoECalculator(package, device="cpu", check=False).calculate_batch(structures)
    for row, result, atoms in zip(rows, expected, structures, strict=True):
        assert row[1] == len(atoms)
        assert abs(row[2] - result[keys.ENERGY]) <= testing.SAME_MODEL * len(atoms) * 100
