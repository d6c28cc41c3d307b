"""Reads a graph file into OpenVINO's model, by the one of its readers that is meant for it.

`Core.read_model` tries every format it knows on a file, whatever it is called, some of which hold more than
graphs. What a stranger's graph may read and run is looked at before OpenVINO sees it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vtp.engines.errors import VtpError, shown
from vtp.engines.graph.check import check_graph
from vtp.engines.openvino.library import load_openvino

# Lines that say where in OpenVINO's sources something went wrong, and where on disk or in memory.
_NOISE = re.compile(r"^(Exception from|Check '|Caught exception|FrontEnd API failed|Summary:|Model wasn't)")
_PLACES = re.compile(r"(Check '.*?' failed at \S+|\bfailed at \S+|0x[0-9a-fA-F]+|\S*src/\S+|\"?/[^\s\"]+\"?)")
_LENGTH = 300


def read_model(path: Path) -> Any:
    """OpenVINO's model of a graph file. VtpError for one that it does not read or that vtp never writes."""
    check_graph(path, _beside(path))
    openvino = load_openvino()
    try:
        reader = openvino.frontend.FrontEndManager().load_by_framework("onnx")
        return reader.convert(reader.load(str(path)))
    except Exception as error:  # pybind11 raises RuntimeError, and what C++ calls otherwise
        raise VtpError(
            f"OpenVINO {version()} cannot load {path.name}: {reason(error)}; use --engine ort-cpu"
        ) from error


def version() -> str:
    """OpenVINO's version as people say it, such as 2026.4.1."""
    return str(load_openvino().__version__).partition("-")[0]


def reason(error: BaseException) -> str:
    """What an exception of OpenVINO says went wrong, without places in its sources, on disk and in memory."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    said = [" ".join(_PLACES.sub("", line).split()) for line in lines if line and not _NOISE.match(line)]
    return shown(" ".join(line for line in said if line) or "it gives no reason", _LENGTH)


def _beside(path: Path) -> dict[str, int]:
    """The files that a graph may read weights from: regular ones of its folder, with their sizes."""
    folder = path.parent.resolve()
    try:
        files = [one for one in folder.iterdir() if one.is_file() and one.resolve().parent == folder]
        return {one.name: one.stat().st_size for one in files}
    except OSError as error:
        raise VtpError(f"cannot look into {folder}: {error.strerror or error}") from error
