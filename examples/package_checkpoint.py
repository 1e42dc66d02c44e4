"""Turn a trained checkpoint into a package for four of its ten elements, and check that nothing was lost.

The same on the command line:

    moecalc package examples/data/metals10.pt -o nbmotaw.moe.pt --elements Nb,Mo,Ta,W
"""

from __future__ import annotations

from pathlib import Path

from common import ALLOY, DATA, alloy, options
from rich.console import Console

from moecalc import MoECalculator
from moecalc.cli.package_tables import show_checks, show_package
from moecalc.package import package_checkpoint
from moecalc.report import save_routing


def main(output: Path, fast: bool = False) -> dict[str, float]:  # noqa: ARG001 - short as it is
    """Package, print the report, draw the routing, compare with the full model.

    Returns:
        File size relative to the checkpoint, and the difference to the full model in eV per atom.
    """
    output.mkdir(parents=True, exist_ok=True)
    out = output / "nbmotaw.moe.pt"
    report = package_checkpoint(
        DATA / "metals10.pt",
        out,
        elements=ALLOY,
        note="DPA3-MoLE trained on PBE data; see moecalc/models/metals10.md",
    )
    console = Console(highlight=False)
    show_package(console, report, selected=True)
    show_checks(console, report.verification)
    save_routing(report.metadata, output / "nbmotaw_routing.png")
    print(f"wrote {output / 'nbmotaw_routing.png'}")

    # the package that comes with moecalc holds all ten elements of the same checkpoint
    atoms = alloy(2)
    atoms.rattle(0.1, seed=1)
    full, pruned = (
        MoECalculator(model, dtype="float64").get_potential_energy(atoms) for model in (None, out)
    )
    difference = abs(full - pruned) / len(atoms)
    print(f"four elements against all ten: {difference:.1e} eV/atom")
    return {
        "relative size": report.size_bytes / report.metadata.source.size_bytes,
        "difference (eV/atom)": difference,
    }


if __name__ == "__main__":
    main(**options(__doc__))
