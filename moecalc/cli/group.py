"""How every command ends: errors in one line, signals that clean up, exit codes."""

from __future__ import annotations

import io
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import typer
from typer.core import TyperGroup

from moecalc.errors import MoecalcError

_CLEAN_UP_TIME: Final = 5.0  # seconds


class Commands(TyperGroup):
    """Turns the errors that users can act on into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        _accept_any_text()
        try:
            with _signals_as_exceptions():
                return super().invoke(ctx)
        except _Stopped as stop:
            typer.echo(f"error: stopped by {stop.signal.name}; temporary files were removed", err=True)
            raise typer.Exit(128 + stop.signal) from None
        except KeyboardInterrupt:
            typer.echo("error: interrupted; temporary files were removed", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.params.get("debug") or not _is_expected(error):
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


class _Stopped(BaseException):
    """SIGTERM or SIGHUP. Not an Exception: nothing but clean-up may come between it and the end."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, with its clean-up."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return

    last = -_CLEAN_UP_TIME

    def stop(number: int, _frame: Any) -> None:
        nonlocal last
        # a second signal must not stop the clean-up; but an exception can be lost, as in a destructor
        if time.monotonic() - last > _CLEAN_UP_TIME:
            last = time.monotonic()
            raise _Stopped(number)

    # one that is ignored (nohup) stays so
    before = {
        s: signal.getsignal(s)
        for s in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(s) in (signal.SIG_DFL, None)
    }
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _accept_any_text() -> None:
    """Write what the terminal's encoding lacks (LANG=C) as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_expected(error: Exception) -> bool:
    """Whether the message alone tells a user what to do."""
    native = sys.modules.get("moecalc._C")
    return isinstance(error, MoecalcError | OSError | ImportError | EOFError) or (
        native is not None and isinstance(error, native.Error)
    )
