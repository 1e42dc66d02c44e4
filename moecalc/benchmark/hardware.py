"""The machine: what it is, and what NumPy reaches on it."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict

from moecalc._gpu import DriverError, gpus

_GEMM: Final = 1536  # rows and columns of the products that measure the arithmetic ceiling
_STREAM: Final = 1 << 25  # numbers in the arrays whose copy measures the memory bandwidth


class Machine(BaseModel):
    """What the numbers depend on."""

    model_config = ConfigDict(extra="forbid")

    cpu: str
    cores: int
    gpu: str | None
    numpy: str
    moecalc: str
    python: str


class Ceilings(BaseModel):
    """What NumPy reached on the CPU.

    Attributes:
        gemm: matrix products, FLOP/s.
        stream: copies, bytes read and written per second.
    """

    model_config = ConfigDict(extra="forbid")

    gemm: float
    stream: float


def machine() -> Machine:
    """This machine."""
    import moecalc

    affinity = getattr(os, "sched_getaffinity", None)
    return Machine(
        cpu=_cpu_name(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        gpu=_gpu_name(),
        numpy=np.__version__,
        moecalc=moecalc.__version__,
        python=platform.python_version(),
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_name() -> str | None:
    try:
        found = gpus()
    except DriverError:
        return None
    return found[0].name if found else None


def ceilings(dtype: str, threads: int = 1, repeat: int = 4) -> Ceilings:
    """Best of some matrix products and copies on the CPU.

    Args:
        dtype: "float32" or "float64".
        threads: that copy; the products take those that NumPy was started with (OMP_NUM_THREADS).
        repeat: measurements.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.random((_GEMM, _GEMM)).astype(dtype) for _ in range(2))
    c = np.empty_like(a)
    gemm = 2 * _GEMM**3 / _fastest(lambda: np.matmul(a, b, out=c), repeat)
    x = np.ones(_STREAM, dtype=dtype)
    y = np.empty_like(x)
    parts = list(zip(np.array_split(y, threads), np.array_split(x, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        seconds = _fastest(lambda: list(pool.map(lambda part: np.copyto(*part), parts)), repeat)
    return Ceilings(gemm=gemm, stream=2 * x.nbytes / seconds)


def _fastest(work: Callable[[], Any], repeat: int) -> float:
    """Least seconds of some calls, one more than `repeat`."""
    best = math.inf
    for _ in range(1 + repeat):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
