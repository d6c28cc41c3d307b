"""Which GPUs there are: a stand-in for the driver's library, and this machine's own."""

from __future__ import annotations

from typing import Any

import pytest

from vtp.engines.cuda.driver import CudaDevice, probe_cuda


class Driver:
    """Answers as libcuda does, through the references it is given."""

    def __init__(self, init: int = 0, devices: int = 1) -> None:
        self._init, self._devices = init, devices

    def cuInit(self, flags: int) -> int:
        return self._init

    def cuDeviceGetCount(self, count: Any) -> int:
        return self._give(count, self._devices)

    def cuDriverGetVersion(self, version: Any) -> int:
        return self._give(version, 12060)

    def cuDeviceGet(self, device: Any, number: int) -> int:
        return self._give(device, number)

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = b"Orin"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        return self._give(memory, 8 << 30)

    def cuDeviceGetAttribute(self, value: Any, which: int, device: Any) -> int:
        return self._give(value, {75: 8, 76: 7}[which])

    def _give(self, reference: Any, value: int) -> int:
        reference._obj.value = value
        return 0


def test_devices_are_described() -> None:
    found = probe_cuda(Driver)
    assert found.devices == [CudaDevice("Orin", "8.7", 8 << 30)]
    assert (found.driver, found.reason) == ("12.6", "")


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver(init=100), "finds no GPU"),
        (Driver(init=803), "error 803"),
        (Driver(devices=0), "finds no GPU"),
    ],
)
def test_a_driver_without_a_gpu_says_why(driver: Driver, reason: str) -> None:
    found = probe_cuda(lambda: driver)
    assert not found.devices and reason in found.reason


def test_no_driver_says_so() -> None:
    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    assert probe_cuda(missing).reason.startswith("no NVIDIA driver")


def test_this_machine_is_probed() -> None:
    found = probe_cuda()
    assert bool(found.devices) != bool(found.reason)
