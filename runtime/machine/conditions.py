"""Under which conditions a figure was measured: engine, threads, machine and versions.

Times, and to the last bit answers too, belong to the conditions that they were taken under. vtp-calib keeps
them in its journal and in the manifest; `budget_ms` refuses times that were taken under others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vtp.engines import capabilities
from vtp.engines.versions import installed_version
from vtp.runtime.machine.facts import Machine, look

OPENVINO = "openvino"
_FIELDS = ("engine", "threads", "machine", "versions")


@dataclass(frozen=True)
class Conditions:
    """What a measurement depends on beside the bundle and the question.

    engine    by name, such as "ort-cpu"; of several, that of most stages, then each graph with another
    threads   CPU threads of one operator; 0: as many as the engine takes by itself
    machine   board or processor, cores that may be used, power mode, and the first GPU of GPU engines
    versions  of vtp and of the installed libraries that answers and times depend on
    """

    engine: str
    threads: int
    machine: str
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values, for a manifest."""
        return asdict(self)

    def differs_from(self, known: object) -> str:
        """What `to_json`'s dictionary of other conditions says differently, in words; "" if nothing."""
        if not isinstance(known, Mapping):
            return "the conditions were not recorded"
        here = self.to_json()
        for name in _FIELDS[:3]:
            if known.get(name) != here[name]:
                return f"{name} {known.get(name)!r}, here {here[name]!r}"
        versions = known.get("versions")
        if not isinstance(versions, Mapping):
            return "the versions were not recorded"
        for name in sorted({*versions, *self.versions}):
            if versions.get(name) != self.versions.get(name):
                return f"{name} {versions.get(name, 'none')}, here {self.versions.get(name, 'none')}"
        return ""


def conditions(engine: str, threads: int | None, machine: Machine | None = None) -> Conditions:
    """The conditions of a measurement that is made now, here, on an engine."""
    found = look(smi=lambda: "") if machine is None else machine
    # A library that has no part in it may come and go.
    packages = {name: one for name, one in found.packages.items() if name != OPENVINO or OPENVINO in engine}
    versions = {"vtp-edge": installed_version("vtp-edge", "unknown"), **packages}
    return Conditions(engine, threads or 0, _name(found, engine), versions)


def _name(machine: Machine, engine: str) -> str:
    power = machine.power.partition(", GPU")[0]  # without the clock of this very moment
    gpus = machine.cuda.devices[:1] if not capabilities(engine.partition(",")[0]).on_cpu else []
    parts = (
        machine.board or machine.processor,
        f"{_usable_cores()} cores",
        power,
        *(gpu.name for gpu in gpus),
    )
    return ", ".join(part for part in parts if part)


def _usable_cores() -> int:
    """Cores that this process may use: a container or taskset may leave it fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0
