"""Package + MoECalculator against the independent codes, for every checkpoint and frame of tests/data/oracle."""

import numpy as np
import pytest
from helpers import DATA, frames

from moecalc import MoECalculator, testing
from moecalc.package import package_checkpoint

FRAMES = frames("oracle/fixtures")
MODELS = sorted({(f.model, f.head) for f in FRAMES}, key=str)


@pytest.fixture(scope="session")
def calculators(tmp_path_factory):
    """Calculators by (model, head), each through a freshly made package."""
    folder = tmp_path_factory.mktemp("oracle")
    cache = {}

    def get(model, head):
        if (model, head) not in cache:
            path = folder / f"{model}-{head}.moe.pt"
            package_checkpoint(DATA / "oracle" / "models" / f"{model}.pt", path, head=head, dtype="float64")
            cache[model, head] = MoECalculator(path, dtype="float64", device="cpu", allow_untrained=True)
        return cache[model, head]

    return get


@pytest.mark.filterwarnings("ignore:.*neighbo")
@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: f"{f.model}-{f.head}-{f.frame}")
def test_calculator_equals_the_independent_code(calculators, frame):
    atoms = frame.atoms.copy()
    atoms.calc = calculators(frame.model, frame.head)
    forces, energy, energies = (
        atoms.get_forces(),
        atoms.get_potential_energy(),
        atoms.get_potential_energies(),
    )
    periodic = atoms.pbc.all()
    if frame.model == "G_float32":
        # the reference itself is rounded: compare relative to the size of each quantity
        assert abs(energy - frame.energy) <= testing.ORACLE_FLOAT32 * max(1.0, abs(frame.energy))
        assert (
            np.abs(energies - frame.energies).max() <= testing.ORACLE_FLOAT32 * np.abs(frame.energies).max()
        )
        assert np.abs(forces - frame.forces).max() <= testing.ORACLE_FLOAT32 * max(
            1.0, np.abs(frame.forces).max()
        )
        tolerance = testing.ORACLE_FLOAT32 * max(1.0, np.abs(frame.virial).max())
    else:
        assert abs(energy - frame.energy) < testing.ORACLE_ENERGY
        assert np.abs(energies - frame.energies).max() < testing.ORACLE_ENERGY
        assert np.abs(forces - frame.forces).max() < testing.ORACLE_FORCES
        tolerance = testing.ORACLE_VIRIAL
    if periodic:
        virial = -atoms.get_stress(voigt=False) * atoms.get_volume()
        assert np.abs(virial - 0.5 * (frame.virial + frame.virial.T)).max() < tolerance
