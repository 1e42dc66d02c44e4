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
