"""Loads the native library, and says in one line why it does not load."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from moecalc import _install
from moecalc._install import REBUILD

if TYPE_CHECKING:
    from moecalc import _C


class Native(Protocol):
    """What the module `moecalc._C` has; its classes and functions are described in `_C.pyi`."""

    Error: type[_C.Error]
    OutOfMemoryError: type[_C.OutOfMemoryError]
    NotFiniteError: type[_C.NotFiniteError]
    OverlapError: type[_C.OverlapError]
    Evaluator: type[_C.Evaluator]
    LayerRunner: type[_C.LayerRunner]
    Trainer: type[_C.Trainer]
    MIN_DISTANCE: float
    TRAINING_TENSORS: list[str]

    def build_info(self) -> str: ...
    def cuda_device_count(self) -> int: ...
    def check_archive(self, path: str | bytes) -> None: ...
    def check_package(self, path: str | bytes, content: bytes = ...) -> None: ...
    def words_of_code(self, path: str | bytes) -> list[str]: ...
    def allowed_words(self) -> list[str]: ...
    def read_record(self, path: str | bytes, name: str) -> bytes: ...


if TYPE_CHECKING:
    _module: Native = _C  # the types of the module and the protocol agree


def load() -> Native:
    """The module `moecalc._C`. It needs no torch.

    Raises:
        ImportError: One line that names the versions involved and the command that repairs it.
    """
    if "moecalc._C" in sys.modules:
        return cast("Native", sys.modules["moecalc._C"])
    running = (sys.version_info.major, sys.version_info.minor)
    if not _install.OLDEST_PYTHON <= running <= _install.NEWEST_PYTHON:
        oldest, newest = _install.dotted(_install.OLDEST_PYTHON), _install.dotted(_install.NEWEST_PYTHON)
        raise ImportError(
            f"expected Python {oldest} to {newest}, got Python {_install.dotted(running)}: "
            "install moecalc in an environment of a supported Python"
        )
    try:
        return cast("Native", import_module("moecalc._C"))
    except ModuleNotFoundError as error:
        if error.name != "moecalc._C":
            raise
        raise ImportError(_missing(_install.dotted(running))) from None
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise ImportError(
            f"moecalc's native library does not load with Python {_install.dotted(running)}: {reason}: "
            f"{REBUILD}"
        ) from error


def _missing(running: str) -> str:
    """What to say where there is no module for this Python."""
    others = sorted(path.name for path in Path(__file__).parent.glob("_C.*.so"))
    if others:
        return (
            f"moecalc's native library was compiled for another Python ({', '.join(others)}), "
            f"not for Python {running}: {REBUILD}"
        )
    sources = Path(__file__).resolve().parents[1]
    if (sources / "setup.py").is_file():  # Python looks into its working folder before the environment
        return (
            f"moecalc was imported from its sources in {sources}, where nothing is built for Python "
            f"{running}: if it is installed, run Python in another folder; else build it with `make dev`"
        )
    return f"moecalc's native library has not been built for Python {running}: {REBUILD}"
