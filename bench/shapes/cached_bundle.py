"""A bundle of a full-size shape with random weights, made once and kept: speed without a download."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtp.engines import UsageError, VtpError
from vtp.engines.child import python_command
from vtp.engines.disk.files import free_disk
from vtp.runtime.bundle.folder import MANIFEST
from vtp.runtime.bundle.memory import PROCESS
from vtp.runtime.machine.facts import look

DTYPES = ("float32", "float16")
# On the CPU, ONNX Runtime widens float16 weights to float32 and keeps the originals.
_WIDENED = 3
BESIDE = 1.15  # cache and activations, as a share of the weights


@dataclass(frozen=True)
class Wanted:
    """A shape's bundle: keep None is the method's default, engine what is to run it."""

    shape: str
    method: str
    keep: int | None
    dtype: str
    engine: str
    cache: Path

    @property
    def model(self) -> Path:
        """Where the model lies, once it is made."""
        return self.cache / f"{self.shape}-{self.dtype}"

    @property
    def bundle(self) -> Path:
        """Where the bundle lies, once it is made."""
        count = "" if self.keep is None or self.method == "none" else f"-{self.keep}"
        return self.cache / f"{self.shape}-{self.dtype}-{self.method}{count}.bundle"


def make(wanted: Wanted, progress: Callable[[str], None]) -> Path:
    """The folder of the bundle, made if it is not there.

    Raises UsageError for an unknown shape or dtype, VtpError where memory or disk are too small for it, or
    where the export fails (what it said is on standard error).
    """
    check(wanted, room=look().memory.usable, disk=free_disk(wanted.cache))
    if (wanted.bundle / MANIFEST).exists():
        return wanted.bundle
    from vtp.bench.shapes.models import write_shape

    if not wanted.model.exists():
        progress(f"make a {wanted.shape} with random weights in {wanted.model}")
        write_shape(wanted.shape, wanted.model, wanted.dtype)
    progress(f"export it with {wanted.method}")
    keep = [] if wanted.keep is None or wanted.method == "none" else ["--keep-tokens", str(wanted.keep)]
    run_export(["--model", str(wanted.model), "--method", wanted.method, "--dtype", wanted.dtype, *keep,
                "-o", str(wanted.bundle)])  # fmt: skip
    return wanted.bundle


def run_export(arguments: Sequence[str]) -> None:
    """vtp-export in a process of its own: torch's memory is gone before anything is measured."""
    command = python_command("vtp.export.cli", *arguments, "--verify", "none")
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code:
        raise VtpError(f"vtp-export {' '.join(arguments)} left with {code}; its message is above")


def check(wanted: Wanted, room: int, disk: int) -> None:
    """Refuse what cannot fit before anything is made; `room` and `disk` are free bytes (0: not known)."""
    from vtp.bench.shapes.models import find_shape

    if wanted.dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{wanted.dtype}'; choose one of {', '.join(DTYPES)}")
    stored, needed = find_shape(wanted.shape).bytes(wanted.dtype), _needed(wanted, wanted.dtype)
    if room and needed > room:
        wide = _needed(wanted, "float32")
        other = f", or --dtype float32, which needs {wide / 1e9:.1f} GB" if wide <= room else ""
        raise VtpError(
            f"shape {wanted.shape} in {wanted.dtype} needs about {needed / 1e9:.1f} GB of memory on "
            f"{wanted.engine}; {room / 1e9:.1f} GB are free here: choose a smaller shape{other}"
        )
    missing = sum(
        0 if (folder / file).exists() else stored
        for folder, file in ((wanted.model, "config.json"), (wanted.bundle, MANIFEST))
    )
    if disk and missing > disk:
        raise VtpError(
            f"shape {wanted.shape} in {wanted.dtype} takes {missing / 1e9:.1f} GB of disk for the model and "
            f"its bundle; {disk / 1e9:.1f} GB are free for {wanted.cache}: choose another --cache"
        )


def _needed(wanted: Wanted, dtype: str) -> int:
    """Bytes of memory that running the shape in `dtype` takes, at least."""
    from vtp.bench.shapes.models import find_shape

    widened = _WIDENED if dtype == "float16" and wanted.engine in ("auto", "ort-cpu") else 1
    return int(BESIDE * widened * find_shape(wanted.shape).bytes(dtype)) + PROCESS
