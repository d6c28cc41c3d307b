"""Energy of the runs, where the device reports its power: a Jetson's tegrastats, or NVML by nvidia-smi.

Both print a line every tenth of a second; power is averaged over the time in which runs were counted.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

_EVERY_MS = 100


# The rail that feeds everything, where a board measures it (Orin NX and Nano, Xavier NX; Nano of 2019).
_INPUTS = ("VDD_IN", "POM_5V_IN")
# Else the rails whose sum is the module: AGX Orin.
_SHARES = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")


def _tegra(line: str) -> float | None:
    """Watts of the module, from "RAIL now/average" in mW (releases before JetPack 5 leave the unit out)."""
    rails = {name: int(now) for name, now in re.findall(r"\b(\w+) (\d+)(?:mW)?/\d+(?:mW)?\b", line)}
    for name in _INPUTS:
        if name in rails:
            return rails[name] / 1e3
    shares = [rails[name] for name in _SHARES if name in rails]
    return sum(shares) / 1e3 if len(shares) == len(_SHARES) else None


def _smi(line: str) -> float | None:
    """Watts of the first GPU alone."""
    try:
        return float(line)
    except ValueError:
        return None


Source = tuple[str, list[str], Callable[[str], float | None]]
SOURCES: tuple[Source, ...] = (
    ("tegrastats, the module", ["tegrastats", "--interval", str(_EVERY_MS)], _tegra),
    (
        "NVML, first GPU",
        [
            "nvidia-smi",
            "--id=0",
            "--query-gpu=power.draw",
            "--format=csv,noheader,nounits",
            f"--loop-ms={_EVERY_MS}",
        ],
        _smi,
    ),
)


class Meter:
    """Reads power while it is open; `counting` marks the runs whose energy is wanted."""

    def __init__(self, sources: Sequence[Source] = SOURCES) -> None:
        """Take the first source whose command is there."""
        self.source = next((source for source in sources if shutil.which(source[1][0])), None)
        self._runs = 0
        self._seconds = 0.0
        self._counted = False
        self._watts: list[float] = []
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Meter:
        if self.source is not None:
            self._process = subprocess.Popen(
                self.source[1], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._thread is not None:
            self._process.terminate()
            self._process.wait()
            self._thread.join()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """The body is one run."""
        self._counted, start = True, time.perf_counter()
        try:
            yield
        finally:
            self._counted = False
            self._runs += 1
            self._seconds += time.perf_counter() - start

    def report(self) -> dict[str, Any]:
        """source, watts and joules per run; without a reading, `note` says why."""
        if self.source is None:
            return {"note": "this device reports no power (neither tegrastats nor NVML)"}
        if not self._watts or not self._runs:
            return {"source": self.source[0], "note": f"{self.source[1][0]} gave no reading during the runs"}
        watts = sum(self._watts) / len(self._watts)
        return {"source": self.source[0], "watts": watts, "joules": watts * self._seconds / self._runs}

    def _read(self) -> None:
        assert self._process is not None and self.source is not None  # started with both
        for line in self._process.stdout or ():
            watts = self.source[2](line.strip())
            if watts is not None and self._counted:
                self._watts.append(watts)
