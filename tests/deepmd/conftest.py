"""Tests that need DeePMD-kit: skipped, with the reason, where it cannot be imported."""

import warnings

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write


def _why_not():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import deepmd.pt  # noqa: F401
        except Exception as error:  # noqa: BLE001 # a missing CUDA runtime is an error of the dynamic linker
            return f"deepmd-kit cannot be imported ({type(error).__name__}: {error}): make test-deepmd"
    return None


_REASON = _why_not()


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/deepmd" in item.path.as_posix():
            item.add_marker(pytest.mark.deepmd)
            # DeePMD-kit and what it imports have warnings of their own
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            if _REASON is not None:
                item.add_marker(pytest.mark.skip(reason=_REASON))


@pytest.fixture(autouse=True)
def _plain_activations(monkeypatch):
    """No compilation, which would take longer than the tests; one test of its own compiles."""
    monkeypatch.setenv("MOECALC_COMPILE", "0")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A folder with a small converted data set in `data`."""
    from training_models import random_frames

    from moecalc.data.convert import convert

    folder = tmp_path_factory.mktemp("training")
    random = np.random.default_rng(5)
    frames = random_frames(12, sizes=(5, 9))
    for atoms in frames:
        forces = random.normal(size=(len(atoms), 3))
        stress = random.normal(scale=0.01, size=6)
        atoms.calc = SinglePointCalculator(
            atoms, energy=-3.0 * len(atoms) + random.normal(), forces=forces, stress=stress
        )
    write(folder / "frames.extxyz", frames)
    convert(folder / "frames.extxyz", folder / "data", validation=0.2)
    return folder
