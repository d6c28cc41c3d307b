"""Where llama.cpp's binaries are, and how they were built: the page says it.

`make llamacpp` builds them in build/llamacpp of the checkout; VTP_LLAMACPP names another folder of that form.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from vtp.bench.common.checkout import checkout
from vtp.bench.compare.llamacpp.report import instructions
from vtp.engines import UsageError, VtpError

COMMAND = "make llamacpp"
FOLDER = "VTP_LLAMACPP"
_OPTIONS = (
    "CMAKE_BUILD_TYPE",
    "GGML_NATIVE",
    "GGML_OPENMP",
    "GGML_LLAMAFILE",
    "GGML_BLAS",
    "BUILD_SHARED_LIBS",
)
_SECONDS = 600  # for one file to be quantised, or a version to be told


def built_folder() -> Path | None:
    """The folder of the build; None outside a checkout, if no other is named."""
    named = os.environ.get(FOLDER)
    if named:
        return Path(named).absolute()
    try:
        return checkout(FOLDER) / "build/llamacpp"
    except UsageError:
        return None


def binary(name: str) -> Path:
    """One of the programs, such as llama-server. VtpError with the line that builds it if it is not there."""
    folder = built_folder()
    path = (folder or Path()) / "cmake/bin" / name
    if folder is None or not os.access(path, os.X_OK):
        raise VtpError(f"llama.cpp's {name} is not built; run: {COMMAND}")
    return path


def is_built() -> bool:
    """Whether what the peer runs is there."""
    try:
        return all(binary(name) for name in ("llama-server", "llama-quantize"))
    except VtpError:
        return False


def quantise(source: Path, target: Path, kind: str) -> None:
    """Write `source` with its matrices as `kind` (q8_0, q4_0), the embedding and a head included.

    `--pure`: llama.cpp would otherwise keep the embedding, which is also the head of tied models, in more
    bits, so that each token took longer.
    """
    aside = target.with_suffix(".part")
    command = [str(binary("llama-quantize")), "--pure", str(source), str(aside), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise VtpError(f"llama-quantize left with {done.returncode} for {source.name}: {' '.join(last)}")
    aside.replace(target)


def how_built(logs: Path) -> dict[str, Any]:
    """What the page says: release, version and compiler as the program tells them, CMake's options, and what
    the servers whose logs lie in `logs` said of the machine's instructions. Empty if nothing is built."""
    folder = built_folder()
    if folder is None or not is_built():
        return {}
    command = [str(binary("llama-server")), "--version"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    package, cache = folder / "src/PKG-INFO", folder / "cmake/CMakeCache.txt"
    return {
        **version_of(told.stdout + told.stderr),
        "package": _field(package, r"^Version: (.*)$"),
        "instructions": next(
            (found for log in sorted(logs.glob("server-*.log")) if (found := instructions(log.read_text()))),
            [],
        ),
        "options": {
            name: value for name in _OPTIONS if (value := _field(cache, rf"^{name}:\w+=(.*)$")) is not None
        },
    }


def version_of(said: str) -> dict[str, str]:
    """version and compiler in what `--version` prints."""
    version = re.search(r"^version: (.+)$", said, re.MULTILINE)
    compiler = re.search(r"^built with (.+)$", said, re.MULTILINE)
    return {
        "version": version[1].strip() if version else "not told",
        "compiler": compiler[1].strip() if compiler else "not told",
    }


def _field(path: Path, pattern: str) -> str | None:
    if not path.is_file():
        return None
    found = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found[1].strip() if found else None
