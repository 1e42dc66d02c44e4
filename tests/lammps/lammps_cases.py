"""Many short inputs in one process: each in a LAMMPS of its own, which keeps its error, energy and log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_DRIVER = """
import json, sys
from moecalc.lammps import lammps

results = {}
for name, script in json.load(open("cases.json")).items():
    engine = lammps(cmdargs=["-screen", "none", "-log", "case.log", "-nocite"])
    error, energy = "", None
    try:
        engine.commands_string(script)
        energy = engine.get_thermo("pe")
    except Exception as exception:
        error = str(exception)
    engine.close()
    results[name] = {"error": error, "energy": energy, "log": open("case.log", errors="replace").read()}
json.dump(results, open("results.json", "w"))
"""


@dataclass
class Case:
    """What became of an input."""

    error: str  # "" if there was none
    energy: float | None  # eV, of the last step
    log: str

    def warnings(self) -> list[str]:
        """Those of the pair style."""
        return [line for line in self.log.splitlines() if line.startswith("WARNING: Pair style moe")]


def run_cases(scripts: dict[str, str], folder: Path) -> dict[str, Case]:
    """Run inputs by name, on one rank."""
    (folder / "cases.json").write_text(json.dumps(scripts))
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text())
    return {name: Case(**result) for name, result in results.items()}
