"""The commands `moecalc lammps ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecalc.lammps.build import DEFAULT_OUTPUT

app = typer.Typer(help="Make `pair_style moe` for a LAMMPS of your own.", no_args_is_help=True)


@app.callback()
def lammps() -> None:
    """Make `pair_style moe` for a LAMMPS of your own."""


@app.command()
def build(
    lammps: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Sources of LAMMPS, or the folder in which CMake built it."),
    ],
    mpicxx: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Compiler of LAMMPS' MPI. Default: that of LAMMPS' build folder, else CMake's.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the plugin.")
    ] = DEFAULT_OUTPUT,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="smallbig|bigbig|smallsmall",
            help="LAMMPS_SIZES of that LAMMPS. Default: as its build says, else smallbig.",
        ),
    ] = None,
) -> None:
    """Compile the plugin with pair_style moe for a LAMMPS of your own."""
    from moecalc.lammps.build import build_plugin

    plugin = build_plugin(
        lammps,
        output,
        mpicxx=mpicxx,
        sizes=sizes,
        progress=lambda step: typer.echo(f"lammps: {step}", err=True),
    )
    details = ", ".join(filter(None, (plugin.build, plugin.sizes, plugin.mpicxx)))
    typer.echo(f"for LAMMPS {plugin.version} ({details}): {plugin.folder / 'moeplugin.so'}")
    typer.echo(f"export LAMMPS_PLUGIN_PATH={plugin.folder}")
