"""The device under measurement: wait until it is idle, read how much memory is taken, name it.

CUDA is asked through its driver (ctypes), in the primary context, which ONNX Runtime and torch use too. So
one wait covers every stream of this process, and no further package is needed.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from vtp.engines import VtpError, capabilities
from vtp.engines.cuda.driver import load_driver
from vtp.engines.ort.library import load_onnxruntime

CUDA = "ort-cuda"


class Device(Protocol):
    """What a measurement needs of a device."""

    def wait(self) -> None:
        """Return when all work that was given to the device is done."""
        ...

    def used(self) -> int:
        """Bytes taken: of the GPU by everybody, or the most that this process ever held on the CPU."""
        ...


class Cpu:
    """ONNX Runtime's CPU provider returns when it is done."""

    def wait(self) -> None:
        """Nothing is ever pending."""

    def used(self) -> int:
        """Peak resident bytes of this process; 0 where the system does not tell."""
        with suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            return int(found[1]) << 10 if found else 0
        return 0


class Cuda:
    """The first GPU, for the thread that made this object. Raises VtpError where the driver refuses."""

    def __init__(self, load: Callable[[], Any] = load_driver) -> None:
        """Make the primary context current; `load` gives the driver's library (passed in for tests)."""
        try:
            self._driver = load()
        except OSError as error:
            raise VtpError("no NVIDIA driver on this machine; check nvidia-smi") from error
        device, context = ctypes.c_int(0), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def wait(self) -> None:
        """Wait for every stream of this process; VtpError when a kernel had failed."""
        self._call("cuCtxSynchronize")

    def used(self) -> int:
        """Bytes of the GPU that are taken, by whomever."""
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            raise VtpError(f"the CUDA driver failed in {name} (error {code}); check nvidia-smi")


def device_for(engine: str) -> Device:
    """The device that an engine runs on."""
    return Cpu() if capabilities(engine).on_cpu else Cuda()


def load_cuda_libraries(engine: str) -> None:
    """Load CUDA's and cuDNN's libraries for ONNX Runtime, from torch's packages where there is a torch."""
    if engine != CUDA:
        return
    try:
        importlib.import_module("torch")
    except ImportError:
        preload = getattr(load_onnxruntime(), "preload_dlls", None)
        if preload:
            preload()


def slug(name: str) -> str:
    """A hardware's name as a file name: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"
