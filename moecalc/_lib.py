"""Loads the native library, and says in one line why it does not load."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from moecalc import _install
from moecalc._install import REBUILD


def load() -> ModuleType:
    """The module `moecalc._C`. It needs no torch: its types are in `_C.pyi`.

    Raises:
        ImportError: One line that names the versions involved and the command that repairs it.
    """
    if "moecalc._C" in sys.modules:
        return sys.modules["moecalc._C"]
    running = (sys.version_info.major, sys.version_info.minor)
    if not _install.OLDEST_PYTHON <= running <= _install.NEWEST_PYTHON:
        oldest, newest = _install.dotted(_install.OLDEST_PYTHON), _install.dotted(_install.NEWEST_PYTHON)
        raise ImportError(
            f"expected Python {oldest} to {newest}, got Python {_install.dotted(running)}: "
            "install moecalc in an environment of a supported Python"
        )
    try:
        return import_module("moecalc._C")
    except ModuleNotFoundError as error:
        if error.name != "moecalc._C":
            raise
        raise ImportError(_missing(_install.dotted(running))) from None
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise ImportError(
            f"moecalc's native library does not load with Python {_install.dotted(running)}: {reason}: {REBUILD}"
        ) from error


def _missing(running: str) -> str:
    """What to say where there is no module for this Python."""
    others = sorted(path.name for path in Path(__file__).parent.glob("_C.*.so"))
    if others:
        return f"moecalc's native library was compiled for another Python ({', '.join(others)}), not for Python {running}: {REBUILD}"
    return f"moecalc's native library has not been built for Python {running}: {REBUILD}"
