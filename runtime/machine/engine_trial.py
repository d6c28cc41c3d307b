"""Whether an engine that should run here does: its graphs are opened, one after the other."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path

from vtp.engines import Choice, Decision, VtpError, capabilities, open_graph
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.memory import bundle_memory
from vtp.runtime.engine_choice import choose_engines
from vtp.runtime.machine.facts import Machine
from vtp.runtime.opening import open_stage

# One Abs of one float32, opset 17, IR 8: what an engine opens if it runs at all.
_SMALLEST = bytes.fromhex(
    "08083a320a0b0a017812017922034162731201675a0f0a0178120a0a08080112040a02080162"
    "0f0a0179120a0a08080112040a02080142040a001011"
)


def tried(decisions: Iterable[Decision], machine: Machine, bundle: Bundle | None) -> list[Decision]:
    """The decisions; those that were accepted have opened the bundle's graphs, or say why they could not."""
    return [_try(one, machine, bundle) if one.accepted else one for one in decisions]


def _try(decision: Decision, machine: Machine, bundle: Bundle | None) -> Decision:
    engine = decision.engine
    if bundle is None:
        found = "" if capabilities(engine).built else _failure_of_smallest(engine)
    elif not _has_room(engine, machine, bundle):
        return dataclasses.replace(decision, reason=f"{decision.reason}; not opened, for it would not fit")
    else:
        found, notes = _failure_of_bundle(engine, bundle)
        decision = dataclasses.replace(decision, reason="; ".join([decision.reason, *notes]))
    return Decision(engine, "opens-nothing", found) if found else decision


def _failure_of_smallest(engine: str) -> str:
    """Why an engine opens no graph at all; empty if it does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "smallest.onnx"
        path.write_bytes(_SMALLEST)
        try:
            open_graph(path, engine, threads=1).close()
        except VtpError as error:
            return f"it opens no graph: {error}"
    return ""


def _failure_of_bundle(engine: str, bundle: Bundle) -> tuple[str, tuple[str, ...]]:
    """Why a graph of the bundle does not open; empty if all do. One is open at a time.

    Second what is to be said of graphs that another engine has to run.
    """
    try:
        engines = choose_engines(bundle, engine, lambda name, *more, **named: Choice(name))
    except VtpError as error:
        return str(error), ()
    for file in bundle.manifest.graphs:
        try:
            open_stage(bundle, file, engine, how=engines.opening(None)).close()
        except VtpError as error:
            return str(error) if file in str(error) else f"{file}: {error}", ()
    return "", engines.notes


def _has_room(engine: str, machine: Machine, bundle: Bundle) -> bool:
    """Whether the largest graph fits by itself, or nothing is known about the memory."""
    room = machine.room(on_cpu=capabilities(engine).on_cpu)
    largest = max(stage.total for stage in bundle_memory(bundle, engine).stages)
    return not room or largest <= room
