"""Which engine runs each graph of a bundle fastest here: `vtp-bench --engines` writes it, "auto" reads it.

A file of the user's cache, for one bundle's files and a number of threads; it counts as long as machine and
versions are those that it was measured under.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtp.engines import VtpError, capabilities
from vtp.engines.disk.whole import whole_file
from vtp.engines.errors import shown
from vtp.engines.strict_json import read_json
from vtp.engines.tensorrt.store import cache_folder, check_folder, make_folder
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.machine.conditions import conditions

MEASURED_WITH = "vtp-bench --engines"
_LABEL = "openvino-cpu"  # of the conditions: with the versions of every library that was measured


@dataclass(frozen=True)
class Measured:
    """Graph file -> the engine that was proven equal and fastest; `note` says why there is none."""

    engines: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def remember(
    bundle: Bundle, threads: int | None, engines: Mapping[str, str], figures: Mapping[str, Any]
) -> Path:
    """Keep the choice for a bundle on this machine, with the figures that led to it; returns the file."""
    path = _path(bundle, threads)
    make_folder(path.parent)
    data = {
        "conditions": conditions(_LABEL, threads).to_json(),
        "engines": dict(engines),
        "figures": dict(figures),
    }
    with whole_file(path) as aside:
        aside.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return path


def recall(bundle: Bundle, threads: int | None) -> Measured:
    """What was measured for a bundle with these threads; nothing where machine or versions have changed."""
    path = _path(bundle, threads)
    if not path.is_file():
        return Measured()
    try:
        check_folder(path.parent)
        data = read_json(path)
        engines = _checked(data, bundle)
    except VtpError as error:
        return Measured(note=f"what {MEASURED_WITH} kept is not used: {error}")
    differs = conditions(_LABEL, threads).differs_from(data["conditions"])
    if differs:
        return Measured(note=f"what {MEASURED_WITH} measured is not used, run it again: {shown(differs)}")
    return Measured(engines)


def _checked(data: Any, bundle: Bundle) -> dict[str, str]:
    engines = data.get("engines") if isinstance(data, dict) and "conditions" in data else None
    if not isinstance(engines, dict) or not set(engines) <= set(bundle.manifest.graphs):
        raise VtpError("the file names no engines of this bundle's graphs; run it again")
    for engine in engines.values():
        able = capabilities(str(engine))
        if not able.on_cpu or able.built:
            raise VtpError(f"{shown(engine)} cannot be mixed with others; run it again")
    return {file: str(engine) for file, engine in engines.items()}


def _path(bundle: Bundle, threads: int | None) -> Path:
    files = sorted((name, info.sha256) for name, info in bundle.manifest.files.items())
    digest = hashlib.sha256(json.dumps([files, threads or 0]).encode()).hexdigest()[:32]
    return cache_folder() / "measured" / f"{digest}.json"
