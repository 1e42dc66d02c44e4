"""Package + MoECalculator against the independent codes, for every checkpoint and frame of tests/data/oracle."""

import numpy as np
import pytest
import torch
from helpers import DATA, evaluate_atoms, frames

from moecalc import MoECalculator, testing
from moecalc.conditions import resolve
from moecalc.package import package_checkpoint
from moecalc.package.importers import build_model, load_checkpoint

CONDITIONAL = frames("oracle/fixtures", conditional=True)
# one package each, fixed at the values of these frames
FIXED = [f for f in CONDITIONAL if f.frame.rpartition("_")[2] in {"f", "q-2m3", "x"}]
FRAMES = frames("oracle/fixtures") + FIXED
MODELS = sorted({(f.model, f.head) for f in FRAMES}, key=str)


@pytest.fixture(scope="session")
def calculators(tmp_path_factory):
    """Calculators of frames by (model, head), each through a freshly made package."""
    folder = tmp_path_factory.mktemp("oracle")
    cache = {}

    def get(frame, backend):
        model, head = frame.model, frame.head
        path = folder / f"{model}-{head}.moe.pt"
        if not path.exists():
            checkpoint = DATA / "oracle" / "models" / f"{model}.pt"
            package_checkpoint(checkpoint, path, head=head, dtype="float64", **frame.given)
        if (path, backend) not in cache:
            cache[path, backend] = MoECalculator(
                path, dtype="float64", device="cpu", allow_untrained=True, backend=backend
            )
        return cache[path, backend]

    return get


@pytest.mark.filterwarnings("ignore:.*neighbo", "ignore:.*evaluated by the plain backend")
@pytest.mark.parametrize("backend", [None, "plain"])
@pytest.mark.parametrize("frame", FRAMES, ids=lambda f: f"{f.model}-{f.head}-{f.frame}")
def test_calculator_equals_the_independent_code(calculators, frame, backend):
    atoms = frame.atoms.copy()
    atoms.calc = calculators(frame, backend)
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


@pytest.fixture(scope="session")
def models():
    """Plain models by (model, head), and what they take."""
    cache = {}

    def get(model, head):
        if (model, head) not in cache:
            found = load_checkpoint(DATA / "oracle" / "models" / f"{model}.pt", head)
            cache[model, head] = build_model(found, torch.float64), found.config.conditions()
        return cache[model, head]

    return get


@pytest.mark.parametrize("frame", CONDITIONAL, ids=lambda f: f"{f.model}-{f.head}-{f.frame}")
def test_plain_model_with_conditions_equals_the_independent_code(models, frame):
    model, taken = models(frame.model, frame.head)
    out = evaluate_atoms(model, frame.atoms, resolve(taken, **frame.given))
    assert abs(float(out.energy) - frame.energy) < 1e-11
    assert np.abs(out.forces.numpy() - frame.forces).max() < 1e-11
    assert np.abs(out.virial[0].numpy() - frame.virial).max() < 1e-11
