"""CUDA source to PTX, the form in which TensorRT takes a kernel into an engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from vtp.engines.errors import VtpError
from vtp.engines.versions import version_numbers

_HOME = "/usr/local/cuda/bin"  # where JetPack and NVIDIA's packages put it, mostly not on the PATH


def find_nvcc() -> str:
    """The path of CUDA's compiler. VtpError if there is none."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path=_HOME)
    if found is None:
        raise VtpError(
            f"a plugin is compiled on the device, and nvcc is neither on the PATH nor in {_HOME}; install "
            "the CUDA toolkit (JetPack: sudo apt install cuda-toolkit), or build without --plugin"
        )
    return found


def compile_ptx(source: Path, sm: str, driver: str = "") -> str:
    """The PTX of a source file for a compute capability ("8.7").

    `driver` is the newest CUDA that the driver runs, where it is known: it does not take PTX of a newer
    compiler. Raises VtpError in one line for that, for a missing compiler and for what it says.
    """
    nvcc = find_nvcc()
    newest = _release(nvcc)
    if driver and newest and version_numbers(newest) > version_numbers(driver):
        raise VtpError(
            f"nvcc is of CUDA {newest}, and the driver runs CUDA {driver} at most: it would not take "
            "the kernel; update the driver, install an older toolkit, or build without --plugin"
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.ptx"
        # Without fused products: a score is rounded after each one, as everywhere else.
        flags = ["-ptx", "--fmad=false", f"-arch=compute_{sm.replace('.', '')}", "-o", os.fspath(target)]
        done = subprocess.run([nvcc, *flags, os.fspath(source)], capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())[:300]
            raise VtpError(f"nvcc does not compile {source.name} for compute capability {sm}: {said}")
        return target.read_text(encoding="utf-8")


def _release(nvcc: str) -> str:
    """The compiler's CUDA version ("13.0"), empty where it does not tell."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found.group(1) if found else ""
