"""Whole runs with a package: molecular dynamics and relaxation, from a structure file to a folder of results.

from moecalc.dynamics import MDSettings, run_md

run_md(None, "POSCAR", "run", MDSettings(ensemble="nvt", temperature=600, steps=20000))
"""

from moecalc.dynamics.md import MDResult, run_md
from moecalc.dynamics.relaxation import RelaxResult, RelaxSettings, relax
from moecalc.dynamics.settings import MDSettings

__all__ = ["MDResult", "MDSettings", "RelaxResult", "RelaxSettings", "relax", "run_md"]
