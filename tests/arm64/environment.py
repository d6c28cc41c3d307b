"""Two environments in build/arm64: arm64 Python under qemu, this machine's with the same ONNX Runtime.

Debian's arm64 packages and PyPI's aarch64 wheels are unpacked into folders; nothing enters the system.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/arm64"
SYSTEM, WHEELS, HOST, MORE = BUILD / "root", BUILD / "site", BUILD / "host", BUILD / "more"
QEMU = "qemu-aarch64-static"
WANTED = {QEMU: "qemu-user-static", "apt-get": "apt", "dpkg-deb": "dpkg"}  # command: its package
# 1.31.1's import crashes under Debian's qemu 7.2; bundles of target ort want 1.23.
ONNXRUNTIME = "onnxruntime==1.23.2"
PINNED = ("numpy", "pillow", "tokenizers", "jinja2")  # in constraints.txt
# What the commands need beside: of the extras [serve] and [streams], and what those need.
FOR_COMMANDS = ("av", "starlette", "uvicorn", "llguidance")
NEEDED_BY_THOSE = ("anyio", "idna", "sniffio", "h11", "click", "typing_extensions")
RELEASE, KEYRING = "bookworm", Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = """libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 libffi8 libssl3 libbz2-1.0 liblzma5 libuuid1
libcrypt1 libpython3.11-minimal python3.11-minimal libpython3.11-stdlib"""
PYTHON_TAGS = ["--python-version", "3.11", "--implementation", "cp"]
# Up to the glibc of RELEASE; llguidance's wheel wants 2.31.
PLATFORMS = tuple(f"manylinux{one}_aarch64" for one in ("_2_36", "_2_34", "_2_31", "_2_28", "_2_17", "2014"))
ABIS = ("cp311", "abi3", "none")
# -S: Debian's dist-packages of this machine, which qemu shows as well, are of another one.
ARM64_PYTHON = (QEMU, "-L", SYSTEM, SYSTEM / "usr/bin/python3.11", "-S", "-B")


def refusal(
    which: Callable[[str], str | None] = shutil.which, machine: str | None = None, keyring: Path = KEYRING
) -> str:
    """Why nothing can run here, and what to do, in one line; empty if it can."""
    if (machine or platform.machine()) in ("aarch64", "arm64"):
        return "make test-arm64 compares x86-64 with arm64, and this machine is arm64: run make test here"
    missing = [package for command, package in WANTED.items() if which(command) is None]
    missing += ["debian-archive-keyring"] if not keyring.is_file() else []
    if not missing:
        return ""
    return f"make test-arm64 needs {', '.join(missing)}: apt-get install {' '.join(missing)} (Debian, Ubuntu)"


def pins() -> list[str]:
    """The packages of the runtime in the versions that vtp is tested with, and ONNX Runtime."""
    return [*_pinned(PINNED), "markupsafe", ONNXRUNTIME]


def _pinned(names: Sequence[str]) -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0] in names]


def prepare() -> None:
    """Make both environments, unless just these packages are there."""
    stamp, wanted = BUILD / "packages.txt", "\n".join([RELEASE, PACKAGES, *pins()])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    for folder in (SYSTEM, WHEELS, HOST, BUILD / "debs", BUILD / "wheels"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    _unpack_system()
    _unpack_wheels(pins(), BUILD / "wheels", WHEELS)
    _pip("install", "--no-deps", "--target", HOST, ONNXRUNTIME)
    stamp.write_text(wanted, encoding="utf-8")


def prepare_commands() -> None:
    """Add PyAV and the server's packages to the arm64 environment, unless just these are there."""
    needed = [*_pinned(FOR_COMMANDS), *NEEDED_BY_THOSE]
    stamp, wanted = MORE / "packages.txt", "\n".join(needed)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(MORE, ignore_errors=True)
    (MORE / "wheels").mkdir(parents=True)
    _unpack_wheels(needed, MORE / "wheels", MORE)
    stamp.write_text(wanted, encoding="utf-8")


def on_arm64(*words: object) -> None:
    """Run arm64 Python with these arguments. Its failure is told: what it did before is there."""
    try:
        _call([*ARM64_PYTHON, *words], ROOT, environment(WHEELS))
    except SystemExit as error:
        print(error, flush=True)


def on_host(*words: object) -> None:
    """Run this Python with the same ONNX Runtime as there; SystemExit if it fails."""
    _call([sys.executable, *words], ROOT, environment(HOST))


def environment(*sites: Path) -> dict[str, str]:
    """Variables for a Python that imports from these folders first, then from the checkout."""
    path = ":".join(map(str, (*sites, ROOT)))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _unpack_system() -> None:
    """Debian's arm64 packages, with lists of their own: this machine's apt and dpkg are left as they are."""
    apt, debs = BUILD / "apt", BUILD / "debs"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    line = f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {RELEASE} main\n"
    (apt / "sources.list").write_text(line, encoding="utf-8")
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Dir::State::Lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
    }
    command = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    _call([*command, "update"], debs)
    _call([*command, "download", *PACKAGES.split()], debs)
    for deb in sorted(debs.glob("*.deb")):
        _call(["dpkg-deb", "-x", deb, SYSTEM], debs)


def _unpack_wheels(wanted: Sequence[str], wheels: Path, site: Path) -> None:
    """aarch64 wheels of just these packages."""
    tags = [word for one in PLATFORMS for word in ("--platform", one)]
    tags += [word for one in ABIS for word in ("--abi", one)]
    _pip("download", "--no-deps", "--only-binary", ":all:", *PYTHON_TAGS, *tags, "-d", wheels, *wanted)
    for wheel in sorted(wheels.glob("*.whl")):
        shutil.unpack_archive(wheel, site, "zip")


def _pip(action: str, *words: object) -> None:
    _call([sys.executable, "-m", "pip", action, "--quiet", "--disable-pip-version-check", *words], BUILD)


def _call(command: list[object], folder: Path, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run([str(word) for word in command], cwd=folder, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{Path(str(command[0])).name} ended with exit code {done.returncode}")
