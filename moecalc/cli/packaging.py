"""`moecalc package`, `inspect`, `verify`, `upgrade`: make packages, and look at them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moecalc.cli.console import echo_json, new_console, progress, show_written, start_torch
from moecalc.cli.options import DType, NewPackage, Overwrite, PackageName, check_new, path_of, split_symbols
from moecalc.cli.package_tables import (
    show_checks,
    show_metadata,
    show_package,
    show_routing,
    show_verified,
)
from moecalc.conditions import parsed_numbers
from moecalc.files import check_outputs


def package(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Trained checkpoint (.pt; its layout is detected), frozen model (.pth), "
            "or a name of DeePMD-kit's registry: DPA-3.3-1M."
        ),
    ],
    out: NewPackage,
    head: Annotated[
        str | None,
        typer.Option(help="Head of a multi-task checkpoint. Default: the one with the alias Default."),
    ] = None,
    elements: Annotated[
        str | None, typer.Option(help="Elements to keep, in this order: Nb,Mo,Ta,W. Default: all.")
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="Precision. Default: the checkpoint's.")] = None,
    charge: Annotated[
        str | None,
        typer.Option(help="Fix the charge (e), for models that take one. Default: given at run time."),
    ] = None,
    spin: Annotated[
        str | None,
        typer.Option(help="Fix the multiplicity 2S+1. Default: the checkpoint's where --charge is given."),
    ] = None,
    fparam: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Fix the frame parameters. Default: given at run time."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model. Default: the file name.")] = None,
    note: Annotated[str, typer.Option(help="Free text: training data, purpose, limits.")] = "",
    license: Annotated[str, typer.Option(help="Licence of the model.")] = "",  # noqa: A002
    citation: Annotated[str | None, typer.Option(help="What to cite. Default: the method's papers.")] = None,
    force: Overwrite = False,
) -> None:
    """Turn a trained checkpoint into a package that ASE and LAMMPS run, and verify it."""
    check_outputs([("--out", out)], [("checkpoint", checkpoint)])
    check_new(out, force)
    chosen = split_symbols(elements)
    free_text: dict[str, Any] = {} if citation is None else {"citation": citation}
    fixed = _fixed(charge=charge, spin=spin, fparam=fparam)
    with progress("packaging") as say:
        start_torch(say)
        from moecalc.package import package_checkpoint

        report = package_checkpoint(
            checkpoint,
            out,
            head=head,
            elements=chosen,
            dtype=dtype,
            name=name,
            note=note,
            license=license,
            progress=say,
            **free_text,
            **fixed,
        )
    console = new_console()
    show_package(console, report, selected=chosen is not None)
    show_routing(console, report.metadata)
    show_checks(console, report.verification)


def _fixed(**given: str | None) -> dict[str, Any]:
    """Numbers of `--charge`, `--spin` and `--fparam`, those that were given."""
    return {
        name: parsed_numbers(f"--{name}", text, None if name == "fparam" else 1)
        for name, text in given.items()
        if text is not None
    }


def inspect(
    package: PackageName,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the metadata as JSON, nothing else.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Write a figure of the routing: periodic table and expert weights (.png, .pdf, .svg)."
        ),
    ] = None,
) -> None:
    """Show what a package says of itself, without loading the model."""
    from moecalc.package.archive import read_metadata, read_verification

    path = path_of(package)
    check_outputs([("--plot", plot)], [("package", path)])
    metadata = read_metadata(path)
    if plot is not None:
        with progress("drawing") as say:
            say(f"routing of {metadata.name}")
            from moecalc.report import save_routing

            save_routing(metadata, plot)
    if as_json:
        echo_json(metadata.model_dump_json(indent=2))
        return
    verification = read_verification(path)
    console = new_console()
    show_metadata(console, metadata, path, path.stat().st_size)
    show_verified(console, verification)
    show_routing(console, metadata)
    if plot is not None:
        console.print()
        show_written(console, plot)


def verify(
    package: PackageName,
    device: Annotated[str, typer.Option(help="Where the evaluator runs: cpu, cuda, cuda:N.")] = "cpu",
) -> None:
    """Check a package against its reference frames, finite differences and symmetries; exit code 1 if one fails."""  # noqa: E501 - text of --help
    with progress("verifying") as say:
        start_torch(say)
        from moecalc.package import verify_package

        report = verify_package(path_of(package), say, device)
    console = new_console()
    show_checks(console, report)
    if not report.passed:
        raise typer.Exit(1)


def upgrade(
    old: Annotated[Path, typer.Argument(help="Package of an older format, *.moe.pt.")],
    out: NewPackage,
    force: Overwrite = False,
) -> None:
    """Write a package of an older format as one that this version runs; the model stays the same."""
    check_outputs([("--out", out)], [("package", old)])
    check_new(out, force)
    with progress("upgrading") as say:
        start_torch(say)
        from moecalc.package import upgrade_package

        report = upgrade_package(old, out, say)
    console = new_console()
    show_metadata(console, report.metadata, out, report.size_bytes)
    console.print()
    show_written(console, out)
