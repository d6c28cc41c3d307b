"""vtp-build: TensorRT engines of a bundle's graphs, built and compared on the device that runs them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vtp.engines import capabilities, choose_engine, open_graph
from vtp.engines.disk.whole import try_writing
from vtp.engines.errors import UsageError, VtpError, shown
from vtp.engines.plugins import PLUGINS
from vtp.engines.plugins.greedy import check_plugin
from vtp.engines.plugins.rewrite import find_greedy
from vtp.engines.tensorrt.build import Room, StoredEngine, set_gate, store_engine
from vtp.engines.tensorrt.library import LIBRARIES, BuildOptions, Profile, load_library
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.bundle.manifest import SINGLE, GraphInfo
from vtp.runtime.bundle.memory import bundle_memory
from vtp.runtime.commands.arguments import add_debug, add_json, suggest, take_bundle
from vtp.runtime.commands.console import Parser, Progress, run_command, say, say_json, table, whole_number
from vtp.runtime.example_input import PROMPT
from vtp.runtime.machine.facts import Machine, look
from vtp.runtime.media.images import load_image
from vtp.runtime.opening import engines_folder
from vtp.runtime.parity_gate import run_gate
from vtp.runtime.shell import command_line
from vtp.runtime.triton.repository import write_repository

PROG = "vtp-build"
TARGETS = capabilities("tensorrt").targets
_A_BUNDLE = f"a folder that vtp-export --target {' or '.join(TARGETS)} made, or such a one of the hub"
_QUIET = 2.0  # seconds between two lines about one build


@dataclass(frozen=True)
class BuiltGraph:
    """One graph's engine, and the seconds it took (0 where it was there already).

    `plugin` names the plugin within; `note` says why one that was asked for is not.
    """

    file: str
    engine: StoredEngine
    seconds: float
    plugin: str = ""
    note: str = ""


def build_parser() -> argparse.ArgumentParser:
    """The flags of vtp-build."""
    parser = Parser(prog=PROG, description="Build a bundle's graphs with TensorRT, on the device itself.")
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help=_A_BUNDLE)
    suggest(add("--engine", metavar="NAME", help=f"one of {', '.join(LIBRARIES)}"), LIBRARIES)
    add("--triton", metavar="DIR", help="write a model repository for NVIDIA's Triton server instead")
    add("-o", "--output", metavar="DIR", help="where engines are kept (default: in ~/.cache/vtp/engines)")
    add("--workspace-mb", metavar="N", default="1024", help="memory for one layer (default: %(default)s)")
    plugin = add(
        "--plugin", metavar="NAME", help=f"kernel to use where it answers as ONNX Runtime: {PLUGINS[0]}"
    )
    suggest(plugin, PLUGINS)
    add("--image", metavar="FILE", help="picture to compare engines on (default: a generated one)")
    add("--prompt", metavar="TEXT", default=PROMPT, help="prompt to compare engines on")
    add("--again", action="store_true", help="compare engines again that were compared on this GPU")
    add_json(parser)
    add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of vtp-build; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(PROG, lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    """Build every graph, compare with ONNX Runtime, and build without the plugin where a graph differs."""
    if args.triton:
        return _write_triton(args)
    if args.engine is None:
        raise UsageError(f"give --engine {' or '.join(LIBRARIES)}, or --triton DIR")
    if args.engine not in LIBRARIES:
        raise UsageError(f"unknown engine '{args.engine}'; choose one of {', '.join(LIBRARIES)}")
    workspace = whole_number("workspace-mb", args.workspace_mb, least=0)
    options = BuildOptions(workspace=workspace << 20, plugin=_plugin(args))
    bundle, machine = open_bundle(take_bundle(PROG, args.bundle, args.json)), look()
    if args.image and bundle.manifest.image.frames is not None:
        raise UsageError("this bundle answers about videos; leave out --image: a clip of its own will do")
    picture = load_image(args.image) if args.image else None
    folder = engines_folder(bundle, Path(args.output) if args.output else None)
    _check_writable(folder)
    room, progress = _room(machine), Progress()

    def compare(made: list[BuiltGraph]) -> list[BuiltGraph]:
        return compare_bundle(
            bundle, args.engine, made, machine, progress.step, picture, args.prompt, args.again
        )

    try:
        made = compare(build_bundle(bundle, args.engine, folder, options, room, progress.step))
        if any(map(_is_unequal, made)):
            made = compare(without_unequal(bundle, args.engine, folder, made, options, room, progress.step))
    finally:
        progress.end()
    rows = [_row(one) for one in made]
    checked = all(row["gate"] for row in rows)
    if args.json:
        say_json({"engines": rows, "checked": checked, **bundle.stated_origin})
    else:
        say(_report(rows, folder))
    failed = [row for row in rows if row["gate"] and not row["gate"]["passed"]]
    if failed:
        reason = failed[0]["gate"]["note"]
        raise VtpError(f"the engine of {failed[0]['graph']} does not answer as ONNX Runtime does: {reason}")


def _plugin(args: argparse.Namespace) -> str:
    """The plugin that was asked for, "" for none; refused here, before anything is built, if it cannot be."""
    if args.plugin is None:
        return ""
    if args.plugin not in PLUGINS:
        raise UsageError(f"unknown plugin '{args.plugin}'; choose {' or '.join(PLUGINS)}")
    check_plugin(args.engine, load_library(args.engine).__version__)
    return args.plugin


def _write_triton(args: argparse.Namespace) -> None:
    if args.engine:
        raise UsageError("a Triton repository runs on ONNX Runtime; leave out --engine")
    bundle = open_bundle(take_bundle(PROG, args.bundle, args.json))
    models = write_repository(bundle, Path(args.triton))
    if args.json:
        say_json({"repository": args.triton, "models": models, **bundle.stated_origin})
    else:
        serve = command_line("tritonserver", "--model-repository", Path(args.triton))
        say(f"{shown(args.triton)}: {', '.join(models)}\nserve it with: {serve}")


def _row(one: BuiltGraph) -> dict[str, Any]:
    return {
        "graph": one.file,
        "engine": str(one.engine.path),
        "bytes": one.engine.stamp.bytes,
        "built": one.engine.built,
        "seconds": round(one.seconds, 1),
        "gate": one.engine.stamp.gate,
        "plugin": one.plugin,
        "note": one.note,
    }


def build_bundle(
    bundle: Bundle,
    engine: str,
    folder: Path,
    options: BuildOptions | None = None,
    room: Room | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[BuiltGraph]:
    """Build every graph that `folder` does not hold yet; `say` is told what is being done.

    A plugin goes into the graphs that have the nodes it takes the place of; one that cannot be built with it
    is built without. Raises VtpError for a bundle of another target, for a plugin without such a graph, and
    for whatever `store_engine` refuses.
    """
    if bundle.manifest.target not in TARGETS:
        raise VtpError(
            f"{bundle.folder} was made for target '{bundle.manifest.target}', whose decoder TensorRT "
            "does not take; export it again with: vtp-export --target tensorrt (TensorRT 10.15 or newer, "
            "TensorRT-RTX) or --target jetpack6 (TensorRT 10.3 or newer)"
        )
    options = options or BuildOptions()
    plugged = _plugged(bundle) if options.plugin else ()
    made = []
    for file in bundle.manifest.graphs:
        one = options if file in plugged else replace(options, plugin="")
        try:
            made.append(_build(bundle, engine, folder, file, one, room, say))
        except VtpError as error:
            if not one.plugin:
                raise
            plain = _build(bundle, engine, folder, file, replace(one, plugin=""), room, say)
            made.append(replace(plain, note=str(error)))
    return made


def _plugged(bundle: Bundle) -> list[str]:
    """The graphs with a greedy selection."""
    files = [file for file in bundle.manifest.graphs if find_greedy(bundle.path(file))]
    if not files:
        raise VtpError(
            f"no graph of {bundle.folder} (method {bundle.manifest.method.name}) has the greedy selection "
            "that the plugin takes the place of; leave out --plugin"
        )
    return files


def _build(
    bundle: Bundle,
    engine: str,
    folder: Path,
    file: str,
    options: BuildOptions,
    room: Room | None,
    say: Callable[[str], None],
) -> BuiltGraph:
    say(f"build {file}" + (f" with plugin {options.plugin}" if options.plugin else ""))
    started, profiles = time.monotonic(), profiles_of(bundle.manifest.graphs[file])
    stored = store_engine(
        bundle.path(file), engine, folder, profiles, options, room, _BuildProgress(file, say)
    )
    seconds = time.monotonic() - started if stored.built else 0.0
    return BuiltGraph(file, stored, seconds, options.plugin)


def without_unequal(
    bundle: Bundle,
    engine: str,
    folder: Path,
    made: list[BuiltGraph],
    options: BuildOptions,
    room: Room | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[BuiltGraph]:
    """Engines without their plugin in the place of those that were compared and are not equal with it."""
    plain = replace(options, plugin="")
    return [
        replace(
            _build(bundle, engine, folder, one.file, plain, room, say), note=one.engine.stamp.gate["note"]
        )
        if _is_unequal(one)
        else one
        for one in made
    ]


def _is_unequal(one: BuiltGraph) -> bool:
    gate = one.engine.stamp.gate
    return bool(one.plugin and gate and not gate["passed"])


def compare_bundle(
    bundle: Bundle,
    engine: str,
    made: list[BuiltGraph],
    machine: Machine,
    say: Callable[[str], None] = lambda line: None,
    picture: Any = None,
    prompt: str = PROMPT,
    again: bool = False,
) -> list[BuiltGraph]:
    """Hold engines against ONNX Runtime and stamp them; as they were where there is no GPU to run them.

    Nothing is run where all were compared on this GPU before, unless `again`.
    """
    if not machine.cuda.devices:
        return made
    device = machine.cuda.devices[0].name
    if not again and all(_was_compared(one.engine.stamp.gate, device) for one in made):
        return made
    _check_oracle(bundle, machine)
    plans = {one.file: one.engine.path for one in made}
    verdicts = run_gate(
        bundle,
        lambda file: open_graph(bundle.path(file), engine, plan=plans[file]),
        picture,
        prompt,
        say,
        exact={one.file for one in made if one.plugin},
    )
    return [
        replace(one, engine=replace(one.engine, stamp=set_gate(one.engine.path, gate)))
        for one in made
        if (gate := verdicts[one.file].to_gate(device))
    ]


def _check_writable(folder: Path) -> None:
    """Refuse a folder that nothing can be written to, before minutes are spent on building."""
    try:
        try_writing(folder / "engine")
    except OSError as error:
        raise UsageError(f"output {folder} cannot be used: {error.strerror or error}") from error


def _check_oracle(bundle: Bundle, machine: Machine) -> None:
    """Refuse a comparison that ONNX Runtime cannot take part in; what was built stays."""
    choose_engine("ort-cpu", target=bundle.manifest.target)
    largest = max(bundle_memory(bundle, "ort-cpu").stages, key=lambda stage: stage.total)
    free = machine.memory.usable + machine.memory.swap
    if free and largest.total > free:
        raise VtpError(
            f"comparing the engine of {largest.file} with ONNX Runtime takes about "
            f"{largest.total / 1e9:.1f} GB and {free / 1e9:.1f} are free, swap included; "
            "add swap and run the same command again: the engines are built and kept"
        )


def profiles_of(graph: GraphInfo) -> list[Profile]:
    """The profiles of a graph: its whole range, and for a graph with a cache single steps as well."""
    whole = profile_of(graph)
    if graph.kv is None:
        return [whole]
    axes = {name: [1, 1, 1] for name in graph.axes}
    step = {name: (_shape(tensor.shape, axes, 0),) * 3 for name, tensor in graph.inputs.items()}
    return [whole, step]


def profile_of(graph: GraphInfo) -> Profile:
    """Least, usual and largest shape of a graph's inputs, batch 1, from the ranges in the manifest."""
    axes = {name: [1, 1, 1] if name in SINGLE else sizes for name, sizes in graph.axes.items()}
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


class _BuildProgress:
    """Says which phase a long build is in, every few seconds: never minutes of silence."""

    def __init__(self, file: str, say: Callable[[str], None]) -> None:
        self._file, self._say = file, say
        self._last = time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if time.monotonic() - self._last > _QUIET:
            self._last = time.monotonic()
            self._say(f"build {self._file}: {phase.lower()}, {done} of {total}")


def _was_compared(gate: dict[str, Any], device: str) -> bool:
    """On this device and row by row: gates of versions before 0.2 measured whole tensors."""
    return gate.get("device") == device and "compared" in gate


def _report(rows: list[dict], folder: Path) -> str:
    lines = [
        [
            row["graph"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['seconds']:.1f}" if row["built"] else "kept",
            *_compared(row["gate"]),
        ]
        for row in rows
    ]
    header = ["graph", "MB", "seconds", "cosine", "difference", "usable"]
    text = f"{table(header, lines)}\n\nengines are in {shown(folder)}"
    for row in rows:
        if row["plugin"]:
            text += f"\n{shown(row['graph'])} has plugin {row['plugin']}"
        elif row["note"]:
            text += f"\n{shown(row['graph'])} was built without the plugin: {shown(row['note'])}"
    if not all(row["gate"] for row in rows):
        text += (
            "\nbuilt, and not compared: no GPU here to run them; run the same command on the device that has "
            "one: an engine is usable once it was held against ONNX Runtime there"
        )
    return text


def _compared(gate: dict[str, Any]) -> list[str]:
    if not gate:
        return ["not compared", "", "no"]
    return [f"{gate['cosine']:.6f}", f"{gate.get('relative', 0):.4f}", "yes" if gate["passed"] else "no"]


if __name__ == "__main__":
    sys.exit(main())
