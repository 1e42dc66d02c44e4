"""What the commands print: tables of packages, checks, times and errors, for `rich`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moecalc.conditions import Conditions, ModelConditions, format_numbers

if TYPE_CHECKING:
    from moecalc.bench import Ceilings, Report
    from moecalc.package.metadata import Metadata, PackageReport, PositionRouting, VerificationReport
    from moecalc.report import Report as FitnessReport

MAX_ELEMENTS: Final = 30
"""Rows of a routing table that a terminal page still shows."""


def plain_table(*columns: str, right: Sequence[int] = ()) -> Table:
    """A table without lines; `right` are the columns that are aligned so."""
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(columns), header_style="bold"
    )
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k in right else "left")
    return table


def facts(*rows: tuple[str, str]) -> Table:
    """Names and values in two columns; every call gives the same widths."""
    table = plain_table()
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


def show_package(console: Console, report: PackageReport, *, selected: bool) -> None:
    """Facts of a new package, and its size against the checkpoint's. `selected`: its elements were chosen."""
    metadata, pruned = report.metadata, report.pruned
    source = metadata.source
    dropped: list[str] = pruned.get("elements", [])
    show_metadata(console, metadata, Path(report.path), report.size_bytes)
    if selected:
        console.print(facts(("dropped", f"{len(dropped)}: {' '.join(dropped)}" if dropped else "no element")))
    table = plain_table("", "checkpoint", "package", "", right=(1, 2))
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


def show_metadata(console: Console, metadata: Metadata, path: Path, size: int) -> None:
    """Facts of a package."""
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
        *([] if metadata.conditions is None else _describe_conditions(metadata.conditions)),
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
    console.print(facts(*rows))


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
    by = "element, charge and spin" if routing.on_charge_spin else routing.level
    return f"{'; '.join(sorted(kinds))}; at {n_positions} positions, routed by {by}"


def _describe_conditions(conditions: ModelConditions) -> list[tuple[str, str]]:
    """What a package takes beside a structure, and what is fixed."""
    rows = []
    if conditions.charge_spin is not None:
        default = conditions.charge_spin.default
        given = "no default, must be given" if default is None else f"default {default[0]} and {default[1]}"
        rows.append(("charge, spin", f"taken (spin is the multiplicity 2S+1), {given}"))
    if conditions.fparam is not None:
        numbers = conditions.fparam.default
        given = "no default, must be given" if numbers is None else f"default {format_numbers(numbers)}"
        same = " (charge and spin, by another name)" if conditions.fparam_is_charge_spin else ""
        rows.append(("fparam", f"{conditions.fparam.size} taken{same}, {given}"))
    fixed = conditions.fixed
    if fixed is not None:
        values = Conditions(fixed.charge, fixed.spin, None if fixed.fparam is None else tuple(fixed.fparam))
        rows.append(("fixed", str(values)))
    return rows


def show_routing(console: Console, metadata: Metadata) -> None:
    """Experts and weights in per cent, one table per layer: elements down, positions (equal ones joined) across."""
    if not metadata.routing.is_moe or not metadata.routing.is_table:
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
        table = plain_table(f"layer {index}", *headers)
        for column in table.columns[1:]:
            column.min_width = 5
        table.padding = (0, 1, 0, 0)
        for t, element in enumerate(metadata.elements[:MAX_ELEMENTS]):
            table.add_row(element, *(" ".join(cells[t]) for cells in columns))
        console.print()
        console.print(table)
    hidden = len(metadata.elements) - MAX_ELEMENTS
    if hidden > 0:
        console.print(f"\n{hidden} more elements: see `moecalc inspect --json`, or --plot for a figure")


def _routing_cells(position: PositionRouting) -> list[list[str]]:
    """For every element its routed experts as `expert:percent`."""
    cells = []
    for experts, weights in zip(position.experts, position.weights, strict=True):
        routed = [(w, e) for e, w in zip(experts, weights, strict=True) if e < position.n_routed]
        cells.append([f"{e}:{100 * w:.0f}" for w, e in sorted(routed, reverse=True)] or ["-"])
    return cells


def show_checks(console: Console, report: VerificationReport) -> None:
    """Every check of a verification."""
    table = plain_table("verification", "deviation", "allowed", "", right=(1, 2))
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


def show_bench(console: Console, report: Report) -> None:
    """Times by size, shares of a step and arithmetic of the first size."""
    from moecalc.bench import breakdown, part_costs
    from moecalc.costs import total_cost

    machine, first = report.machine, report.sizes[0]
    where = machine.gpu if report.device != "cpu" and machine.gpu else machine.cpu
    console.print(
        facts(
            ("model", f"{report.model}, {report.dtype}, {report.backend}"),
            ("structure", report.structure),
            ("machine", f"{where}, {report.device}, {report.threads} threads"),
            ("loading", f"{first.load_s:.2f} s, first step {first.first_s:.2f} s"),
            *(() if first.ceilings is None else (("ceilings", _describe_ceilings(first.ceilings)),)),
        )
    )
    gpu = first.peak_gpu_mb is not None
    table = plain_table(
        "atoms", "edges", "angles", "ms/step", "95 %", "ASE ms", "atom steps/s", "GPU MB" if gpu else "MB", "/floor",
        right=range(9),
    )  # fmt: skip
    for size in report.sizes:
        peak = size.peak_gpu_mb if gpu else size.peak_mb
        table.add_row(
            f"{size.atoms:,}", f"{size.edges:,}", f"{size.angles:,}", f"{1e3 * size.step_p50_s:.1f}",
            f"{1e3 * size.step_p95_s:.1f}", f"{1e3 * size.ase_p50_s:.1f}",
            f"{size.atom_steps_per_s:,.0f}", "-" if peak is None else f"{peak:.0f}", "-" if size.ratio is None else f"{size.ratio:.2f}",
        )  # fmt: skip
    console.print()
    console.print(table)
    for failure in report.failures:
        console.print(f"[red]{failure.copies} copies failed:[/] {escape(failure.error)}")

    table = plain_table(f"step, {first.atoms:,} atoms", "ms", "%", right=(1, 2))
    for name, value in (*breakdown(first), ("(search for neighbours, once in many steps)", first.search_s)):
        table.add_row(name, f"{1e3 * value:.2f}", f"{100 * value / first.step_p50_s:.1f}")
    console.print()
    console.print(table)

    parts = part_costs(first)
    table = plain_table(
        "GFLOP", "forward", "backward", "recompute", "activations, 1e6", "GB moved", right=(1, 2, 3, 4, 5)
    )
    for name, cost in [*parts.items(), ("total", total_cost(parts))]:
        table.add_row(
            name, f"{cost.forward / 1e9:.3f}", f"{cost.backward / 1e9:.3f}", f"{cost.recompute / 1e9:.3f}",
            f"{cost.activations / 1e6:.1f}", f"{(cost.forward_bytes + cost.backward_bytes) / 1e9:.3f}",
        )  # fmt: skip
    console.print()
    console.print(table)
    if first.floor_s is not None and first.with_recompute_s is not None:
        console.print(
            f"\narithmetic floor, forward and backward: {1e3 * first.floor_s:.1f} ms; with recomputed values "
            f"{1e3 * first.with_recompute_s:.1f} ms; a step takes {first.step_p50_s / first.floor_s:.2f} and "
            f"{first.step_p50_s / first.with_recompute_s:.2f} times that"
        )


def _describe_ceilings(ceilings: Ceilings) -> str:
    return f"matrix products {ceilings.gemm / 1e9:.0f} GFLOP/s, copies {ceilings.stream / 1e9:.1f} GB/s"


def show_report(console: Console, report: FitnessReport) -> None:
    """Errors of every group, and elastic constants."""
    from moecalc.report.render import significant as sig

    skipped = f", {len(report.skipped)} skipped" if report.skipped else ""
    console.print(
        facts(
            ("model", f"{report.model}, {report.speed.dtype} on {report.speed.device}"),
            (
                "data",
                f"{report.n_frames:,} of {report.n_read:,} frames, {report.n_atoms:,} atoms of {report.data}{skipped}",
            ),
            ("speed", f"{report.speed.atom_steps_per_s:,.0f} atom-steps/s in batches"),
        )
    )
    table = plain_table(
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
        table = plain_table("GPa, reference / model", *names, right=range(1, 1 + len(names)))
        for crystal in report.elastic:
            values = zip(crystal.reference, crystal.model, strict=True)
            table.add_row(f"{crystal.cell} {crystal.lattice}", *(f"{a:.0f} / {b:.0f}" for a, b in values))
        console.print()
        console.print(table)
    for remark in report.remarks:
        console.print(f"\n[yellow]{escape(remark)}[/]")
    console.print()
