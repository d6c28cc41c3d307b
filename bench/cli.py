"""vtp-bench: where a bundle's time, memory and operations go, and how near the machine's limits that is."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtp.bench import report, video
from vtp.bench.engines import BASE, candidates, disagreement, measure_engines, saved_share, table_of
from vtp.bench.measure import Task, in_child
from vtp.bench.shapes.cached_bundle import Wanted, make
from vtp.engines import UsageError, choose_engine, engine_names
from vtp.engines.errors import shown
from vtp.engines.versions import installed_version
from vtp.export.method_files import DEFAULT, method_names
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.arguments import (
    A_BUNDLE,
    add_debug,
    add_engine,
    add_json,
    add_keep_tokens,
    add_threads,
    suggest,
    take_bundle,
)
from vtp.runtime.commands.console import Parser, Progress, run_command, say, say_json, table, whole_number
from vtp.runtime.hub.names import display_name
from vtp.runtime.machine.facts import look
from vtp.runtime.measured_engines import remember
from vtp.scenes import examples_dir

PROG = "vtp-bench"
PROMPT = "what color is the star ?"
CACHE = "VTP_CACHE"
_VERSIONS = ("vtp-edge", "onnxruntime", "onnxruntime-gpu", "numpy", "torch", "transformers")


def build_parser() -> argparse.ArgumentParser:
    """The flags of vtp-bench."""
    parser = Parser(prog=PROG, description="Measure a bundle: stages, tokens, memory, operations, limits.")
    add = parser.add_argument
    add("bundle", nargs="?", metavar="BUNDLE", help=A_BUNDLE)
    add("--shape", metavar="NAME", help="instead: a full-size shape with random weights (made and kept)")
    method = add("--method", default=DEFAULT, help="of a --shape (default: %(default)s)")
    suggest(method, method_names())
    dtype = add("--dtype", default="float32", help="of a --shape: float32 or float16 (default: %(default)s)")
    suggest(dtype, ["float32", "float16"])
    add("--cache", metavar="DIR", help=f"where shapes are kept (default: ${CACHE} or ~/.cache/vtp-edge)")
    add_keep_tokens(parser, "one of the bundle's keep-counts; of a --shape: any")
    add("--image", metavar="FILE", help="the picture (default: one of the built-in examples)")
    add("--video", metavar="FILE", help="instead: a video in real time, as before a camera (needs PyAV)")
    add("--prompt", default=PROMPT, metavar="TEXT", help="default: %(default)s")
    add("--max-new-tokens", default="32", metavar="N", help="tokens of every answer (default: %(default)s)")
    add(
        "--repeats", default="10", metavar="N", help="timed runs, after two to warm up (default: %(default)s)"
    )
    add_engine(parser)
    add(
        "--engines",
        action="store_true",
        help="instead: each graph on each CPU engine; keep who is equal and fastest for --engine auto",
    )
    add_threads(parser)
    add_json(parser)
    add("--csv", metavar="FILE", help="also write every figure as a line of FILE")
    add("--plot", metavar="FILE", help="also draw the stages (.png, .svg or .pdf; needs matplotlib)")
    add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of vtp-bench; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(PROG, lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    """Measure one bundle in a process of its own, and write what was asked for."""
    task, progress = _task(args), Progress()
    if args.plot:
        report.check_plot(args.plot)
    if args.shape:
        wanted = Wanted(args.shape, args.method, task.keep, args.dtype, args.engine, _cache(args.cache))
        task = dataclasses.replace(task, bundle=str(make(wanted, progress.step)))
    else:
        task = dataclasses.replace(task, bundle=str(take_bundle(PROG, task.bundle, args.json)))
    if args.engines:
        _run_engines(task, args.json, progress)
        return
    if args.video:
        _run_video(task, args, progress)
        return
    about = _about(task, args.shape, repeats=task.repeats)
    progress.step(f"measure {display_name(task.bundle)}: {task.repeats} runs of {task.max_new_tokens} tokens")
    found = in_child(task)
    progress.end()
    results = {**about, **found}
    if args.csv:
        Path(args.csv).write_text(report.csv_text(results), encoding="utf-8")
    if args.plot:
        report.plot(results, Path(args.plot))
    if args.json:
        say_json(results)
    else:
        say(report.render(results))


def _about(task: Task, shape: str | None, **settings: Any) -> dict[str, Any]:
    """Which bundle was measured, how, and on what."""
    bundle = open_bundle(Path(task.bundle))
    manifest = bundle.manifest
    return {
        "bundle": {
            "name": display_name(task.bundle),
            "model": manifest.model.name,
            "shape": shape,
            "method": manifest.method.name,
            "target": manifest.target,
            "dtype": manifest.dtype,
            **bundle.stated_origin,
        },
        "settings": {"threads": task.threads or os.cpu_count(), **settings, "prompt": task.prompt},
        "machine": stamp(),
    }


def _run_video(task: Task, args: argparse.Namespace, progress: Progress) -> None:
    video.check_file(args.video)
    about = _about(task, args.shape, video=Path(args.video).name)
    progress.step(f"play {Path(args.video).name}, and ask about its newest frame")
    found = video.measure_video(dataclasses.replace(task, image=args.video))
    progress.end()
    results = {**about, **found}
    if args.json:
        say_json(results)
    else:
        say(video.render(results))


def _run_engines(task: Task, as_json: bool, progress: Progress) -> None:
    """Measure every graph on every engine, and keep the choice for `--engine auto` if all answer alike."""
    bundle = open_bundle(Path(task.bundle))
    engines = candidates(bundle)
    choose_engine(BASE, target=bundle.manifest.target)  # what all are held against
    measured = measure_engines(
        bundle, engines, task.threads, task.repeats, task.max_new_tokens, progress.step
    )
    wrong = disagreement(bundle, {one.file: one.engine for one in measured}, task.threads)
    for one in measured if wrong else []:
        one.out |= dict.fromkeys((name for name in one.ms if name != BASE), wrong)
    progress.end()
    figures = {one.file: one.to_json() for one in measured}
    kept = remember(bundle, task.threads, {one.file: one.engine for one in measured}, figures)
    if as_json:
        say_json({"machine": stamp(), "threads": task.threads, "graphs": figures, "kept": str(kept)})
        return
    say(table(["graph", *(f"{name} ms" for name in engines), "runs on"], table_of(measured, engines)))
    for one in measured:
        for name, why in one.out.items():
            say(f"{one.file} is not run on {name}: {why}")
    say(
        f"milliseconds of an answer of {task.max_new_tokens} tokens; the choice saves "
        f"{saved_share(measured):.0%} of {BASE}'s. --engine auto takes it, from {kept}"
    )


def _task(args: argparse.Namespace) -> Task:
    if args.video and (args.image or args.csv or args.plot or args.engines):
        raise UsageError("--video plays a video once: leave out --image, --csv, --plot and --engines")
    if (args.bundle is None) == (args.shape is None):
        raise UsageError("give either a BUNDLE or --shape NAME, exactly one of the two")
    first = args.engine.partition(",")[0].strip()
    if "=" not in first and first not in engine_names():
        raise UsageError(f"unknown engine '{shown(first)}'; choose one of {', '.join(engine_names())}")
    image = Path(args.image) if args.image else examples_dir() / "scene.png"
    return Task(
        bundle=args.bundle or "",
        image=str(image),
        prompt=args.prompt,
        keep=None if args.keep_tokens is None else whole("keep-tokens", args.keep_tokens),
        engine=args.engine,
        threads=None if args.threads is None else whole("threads", args.threads),
        max_new_tokens=whole("max-new-tokens", args.max_new_tokens),
        repeats=whole("repeats", args.repeats),
        small_ceilings="VTP_SMALL_CEILINGS" in os.environ,
    )


def whole(name: str, text: str) -> int:
    """A flag's number, at least 1. Raises UsageError."""
    return whole_number(name, text, least=1)


def _cache(told: str | None) -> Path:
    return Path(told or os.environ.get(CACHE) or Path.home() / ".cache/vtp-edge")


def stamp() -> dict[str, Any]:
    """Hardware, versions and the time, for a result."""
    machine = look()
    named = {name: installed_version(name) for name in _VERSIONS}
    return {
        "processor": machine.board or machine.processor or platform.machine(),
        "cores": machine.cores,
        "memory_gb": round(machine.memory.total / 1e9, 1),
        "gpu": ", ".join(device.name for device in machine.cuda.devices),
        "power": machine.power,
        "system": machine.system,
        "python": platform.python_version(),
        "versions": {name: version for name, version in named.items() if version},
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


if __name__ == "__main__":
    sys.exit(main())
