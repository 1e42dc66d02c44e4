"""Compiles the plugin with `pair_style moe` for a LAMMPS of the user's own: `moecalc lammps build`."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moecalc import _lammps_entry
from moecalc.errors import MoecalcError

SIZES: Final = ("smallbig", "bigbig", "smallsmall")
DEFAULT_OUTPUT: Final = Path("moecalc-plugin")
_LOG: Final = "moecalc-build.log"
_TIME_LIMIT: Final = 20.0  # seconds for `lmp -h`


@dataclass(frozen=True)
class BuiltPlugin:
    """A plugin, and the LAMMPS that it is for."""

    folder: Path  # for LAMMPS_PLUGIN_PATH
    version: str  # of LAMMPS, as "22 Jul 2025" or "4 Jul 2026 - Development"
    build: str  # what LAMMPS says of its git checkout; "" if it has none
    sizes: str  # "smallbig", "bigbig" or "smallsmall"
    mpicxx: str  # the compiler of its MPI; "" if CMake chose


@dataclass(frozen=True)
class _Tree:
    """A LAMMPS that was compiled, or is to be, from sources."""

    source: Path  # folder of pair.h and version.h
    builds: tuple[Path, ...]  # folders in which CMake built it


def build_plugin(
    lammps: str | Path,
    output: str | Path = DEFAULT_OUTPUT,
    *,
    mpicxx: str | Path | None = None,
    sizes: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> BuiltPlugin:
    """Compile the plugin for a LAMMPS of one's own, with CMake.

    Args:
        lammps: folder of LAMMPS' sources, their `src`, or the folder in which CMake built it.
        output: folder for the plugin; made if it is missing.
        mpicxx: compiler of the MPI that LAMMPS was built with. Default: that of LAMMPS' build folder, else
            what CMake finds.
        sizes: LAMMPS_SIZES of that build. Default: as its build folder or its program says, else smallbig.
        progress: called with what happens.

    Raises:
        MoecalcError: no such LAMMPS, it cannot load plugins, a tool is missing, or the compiler failed.
    """
    tree = _find_tree(Path(lammps))
    if sizes is not None and sizes not in SIZES:
        raise MoecalcError(f"expected sizes {', '.join(SIZES[:-1])} or {SIZES[-1]}, got {sizes!r}")
    _check_options(tree)
    chosen_sizes = sizes or _agreed(tree, "LAMMPS_SIZES", "--sizes") or _sizes_of_program(tree) or SIZES[0]
    chosen_mpicxx = str(_program(mpicxx)) if mpicxx else _agreed(tree, "MPI_CXX_COMPILER", "--mpicxx")
    version, build = _version(tree.source), _git_description(tree)
    folder = Path(output).resolve()
    settings = {
        "LAMMPS_SOURCE_DIR": str(tree.source),
        "LAMMPS_BUILD": build,
        "LAMMPS_SIZES": chosen_sizes,
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(folder),
        **({"MPI_CXX_COMPILER": chosen_mpicxx} if chosen_mpicxx else {}),
    }
    progress(f"compiling for LAMMPS {version} ({chosen_sizes})")
    _compile(folder, settings)
    return BuiltPlugin(folder, version, build, chosen_sizes, chosen_mpicxx)


def plugin_sources() -> Path:
    """Folder with the CMakeLists.txt of the plugin, as installed or in a working tree.

    Raises:
        MoecalcError: it is missing.
    """
    package = Path(_lammps_entry.__file__).resolve().parent
    for folder in (package / "_lammps/src", package.parent / "lammps_plugin"):
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise MoecalcError(f"{package / '_lammps/src'}: no sources of the plugin: install moecalc again")


# --- the LAMMPS ---------------------------------------------------------------------------------------


def _find_tree(folder: Path) -> _Tree:
    if not folder.is_dir():
        raise MoecalcError(f"{folder}: no such folder, expected the sources of LAMMPS")
    here = folder.resolve()
    home = _cache(here).get("CMAKE_HOME_DIRECTORY")
    if home is not None:  # a build folder
        return _Tree(_source(Path(home).parent, folder), (here,))
    source = _source(here, folder)
    recipe = source.parent / "cmake"
    found = (file.parent for file in sorted(source.parent.glob("*/CMakeCache.txt")))
    return _Tree(
        source, tuple(path for path in found if _cache(path).get("CMAKE_HOME_DIRECTORY") == str(recipe))
    )


def _source(root: Path, given: Path) -> Path:
    for folder in (root, root / "src"):
        if (folder / "version.h").is_file() and (folder / "pair.h").is_file():
            return folder
    raise MoecalcError(
        f"{given}: expected a folder of LAMMPS' sources with src/version.h and src/pair.h, or one in which "
        "CMake built LAMMPS"
    )


def _version(source: Path) -> str:
    text = (source / "version.h").read_text(encoding="utf-8", errors="replace")
    found = re.search(r'define\s+LAMMPS_VERSION\s+"([^"]+)"', text)
    if found is None:
        raise MoecalcError(f"{source / 'version.h'}: expected a line that defines LAMMPS_VERSION")
    update = re.search(r'define\s+LAMMPS_UPDATE\s+"([^"]+)"', text)
    return found[1] if update is None else f"{found[1]} - {update[1]}"


def _git_description(tree: _Tree) -> str:
    """What the program will say of its git checkout: builds of one release can differ in their classes."""
    found = set()
    for folder in (*(build / "styles" for build in tree.builds), tree.source):
        file = folder / "lmpgitversion.h"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        found |= set(re.findall(r'git_descriptor\(\)\s*{\s*return\s*"([^"]*)"', text))
    found -= {"", "(unknown)"}
    return found.pop() if len(found) == 1 else ""


def _check_options(tree: _Tree) -> None:
    """Raises MoecalcError if LAMMPS was built such that it loads no plugin."""
    for build in tree.builds:
        cache = _cache(build)
        for option in ("PKG_PLUGIN", "BUILD_MPI"):
            if cache.get(option, "ON").upper() in {"OFF", "NO", "FALSE", "0", "N"}:
                raise MoecalcError(
                    f"{build}: expected a LAMMPS that was built with -D{option}=ON, got "
                    f"{option}={cache[option]}: "
                    f"`cmake -D{option}=ON {build}`, and build it again"
                )


def _agreed(tree: _Tree, variable: str, option: str) -> str:
    """What the build folders say; "" if there is none that says anything."""
    values = {build: value for build in tree.builds if (value := _cache(build).get(variable, ""))}
    if len(set(values.values())) > 1:
        every = ", ".join(f"{build.name} has {value}" for build, value in values.items())
        raise MoecalcError(
            f"expected one build of LAMMPS, got several with different {variable} ({every}): give the folder "
            f"of one with --lammps, or {option}"
        )
    return next(iter(values.values()), "")


def _sizes_of_program(tree: _Tree) -> str:
    """LAMMPS_SIZES by what the programs in the sources' folder, built with make, print about themselves.

    "" if there are none.
    """
    found = set()
    for program in sorted(tree.source.glob("lmp*")):
        if not program.is_file() or not os.access(program, os.X_OK):
            continue
        try:
            done = subprocess.run(  # noqa: S603 - the user's LAMMPS
                [str(program), "-h"],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_TIME_LIMIT,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        bits = dict(re.findall(r"sizeof\((\w+)\):\s*(\d+)-bit", done.stdout))
        if {"tagint", "bigint"} <= bits.keys():
            small = "smallsmall" if bits["bigint"] == "32" else "smallbig"
            found.add("bigbig" if bits["tagint"] == "64" else small)
    if len(found) > 1:
        raise MoecalcError(
            f"expected one build of LAMMPS in {tree.source}, got programs of {' and '.join(sorted(found))}: "
            "give --sizes"
        )
    return found.pop() if found else ""


def _cache(folder: Path) -> dict[str, str]:
    """Variables of a folder in which CMake built something; empty if it did not."""
    file = folder / "CMakeCache.txt"
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    return dict(re.findall(r"^(\w+):\w+=(.*)$", text, re.MULTILINE))


# --- compiling ----------------------------------------------------------------------------------------


def _compile(folder: Path, settings: dict[str, str]) -> None:
    """Run CMake in a folder of its own, which is empty at the start: it would remember another MPI."""
    cmake = _find_cmake()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".moecalc-build-", dir=folder) as work:
        _compile_in(Path(work), folder, cmake, settings)


def _compile_in(work: Path, folder: Path, cmake: str, settings: dict[str, str]) -> None:
    variables = [f"-D{name}={value}" for name, value in settings.items()]
    jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 8))
    commands = [
        [cmake, "-S", str(plugin_sources()), "-B", str(work), *variables],
        [cmake, "--build", str(work), "--parallel", jobs],
    ]
    log = folder / _LOG
    with log.open("w", encoding="utf-8") as out:
        for command in commands:
            done = subprocess.run(  # noqa: S603 - our own
                command, stdout=out, stderr=subprocess.STDOUT, check=False
            )
            out.flush()
            if done.returncode != 0:
                raise MoecalcError(
                    f"the plugin does not compile: {_first_error(log)} (all of it is in {log})"
                )
    for name in (_lammps_entry.PLUGIN, _lammps_entry.STYLE):
        if not (folder / name).is_file():
            raise MoecalcError(f"the build left no {name} in {folder}, expected one: see {log}")


def _first_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    for k, line in enumerate(lines):
        if line.startswith("CMake Error"):  # the text is in the lines below
            text = " ".join(part for part in lines[k + 1 : k + 6] if part)
            return text.split("Call Stack")[0].strip() or line
        if re.search(r"\b(fatal )?error\b", line, re.IGNORECASE):
            return line
    return next((line for line in reversed(lines) if line), "no output")


def _program(given: str | Path) -> Path:
    found = shutil.which(str(given))
    if found is None:
        raise MoecalcError(
            f"{given}: no such program, expected the mpicxx of the MPI that LAMMPS was built with"
        )
    return Path(found).absolute()


def _find_cmake() -> str:
    """CMake of the system, or of the PyPI package `cmake`."""
    found = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if found is None and importlib.util.find_spec("cmake") is not None:
        found = shutil.which("cmake", path=str(importlib.import_module("cmake").CMAKE_BIN_DIR))
    if found is None:
        raise MoecalcError("expected CMake 3.18 or newer, found none: `pip install cmake`")
    return found
