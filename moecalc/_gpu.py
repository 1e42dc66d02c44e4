"""The GPUs of this machine, asked of the CUDA driver: no CUDA toolkit and no torch needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

_LIBRARY: Final = "libcuda.so.1"  # belongs to the driver
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver numbers them (CUDA_VISIBLE_DEVICES counts).

    Attributes:
        name: of the product.
        capability: of its processors, (9, 0) for `sm_90`.
        memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int


class DriverError(RuntimeError):
    """The driver is missing, or does not answer."""


def is_here() -> bool:
    """Whether the machine has an NVIDIA GPU, with a driver or without CUDA."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


@cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise DriverError(str(error)) from None
    _call(library, "cuInit", 0)
    return library


def _call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    code = getattr(library, name)(*arguments)
    if code:
        raise DriverError(f"{name} returns error {code}")


def driver_version() -> str:
    """Newest CUDA version that the driver runs, like `12.8`.

    Raises:
        DriverError: there is none, or it does not answer.
    """
    value = ctypes.c_int()
    _call(_driver(), "cuDriverGetVersion", ctypes.byref(value))
    return f"{value.value // 1000}.{value.value % 1000 // 10}"


def gpus() -> list[Gpu]:
    """GPUs that this process can use.

    Raises:
        DriverError: there is no driver, or it does not answer.
    """
    driver = _driver()
    count = ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    return [_gpu(driver, number) for number in range(count.value)]


def _gpu(driver: ctypes.CDLL, number: int) -> Gpu:
    device, value, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGet", ctypes.byref(device), number)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name.value.decode(errors="replace"), (capability[0], capability[1]), memory.value)
