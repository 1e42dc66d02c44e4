"""The command `moecalc`: package checkpoints, look at packages, verify and time them, and find out why something does not work.

Results go to standard output, progress and errors to standard error. Exit codes: 0 success, 1 a check failed, 2 an error, which is
one line.
"""

from __future__ import annotations

import io
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from moecalc import __version__
from moecalc._extras import need_torch
from moecalc.conditions import parsed_numbers
from moecalc.errors import MoecalcError, PackageError
from moecalc.files import check_outputs, write_text
from moecalc.lammps_cli import app as lammps_app
from moecalc.tables import (
    facts,
    plain_table,
    show_bench,
    show_checks,
    show_metadata,
    show_package,
    show_report,
    show_routing,
)


class DType(StrEnum):
    """Precision of the network."""

    float32 = "float32"
    float64 = "float64"


class _Commands(TyperGroup):
    """Turns the errors that users can act on into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        _accept_any_text()
        try:
            with _signals_as_exceptions():
                return super().invoke(ctx)
        except _Stopped as stop:
            typer.echo(f"error: stopped by {stop.signal.name}; temporary files were removed", err=True)
            raise typer.Exit(128 + stop.signal) from None
        except KeyboardInterrupt:
            typer.echo("error: interrupted; temporary files were removed", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.params.get("debug") or not _is_expected(error):
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


class _Stopped(BaseException):
    """SIGTERM or SIGHUP. Not an Exception: nothing but clean-up may come between it and the end."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


_CLEAN_UP_TIME = 5.0  # seconds


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that what it began is cleaned up; only for the command line."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    last = -_CLEAN_UP_TIME

    def stop(number: int, _frame: Any) -> None:
        nonlocal last
        # the clean-up is not to be stopped in its turn; but an exception can be lost, in a destructor for example
        if time.monotonic() - last > _CLEAN_UP_TIME:
            last = time.monotonic()
            raise _Stopped(number)

    # one that is ignored (nohup) stays so
    before = {
        s: signal.getsignal(s)
        for s in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(s) in (signal.SIG_DFL, None)
    }
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _accept_any_text() -> None:
    """Write what the terminal's encoding lacks (LANG=C) as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _echo_json(text: str) -> None:
    """Print JSON that stays JSON in any encoding."""
    if (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        text = re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], text)
    typer.echo(text)


def _is_expected(error: Exception) -> bool:
    """Whether the message alone tells a user what to do: our errors, the file system's, and a library that does not load."""
    native = sys.modules.get("moecalc._C")
    return isinstance(error, MoecalcError | OSError | ImportError | EOFError) or (
        native is not None and isinstance(error, native.Error)
    )


app = typer.Typer(
    cls=_Commands,
    help="Package, inspect, verify and time element-wise mixture-of-experts interatomic potentials.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"moecalc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; give it before the command.")
    ] = False,
) -> None:
    """Options of every command; `_Commands` reads `debug`."""


@app.command()
def package(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Trained checkpoint (.pt; its layout is detected), frozen model (.pth), "
            "or a name of DeePMD-kit's registry: DPA-3.3-1M."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Package to write, *.moe.pt.")],
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
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing package.")] = False,
) -> None:
    """Turn a trained checkpoint into a package that ASE and LAMMPS run, and verify it."""
    check_outputs([("--out", out)], [("checkpoint", checkpoint)])
    if out.exists() and not force:
        raise PackageError(f"{out} exists: choose another name with -o, or overwrite it with --force")
    chosen = [symbol.strip() for symbol in elements.split(",")] if elements is not None else None
    free_text: dict[str, Any] = {} if citation is None else {"citation": citation}
    fixed: dict[str, Any] = {
        name: parsed_numbers(f"--{name}", text, None if name == "fparam" else 1)
        for name, text in (("charge", charge), ("spin", spin), ("fparam", fparam))
        if text is not None
    }
    with _progress("packaging") as say:
        say("starting torch")
        need_torch()
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
    console = _console()
    show_package(console, report, selected=chosen is not None)
    show_routing(console, report.metadata)
    show_checks(console, report.verification)


@app.command()
def inspect(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE|default", help="Package, *.moe.pt, or the default model.")
    ],
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

    path = _path_of(package)
    check_outputs([("--plot", plot)], [("package", path)])
    metadata = read_metadata(path)
    if plot is not None:
        with _progress("drawing") as say:
            say(f"routing of {metadata.name}")
            from moecalc.plots import save_routing

            save_routing(metadata, plot)
    if as_json:
        _echo_json(metadata.model_dump_json(indent=2))
        return
    verification = read_verification(path)
    console = _console()
    show_metadata(console, metadata, path, path.stat().st_size)
    n, failed = len(verification.checks), len(verification.failures())
    console.print(
        facts(
            ("verified", f"{n - failed} of {n} checks passed when it was made; `moecalc verify` repeats them")
        )
    )
    show_routing(console, metadata)
    if plot is not None:
        console.print(f"\nwrote {escape(str(plot))}", soft_wrap=True)


@app.command()
def verify(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE|default", help="Package, *.moe.pt, or the default model.")
    ],
    device: Annotated[str, typer.Option(help="Where the evaluator runs: cpu, cuda, cuda:N.")] = "cpu",
) -> None:
    """Check a package against its reference frames, finite differences and symmetries; exit code 1 if one fails."""
    with _progress("verifying") as say:
        say("starting torch")
        need_torch()
        from moecalc.package import verify_package

        report = verify_package(_path_of(package), say, device)
    console = _console()
    show_checks(console, report)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def upgrade(
    old: Annotated[Path, typer.Argument(help="Package of an older format, *.moe.pt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Package to write, *.moe.pt.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing package.")] = False,
) -> None:
    """Write a package of an older format as one that this version runs; the model stays the same."""
    check_outputs([("--out", out)], [("package", old)])
    if out.exists() and not force:
        raise PackageError(f"{out} exists: choose another name with -o, or overwrite it with --force")
    with _progress("upgrading") as say:
        say("starting torch")
        need_torch()
        from moecalc.package import upgrade_package

        report = upgrade_package(old, out, say)
    console = _console()
    show_metadata(console, report.metadata, out, report.size_bytes)
    console.print(f"\nwrote {escape(str(out))}", soft_wrap=True)


@app.command()
def bench(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE|default", help="Package, *.moe.pt, or the default model.")
    ] = "default",
    structure: Annotated[
        Path | None,
        typer.Option(
            help="File that ASE reads. Default: water for H and O, else an alloy of the package's elements."
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
    from moecalc.bench import benchmark, check_plot_path, save_plot

    parts = [part.strip() for part in repeat.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise MoecalcError(f"--repeat {repeat!r}, expected numbers of copies with commas: 1,8,27")
    if plot is not None:
        check_plot_path(plot)
    check_outputs(
        [("--json", json_file), ("--plot", plot)],
        [("package", _path_of(package)), ("--structure", structure)],
    )
    if json_file is not None and not json_file.parent.is_dir():
        raise MoecalcError(f"{json_file.parent}: no such folder, expected an existing one for the results")
    with _progress("timing") as say:
        report = benchmark(
            None if package == "default" else package,
            structure,
            copies=[int(part) for part in parts],
            dtype=dtype,
            device=device,
            threads=threads,
            steps=steps,
            progress=say,
        )
        if json_file is not None:
            write_text(json_file, report.model_dump_json(indent=1) + "\n")
        if plot is not None:
            save_plot(report, plot)
    console = _console()
    show_bench(console, report)
    for path in (json_file, plot):
        if path is not None:
            console.print(f"wrote {escape(str(path))}", soft_wrap=True)
    if report.failures:
        raise typer.Exit(1)


@app.command()
def report(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE|default", help="Package, *.moe.pt, or the default model.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Reference frames that ASE reads, with energies and forces: test.extxyz, also .gz."
        ),
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
    check_outputs([("--out", out), ("--json", json_file)], [("package", _path_of(package)), ("--data", data)])
    if json_file is not None and not json_file.parent.is_dir():
        raise MoecalcError(f"{json_file.parent}: no such folder, expected an existing one for the numbers")
    with _counted_progress("report") as progress:
        evaluation = evaluate(
            None if package == "default" else package, data, key=key, limit=limit, device=device,
            dtype=dtype, skip_unknown=skip_unknown, progress=progress,
        )  # fmt: skip
        progress("drawing", 0, 1)
        result = write_report(evaluation, out)
        if json_file is not None:
            write_text(json_file, result.model_dump_json(indent=1) + "\n")
    console = _console()
    show_report(console, result)
    for path in (out, json_file):
        if path is not None:
            console.print(f"wrote {escape(str(path))}", soft_wrap=True)


@app.command()
def zbl(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE|default", help="Package, *.moe.pt, or the default model.")
    ] = "default",
    elements: Annotated[
        str | None,
        typer.Option(help="Element of every atom type, in order: Nb,Mo,Ta,W. Default: all of the package."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Training data: the guard stays below their shortest distances.")
    ] = None,
) -> None:
    """Print the lines of LAMMPS that add a short-range guard (ZBL) to a package."""
    from moecalc.errors import ElementError
    from moecalc.package.archive import read_metadata
    from moecalc.zbl import guard_radii, lammps_commands, shortest_distances

    path = _path_of(package)
    known = read_metadata(path).elements
    chosen = known if elements is None else [symbol.strip() for symbol in elements.split(",")]
    if unknown := [e for e in chosen if e not in known]:
        raise ElementError(
            f"{path.name} has no {' '.join(unknown)}, expected elements among {' '.join(known)}"
        )
    shortest = None
    if data is not None:
        with _progress("reading") as say:
            say(str(data))
            from moecalc.report import read_frames

            shortest = shortest_distances(read_frames(data))
    typer.echo(lammps_commands(chosen, guard_radii(chosen, shortest), package), nl=False)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Frames with energies, forces and stresses: extended XYZ, also compressed (.gz)."
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
    from moecalc.dataset import convert as convert_frames

    chosen = [symbol.strip() for symbol in elements.split(",")] if elements is not None else None
    with _progress("converting") as say:
        say(str(source))
        report = convert_frames(source, out, validation, seed, chosen, force)
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
    without_stress = sum(group.train + group.valid - group.with_stress for group in report.groups)
    console = _console()
    console.print(table)
    train, valid = (sum(getattr(group, part) for group in report.groups) for part in ("train", "valid"))
    console.print(
        facts(
            ("frames", f"{train} to train, {valid} held out (seed {report.seed})"),
            ("E, F", "energy per atom in eV, largest component of a force in eV/A"),
            ("no stress", f"{without_stress} frames"),
            ("type_map", ", ".join(report.type_map)),
            ("written", escape(str(out))),
        )
    )


@app.command()
def upcycle(
    dense: Annotated[Path, typer.Argument(help="Checkpoint of a dense DPA3 (.pt).")],
    input_file: Annotated[
        Path, typer.Option("--input", help="Training input (input.json) whose descriptor is dpa3_moe.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Checkpoint to write, *.pt.")],
    head: Annotated[str | None, typer.Option(help="Head of a multi-task checkpoint.")] = None,
    noise: Annotated[
        float, typer.Option(min=0.0, help="Relative perturbation of the routed experts; 0 starts exactly.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the gates and the perturbation.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Make a mixture of experts that starts as a dense DPA3, for `dp --pt train --init-model`."""
    check_outputs([("--out", out)], [("dense checkpoint", dense), ("--input", input_file)])
    if out.exists() and not force:
        raise PackageError(f"{out} exists: choose another name with -o, or overwrite it with --force")
    with _progress("upcycling") as say:
        say("starting torch")
        need_torch()
        from moecalc.deepmd.upcycle import upcycle as make_start

        remarks = make_start(dense, input_file, out, head, noise, seed)
    console = _console()
    for remark in remarks:
        console.print(escape(remark), soft_wrap=True)
    if not remarks:
        console.print(
            f"train with: dp --pt train {input_file} --init-model {out}", soft_wrap=True, markup=False
        )


@app.command()
def fit(
    source: Annotated[
        Path, typer.Argument(metavar="FRAMES", help="Frames with energy and forces: train.extxyz, also .gz.")
    ],
    input_file: Annotated[
        Path, typer.Option("--input", help="JSON with the model and the settings of the fit.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the results; an earlier fit in it goes on.")
    ],
    validation: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of every group to hold out.")
    ] = 0.05,
    hours: Annotated[
        float | None, typer.Option(min=0.0, help="Stop after so long. Default: at the last step.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: those of torch.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 2000,
) -> None:
    """Fit a potential on CPUs with the fused kernels; the result is a checkpoint for `moecalc package`."""
    need_torch()
    from moecalc.package.metadata import worst

    console = _console()

    def show(entry: dict[str, Any]) -> None:
        groups = entry["validation"].values()
        frames = sum(g["frames"] for g in groups)
        energy = sum(g["energy"] * g["frames"] for g in groups) / max(1, frames)
        worst_force = worst(*(g["force"] for g in groups))
        console.print(
            f"step {entry['step']:>8,}  {1e3 * entry['seconds']:.0f} ms  batches {1e3 * entry['energy']:.1f} meV/atom "
            f"{entry['force']:.3f} eV/A  held out {1e3 * energy:.1f} meV/atom, worst group {worst_force:.3f} eV/A",
            soft_wrap=True,
        )

    with _progress("fitting") as say:
        say("reading frames")
        from moecalc.training.fit import fit_frames

        say("training")
        result = fit_frames(
            source,
            input_file,
            out,
            validation=validation,
            hours=hours,
            threads=threads,
            every=every,
            progress=show,
        )
    checkpoint = out / "state.averaged.pt"
    console.print(f"stopped at step {result.step_number:,} of {result.options.steps:,}", soft_wrap=True)
    console.print(f"next: moecalc package {checkpoint} -o model.moe.pt", soft_wrap=True, markup=False)


app.add_typer(lammps_app, name="lammps")


@app.command()
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON, nothing else.")
    ] = False,
) -> None:
    """Check this installation, and say what to do where something is wrong; exit code 1 if something fails."""
    from dataclasses import asdict

    from moecalc.doctor import run_checks

    with _progress("checking") as say:
        findings = run_checks(say)
    failed = any(f.status == "fail" for f in findings)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        console = _console()
        table = plain_table()
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for f in findings:
            detail = escape(f.detail) + (f"\n[bold]-> {escape(f.remedy)}[/bold]" if f.remedy else "")
            table.add_row(f"[{colours[f.status]}]{f.status}[/]", escape(f.name), detail)
        console.print(table)
        counts = {s: sum(f.status == s for f in findings) for s in colours}
        console.print(
            "everything works"
            if counts["ok"] == len(findings)
            else ", ".join(f"{n} {s}" for s, n in counts.items() if n)
        )
    if failed:
        raise typer.Exit(1)


def _path_of(package: str) -> Path:
    """Path of a package that was named, or of the default model."""
    from moecalc.models import default_model_path

    return default_model_path() if package == "default" else Path(package)


# --- output ------------------------------------------------------------------------------------


def _console() -> Console:
    return Console(highlight=False)


@contextmanager
def _progress(action: str) -> Iterator[Callable[[str], None]]:
    """A spinner with the current step and the time; plain lines where standard error is no terminal."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda step: typer.echo(f"{action}: {step}", err=True)
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(action, total=None)
        yield lambda step: bar.update(task, description=f"{action}: {escape(step)}")


@contextmanager
def _counted_progress(action: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for what can be counted; where standard error is no terminal, a line whenever something else begins."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        current = ""

        def say(what: str, done: int, total: int) -> None:  # noqa: ARG001 - lines do not count
            nonlocal current
            if what != current:
                typer.echo(f"{action}: {what}", err=True)
                current = what

        yield say
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(action, total=None)
        yield lambda what, done, total: bar.update(
            task, description=f"{action}: {escape(what)}", completed=done, total=total
        )


if __name__ == "__main__":
    app()
