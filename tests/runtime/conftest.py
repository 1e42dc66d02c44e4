"""Fixtures of the tests of evaluators."""

import pytest
from evaluators import ELEMENTS

from moecalc import testing
from moecalc.package.lower import lower
from moecalc.package.write import write_bare


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Write a random potential as a package, without the verification; cached by options."""
    folder = tmp_path_factory.mktemp("fused")
    cache = {}

    def run(**kwargs):
        key = repr(sorted(kwargs.items()))
        if key not in cache:
            config = testing.random_config(ELEMENTS, **kwargs)
            low, _ = lower(testing.random_potential(config), config)
            cache[key] = folder / f"{len(cache)}.moe.pt"
            write_bare(cache[key], low)
        return cache[key]

    return run
