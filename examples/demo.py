"""The main job in a few minutes: package a checkpoint, relax an alloy, run dynamics in ASE and in LAMMPS (`make demo`)."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import dynamics
import melt_quench
import package_checkpoint
import relax_alloy
from common import options
from rich.console import Console
from rich.table import Table


def main(output: Path, fast: bool = False) -> dict[str, float]:
    """Run the examples and print what came out.

    Returns:
        The results of all of them.
    """
    console = Console(highlight=False)
    jobs = (
        (
            "packaging",
            package_checkpoint,
            ("relative size", "difference (eV/atom)"),
            "nbmotaw_routing.png",
        ),
        ("relaxation", relax_alloy, ("max force (eV/A)", "pressure (GPa)"), "relax_alloy.png"),
        (
            "dynamics",
            dynamics,
            ("drift (meV/atom)", "NPT pressure (GPa)"),
            "dynamics_nve.png, dynamics_npt.png",
        ),
        ("LAMMPS", melt_quench, ("LAMMPS (atom-steps/s)", "density (g/cm^3)"), "melt_quench.png"),
    )
    table = Table("what", "result", "time", "picture", box=None, padding=(0, 2, 0, 0), header_style="bold")
    results: dict[str, float] = {}
    for title, module, shown, pictures in jobs:
        console.rule(title)
        start = perf_counter()
        found = module.main(output, fast)
        results |= found
        text = "\n".join(f"{name}: {found[name]:.3g}" for name in shown if name in found) or "not run"
        table.add_row(title, text, f"{perf_counter() - start:.0f} s", pictures.replace(", ", "\n"))
    console.rule("done")
    console.print(table)
    console.print(f"\npackage, pictures and trajectories (`ase gui`) are in {output}/", soft_wrap=True)
    return results


if __name__ == "__main__":
    main(**options(__doc__))
