"""Fixtures that several test files share."""

import os

import pytest

from moecalc import MoECalculator, testing

# Ranks of a test that wait for messages leave the processor to the others: there are often fewer processors than ranks.
os.environ.setdefault("MPIR_CVAR_POLLS_BEFORE_YIELD", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--altered", type=int, default=60, help="how many altered packages to try (test_package_safety.py)"
    )
    parser.addoption("--altered-seed", type=int, default=1, help="seed of the alterations")


@pytest.fixture(scope="session")
def shared_calculator():
    """The default model in float64, loaded once; for tests that only evaluate with it."""
    return MoECalculator(dtype="float64", device="cpu")


@pytest.fixture
def calculator(shared_calculator):
    """The default model in float64, in a calculator of the test's own."""
    return MoECalculator(dtype="float64", device="cpu")


@pytest.fixture(scope="session")
def energies_of(shared_calculator):
    """Energies (eV) of many structures with the default model in float64."""
    return lambda structures: [r["energy"] for r in shared_calculator.calculate_batch(structures, ["energy"])]


@pytest.fixture
def small_bulk():
    """Two atoms in a cell much smaller than the cutoff."""
    return testing.bulk_alloy(repeat=1)
