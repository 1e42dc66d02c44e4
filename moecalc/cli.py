"""The command `moecalc`: package checkpoints, look at packages, verify and time them, and find out why something does not work.

Results go to standard output, progress and errors to standard error. Exit codes: 0 success, 1 a check failed, 2 an error, which is
one line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from moecalc import __version__
from moecalc.errors import MoecalcError, PackageError

if TYPE_CHECKING:
    from moecalc.bench import Report
    from moecalc.package.metadata import Metadata, PackageReport, PositionRouting, VerificationReport
    from moecalc.report import Report as FitnessReport

# rows of a routing table that a terminal page still shows
_MAX_ELEMENTS = 30


class DType(StrEnum):
    """Precision of the network."""

    float32 = "float32"
    float64 = "float64"


class _Commands(TyperGroup):
    """Turns the errors that users can act on into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params.get("debug") or not _is_expected(error):
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


def _is_expected(error: Exception) -> bool:
    """Whether the message alone tells a user what to do: our errors, the file system's, and a library that does not load."""
    native = sys.modules.get("moecalc._C")
    return isinstance(error, MoecalcError | OSError | ImportError) or (
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
    checkpoint: Annotated[Path, typer.Argument(help="Trained checkpoint (.pt); its layout is detected.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Package to write, *.moe.pt.")],
    head: Annotated[str | None, typer.Option(help="Head of a multi-task checkpoint.")] = None,
    elements: Annotated[
        str | None, typer.Option(help="Elements to keep, in this order: Nb,Mo,Ta,W. Default: all.")
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="Precision. Default: the checkpoint's.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model. Default: the file name.")] = None,
    note: Annotated[str, typer.Option(help="Free text: training data, purpose, limits.")] = "",
    license: Annotated[str, typer.Option(help="Licence of the model.")] = "",  # noqa: A002
    citation: Annotated[str | None, typer.Option(help="What to cite. Default: the method's papers.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing package.")] = False,
) -> None:
    """Turn a trained checkpoint into a package that ASE and LAMMPS run, and verify it."""
    if out.exists() and not force:
        raise PackageError(f"{out} exists: choose another name with -o, or overwrite it with --force")
    chosen = [symbol.strip() for symbol in elements.split(",")] if elements is not None else None
    free_text = {} if citation is None else {"citation": citation}
    with _progress("packaging") as say:
        say("starting torch")
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
        )
    console = _console()
    _show_package(console, report, selected=chosen is not None)
    _show_routing(console, report.metadata)
    _show_checks(console, report.verification)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PACKAGE", help="Package, *.moe.pt.")],
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

    metadata = read_metadata(path)
    if plot is not None:
        with _progress("drawing") as say:
            say(f"routing of {metadata.name}")
            from moecalc.plots import save_routing

            save_routing(metadata, plot)
    if as_json:
        typer.echo(metadata.model_dump_json(indent=2))
        return
    verification = read_verification(path)
    console = _console()
    _show_metadata(console, metadata, path, path.stat().st_size)
    n, failed = len(verification.checks), len(verification.failures())
    console.print(
        _facts(
            ("verified", f"{n - failed} of {n} checks passed when it was made; `moecalc verify` repeats them")
        )
    )
    _show_routing(console, metadata)
    if plot is not None:
        console.print(f"\nwrote {escape(str(plot))}", soft_wrap=True)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="PACKAGE", help="Package, *.moe.pt.")],
    device: Annotated[str, typer.Option(help="Where the evaluator runs: cpu, cuda, cuda:N.")] = "cpu",
) -> None:
    """Check a package against its reference frames, finite differences and symmetries; exit code 1 if one fails."""
    with _progress("verifying") as say:
        say("starting torch")
        from moecalc.package import verify_package

        report = verify_package(path, say, device)
    console = _console()
    _show_checks(console, report)
    if not report.passed:
        raise typer.Exit(1)


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
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: what torch chooses.")] = None,
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
            json_file.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if plot is not None:
            save_plot(report, plot)
    console = _console()
    _show_bench(console, report)
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
            json_file.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    console = _console()
    _show_report(console, result)
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
    from moecalc.models import default_model_path
    from moecalc.package.archive import read_metadata
    from moecalc.zbl import guard_radii, lammps_commands, shortest_distances

    path = default_model_path() if package == "default" else Path(package)
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
    table = _table(
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
        _facts(
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
    if out.exists() and not force:
        raise PackageError(f"{out} exists: choose another name with -o, or overwrite it with --force")
    with _progress("upcycling") as say:
        say("starting torch")
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
    console = _console()

    def show(entry: dict[str, Any]) -> None:
        groups = entry["validation"].values()
        frames = sum(g["frames"] for g in groups)
        energy = sum(g["energy"] * g["frames"] for g in groups) / max(1, frames)
        worst = max((g["force"] for g in groups), default=0.0)
        console.print(
            f"step {entry['step']:>8,}  {1e3 * entry['seconds']:.0f} ms  batches {1e3 * entry['energy']:.1f} meV/atom "
            f"{entry['force']:.3f} eV/A  held out {1e3 * energy:.1f} meV/atom, worst group {worst:.3f} eV/A",
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


@app.command()
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON, nothing else.")
    ] = False,
) -> None:
    """Check this installation, and say what to do where something is wrong; exit code 1 if something fails."""
    import json
    from dataclasses import asdict

    from moecalc.doctor import run_checks

    with _progress("checking") as say:
        findings = run_checks(say)
    failed = any(f.status == "fail" for f in findings)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        console = _console()
        table = _table()
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


def _table(*columns: str, right: Sequence[int] = ()) -> Table:
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(columns), header_style="bold"
    )
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k in right else "left")
    return table


def _facts(*rows: tuple[str, str]) -> Table:
    """Names and values in two columns; every call gives the same widths."""
    table = _table()
    table.add_column(width=11, style="dim")
    table.add_column()
    for key, value in rows:
        table.add_row(key, escape(value))
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _change(before: int, after: int) -> str:
    """How much smaller `after` is, in words."""
    if before == 0:
        return ""
    if after == before:
        return "unchanged"
    return f"{abs(before - after) / before:.1%} {'smaller' if after < before else 'larger'}"


def _show_package(console: Console, report: PackageReport, *, selected: bool) -> None:
    metadata, pruned = report.metadata, report.pruned
    source = metadata.source
    dropped: list[str] = pruned.get("elements", [])
    _show_metadata(console, metadata, Path(report.path), report.size_bytes)
    if selected:
        console.print(
            _facts(("dropped", f"{len(dropped)}: {' '.join(dropped)}" if dropped else "no element"))
        )
    table = _table("", "checkpoint", "package", "", right=(1, 2))
    table.add_row("file", _megabytes(source.size_bytes), _megabytes(report.size_bytes),
                  _change(source.size_bytes, report.size_bytes))  # fmt: skip
    total = metadata.parameters.total
    table.add_row("parameters", f"{source.parameters:,}", f"{total:,}", _change(source.parameters, total))
    before, after = pruned.get("experts_before"), pruned.get("experts_after")
    if metadata.routing.is_moe and before is not None and after is not None:
        table.add_row("expert matrices", f"{before:,}", f"{after:,}", _change(before, after))
    elements_before = len(metadata.elements) + len(dropped)
    table.add_row("elements", str(elements_before), str(len(metadata.elements)), "")
    console.print()
    console.print(table)


def _show_metadata(console: Console, metadata: Metadata, path: Path, size: int) -> None:
    source, parameters = metadata.source, metadata.parameters
    untrained = [e for e in metadata.elements if e not in metadata.trained_elements]
    angles = f", angles {metadata.angle_cutoff:g} A" if metadata.angle_cutoff > 0 else ", no angles"
    rows = [
        ("name", metadata.name),
        ("file", f"{path}, {_megabytes(size)}, format {metadata.format_version}"),
        ("elements", f"{len(metadata.elements)}: {' '.join(metadata.elements)}"),
    ]
    if untrained:
        rows.append(
            ("untrained", f"{len(untrained)}: {' '.join(untrained)} (using them needs allow_untrained=True)")
        )
    rows += [
        ("cutoffs", f"edges {metadata.cutoff:g} A{angles}"),
        (
            "network",
            f"{metadata.n_layers} layers, " + ", ".join(f"{k} {v}" for k, v in metadata.dims.items()),
        ),
        ("precision", metadata.dtype),
        ("parameters", f"{parameters.total:,}, active per atom {parameters.active:,}"),
        ("experts", _describe_experts(metadata)),
        (
            "source",
            f"{source.file}, layout {source.layout}" + (f", head {source.head}" if source.head else ""),
        ),
        ("sha256", source.sha256),
        ("made", f"{metadata.created} by " + ", ".join(f"{k} {v}" for k, v in metadata.versions.items())),
    ]
    rows += [
        (key, value)
        for key, value in (
            ("note", metadata.note),
            ("licence", metadata.license),
            ("cite", metadata.citation),
        )
        if value
    ]
    rows += [("remark", remark) for remark in metadata.remarks]
    console.print(_facts(*rows))


def _describe_experts(metadata: Metadata) -> str:
    routing = metadata.routing
    if not routing.is_moe:
        return "none, a dense model"
    kinds = {
        f"{p.n_routed} routed ({p.top_k} active) + {p.n_shared} shared, {'linear' if p.kind == 'linear' else 'nonlinear'}"
        for layer in routing.layers
        for p in layer.values()
    }
    n_positions = sum(len(layer) for layer in routing.layers)
    return f"{'; '.join(sorted(kinds))}; at {n_positions} positions, routed by {routing.level}"


def _show_routing(console: Console, metadata: Metadata) -> None:
    """Experts and weights in per cent, one table per layer: elements down, positions (equal ones joined) across."""
    if not metadata.routing.is_moe or metadata.routing.level == "configuration":
        return
    console.print(
        "\nRouting: expert and its weight in %, largest first; shared experts (weight 1 for all) are left out."
    )
    for index, layer in enumerate(metadata.routing.layers, start=1):
        columns: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        for name, position in layer.items():
            cells = _routing_cells(position)
            columns.setdefault(tuple(map(tuple, cells)), []).append(name)
        if not columns:
            continue
        from moecalc.plots import short_name

        headers = [",\n".join(short_name(n) for n in names) for names in columns.values()]
        table = _table(f"layer {index}", *headers)
        for column in table.columns[1:]:
            column.min_width = 5
        table.padding = (0, 1, 0, 0)
        for t, element in enumerate(metadata.elements[:_MAX_ELEMENTS]):
            table.add_row(element, *(" ".join(cells[t]) for cells in columns))
        console.print()
        console.print(table)
    hidden = len(metadata.elements) - _MAX_ELEMENTS
    if hidden > 0:
        console.print(f"\n{hidden} more elements: see `moecalc inspect --json`, or --plot for a figure")


def _routing_cells(position: PositionRouting) -> list[list[str]]:
    """For every element its routed experts as `expert:percent`."""
    cells = []
    for experts, weights in zip(position.experts, position.weights, strict=True):
        routed = [(w, e) for e, w in zip(experts, weights, strict=True) if e < position.n_routed]
        cells.append([f"{e}:{100 * w:.0f}" for w, e in sorted(routed, reverse=True)] or ["-"])
    return cells


def _show_checks(console: Console, report: VerificationReport) -> None:
    table = _table("verification", "deviation", "allowed", "", right=(1, 2))
    for check in report.checks:
        detail = f" [dim]({escape(check.detail)})[/dim]" if check.detail else ""
        table.add_row(
            escape(check.name) + detail,
            f"{check.value:.1e}",
            f"{check.tolerance:.1e}",
            "[green]pass[/]" if check.passed else "[bold red]FAIL[/]",
        )
    console.print()
    console.print(table)
    failures = report.failures()
    n = len(report.checks)
    console.print(
        f"\nall {n} checks passed" if not failures else f"\n[bold red]{len(failures)} of {n} checks failed[/]"
    )


def _show_bench(console: Console, report: Report) -> None:
    """Times by size, shares of a step and arithmetic of the first size."""
    from moecalc.bench import breakdown, part_costs
    from moecalc.costs import total_cost

    machine, first = report.machine, report.sizes[0]
    where = machine.gpu if report.device != "cpu" and machine.gpu else machine.cpu
    console.print(
        _facts(
            ("model", f"{report.model}, {report.dtype}, {report.backend}"),
            ("structure", report.structure),
            ("machine", f"{where}, {report.device}, {report.threads} threads, torch {machine.torch}"),
            ("loading", f"{first.load_s:.2f} s, first step {first.first_s:.2f} s"),
            (
                "ceilings",
                f"matrix products {first.ceilings.gemm / 1e9:.0f} GFLOP/s, copies {first.ceilings.stream / 1e9:.1f} GB/s",
            ),
        )
    )
    gpu = first.peak_gpu_mb is not None
    table = _table(
        "atoms", "edges", "angles", "ms/step", "95 %", "ASE ms", "atom steps/s", "GPU MB" if gpu else "MB", "/floor",
        right=range(9),
    )  # fmt: skip
    for size in report.sizes:
        peak = size.peak_gpu_mb if gpu else size.peak_mb
        table.add_row(
            f"{size.atoms:,}", f"{size.edges:,}", f"{size.angles:,}", f"{1e3 * size.step_p50_s:.1f}",
            f"{1e3 * size.step_p95_s:.1f}", f"{1e3 * size.ase_p50_s:.1f}",
            f"{size.atom_steps_per_s:,.0f}", "-" if peak is None else f"{peak:.0f}", f"{size.ratio:.2f}",
        )  # fmt: skip
    console.print()
    console.print(table)
    for failure in report.failures:
        console.print(f"[red]{failure.copies} copies failed:[/] {escape(failure.error)}")

    table = _table(f"step, {first.atoms:,} atoms", "ms", "%", right=(1, 2))
    for name, value in (*breakdown(first), ("(search for neighbours, once in many steps)", first.search_s)):
        table.add_row(name, f"{1e3 * value:.2f}", f"{100 * value / first.step_p50_s:.1f}")
    console.print()
    console.print(table)

    parts = part_costs(first)
    table = _table(
        "GFLOP", "forward", "backward", "recompute", "activations, 1e6", "GB moved", right=(1, 2, 3, 4, 5)
    )
    for name, cost in [*parts.items(), ("total", total_cost(parts))]:
        table.add_row(
            name, f"{cost.forward / 1e9:.3f}", f"{cost.backward / 1e9:.3f}", f"{cost.recompute / 1e9:.3f}",
            f"{cost.activations / 1e6:.1f}", f"{(cost.forward_bytes + cost.backward_bytes) / 1e9:.3f}",
        )  # fmt: skip
    console.print()
    console.print(table)
    console.print(
        f"\narithmetic floor, forward and backward: {1e3 * first.floor_s:.1f} ms; with recomputed values "
        f"{1e3 * first.with_recompute_s:.1f} ms; a step takes {first.ratio:.2f} and "
        f"{first.step_p50_s / first.with_recompute_s:.2f} times that"
    )


def _show_report(console: Console, report: FitnessReport) -> None:
    """Errors of every group, and elastic constants."""
    from moecalc.report.render import significant as sig

    skipped = f", {len(report.skipped)} skipped" if report.skipped else ""
    console.print(
        _facts(
            ("model", f"{report.model}, {report.speed.dtype} on {report.speed.device}"),
            (
                "data",
                f"{report.n_frames:,} of {report.n_read:,} frames, {report.n_atoms:,} atoms of {report.data}{skipped}",
            ),
            ("speed", f"{report.speed.atom_steps_per_s:,.0f} atom-steps/s in batches"),
        )
    )
    table = _table(
        "group", "frames", "energy MAE\nmeV/atom", "without\nmean", "force MAE\neV/A", "RMSE\neV/A", "rms\nforce", "stress MAE\nGPa",
        right=range(1, 8),
    )  # fmt: skip
    table.columns[0].no_wrap = True
    table.columns[0].min_width = max(len(g.name) for g in report.groups)
    for group in (*report.groups, report.total):
        style = "bold" if group is report.total else ""
        table.add_row(
            escape(group.name), f"{group.n_frames:,}", sig(group.energy.mae), sig(group.energy_shifted.mae), sig(group.forces.mae),
            sig(group.forces.rmse), sig(group.forces.scale), sig(group.stress.mae) if group.stress else "-", style=style,
        )  # fmt: skip
    console.print()
    console.print(table)
    if report.elastic:
        names = report.elastic[0].names
        table = _table("GPa, reference / model", *names, right=range(1, 1 + len(names)))
        for crystal in report.elastic:
            values = zip(crystal.reference, crystal.model, strict=True)
            table.add_row(f"{crystal.cell} {crystal.lattice}", *(f"{a:.0f} / {b:.0f}" for a, b in values))
        console.print()
        console.print(table)
    for remark in report.remarks:
        console.print(f"\n[yellow]{escape(remark)}[/]")
    console.print()


if __name__ == "__main__":
    app()
