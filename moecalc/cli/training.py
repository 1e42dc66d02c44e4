"""`moecalc upcycle` and `fit`: make a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moecalc._extras import need_torch
from moecalc.cli.console import counted_progress, new_console, progress, start_torch
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
    start: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint to begin with, of any layout (fine-tuning). The model is its, and `model` may "
            "be left out of the input. Default: random weights."
        ),
    ] = None,
    validation: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of every group to hold out.")
    ] = 0.05,
    test: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=0.9,
            help="Share of every group that decides nothing: written to OUT/test.extxyz, for one report.",
        ),
    ] = 0.0,
    hours: Annotated[
        float | None,
        typer.Option(
            help="Train for so long in all, over all calls; the learning rate falls to its last value by "
            "then. Default: for the steps of the input."
        ),
    ] = None,
    pause_after: Annotated[
        float | None,
        typer.Option(min=0.0, help="Hours after which to stop, to go on later with the same command."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="In every process. Default: those of torch, divided by them.")
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes that share every step: each takes a batch of its own. Faster than threads.",
        ),
    ] = 1,
    every: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 2000,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Make a committee of so many fits, with seeds 1, 2, ... in OUT/seed-1, OUT/seed-2, ...: one "
            "after the other; --hours and --pause-after are shared.",
        ),
    ] = None,
) -> None:
    """Fit a potential on CPUs with the fused kernels; the result is a checkpoint for `moecalc package`."""
    need_torch()
    console = new_console()
    members: list[tuple[int | None, Path, str]] = [(None, out, "model.moe.pt")]
    if seeds is not None:
        members = [(seed, out / f"seed-{seed}", f"model-{seed}.moe.pt") for seed in range(1, seeds + 1)]
    with counted_progress("fitting") as say:
        say("reading frames", 0, 1)
        from moecalc.training.fit import fit_frames

        for seed, folder, name in members:
            what = "training" if seed is None else f"training with seed {seed} of {len(members)}"
            result = fit_frames(
                source,
                input_file,
                folder,
                validation=validation,
                test=test,
                hours=None if hours is None else hours / len(members),
                pause_after=None if pause_after is None else pause_after / len(members),
                threads=threads,
                processes=processes,
                every=every,
                seed=seed,
                start=start,
                progress=lambda entry: _show_step(console, entry),
                stepped=partial(say, what),
            )
            checkpoint = folder / "state.averaged.pt"
            share = (
                f"of {result.options.steps:,}"
                if hours is None
                else f"after {result.progress:.0%} of the hours"
            )
            console.print(f"stopped at step {result.step_number:,} {share}", soft_wrap=True)
            console.print(f"next: moecalc package {checkpoint} -o {name}", soft_wrap=True, markup=False)


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
