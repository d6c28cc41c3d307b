"""Imports ONNX Runtime, with its telemetry off unless the user says otherwise.

From 1.29 on, its builds for Linux and macOS record what is run (in ~/.cache/Microsoft/DeveloperTools) and
upload it, unless ORT_DISABLE_TELEMETRY is 1 when the library is loaded (its Privacy.md). `vtp.engines` sets
that when it is imported, so that it holds for packages that load the library by themselves, too.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

SWITCH = "ORT_DISABLE_TELEMETRY"


def disable_telemetry() -> None:
    """Turn ONNX Runtime's telemetry off for this process and its children; a value that is set stays."""
    os.environ.setdefault(SWITCH, "1")


def load_onnxruntime() -> Any:
    """The module onnxruntime. ImportError where it is not installed."""
    disable_telemetry()
    return importlib.import_module("onnxruntime")
