"""Programs in processes of their own, and one that notices what a step changes in its process."""

from __future__ import annotations

import os
import subprocess
import sys

SETTINGS = """
import ctypes, fcntl, gc, locale, os, signal, sys

import numpy as np
from ase.build import bulk
import torch

openmp = ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_LOCAL)
libm = ctypes.CDLL("libm.so.6")

def kept_after_free():
    "MB that stay with the process after many arrays of a step's size were freed."
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
    before = resident()
    blocks = [np.ones(25_000) for _ in range(1500)]  # 0.2 MB each
    del blocks
    gc.collect()
    return resident() - before

def settings():
    tiny = np.full(4, 1e-310)
    old_mask = os.umask(0o22)
    os.umask(old_mask)
    with open("/proc/self/status") as status:
        masks = [line.split() for line in status if line.startswith(("SigBlk", "SigIgn", "SigCgt"))]
    own = 3 << 31  # the C library takes signals 32 and 33 with the first thread
    return dict(
        openmp=openmp.omp_get_max_threads(),
        dynamic=openmp.omp_get_dynamic(),
        torch=torch.get_num_threads(),
        denormals=bool((tiny * 0.5 != 0.0).all()),
        rounding=libm.fegetround(),
        traps=libm.fegetexcept(),
        locale=locale.setlocale(locale.LC_ALL),
        handlers=[str(signal.getsignal(s)) for s in sorted(signal.valid_signals())],
        signals=[(name, int(mask, 16) & ~own) for name, mask in masks],
        umask=old_mask,
        folder=os.getcwd(),
        environment=dict(os.environ),
        affinity=os.sched_getaffinity(0),
    )

torch.get_num_threads()  # where it is first asked, torch sets OpenMP's number
{setup}
before = settings()
{use}
after = settings()
for name in before:
    assert before[name] == after[name], (name, before[name], after[name])
kept = kept_after_free()
assert kept < 60, f"{{kept:.0f}} MB of 300 stay with the process"
print("unchanged")
"""


def python(code: str, *, openmp: str | None = None, limit: float = 120.0, **env: str) -> str:
    """Output of a program that must end well, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | env
    if openmp is not None:
        environment["OMP_NUM_THREADS"] = openmp
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    return run.stdout
