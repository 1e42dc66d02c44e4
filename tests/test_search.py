"""benchmarks/search.py on a few frames and steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "search.py"


def test_variants_are_trained_packaged_and_tabulated(tmp_path: Path) -> None:
    frames = []
    for k in range(4):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=k)
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info["dataset"] = "mlearn_Cu"
        frames.append(atoms)
    write(tmp_path / "frames.extxyz", frames)
    command = [sys.executable, str(SCRIPT), "frames.extxyz", "--steps", "1", "--only", "dense", "--only"]
    for _ in range(2):  # the second time, what is finished is read
        done = subprocess.run(
            [*command, "MoLE, narrow"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
        assert [row.split(" | ")[0] for row in table] == ["| model", "| dense", "| MoLE, narrow"]
    results = json.loads((tmp_path / "search" / "search.json").read_text())
    assert results["MoLE, narrow"]["gflop"] < results["dense"]["gflop"]
    assert results["dense"]["validation"]["mlearn_Cu"]["frames"] > 0
