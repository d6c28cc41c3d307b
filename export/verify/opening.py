"""The least that is held of a bundle that nothing else is compared with: every graph opens."""

from __future__ import annotations

from vtp.engines import VtpError, judge_engines
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.memory import bundle_memory
from vtp.runtime.machine.room import memory_room
from vtp.runtime.opening import open_stage

__all__ = ["open_each"]

_ENGINE = "ort-cpu"  # on which bundles of every target are verified


def open_each(bundle: Bundle) -> list[str]:
    """Open every graph on ONNX Runtime's CPU provider, one after the other; VtpError for one that does not.

    Returns the files that were left out: those that may not fit into the memory, all without ONNX Runtime.
    """
    files = list(bundle.manifest.graphs)
    if not any(one.accepted for one in judge_engines() if one.engine == _ENGINE):
        return files
    large = _too_large(bundle)
    for file in files:
        if file not in large:
            _open(bundle, file)
    return large


def _too_large(bundle: Bundle) -> list[str]:
    room = memory_room()
    stages = bundle_memory(bundle, _ENGINE).stages
    return [] if room is None else [one.file for one in stages if one.total > room.bytes]


def _open(bundle: Bundle, file: str) -> None:
    try:
        open_stage(bundle, file, _ENGINE, threads=1).close()
    except VtpError as error:
        raise VtpError(f"{file} does not open on ONNX Runtime, so no bundle is written: {error}") from error
