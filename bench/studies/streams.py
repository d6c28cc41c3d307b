"""What reusing a camera's earlier pictures in the tower saves and costs before a stream: a Markdown table.

    python -m vtp.bench.studies.streams BUNDLE... [--scenes 4] [--gate 0.03]

Bundles of the built-in model made with `--tower stc`. The streams are those of `watching.py`: a scene drifts
slowly, a cut to another one, which then stands still under a camera's noise; the question is where a thing
is, and the generator knows the answer for every frame. Every way plays the same frames, with every frame
asked about: whole, reused, and both behind a gate, where the answer before stands while it holds frames back.
Ways take turns stream by stream, so that a slow moment of the machine meets all of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtp.bench.studies.watching import PHASES, Shown, stream
from vtp.engines import UsageError
from vtp.runtime import Pipeline
from vtp.runtime.commands.arguments import add_debug, whole
from vtp.runtime.commands.console import Parser, Progress, real_number, run_command, say
from vtp.runtime.commands.tables import markdown_table
from vtp.serve.streams.gate import DEFAULT_CHANGE, Gate


@dataclass(frozen=True)
class Way:
    """One way to look at a stream: a pipeline, behind a gate of `least` change or none."""

    name: str
    pipe: Pipeline
    least: float | None


@dataclass(frozen=True)
class Seen:
    """A frame: whether it was asked about, which share of the tower's rows was computed, whether the standing
    answer is right, milliseconds of the tower and in all (the gate's among them)."""

    phase: str
    asked: bool
    rows: float
    right: bool
    tower_ms: float
    ms: float


def play(way: Way, frames: Iterator[Shown]) -> Iterator[Seen]:
    """Look at every frame of one stream."""
    with way.pipe.claimed() as runner:
        runner.images.forget()
    gate, standing = None if way.least is None else Gate(way.least), ""
    for shown in frames:
        started = time.perf_counter()
        if gate is not None and gate.change(shown.picture) is None:
            took = (time.perf_counter() - started) * 1e3
            yield Seen(shown.phase, False, 0.0, standing == shown.truth, 0.0, took)
            continue
        result = way.pipe.generate(shown.picture, shown.question, max_new_tokens=8)
        standing, took = result.text.strip(), (time.perf_counter() - started) * 1e3
        stages, tower = result.timings.stages, result.tower or {"rows": 1, "of": 1}
        ms = sum(stages.get(name, 0.0) for name in _encoders(way.pipe))
        share = tower["rows"] / tower["of"]
        yield Seen(shown.phase, True, share, standing == shown.truth, ms, took)


def _encoders(pipe: Pipeline) -> set[str]:
    return {stage.name for stage in pipe.manifest.stages_of("encoder")}


def render(seen: Mapping[str, Sequence[Seen]]) -> str:
    """A Markdown table: for each phase the frames asked about and computed whole, right answers, times."""
    head = [title for phase in PHASES for title in (f"{phase}: asked, whole, right", "tower, frame ms")]
    rows = []
    for name, frames in seen.items():
        cells = []
        for phase in PHASES:
            of = [one for one in frames if one.phase == phase]
            cells += [
                f"{_mean(one.asked for one in of):.0%}, {_mean(one.rows == 1 for one in of):.0%}, "
                f"{_mean(one.right for one in of):.1%}",
                f"{_mean(one.tower_ms for one in of):.1f}, {_mean(one.ms for one in of):.1f}",
            ]
        rows.append([name, *cells])
    return markdown_table(["way", *head], rows, tight=True)


def _mean(values: Iterator[Any]) -> float:
    return float(np.mean(list(values)))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog="python -m vtp.bench.studies.streams", description="What stream reuse saves.")
    parser.add_argument(
        "bundles", metavar="BUNDLE", nargs="+", help="of the built-in model, with --tower stc"
    )
    parser.add_argument("--scenes", type=whole, default=4, help="streams (default: %(default)s)")
    parser.add_argument("--gate", default=str(DEFAULT_CHANGE), help="its change (default: %(default)s)")
    parser.add_argument("--threads", type=whole, default=1, help="default: %(default)s")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("streams", lambda: _run(args), args.debug)


def _run(args: Any) -> None:
    if args.scenes < 1:
        raise UsageError(f"scenes {args.scenes} is not a number of streams; give at least 1")
    least, progress = real_number("gate", args.gate), Progress()
    with ExitStack() as stack:
        ways = list(_ways(args, least, stack))
        seen: dict[str, list[Seen]] = {way.name: [] for way in ways}
        for number in range(args.scenes):
            progress.step(f"stream {number + 1} of {args.scenes}")
            for way in ways:
                seen[way.name] += play(way, stream(number))
        progress.end()
    say(render(seen))


def _ways(args: Any, least: float, stack: ExitStack) -> Iterator[Way]:
    """Whole frames by the first bundle, then each bundle's reuse; all of it once more behind the gate."""
    pipes = {"whole": stack.enter_context(Pipeline.load(args.bundles[0], threads=args.threads))}
    for bundle in args.bundles:
        pipe = stack.enter_context(Pipeline.load(bundle, threads=args.threads, stream_reuse=True))
        assert pipe.manifest.stream is not None and pipe.manifest.tower is not None  # or it was refused
        given = pipe.manifest.tower.options
        pipes[f"stc:{given['recompute']:g}, alike {given['alike']:g}, every {given['every']}"] = pipe
    for pipe in pipes.values():
        pipe.warmup()
    for gate in (None, least):
        for name, pipe in pipes.items():
            yield Way(name if gate is None else f"gate {gate:g}, {name}", pipe, gate)


if __name__ == "__main__":
    sys.exit(main())
