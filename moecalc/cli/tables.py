"""Tables without lines, for `rich`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table


def plain_table(*columns: str, right: Sequence[int] = ()) -> Table:
    """A table without lines; `right` are the columns that are aligned so."""
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(columns), header_style="bold"
    )
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k in right else "left", overflow="fold")
    return table


def facts(*rows: tuple[str, str]) -> Table:
    """Names and values in two columns; every call gives the same widths."""
    table = plain_table()
    table.add_column(width=11, style="dim")
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(key, escape(value))
    return table
