"""What is printed of a package: facts, routing, checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moecalc.cli.tables import facts, plain_table
from moecalc.conditions import Conditions, ModelConditions, format_numbers

if TYPE_CHECKING:
    from moecalc.package.metadata import Metadata, PackageReport, PositionRouting, VerificationReport

Fact = tuple[str, str]

MAX_ELEMENTS: Final = 30
"""Rows of a routing table that a terminal page still shows."""


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
    dropped: list[str] = report.pruned.get("elements", [])
    show_metadata(console, report.metadata, Path(report.path), report.size_bytes)
    if selected:
        console.print(facts(("dropped", f"{len(dropped)}: {' '.join(dropped)}" if dropped else "no element")))
    console.print()
    console.print(_size_table(report))


def _size_table(report: PackageReport) -> Table:
    """Checkpoint and package side by side."""
    metadata, source = report.metadata, report.metadata.source
    table = plain_table("", "checkpoint", "package", "", right=(1, 2))
    table.add_row(
        "file",
        _megabytes(source.size_bytes),
        _megabytes(report.size_bytes),
        _change(source.size_bytes, report.size_bytes),
    )
    total = metadata.parameters.total
    table.add_row("parameters", f"{source.parameters:,}", f"{total:,}", _change(source.parameters, total))
    before, after = report.pruned.get("experts_before"), report.pruned.get("experts_after")
    if metadata.routing.is_moe and before is not None and after is not None:
        table.add_row("expert matrices", f"{before:,}", f"{after:,}", _change(before, after))
    elements_before = len(metadata.elements) + len(report.pruned.get("elements", []))
    table.add_row("elements", str(elements_before), str(len(metadata.elements)), "")
    return table


def show_metadata(console: Console, metadata: Metadata, path: Path, size: int) -> None:
    """Facts of a package; `size` in bytes."""
    texts = (("note", metadata.note), ("licence", metadata.license), ("cite", metadata.citation))
    console.print(
        facts(
            ("name", metadata.name),
            ("file", f"{path}, {_megabytes(size)}, format {metadata.format_version}"),
            *_describe_model(metadata),
            *([] if metadata.conditions is None else _describe_conditions(metadata.conditions)),
            *_describe_origin(metadata),
            *((name, text) for name, text in texts if text),
            *(("remark", remark) for remark in metadata.remarks),
        )
    )


def _describe_model(metadata: Metadata) -> list[Fact]:
    """Elements, cutoffs and sizes."""
    parameters = metadata.parameters
    angles = f", angles {metadata.angle_cutoff:g} A" if metadata.angle_cutoff > 0 else ", no angles"
    widths = ", ".join(f"{name} {width}" for name, width in metadata.dims.items())
    rows = [("elements", f"{len(metadata.elements)}: {' '.join(metadata.elements)}")]
    untrained = [e for e in metadata.elements if e not in metadata.trained_elements]
    if untrained:
        listed = f"{len(untrained)}: {' '.join(untrained)}"
        rows.append(("untrained", f"{listed} (using them needs allow_untrained=True)"))
    return [
        *rows,
        ("cutoffs", f"edges {metadata.cutoff:g} A{angles}"),
        ("network", f"{metadata.n_layers} layers, {widths}"),
        ("precision", metadata.dtype),
        ("parameters", f"{parameters.total:,}, active per atom {parameters.active:,}"),
        ("experts", _describe_experts(metadata)),
    ]


def _describe_origin(metadata: Metadata) -> list[Fact]:
    """The checkpoint, and what made the package of it."""
    source = metadata.source
    head = f", head {source.head}" if source.head else ""
    versions = ", ".join(f"{name} {version}" for name, version in metadata.versions.items())
    return [
        ("source", f"{source.file}, layout {source.layout}{head}"),
        ("sha256", source.sha256),
        ("made", f"{metadata.created} by {versions}"),
    ]


def _describe_experts(metadata: Metadata) -> str:
    routing = metadata.routing
    if not routing.is_moe:
        return "none, a dense model"
    kinds = {
        f"{p.n_routed} routed ({p.top_k} active) + {p.n_shared} shared, "
        + ("linear" if p.kind == "linear" else "nonlinear")
        for layer in routing.layers
        for p in layer.values()
    }
    n_positions = sum(len(layer) for layer in routing.layers)
    by = "element, charge and spin" if routing.on_charge_spin else routing.level
    return f"{'; '.join(sorted(kinds))}; at {n_positions} positions, routed by {by}"


def _describe_conditions(conditions: ModelConditions) -> list[Fact]:
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
    """Experts and their weights in per cent, a table per layer: elements down, positions across."""
    if not metadata.routing.is_moe or not metadata.routing.is_table:
        return
    console.print(
        "\nRouting: expert and its weight in %, largest first; "
        "shared experts (weight 1 for all) are left out."
    )
    for index, layer in enumerate(metadata.routing.layers, start=1):
        if layer:
            console.print()
            console.print(_routing_table(f"layer {index}", metadata.elements[:MAX_ELEMENTS], layer))
    hidden = len(metadata.elements) - MAX_ELEMENTS
    if hidden > 0:
        console.print(
            f"\n{hidden} more elements: see `moecalc inspect PACKAGE --json`, or --plot for a figure"
        )


def _routing_table(title: str, elements: Sequence[str], layer: Mapping[str, PositionRouting]) -> Table:
    """The experts of every element, a column for all positions that are routed alike."""
    from moecalc.keys import short_name

    columns: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for name, position in layer.items():
        cells = tuple(map(tuple, _routing_cells(position)))
        columns.setdefault(cells, []).append(short_name(name))
    table = plain_table(title, *(",\n".join(names) for names in columns.values()))
    for column in table.columns[1:]:
        column.min_width = 5
    table.padding = (0, 1, 0, 0)
    for t, element in enumerate(elements):
        table.add_row(element, *(" ".join(cells[t]) for cells in columns))
    return table


def _routing_cells(position: PositionRouting) -> list[list[str]]:
    """For every element its routed experts as `expert:percent`."""
    cells = []
    for experts, weights in zip(position.experts, position.weights, strict=True):
        routed = [(w, e) for e, w in zip(experts, weights, strict=True) if e < position.n_routed]
        cells.append([f"{e}:{100 * w:.0f}" for w, e in sorted(routed, reverse=True)] or ["-"])
    return cells


def show_verified(console: Console, report: VerificationReport) -> None:
    """What the stored verification found, in one line."""
    n = len(report.checks)
    passed = n - len(report.failures())
    text = f"{passed} of {n} checks passed when it was made; `moecalc verify` repeats them"
    console.print(facts(("verified", text)))


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
