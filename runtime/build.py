"""vtp-build: TensorRT engines of every graph of a bundle, built on the device that will run them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vtp.engines.errors import UsageError, VtpError
from vtp.engines.trt import LIBRARIES, BuildOptions, Profile
from vtp.engines.trt_build import Room, StoredEngine, store_engine
from vtp.runtime.bundle import Bundle, open_bundle
from vtp.runtime.console import Parser, Progress, run_command, table
from vtp.runtime.machine import Machine, look
from vtp.runtime.manifest import GraphInfo

PROG = "vtp-build"
TARGETS = ("tensorrt", "jetpack6")  # those whose graphs TensorRT takes
FOLDER = "engines"  # within the bundle, unless said otherwise
_QUIET = 2.0  # seconds between two lines about one build


@dataclass(frozen=True)
class BuiltGraph:
    """One graph's engine, and the seconds it took (0 where it was there already)."""

    file: str
    engine: StoredEngine
    seconds: float


def build_parser() -> argparse.ArgumentParser:
    """The flags of vtp-build."""
    parser = Parser(prog=PROG, description="Build a bundle's graphs with TensorRT, on the device itself.")
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder that vtp-export --target tensorrt made")
    add("--engine", required=True, metavar="NAME", help=f"one of {', '.join(LIBRARIES)}")
    add("-o", "--output", metavar="DIR", help=f"where engines are kept (default: BUNDLE/{FOLDER})")
    add("--workspace-mb", metavar="N", default="1024", help="memory for one layer (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of vtp-build; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(PROG, lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    if args.engine not in LIBRARIES:
        raise UsageError(f"unknown engine '{args.engine}'; choose one of {', '.join(LIBRARIES)}")
    if not (args.workspace_mb.isascii() and args.workspace_mb.isdecimal()):
        raise UsageError(f"workspace-mb '{args.workspace_mb}' is not a whole number")
    bundle = open_bundle(args.bundle)
    folder = Path(args.output) if args.output else bundle.folder / FOLDER
    options, progress = BuildOptions(workspace=int(args.workspace_mb) << 20), Progress()
    try:
        made = build_bundle(bundle, args.engine, folder, options, _room(look()), progress.step)
    finally:
        progress.end()
    rows = [
        {
            "graph": one.file,
            "engine": str(one.engine.path),
            "bytes": one.engine.stamp.bytes,
            "built": one.engine.built,
            "seconds": round(one.seconds, 1),
        }
        for one in made
    ]
    print(json.dumps({"engines": rows, "checked": False}, indent=1) if args.json else _report(rows, folder))


def build_bundle(
    bundle: Bundle,
    engine: str,
    folder: Path,
    options: BuildOptions | None = None,
    room: Room | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[BuiltGraph]:
    """Build every graph that `folder` does not hold yet; `say` is told what is being done.

    Raises VtpError for a bundle of another target, and for whatever `store_engine` refuses.
    """
    if bundle.manifest.target not in TARGETS:
        raise VtpError(
            f"{bundle.folder} was made for target '{bundle.manifest.target}', whose decoder TensorRT "
            "does not take; export it again with: vtp-export --target tensorrt (TensorRT 10.15 or newer, "
            "TensorRT-RTX) or --target jetpack6 (TensorRT 10.3 or newer)"
        )
    made = []
    for file, graph in bundle.manifest.graphs.items():
        say(f"build {file}")
        started = time.monotonic()
        stored = store_engine(
            bundle.path(file), engine, folder, profile_of(graph), options, room, _Teller(file, say)
        )
        made.append(BuiltGraph(file, stored, time.monotonic() - started if stored.built else 0.0))
    return made


def profile_of(graph: GraphInfo) -> Profile:
    """Least, usual and largest shape of a graph's inputs, batch 1, from the ranges in the manifest."""
    axes = {**graph.axes, "batch": [1, 1, 1]}
    if graph.kv is not None and "sequence" in axes:
        axes["sequence"] = [min(size, graph.kv.capacity) for size in axes["sequence"]]
    return {
        name: (
            _shape(tensor.shape, axes, 0),
            _shape(tensor.shape, axes, 1),
            _shape(tensor.shape, axes, 2),
        )
        for name, tensor in graph.inputs.items()
    }


def _shape(shape: Sequence[int | str], axes: dict[str, list[int]], place: int) -> list[int]:
    return [axis if isinstance(axis, int) else axes[axis][place] for axis in shape]


def _room(machine: Machine) -> Room:
    return Room(machine.memory.usable, machine.gpu_memory, machine.is_jetson)


class _Teller:
    """Says which phase a long build is in, every few seconds: never minutes of silence."""

    def __init__(self, file: str, say: Callable[[str], None]) -> None:
        self._file, self._say = file, say
        self._last = time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if time.monotonic() - self._last > _QUIET:
            self._last = time.monotonic()
            self._say(f"build {self._file}: {phase.lower()}, {done} of {total}")


def _report(rows: list[dict], folder: Path) -> str:
    lines = [
        [row["graph"], f"{row['bytes'] / 1e6:.1f}", f"{row['seconds']:.1f}" if row["built"] else "kept"]
        for row in rows
    ]
    return (
        f"{table(['graph', 'MB', 'seconds'], lines)}\n\nengines are in {folder}\n"
        "not run: this vtp builds TensorRT engines and does not run them yet"
    )


if __name__ == "__main__":
    sys.exit(main())
