"""`moecalc upcycle` and `fit`: make a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moecalc._extras import need_torch
from moecalc.cli.console import new_console, progress, start_torch
from moecalc.cli.options import check_new
from moecalc.files import check_outputs


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
    check_new(out, force)
    with progress("upcycling") as say:
        start_torch(say)
        from moecalc.training.upcycle import upcycle as make_start

        remarks = make_start(dense, input_file, out, head, noise, seed)
    console = new_console()
    for remark in remarks:
        console.print(escape(remark), soft_wrap=True)
    if not remarks:
        console.print(
            f"train with: dp --pt train {input_file} --init-model {out}", soft_wrap=True, markup=False
        )


def fit(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FRAMES", help="Frames with energy and forces: train.extxyz, .gz, or a folder."
        ),
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
    console = new_console()
    with progress("fitting") as say:
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
            progress=lambda entry: _show_step(console, entry),
        )
    checkpoint = out / "state.averaged.pt"
    console.print(f"stopped at step {result.step_number:,} of {result.options.steps:,}", soft_wrap=True)
    console.print(f"next: moecalc package {checkpoint} -o model.moe.pt", soft_wrap=True, markup=False)


def _show_step(console: Console, entry: dict[str, Any]) -> None:
    """A line of the log: errors of the last batches, and of what is held out."""
    from moecalc.package.metadata import worst

    groups = entry["validation"].values()
    frames = sum(group["frames"] for group in groups)
    energy = sum(group["energy"] * group["frames"] for group in groups) / max(1, frames)
    worst_force = worst(*(group["force"] for group in groups))
    console.print(
        f"step {entry['step']:>8,}  {1e3 * entry['seconds']:.0f} ms  "
        f"batches {1e3 * entry['energy']:.1f} meV/atom {entry['force']:.3f} eV/A  "
        f"held out {1e3 * energy:.1f} meV/atom, worst group {worst_force:.3f} eV/A",
        soft_wrap=True,
    )
