"""Imports OpenVINO, which tells nobody of it, and asks what it has.

`import openvino` sends an event to Google Analytics and writes an identity into ~/intel, through the package
openvino_telemetry, which comes with it and has no switch in the environment. Without that package OpenVINO
uses a stub of its own, so it is hidden while OpenVINO is imported. A program that imports openvino before
decides for itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata, util
from typing import Any

from vtp.engines.errors import VtpError, shown
from vtp.engines.versions import version_numbers

INSTALL = "pip install 'vtp-edge[openvino]'"
OLDEST = (2026, 4)
DEVICES = {"openvino-cpu": "CPU", "openvino-gpu": "GPU", "openvino-npu": "NPU"}
_TELLER = "openvino_telemetry"


def load_openvino() -> Any:
    """The module openvino. ImportError where it is not installed."""
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    with _hidden(_TELLER):
        return importlib.import_module("openvino")


def installed_openvino() -> str:
    """The version that is installed, as `pip list` says it; nothing is imported.

    Raises VtpError where there is none, or one that is too old.
    """
    if util.find_spec("openvino") is None:
        raise VtpError(f"openvino is not installed: {INSTALL}")
    try:
        version = metadata.version("openvino")
    except metadata.PackageNotFoundError as error:
        raise VtpError(f"openvino has no version that pip knows: {INSTALL}") from error
    if version_numbers(version)[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise VtpError(f"openvino {shown(version, 40)} is older than {oldest}: {INSTALL} --upgrade")
    return version


def listed_devices() -> list[str]:
    """What OpenVINO lists on this machine, such as "CPU" and "GPU.0". VtpError where it does not import."""
    try:
        return [str(device) for device in load_openvino().Core().available_devices]
    except (ImportError, RuntimeError) as error:
        reason = shown(" ".join(str(error).split()))
        raise VtpError(f"openvino is installed but does not start ({reason}); {INSTALL}") from error


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Meanwhile `import name` fails as if it were not installed; one that is loaded stays."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
