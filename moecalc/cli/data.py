"""`moecalc convert`: training data from DFT frames."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moecalc.cli.console import new_console, progress
from moecalc.cli.options import split_symbols
from moecalc.cli.tables import facts, plain_table

if TYPE_CHECKING:
    from moecalc.data.convert import DatasetReport


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Frames with energies, forces and stresses: extended XYZ, also .gz, or a DeePMD-kit folder."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    validation: Annotated[float, typer.Option(help="Share of every group of frames to hold out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    elements: Annotated[
        str | None, typer.Option(help="type_map: Nb,Mo,Ta,W. Default: the elements of the data.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a data set in the folder.")] = False,
) -> None:
    """Convert DFT frames into training and validation data for `dp --pt train`."""
    from moecalc.data.convert import convert as convert_frames

    with progress("converting") as say:
        say(str(source))
        report = convert_frames(source, out, validation, seed, split_symbols(elements), force)
    _show_groups(new_console(), report, out)


def _show_groups(console: Console, report: DatasetReport, out: Path) -> None:
    """Frames and energies of every group, and what was written."""
    table = plain_table(
        "group", "elements", "train", "valid", "atoms", "E min", "E max", "F max", right=range(2, 8)
    )
    for group in report.groups:
        table.add_row(
            escape(group.name),
            " ".join(group.elements),
            str(group.train),
            str(group.valid),
            str(group.atoms),
            f"{group.min_energy:.2f}",
            f"{group.max_energy:.2f}",
            f"{group.max_force:.1f}",
        )
    console.print(table)
    train = sum(group.train for group in report.groups)
    valid = sum(group.valid for group in report.groups)
    with_stress = sum(group.with_stress for group in report.groups)
    console.print(
        facts(
            ("frames", f"{train} to train, {valid} held out (seed {report.seed})"),
            ("E, F", "energy per atom in eV, largest component of a force in eV/A"),
            ("no stress", f"{train + valid - with_stress} frames"),
            ("type_map", ", ".join(report.type_map)),
            ("written", escape(str(out))),
        )
    )
