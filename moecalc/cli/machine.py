"""`moecalc doctor`: this installation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape

from moecalc.cli.console import new_console, progress
from moecalc.cli.tables import plain_table

if TYPE_CHECKING:
    from moecalc.doctor import Finding

_COLOURS: Final = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON, nothing else.")
    ] = False,
) -> None:
    """Check this installation, and say what to do where something is wrong; exit code 1 if something fails."""  # noqa: E501 - text of --help
    from moecalc.doctor import run_checks

    with progress("checking") as say:
        findings = run_checks(say)
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        shown = {"ok": not failed, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(shown, indent=2))
    else:
        _show_findings(new_console(), findings)
    if failed:
        raise typer.Exit(1)


def _show_findings(console: Console, findings: Sequence[Finding]) -> None:
    table = plain_table()
    for _ in ("status", "name", "detail"):
        table.add_column(overflow="fold")
    for finding in findings:
        remedy = f"\n[bold]-> {escape(finding.remedy)}[/bold]" if finding.remedy else ""
        status = f"[{_COLOURS[finding.status]}]{finding.status}[/]"
        table.add_row(status, escape(finding.name), escape(finding.detail) + remedy)
    console.print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in _COLOURS}
    summary = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    console.print("everything works" if counts["ok"] == len(findings) else summary)
