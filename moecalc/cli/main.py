"""The application: options of every command, and the commands in the order of `moecalc --help`."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from moecalc import __version__
from moecalc.cli import data, dynamics, evaluation, lammps, machine, packaging, training, zbl
from moecalc.cli.group import Commands

COMMANDS: Final = (
    packaging.package,
    packaging.inspect,
    packaging.verify,
    packaging.upgrade,
    evaluation.bench,
    evaluation.report,
    evaluation.devi,
    dynamics.md,
    dynamics.relax,
    zbl.zbl,
    data.convert,
    training.upcycle,
    training.fit,
    machine.doctor,
)

app = typer.Typer(
    cls=Commands,
    help="Package, inspect, verify and time element-wise mixture-of-experts interatomic potentials.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(lammps.app, name="lammps")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"moecalc {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; give it before the command.")
    ] = False,
) -> None:
    """Options of every command; `Commands` reads `debug`."""
