"""benchmarks/melting.py: a short run, its continuation, and the judgement of bad rows."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "melting.py"


@pytest.fixture
def melting():
    spec = importlib.util.spec_from_file_location("melting", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["melting"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["melting"]


def rows(melting, **changes):
    """Thermo rows of a good run of 10 ps with 108 atoms of the first case."""
    table = np.zeros((101, 7))
    table[:, 0] = np.arange(101) * 100
    table[:, 1], table[:, 2], table[:, 3], table[:, 5] = 108, 3000, -1000, -900
    for column, values in changes.items():
        table[:, {"atoms": 1, "temperature": 2, "energy": 3, "conserved": 5}[column]] = values
    return melting.judge(melting.CASES[0], table, 108).failures


@pytest.mark.slow
def test_run_and_continue(melting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(melting, "THERMO", 10)
    small = dataclasses.replace(melting.CASES[0], repeat=2)
    monkeypatch.setattr(melting, "CASES", (small, melting.CASES[1]))
    for ps in (0.15, 0.3):
        monkeypatch.setattr(
            sys, "argv", ["melting.py", "--ps", str(ps), "--only", "alloy", "--folder", str(tmp_path)]
        )
        melting.main()
    found = melting.thermo(tmp_path / "alloy")
    assert found[:, 0].tolist() == list(range(0, 301, 10))
    assert (found[:, 1] == 16).all()
    assert np.ptp(found[:, 5]) < 16 * 0.005
    assert "read_restart run.restart.end" in (tmp_path / "alloy" / "in.run").read_text()
    assert json.loads((tmp_path / "melting.json").read_text())["runs"][0]["n_atoms"] == 16
    assert "NbMoTaW" in capsys.readouterr().out


def test_a_good_run_passes(melting):
    assert rows(melting) == []


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"atoms": 107}, "atoms were lost"),
        ({"energy": np.nan}, "numbers that are not finite"),
        ({"temperature": 2500}, "temperature"),
        ({"conserved": np.linspace(-900, -898, 101)}, "drift"),
        ({"conserved": np.where(np.arange(101) == 50, -890, -900)}, "conserved energy"),
        ({"energy": np.where(np.arange(101) > 80, -900, -1000)}, "potential energy"),
    ],
)
def test_a_bad_run_is_named(melting, changes, failure):
    assert failure in rows(melting, **changes)


def test_length(melting, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["melting.py", "--ps", "0"])
    with pytest.raises(SystemExit):
        melting.main()
    assert "expected --ps above 0, got 0" in capsys.readouterr().err
