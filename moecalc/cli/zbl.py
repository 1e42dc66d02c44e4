"""`moecalc zbl`: the short-range guard, for LAMMPS."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecalc.cli.console import progress
from moecalc.cli.options import DEFAULT, PackageName, path_of, split_symbols
from moecalc.errors import ElementError


def zbl(
    package: PackageName = DEFAULT,
    elements: Annotated[
        str | None,
        typer.Option(help="Element of every atom type, in order: Nb,Mo,Ta,W. Default: all of the package."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Training data: the guard stays below their shortest distances.")
    ] = None,
) -> None:
    """Print the lines of LAMMPS that add a short-range guard (ZBL) to a package."""
    from moecalc.package.archive import read_metadata
    from moecalc.zbl import guard_radii, lammps_commands, shortest_distances

    path = path_of(package)
    known = read_metadata(path).elements
    chosen = split_symbols(elements) or known
    if unknown := [symbol for symbol in chosen if symbol not in known]:
        raise ElementError(
            f"{path.name} has no {' '.join(unknown)}, expected elements among {' '.join(known)}"
        )
    shortest = None
    if data is not None:
        with progress("reading") as say:
            say(str(data))
            from moecalc.data import read_frames

            shortest = shortest_distances(read_frames(data))
    typer.echo(lammps_commands(chosen, guard_radii(chosen, shortest), package), nl=False)
