"""What this machine is, read from its files: board, JetPack, CUDA, TensorRT, memory, power mode.

Every source is optional; what is not there is an empty string. `root` stands in for "/" in tests.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from vtp.engines.cuda.driver import CudaProbe, probe_cuda
from vtp.engines.versions import version_numbers
from vtp.runtime.machine.cgroup import cgroup_left

# Distributions whose presence decides what runs, in the order in which they are shown.
DISTRIBUTIONS = (
    "vtp-edge",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "numpy",
    "tokenizers",
    "pillow",
)
_PACKAGES = re.compile(r"nvidia-jetpack|libnvinfer\d+|cuda-toolkit-\d+-\d+")
_SMI = ("name", "driver_version", "memory.total", "memory.used", "power.limit", "power.max_limit")


@dataclass(frozen=True)
class Memory:
    """Bytes: the machine's, what is free now, swap, and what a container's limit leaves (None: no limit)."""

    total: int = 0
    available: int = 0
    swap: int = 0
    limit: int | None = None

    @property
    def usable(self) -> int:
        """What a process that starts now may take."""
        return self.available if self.limit is None else min(self.available, self.limit)


@dataclass(frozen=True)
class Machine:
    """Everything that `vtp-doctor` knows about a machine; an empty string is something not found."""

    system: str = ""
    board: str = ""  # a Jetson's model
    l4t: str = ""
    jetpack: str = ""
    processor: str = ""
    cores: int = 0
    memory: Memory = field(default_factory=Memory)
    power: str = ""
    cuda: CudaProbe = field(default_factory=CudaProbe)
    toolkit: str = ""
    driver: str = ""
    gpu_used: int = 0  # bytes of the first GPU that other processes hold
    tensorrt: str = ""  # the system's libnvinfer; Python packages are in `packages`
    packages: dict[str, str] = field(default_factory=dict)

    @property
    def is_jetson(self) -> bool:
        """Whether this is a Jetson: GPU and processor share one memory."""
        return bool(self.l4t)

    def room(self, *, on_cpu: bool) -> int:
        """Bytes free for graphs that run on the CPU, or on the GPU; 0 if it is not known."""
        return self.memory.usable if on_cpu else self.gpu_memory

    @property
    def gpu_memory(self) -> int:
        """Free bytes of the first GPU, or what is usable where memory is shared; 0 without a GPU."""
        if not self.cuda.devices:
            return 0
        return self.memory.usable if self.is_jetson else max(1, self.cuda.devices[0].memory - self.gpu_used)


def installed() -> dict[str, str]:
    """Versions of the distributions of `DISTRIBUTIONS` that are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def query_smi() -> str:
    """One line of nvidia-smi about the first GPU; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0]


def look(
    root: Path = Path("/"),
    cuda: Callable[[], CudaProbe] = probe_cuda,
    packages: Callable[[], dict[str, str]] = installed,
    smi: Callable[[], str] = query_smi,
) -> Machine:
    """Look at this machine; nothing missing or unreadable raises."""
    dpkg = _dpkg(root)
    release = _read(root / "etc/nv_tegra_release")
    l4t = _l4t(release)
    gpu, found = _gpu(smi()), cuda()
    return Machine(
        system=_system(root),
        board=_read(root / "proc/device-tree/model").strip("\0 \n"),
        l4t=l4t,
        jetpack=_jetpack(dpkg, l4t),
        processor=_processor(root),
        cores=os.cpu_count() or 0,
        memory=_memory(root),
        power=_power(root, gpu),
        cuda=found,
        toolkit=_toolkit(root, dpkg),
        driver=gpu.get("driver_version", "") or _driver(root),
        gpu_used=_gpu_used(gpu, found),
        tensorrt=_tensorrt(root, dpkg),
        packages=packages(),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else ""


def _system(root: Path) -> str:
    name = _find(r'^PRETTY_NAME="?([^"\n]+)', _read(root / "etc/os-release"))
    return ", ".join(part for part in (name, f"{platform.system()} {platform.machine()}") if part)


def _l4t(release: str) -> str:
    """Jetson Linux's version from "# R36 (release), REVISION: 4.3, ..."."""
    major, minor = _find(r"# R(\d+)", release), _find(r"REVISION: ([\d.]+)", release)
    return f"{major}.{minor}" if major and minor else ""


def _jetpack(dpkg: Mapping[str, str], l4t: str) -> str:
    """The installed metapackage's version; without it the major version that a Jetson Linux belongs to."""
    if "nvidia-jetpack" in dpkg:
        return dpkg["nvidia-jetpack"].partition("+")[0]
    return {"35": "5", "36": "6", "38": "7"}.get(l4t.partition(".")[0], "")


def _dpkg(root: Path) -> dict[str, str]:
    """Versions of the packages that matter, from Debian's own list."""
    found = {}
    for entry in _read(root / "var/lib/dpkg/status").split("\n\n"):
        name = _find(r"^Package: (\S+)", entry)
        if _PACKAGES.fullmatch(name) and "install ok installed" in entry:
            found[name] = _find(r"^Version: (\S+)", entry)
    return found


def _processor(root: Path) -> str:
    text = _read(root / "proc/cpuinfo")
    return _find(r"^model name\s*: (.+)", text) or _find(r"^Model\s*: (.+)", text)


def _memory(root: Path) -> Memory:
    text = _read(root / "proc/meminfo")
    total, available, swap = (
        int(_find(rf"^{name}:\s+(\d+) kB", text) or 0) * 1024
        for name in ("MemTotal", "MemAvailable", "SwapTotal")
    )
    return Memory(total, available, swap, cgroup_left(root))


def _power(root: Path, gpu: Mapping[str, str]) -> str:
    """A Jetson's nvpmodel, else the GPU's power limit, else how the processor is clocked."""
    number = _find(r"pmode:(\d+)", _read(root / "var/lib/nvpmodel/status"))
    if number:
        name = _find(rf"< *POWER_MODEL +ID={int(number)} +NAME=(\S+)", _read(root / "etc/nvpmodel.conf"))
        return f"nvpmodel {int(number)}" + (f" ({name})" if name else "") + _clocks(root)
    if gpu.get("power.limit"):
        most = f" of {gpu['power.max_limit']}" if gpu.get("power.max_limit") else ""
        return f"GPU limited to {gpu['power.limit']}{most} W"
    governor = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    return f"processor governor {governor}" if governor else ""


def _clocks(root: Path) -> str:
    """The GPU's clock now and at most, in MHz."""
    for folder in sorted((root / "sys/class/devfreq").glob("*gpu*")):
        now, most = (_read(folder / name).strip() for name in ("cur_freq", "max_freq"))
        if now.isdecimal() and most.isdecimal():
            return f", GPU {int(now) // 1_000_000} of {int(most) // 1_000_000} MHz"
    return ""


def _gpu(line: str) -> dict[str, str]:
    """nvidia-smi's answer by field; what it does not support is left out."""
    cells = [cell.strip() for cell in line.split(",")]
    pairs = zip(_SMI, cells, strict=True) if len(cells) == len(_SMI) else ()
    return {name: cell for name, cell in pairs if not cell.startswith("[")}


def _gpu_used(gpu: Mapping[str, str], cuda: CudaProbe) -> int:
    """Bytes in use, where nvidia-smi (in MiB) speaks of the same GPU as the driver; else 0."""
    used = gpu.get("memory.used", "")
    same = cuda.devices and cuda.devices[0].name == gpu.get("name")
    return int(used) << 20 if same and used.isdecimal() else 0


def _toolkit(root: Path, dpkg: Mapping[str, str]) -> str:
    try:
        found = json.loads(_read(root / "usr/local/cuda/version.json"))["cuda"]["version"]
        return str(found)
    except (ValueError, KeyError, TypeError):
        found = (version for name, version in dpkg.items() if name.startswith("cuda-toolkit"))
        return max(found, key=version_numbers, default="")


def _driver(root: Path) -> str:
    return _find(r"Kernel Module\D*([\d.]+)", _read(root / "proc/driver/nvidia/version"))


def _tensorrt(root: Path, dpkg: Mapping[str, str]) -> str:
    """The version of libnvinfer: of its package, else of the library file itself."""
    for name, version in dpkg.items():
        if name.startswith("libnvinfer"):
            return version.partition("-")[0]
    files = (path.name for path in (root / "usr/lib").glob("*/libnvinfer.so.*.*"))
    return max((name.partition(".so.")[2] for name in files), key=version_numbers, default="")
