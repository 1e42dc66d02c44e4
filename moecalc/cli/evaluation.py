"""`moecalc bench` and `report`: how fast a package is, and how good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecalc.cli.console import counted_progress, new_console, progress, show_written
from moecalc.cli.evaluation_tables import show_bench, show_report
from moecalc.cli.options import DEFAULT, DType, PackageName, check_folder_of, named, path_of
from moecalc.errors import MoecalcError
from moecalc.files import check_outputs, write_text


def bench(
    package: PackageName = DEFAULT,
    structure: Annotated[
        Path | None,
        typer.Option(
            help="File that ASE reads, or a DeePMD-kit folder. "
            "Default: water for H and O, else an alloy of the package's elements."
        ),
    ] = None,
    repeat: Annotated[
        str, typer.Option(metavar="N,N,...", help="How many copies of the structure to time.")
    ] = "1",
    dtype: Annotated[DType | None, typer.Option(help="Precision. Default: the package's.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. Default: OMP_NUM_THREADS, or the cores.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed steps, after five to warm up.")] = 30,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "cpu",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all results.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a figure of the scaling (.png, .pdf, .svg).")
    ] = None,
) -> None:
    """Time energy + forces + virial per step, and compare with what the arithmetic allows."""
    from moecalc.benchmark import benchmark, check_plot_path, save_plot

    copies = _copies(repeat)
    if plot is not None:
        check_plot_path(plot)
    check_outputs(
        [("--json", json_file), ("--plot", plot)],
        [("package", path_of(package)), ("--structure", structure)],
    )
    check_folder_of(json_file, "results")
    with progress("timing") as say:
        results = benchmark(
            named(package),
            structure,
            copies=copies,
            dtype=dtype,
            device=device,
            threads=threads,
            steps=steps,
            progress=say,
        )
        if json_file is not None:
            write_text(json_file, results.model_dump_json(indent=1) + "\n")
        if plot is not None:
            save_plot(results, plot)
    console = new_console()
    show_bench(console, results)
    show_written(console, json_file, plot)
    if results.failures:
        raise typer.Exit(1)


def _copies(repeat: str) -> list[int]:
    """Numbers of `--repeat 1,8,27`."""
    parts = [part.strip() for part in repeat.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise MoecalcError(f"--repeat {repeat!r}, expected numbers of copies with commas: 1,8,27")
    return [int(part) for part in parts]


def report(
    package: PackageName,
    data: Annotated[
        Path,
        typer.Option(help="Frames with energies and forces: test.extxyz, also .gz, or a DeePMD-kit folder."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Report to write: .html is one file, .md has a folder of pictures."),
    ] = Path("report.html"),
    key: Annotated[str, typer.Option(help="Name of the group in atoms.info.")] = "dataset",
    limit: Annotated[
        int | None, typer.Option(help="Most frames per group, taken evenly. Default: all.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    dtype: Annotated[DType | None, typer.Option(help="Precision. Default: the package's.")] = None,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out frames with elements that the model lacks.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers.")
    ] = None,
) -> None:
    """Compare a package with reference data: errors by group and element, elastic constants, pictures."""
    from moecalc.report import check_output, evaluate, write_report

    check_output(out)
    check_outputs([("--out", out), ("--json", json_file)], [("package", path_of(package)), ("--data", data)])
    check_folder_of(json_file, "numbers")
    with counted_progress("report") as say:
        found = evaluate(
            named(package),
            data,
            key=key,
            limit=limit,
            device=device,
            dtype=dtype,
            skip_unknown=skip_unknown,
            progress=say,
        )
        say("drawing", 0, 1)
        result = write_report(found, out)
        if json_file is not None:
            write_text(json_file, result.model_dump_json(indent=1) + "\n")
    console = new_console()
    show_report(console, result)
    show_written(console, out, json_file)
