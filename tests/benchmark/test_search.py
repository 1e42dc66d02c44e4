"""benchmarks/search.py, expert_roles.py and old_new.py on a few frames and steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "search.py"


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


def test_roles_of_experts_are_tabulated_per_layer(tmp_path: Path) -> None:
    atoms = bulk("W", cubic=True)
    atoms.rattle(0.1, seed=0)
    atoms.calc = SinglePointCalculator(atoms, energy=-25.0, forces=[[0.5, 0, 0], [-0.5, 0, 0]])
    write(tmp_path / "frames.extxyz", atoms)
    script, checkpoint = ROOT / "benchmarks" / "expert_roles.py", ROOT / "examples" / "data" / "metals10.pt"
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoint), "frames.extxyz"],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    layers = [block.splitlines() for block in done.stdout.strip().split("\n\n")]
    assert [layer[0] for layer in layers] == [f"| layer {k} | W |" for k in (1, 2, 3)]
    for layer in layers:
        changes = [float(row.split("|")[2]) for row in layer[2:]]
        assert len(changes) == 7
        assert sum(c > 0 for c in changes) <= 3  # two routed experts and the shared one
        assert max(changes) > 0.01


def test_two_installations_are_compared(tmp_path: Path) -> None:
    name = "default model, 128 atoms of Cu-Ni"
    script = ROOT / "benchmarks" / "old_new.py"
    command = [sys.executable, str(script), "--old", sys.executable, "--rounds", "2", "--only", name]
    done = subprocess.run(
        [*command, "--json", "found.json"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    assert len(found["rounds"]) == 2
    assert found["atoms"] == 128
    assert found["force_deviation"] == 0  # the same library twice
    assert min(found[f"{key}_ratio"] for key in ("wall_s", "cpu_s")) > 0
    assert name[:13] in done.stdout
