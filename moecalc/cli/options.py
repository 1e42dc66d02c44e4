"""Arguments and options that several commands have, and their checks."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moecalc.errors import MoecalcError, PackageError

DEFAULT = "default"
"""Name of the model that comes with moecalc, instead of a path."""

PackageName = Annotated[
    str, typer.Argument(metavar="PACKAGE|default", help="Package, *.moe.pt, or the default model.")
]
NewPackage = Annotated[Path, typer.Option("--out", "-o", help="Package to write, *.moe.pt.")]
Overwrite = Annotated[bool, typer.Option("--force", help="Overwrite an existing package.")]


class DType(StrEnum):
    """Precision of the network."""

    float32 = "float32"
    float64 = "float64"


def path_of(package: str) -> Path:
    """Path of a package that was named, or of the default model."""
    from moecalc.models import default_model_path

    return default_model_path() if package == DEFAULT else Path(package)


def named(package: str) -> str | None:
    """The same for functions that take None for the default model."""
    return None if package == DEFAULT else package


def split_symbols(elements: str | None) -> list[str] | None:
    """Symbols of an option `Nb,Mo,Ta,W`; None: it was not given."""
    return None if elements is None else [symbol.strip() for symbol in elements.split(",")]


def check_new(out: Path, force: bool) -> None:
    """Refuse to overwrite a file without `--force`.

    Raises:
        PackageError: it exists.
    """
    if out.exists() and not force:
        raise PackageError(f"{out} exists: choose another name with -o, or overwrite it with --force")


def check_folder_of(json_file: Path | None, content: str) -> None:
    """Refuse a file of results whose folder does not exist, before the results are computed.

    Raises:
        MoecalcError: no such folder.
    """
    if json_file is not None and not json_file.parent.is_dir():
        raise MoecalcError(f"{json_file.parent}: no such folder, expected an existing one for the {content}")
