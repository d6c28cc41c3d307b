"""Memory and one stream of the first CUDA device, through the driver alone (ctypes): no toolkit, no torch.

The primary context is used, as TensorRT and ONNX Runtime do, so that their kernels see the same addresses.
Never run on a GPU yet: the calls follow CUDA's documentation and are tested against a stand-in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from vtp.engines.cuda.driver import load_driver
from vtp.engines.errors import VtpError

_OUT_OF_MEMORY = 2
_NON_BLOCKING = 1  # a stream that does not wait for the default stream
_SMALL, _LARGE = 256, 1 << 20  # sizes are rounded up to these, so that freed blocks are used again


class DeviceMemory(Protocol):
    """What an engine needs of a device; everything happens in order on `stream`."""

    stream: int

    def alloc(self, size: int) -> int:
        """Address of at least `size` bytes, aligned to 256; VtpError when there is no room."""
        ...

    def free(self, address: int) -> None:
        """Give an address back."""
        ...

    def zero(self, address: int, size: int) -> None:
        """Write zeros."""
        ...

    def to_device(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous host array; it may be changed as soon as this returns."""
        ...

    def to_host(self, array: np.ndarray, address: int) -> None:
        """Fill a contiguous host array; done when this returns."""
        ...

    def wait(self) -> None:
        """Return when everything given to the stream is done; VtpError when some of it failed."""
        ...


class CudaMemory:
    """The first GPU. Freed blocks are kept and used again, which is safe as all work is on one stream."""

    def __init__(self, load: Callable[[], Any] = load_driver) -> None:
        """Take the primary context and make a stream. VtpError where there is no driver or no GPU."""
        try:
            self._driver = load()
        except OSError as error:
            raise VtpError("no NVIDIA driver on this machine; check nvidia-smi") from error
        device, self._context, stream = ctypes.c_int(0), ctypes.c_void_p(), ctypes.c_void_p()
        self._ask("cuInit", ctypes.c_uint(0))
        self._ask("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._ask("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        self.stream: int = stream.value or 0
        self._sizes: dict[int, int] = {}
        self._spare: dict[int, list[int]] = {}

    def alloc(self, size: int) -> int:
        """Address of a block of at least `size` bytes; VtpError when the GPU is full."""
        unit = _SMALL if size < _LARGE else _LARGE
        rounded = max(1, -(-size // unit)) * unit
        if self._spare.get(rounded):
            return self._spare[rounded].pop()
        address = self._new(rounded)
        if address is None:
            self._release_spare()
            address = self._new(rounded)
        if address is None:
            raise VtpError(
                f"the GPU has no {rounded / 1e6:,.0f} MB left; vtp-doctor BUNDLE tells what a bundle needs"
            )
        self._sizes[address] = rounded
        return address

    def free(self, address: int) -> None:
        """Keep a block for the next that wants its size."""
        self._spare.setdefault(self._sizes[address], []).append(address)

    def zero(self, address: int, size: int) -> None:
        """Write `size` zero bytes."""
        self._call("cuMemsetD8Async", _pointer(address), ctypes.c_ubyte(0), ctypes.c_size_t(size), self._on)

    def to_device(self, address: int, array: np.ndarray) -> None:
        """Copy to the device; from pageable memory the driver has read it when the call returns."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            _pointer(address),
            array.ctypes.data_as(ctypes.c_void_p),
            _size(array),
            self._on,
        )

    def to_host(self, array: np.ndarray, address: int) -> None:
        """Copy to the host and wait for it."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            array.ctypes.data_as(ctypes.c_void_p),
            _pointer(address),
            _size(array),
            self._on,
        )
        self.wait()

    def wait(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", self._on)

    @property
    def _on(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.stream)

    def _new(self, size: int) -> int | None:
        address = ctypes.c_uint64(0)
        code = self._ask(
            "cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size), passing=_OUT_OF_MEMORY
        )
        return None if code else address.value

    def _release_spare(self) -> None:
        self.wait()
        for addresses in self._spare.values():
            while addresses:
                address = addresses.pop()
                del self._sizes[address]
                self._call("cuMemFree_v2", _pointer(address))

    def _call(self, name: str, *arguments: Any) -> None:
        """Call in this thread's name: the context is made current first, whichever thread it is."""
        self._ask("cuCtxSetCurrent", self._context)
        self._ask(name, *arguments)

    def _ask(self, name: str, *arguments: Any, passing: int = 0) -> int:
        code = getattr(self._driver, name)(*arguments)
        if code and code != passing:
            raise VtpError(f"the CUDA driver failed in {name} (error {code}); check nvidia-smi")
        return code


@lru_cache(maxsize=1)
def cuda_memory() -> CudaMemory:
    """The one CudaMemory of this process, made at the first call."""
    return CudaMemory()


def _pointer(address: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(address)


def _size(array: np.ndarray) -> ctypes.c_size_t:
    return ctypes.c_size_t(array.nbytes)
