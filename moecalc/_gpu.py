"""The GPUs of this machine, from the CUDA driver alone: neither a CUDA toolkit nor torch is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

_LIBRARY: Final = "libcuda.so.1"  # belongs to the driver
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_MAJOR: Final = 75
_MINOR: Final = 76


@dataclass(frozen=True)
class Gpu:
    """One GPU that CUDA_VISIBLE_DEVICES allows.

    Attributes:
        name: of the product.
        capability: of its processors, (9, 0) for `sm_90`.
        memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int


class DriverError(RuntimeError):
    """The driver is missing, or a call of it failed."""


def is_here() -> bool:
    """Whether the machine has an NVIDIA GPU with its kernel module; CUDA may be missing."""
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
        DriverError: there is no driver, or a call of it failed.
    """
    value = ctypes.c_int()
    _call(_driver(), "cuDriverGetVersion", ctypes.byref(value))
    return f"{value.value // 1000}.{value.value % 1000 // 10}"


def gpus() -> list[Gpu]:
    """GPUs that this process can use, in the driver's order.

    Raises:
        DriverError: there is no driver, or a call of it failed.
    """
    driver = _driver()
    count = ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    return [_gpu(driver, number) for number in range(count.value)]


def _gpu(driver: ctypes.CDLL, number: int) -> Gpu:
    device = ctypes.c_int()
    memory = ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGet", ctypes.byref(device), number)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = _attribute(driver, device, _MAJOR), _attribute(driver, device, _MINOR)
    return Gpu(name.value.decode(errors="replace"), capability, memory.value)


def _attribute(driver: ctypes.CDLL, device: ctypes.c_int, attribute: int) -> int:
    value = ctypes.c_int()
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
    return value.value
