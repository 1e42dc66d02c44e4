"""What is printed of a benchmark and of a report: times, arithmetic, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moecalc.cli.tables import facts, plain_table

if TYPE_CHECKING:
    from moecalc.benchmark import Report, Size
    from moecalc.report import Report as FitnessReport


def show_bench(console: Console, report: Report) -> None:
    """Times by size, shares of a step and arithmetic of the first size."""
    first = report.sizes[0]
    console.print(_machine_facts(report))
    console.print()
    console.print(_times(report.sizes))
    for failure in report.failures:
        console.print(f"[red]{failure.copies} copies failed:[/] {escape(failure.error)}")
    console.print()
    console.print(_shares(first))
    console.print()
    console.print(_arithmetic(first))
    if first.floor_s is not None and first.with_recompute_s is not None:
        console.print(
            f"\narithmetic floor, forward and backward: {1e3 * first.floor_s:.1f} ms; with recomputed values "
            f"{1e3 * first.with_recompute_s:.1f} ms; a step takes {first.step_p50_s / first.floor_s:.2f} and "
            f"{first.step_p50_s / first.with_recompute_s:.2f} times that"
        )


def _machine_facts(report: Report) -> Table:
    """What was timed, and where."""
    machine, first = report.machine, report.sizes[0]
    where = machine.gpu if report.device != "cpu" and machine.gpu else machine.cpu
    rows = [
        ("model", f"{report.model}, {report.dtype}, {report.backend}"),
        ("structure", report.structure),
        ("machine", f"{where}, {report.device}, {report.threads} threads"),
        ("loading", f"{first.load_s:.2f} s, first step {first.first_s:.2f} s"),
    ]
    if first.ceilings is not None:
        gflops, bandwidth = first.ceilings.gemm / 1e9, first.ceilings.stream / 1e9
        rows.append(("ceilings", f"matrix products {gflops:.0f} GFLOP/s, copies {bandwidth:.1f} GB/s"))
    return facts(*rows)


def _times(sizes: Sequence[Size]) -> Table:
    """A row per size; memory is the GPU's where there is one."""
    gpu = sizes[0].peak_gpu_mb is not None
    memory = "GPU MB" if gpu else "MB"
    names = ("atoms", "edges", "angles", "ms/step", "95 %", "ASE ms", "atom steps/s", memory, "/floor")
    table = plain_table(*names, right=range(len(names)))
    for size in sizes:
        peak = size.peak_gpu_mb if gpu else size.peak_mb
        table.add_row(
            f"{size.atoms:,}",
            f"{size.edges:,}",
            f"{size.angles:,}",
            f"{1e3 * size.step_p50_s:.1f}",
            f"{1e3 * size.step_p95_s:.1f}",
            f"{1e3 * size.ase_p50_s:.1f}",
            f"{size.atom_steps_per_s:,.0f}",
            "-" if peak is None else f"{peak:.0f}",
            "-" if size.ratio is None else f"{size.ratio:.2f}",
        )
    return table


def _shares(size: Size) -> Table:
    """Where the time of a step goes."""
    from moecalc.benchmark import breakdown

    table = plain_table(f"step, {size.atoms:,} atoms", "ms", "%", right=(1, 2))
    for name, value in (*breakdown(size), ("(search for neighbors, once in many steps)", size.search_s)):
        table.add_row(name, f"{1e3 * value:.2f}", f"{100 * value / size.step_p50_s:.1f}")
    return table


def _arithmetic(size: Size) -> Table:
    """Operations and traffic of every part of a step."""
    from moecalc.benchmark import part_costs, total_cost

    parts = part_costs(size)
    names = ("GFLOP", "forward", "backward", "recompute", "activations, 1e6", "GB moved")
    table = plain_table(*names, right=range(1, len(names)))
    for name, cost in [*parts.items(), ("total", total_cost(parts))]:
        table.add_row(
            name,
            f"{cost.forward / 1e9:.3f}",
            f"{cost.backward / 1e9:.3f}",
            f"{cost.recompute / 1e9:.3f}",
            f"{cost.activations / 1e6:.1f}",
            f"{(cost.forward_bytes + cost.backward_bytes) / 1e9:.3f}",
        )
    return table


def show_report(console: Console, report: FitnessReport) -> None:
    """Errors of every group, and elastic constants."""
    skipped = f", {len(report.skipped)} skipped" if report.skipped else ""
    frames = f"{report.n_frames:,} of {report.n_read:,} frames, {report.n_atoms:,} atoms"
    console.print(
        facts(
            ("model", f"{report.model}, {report.speed.dtype} on {report.speed.device}"),
            ("data", f"{frames} of {report.data}{skipped}"),
            ("speed", f"{report.speed.atom_steps_per_s:,.0f} atom-steps/s in batches"),
        )
    )
    console.print()
    console.print(_errors(report))
    if report.elastic:
        console.print()
        console.print(_elastic_constants(report))
    for remark in report.remarks:
        console.print(f"\n[yellow]{escape(remark)}[/]")
    console.print()


def _errors(report: FitnessReport) -> Table:
    """A row per group, and one for all frames."""
    from moecalc.page import significant

    names = (
        "group",
        "frames",
        "energy MAE\nmeV/atom",
        "without\nmean",
        "force MAE\neV/A",
        "RMSE\neV/A",
        "rms\nforce",
        "stress MAE\nGPa",
    )
    table = plain_table(*names, right=range(1, len(names)))
    table.columns[0].no_wrap = True
    table.columns[0].min_width = max(len(group.name) for group in report.groups)
    for group in (*report.groups, report.total):
        table.add_row(
            escape(group.name),
            f"{group.n_frames:,}",
            significant(group.energy.mae),
            significant(group.energy_shifted.mae),
            significant(group.forces.mae),
            significant(group.forces.rmse),
            significant(group.forces.scale),
            significant(group.stress.mae) if group.stress else "-",
            style="bold" if group is report.total else "",
        )
    return table


def _elastic_constants(report: FitnessReport) -> Table:
    """A row per crystal."""
    names = report.elastic[0].names
    table = plain_table("GPa, reference / model", *names, right=range(1, 1 + len(names)))
    for crystal in report.elastic:
        values = zip(crystal.reference, crystal.model, strict=True)
        table.add_row(f"{crystal.cell} {crystal.lattice}", *(f"{a:.0f} / {b:.0f}" for a, b in values))
    return table
