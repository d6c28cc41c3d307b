"""Refuses a bundle that this machine's memory cannot hold, before its graphs are opened.

What is counted here is the least that a bundle takes, not what it may take (`memory.py` has that, for
vtp-doctor): weights that the engine copies, and the caches. Weights that only lie in a mapped file are not
counted, and neither are tensors in between, so that nothing is refused that would have run.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from vtp.engines import VtpError
from vtp.engines.graph.file import GraphFile, read_graph
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.memory import cache_bytes
from vtp.runtime.machine.room import Room

SWITCH = "VTP_CHECK_MEMORY"
# Products whose weights ONNX Runtime packs into memory of its own (measured on x86, versions 1.23 and 1.31).
_PACKED = ("MatMul", "Gemm", "MatMulIntegerToFloat", "MatMulNBits")
# On the CPU, float16 weights become float32.
_MOST_WIDENED = 3


@dataclass(frozen=True)
class LeastMemory:
    """Bytes that a bundle takes at least, once it is open and a conversation has its full length."""

    weights: int
    caches: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.weights + self.caches


def switched_off() -> bool:
    """Whether the user turned the check off for all commands, by the environment."""
    return os.environ.get(SWITCH, "").strip().lower() in ("0", "no", "off", "false")


def check_fits(bundle: Bundle, engine: str, room: Room | None, skip: Collection[str] = ()) -> None:
    """Refuse, in one line, a bundle that takes more on "ort-cpu" than `room`; of others nothing is said.

    skip  the moments whose graphs are not opened: see `Opening.skipped`
    """
    if engine != "ort-cpu" or room is None:
        return
    files = sorted({stage.file for stage in bundle.manifest.stages if stage.when not in skip})
    if _at_most(bundle) <= room.bytes:  # nearly always, and no graph has to be read
        return
    least = least_memory(bundle, files)
    if least.total > room.bytes:
        raise VtpError(_refusal(bundle, least, room))


def least_memory(bundle: Bundle, files: Iterable[str]) -> LeastMemory:
    """What some graphs of a bundle take at least on the CPU."""
    files = list(files)
    weights = sum(_copied(read_graph(bundle.path(file))) for file in files)
    return LeastMemory(weights, sum(cache_bytes(bundle.manifest.graphs[file]) for file in files))


def _at_most(bundle: Bundle) -> int:
    """More than `least_memory` says, told from the sizes of the files alone."""
    manifest = bundle.manifest
    files = sum(info.bytes for info in manifest.files.values()) * len(manifest.graphs)
    return files * _MOST_WIDENED + sum(cache_bytes(graph) for graph in manifest.graphs.values())


def _copied(graph: GraphFile) -> int:
    """Bytes of the weights that products pack; float16 ones twice, since they become float32."""
    found = {name for node in graph.nodes if node.op in _PACKED for name in node.inputs[1:2]}
    weights = [graph.weights[name] for name in found if name in graph.weights]
    return sum(weight.bytes * (2 if weight.dtype == "float16" else 1) for weight in weights)


def _refusal(bundle: Bundle, least: LeastMemory, room: Room) -> str:
    cures = []
    if least.caches * 4 > least.total:
        cures.append(f"export with a --max-length below {bundle.manifest.model.max_length}")
    if least.weights * 4 > least.total:
        cures.append("make the weights smaller with vtp-calib quantize")
    return (
        f"this bundle needs at least {_mb(least.total)} MB (weights {_mb(least.weights)}, cache "
        f"{_mb(least.caches)}), and {room.limit} is {_mb(room.bytes)} MB: {', or '.join(cures)}, or give it "
        f"more; to load it all the same, set check_memory=False, --no-memory-check or {SWITCH}=0"
    )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f}" if count >= 10e6 else f"{count / 1e6:,.1f}"
