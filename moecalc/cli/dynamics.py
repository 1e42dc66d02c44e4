"""`moecalc md` and `relax`: a structure goes in, a trajectory, a log and pictures come out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moecalc.cli.console import counted_progress, new_console, show_written
from moecalc.cli.options import DType, PackageName, named

StructureFile = Annotated[
    Path, typer.Argument(metavar="STRUCTURE", help="Structure: cif, POSCAR, extxyz, all that ASE reads.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: OMP_NUM_THREADS, or cores.")]


class Ensemble(StrEnum):
    """What is kept constant."""

    nve = "nve"
    nvt = "nvt"
    npt = "npt"


class Barostat(StrEnum):
    """What the barostat changes."""

    isotropic = "isotropic"
    full = "full"


class Cell(StrEnum):
    """How the cell relaxes."""

    fixed = "fixed"
    isotropic = "isotropic"
    full = "full"


class Optimizer(StrEnum):
    """ASE's optimizers."""

    fire = "fire"
    lbfgs = "lbfgs"
    bfgs = "bfgs"


def md(
    package: PackageName,
    structure: StructureFile,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the results; an earlier run in it goes on.")
    ] = Path("md"),
    ensemble: Annotated[Ensemble, typer.Option(help="nve, nvt or npt.")] = Ensemble.nvt,
    temperature: Annotated[float, typer.Option(help="Of the thermostat and new velocities, K.")] = 300.0,
    pressure: Annotated[float, typer.Option(help="Of the barostat, GPa.")] = 0.0,
    steps: Annotated[int, typer.Option(help="Steps of the whole run.")] = 10_000,
    timestep: Annotated[
        float | None, typer.Option(help="fs. Default: 1, or 0.5 for structures with hydrogen.")
    ] = None,
    cell: Annotated[
        Barostat, typer.Option(help="What npt changes: isotropic, the volume; full, the shape too.")
    ] = Barostat.isotropic,
    thermostat_time: Annotated[float, typer.Option(help="Time constant of the thermostat, fs.")] = 100.0,
    barostat_time: Annotated[float, typer.Option(help="Time constant of the barostat, fs.")] = 1000.0,
    every: Annotated[int, typer.Option(help="Steps between frames of the trajectory.")] = 100,
    log_every: Annotated[int, typer.Option(help="Steps between lines of the log.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of velocities and thermostat.")] = 1,
    device: Device = "auto",
    dtype: Annotated[DType | None, typer.Option(help="Precision. Default: the package's.")] = None,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Begin anew in a folder that has a run.")] = False,
) -> None:
    """Run molecular dynamics of a structure: trajectory, log and a page of results in a folder."""
    from moecalc.dynamics import MDSettings, run_md

    settings = MDSettings(
        ensemble=ensemble.value,
        temperature=temperature,
        pressure=pressure,
        steps=steps,
        timestep=timestep,
        cell=cell.value,
        thermostat_time=thermostat_time,
        barostat_time=barostat_time,
        every=every,
        log_every=log_every,
        seed=seed,
    )
    with counted_progress("md", lines=False) as say:
        result = run_md(
            named(package),
            structure,
            out,
            settings,
            device=device,
            dtype=dtype,
            threads=threads,
            force=force,
            progress=say,
        )
    console = new_console()
    begun = f" (the first {result.started_at:,} earlier)" if result.started_at else ""
    pressure_text = "" if result.pressure is None else f", {result.pressure:.3g} GPa"
    console.print(
        f"{ensemble.value}: {result.steps:,} steps of {result.timestep:g} fs{begun}, "
        f"{1000 * result.seconds_per_step:.3g} ms each",
        soft_wrap=True,
    )
    console.print(f"second half: {result.temperature:.0f} K{pressure_text}", soft_wrap=True)
    if ensemble is Ensemble.nve:
        console.print(f"total energy changed by {result.drift:.3g} meV/atom", soft_wrap=True)
    names = ("trajectory.extxyz", "log.csv", "final.extxyz", "md.png", "md.html")
    show_written(console, *(out / name for name in names))


def relax(
    package: PackageName,
    structure: StructureFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("relaxed"),
    cell: Annotated[
        Cell, typer.Option(help="fixed; isotropic, the volume relaxes; full, the shape too.")
    ] = Cell.fixed,
    pressure: Annotated[float, typer.Option(help="For a cell that relaxes, GPa.")] = 0.0,
    fmax: Annotated[float, typer.Option(help="Largest force at the end, eV/A.")] = 0.01,
    steps: Annotated[int, typer.Option(help="Most steps.")] = 500,
    optimizer: Annotated[Optimizer, typer.Option(help="fire, lbfgs or bfgs.")] = Optimizer.fire,
    device: Device = "auto",
    dtype: Annotated[DType | None, typer.Option(help="Precision. Default: float64.")] = None,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier relaxation.")] = False,
) -> None:
    """Relax a structure, and with --cell its cell: structure, trajectory, log and picture in a folder."""
    from moecalc.dynamics import RelaxSettings
    from moecalc.dynamics import relax as relax_structure

    settings = RelaxSettings(
        cell=cell.value, pressure=pressure, fmax=fmax, steps=steps, optimizer=optimizer.value
    )
    with counted_progress("relax", lines=False) as say:
        result = relax_structure(
            named(package),
            structure,
            out,
            settings,
            device=device,
            dtype=dtype,
            threads=threads,
            force=force,
            progress=say,
        )
    console = new_console()
    state = "relaxed" if result.converged else "not relaxed"
    pressure_text = "" if result.pressure is None else f", {result.pressure:.3g} GPa"
    console.print(
        f"{state} in {result.steps:,} steps: {result.energy:.6f} eV, {1000 * result.lowered:.3g} meV/atom "
        f"lower; largest force {result.force:.3g} eV/A{pressure_text}",
        soft_wrap=True,
    )
    names = ["relaxed.extxyz", "relaxed.cif", "trajectory.extxyz", "log.csv", "relax.png"]
    show_written(console, *(out / name for name in names if (out / name).exists()))
    if not result.converged:
        console.print(
            "give more --steps, another --optimizer or a larger --fmax; go on from relaxed.extxyz",
            soft_wrap=True,
        )
        raise typer.Exit(1)
