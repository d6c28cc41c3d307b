"""The CUDA devices of this machine, asked of the driver itself: no torch, no toolkit, no GPU memory used."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability
_NO_DEVICE = 100
_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@dataclass(frozen=True)
class CudaDevice:
    """One GPU: its name, compute capability ("8.7") and memory in bytes (on a Jetson, the whole board's)."""

    name: str
    sm: str
    memory: int


@dataclass(frozen=True)
class CudaProbe:
    """The devices found; without any, `reason` says why. `driver` is the newest CUDA it runs ("13.0")."""

    devices: list[CudaDevice] = field(default_factory=list)
    reason: str = ""
    driver: str = ""


def load_driver() -> Any:
    """The CUDA driver's library. Raises OSError where there is none."""
    return ctypes.CDLL(_LIBRARY)


def probe_cuda(load: Callable[[], Any] = load_driver) -> CudaProbe:
    """List the CUDA devices; never raises. `load` gives the driver's library (passed in for tests)."""
    try:
        cuda = load()
    except OSError:
        return CudaProbe(reason=f"no NVIDIA driver ({_LIBRARY} is not there)")
    code = cuda.cuInit(0)
    if code:
        why = "the driver finds no GPU" if code == _NO_DEVICE else f"the driver does not start (error {code})"
        return CudaProbe(reason=why)
    count = _integer(cuda.cuDeviceGetCount)
    devices = [_describe(cuda, number) for number in range(count)]
    version = _integer(cuda.cuDriverGetVersion)
    driver = f"{version // 1000}.{version % 1000 // 10}" if version else ""
    return CudaProbe(devices, "" if devices else "the driver finds no GPU", driver)


def _integer(function: Any, *arguments: Any) -> int:
    """Call a driver function that writes one int; 0 when it fails."""
    number = ctypes.c_int(0)
    return 0 if function(ctypes.byref(number), *arguments) else number.value


def _describe(cuda: Any, number: int) -> CudaDevice:
    device = ctypes.c_int(_integer(cuda.cuDeviceGet, number))
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    major, minor = (_integer(cuda.cuDeviceGetAttribute, which, device) for which in (_MAJOR, _MINOR))
    return CudaDevice(name.value.decode(errors="replace"), f"{major}.{minor}", memory.value)
