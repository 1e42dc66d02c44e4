"""Where a command writes: results on standard output, progress on standard error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from moecalc._extras import need_torch


def new_console() -> Console:
    """Standard output, for tables."""
    return Console(highlight=False)


def show_written(console: Console, *paths: Path | None) -> None:
    """A line for every file that was written; None: it was not asked for."""
    for path in paths:
        if path is not None:
            console.print(f"wrote {escape(str(path))}", soft_wrap=True)


def echo_json(text: str) -> None:
    """Print JSON that stays JSON in any encoding."""
    if (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        text = re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], text)
    typer.echo(text)


def start_torch(say: Callable[[str], None]) -> None:
    """Import torch, which takes seconds.

    Raises:
        MoecalcError: as `need_torch`.
    """
    say("starting torch")
    need_torch()


@contextmanager
def progress(action: str) -> Iterator[Callable[[str], None]]:
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
def counted_progress(action: str, *, lines: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left, for what can be counted.

    Args:
        action: begins every line.
        lines: where standard error is no terminal, a line per kind of step instead of nothing.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        current = ""

        def say(what: str, done: int, total: int) -> None:  # noqa: ARG001 - lines do not count
            nonlocal current
            if lines and what != current:
                typer.echo(f"{action}: {what}", err=True)
                current = what

        yield say
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # results that go to a file must not be taken to the terminal where the bar is
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=console, transient=True, redirect_stdout=redirect) as bar:
        task = bar.add_task(action, total=None)
        yield lambda what, done, total: bar.update(
            task, description=f"{action}: {escape(what)}", completed=done, total=total
        )
