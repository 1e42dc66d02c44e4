"""`moecalc bench`, `report` and `devi`: how fast a package is, how good, and where several disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moecalc.cli.console import counted_progress, new_console, progress, show_written
from moecalc.cli.evaluation_tables import show_bench, show_report
from moecalc.cli.options import (
    DEFAULT,
    DType,
    PackageName,
    check_folder_of,
    check_new,
    named,
    path_of,
)
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


def devi(
    packages: Annotated[
        list[str], typer.Argument(metavar="PACKAGE...", help="Two or more packages, *.moe.pt.")
    ],
    data: Annotated[
        Path, typer.Option(help="Frames: any file that ASE reads, also .gz, or a DeePMD-kit folder.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Text file to write, as `dp model-devi` has it.")
    ] = Path("model_devi.out"),
    relative: Annotated[
        float | None, typer.Option(min=0.0, help="Divide deviations of forces by |mean| + this, eV/A.")
    ] = None,
    relative_v: Annotated[
        float | None,
        typer.Option("--relative-v", min=0.0, help="The same for virials per atom, eV."),
    ] = None,
    atomic: Annotated[
        bool, typer.Option("--atomic", help="Add the deviation of the force on each atom.")
    ] = False,
    frequency: Annotated[
        int, typer.Option(min=1, help="Steps between two frames, for the first column.")
    ] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    dtype: Annotated[DType | None, typer.Option(help="Precision. Default: each package's.")] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Accept elements that a model was not trained on.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Show where several packages disagree: DeePMD-kit's model deviation of every frame."""
    from moecalc.model_devi import model_devi_text, model_deviations

    check_outputs(
        [("--out", out)], [("--data", data), *(("package", path_of(package)) for package in packages)]
    )
    check_folder_of(out, "deviations")
    check_new(out, force)
    with counted_progress("devi") as say:
        systems = model_deviations(
            [named(package) for package in packages],
            data,
            device=device,
            dtype=dtype,
            relative=relative,
            relative_v=relative_v,
            allow_untrained=untrained,
            progress=say,
        )
        write_text(out, model_devi_text(systems, atomic=atomic, frequency=frequency))
    frames = [frame for system in systems for frame in system.frames]
    largest = max(frame.max_forces for frame in frames)
    console = new_console()
    unit = "eV/A" if relative is None else "(relative)"
    console.print(
        f"{len(frames):,} frames: largest deviation of a force {largest:.4g} {unit}",
        soft_wrap=True,
    )
    show_written(console, out)
