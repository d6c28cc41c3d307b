"""What a gate saves and costs before a stream, and what an alert costs beside an answer: Markdown tables.

    python -m vtp.bench.studies.watching BUNDLE [--scenes 10] [--questions 200] [--exam reader]

Streams are made: a scene drifts slowly, a cut to another one, which then stands still under a camera's noise.
The question is where a thing is, and the generator knows the answer for every frame. Every frame is asked
about once; a gate then plays the same frames, and where it holds one back, the answer before stands. The
bundle must be of the built-in model, or with `--exam reader` of the second one, which says yes and no.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from vtp.bench.common.figures import ratio, spread
from vtp.runtime import Pipeline
from vtp.runtime.commands.arguments import add_debug, whole
from vtp.runtime.commands.console import Parser, Progress, run_command, say
from vtp.runtime.commands.tables import markdown_table
from vtp.scenes.exam import EXAMS, Item, held_out
from vtp.scenes.generator.pictures import (
    COLORS,
    PLACES,
    SHAPES,
    Picture,
    draw,
    held_out_seed,
    place,
    unique_words,
)
from vtp.serve.streams.gate import Gate

PHASES, FRAMES, STEP = ("drift", "cut and still"), 60, 1  # frames of a phase, pixels of a frame
GATES = (0.01, 0.02, 0.03, 0.05, 0.1)
NOISE = 3.0  # standard deviation of a camera's noise, of 255
OPTIONS: dict[str, list[str] | None] = {  # None: yes or no
    "shape": list(SHAPES),
    "color": list(COLORS),
    "where": list(PLACES),
    "count": list("0123456789"),
    "presence": None,
}


@dataclass(frozen=True)
class Shown:
    """One frame of a made stream, and where its thing is."""

    picture: Image.Image
    question: str
    truth: str
    phase: str


@dataclass
class Asked:
    """A frame with the model's answer, and the milliseconds that took."""

    shown: Shown
    answer: str
    ms: float


def stream(number: int) -> Iterator[Shown]:
    """The frames of one stream: two held-out scenes that have a word in common."""
    first, second, word = _pair(number)
    rng = np.random.default_rng(number)
    thing = unique_words(first)[word]
    for step in range(FRAMES):
        shift = STEP * step
        moved = replace(thing, x=(thing.x + shift) % len(first.pixels))
        yield Shown(
            _noisy(np.roll(first.pixels, shift, axis=1), rng),
            f"where is the {word} ?",
            place(first, moved),
            PHASES[0],
        )
    truth = place(second, unique_words(second)[word])
    for _ in range(FRAMES):
        yield Shown(_noisy(second.pixels, rng), f"where is the {word} ?", truth, PHASES[1])


def _pair(number: int) -> tuple[Picture, Picture, str]:
    """Two scenes, and a word that names one thing of each, which does not leave the first while it drifts."""
    seed = held_out_seed(5000 + 20 * number)
    first = draw(seed)
    for other in range(1, 20):
        second = draw(seed + other)
        for word in sorted(set(unique_words(first)) & set(unique_words(second))):
            if unique_words(first)[word].x + FRAMES * STEP < len(first.pixels) - 21:
                return first, second, word
    raise AssertionError("no two scenes share a word")


def _noisy(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(np.clip(pixels + rng.normal(0, NOISE, pixels.shape), 0, 255).astype(np.uint8))


def ask_all(pipe: Pipeline, frames: Iterator[Shown]) -> list[Asked]:
    """Ask about every frame."""
    asked = []
    for one in frames:
        result = pipe.generate(one.picture, one.question, max_new_tokens=8)
        asked.append(Asked(one, result.text.strip(), result.timings.total))
    return asked


def gated(streams: Sequence[list[Asked]], least: float | None) -> dict[str, dict[str, float]]:
    """For each phase: the share of frames asked about, right standing answers, and milliseconds a frame."""
    rows: dict[str, list[tuple[bool, bool, float]]] = {phase: [] for phase in PHASES}
    for asked in streams:
        gate, standing = None if least is None else Gate(least), ""
        for one in asked:
            started = time.perf_counter()
            passed = gate is None or gate.change(one.shown.picture) is not None
            own = 0.0 if gate is None else (time.perf_counter() - started) * 1e3
            standing = one.answer if passed else standing
            rows[one.shown.phase].append((passed, standing == one.shown.truth, own + passed * one.ms))
    columns = {phase: np.array(found, float).mean(axis=0) for phase, found in rows.items()}
    return {
        phase: dict(zip(("asked", "right", "ms"), found, strict=True)) for phase, found in columns.items()
    }


def gate_table(streams: Sequence[list[Asked]]) -> str:
    """A Markdown table: for each phase the frames asked about, right answers and times."""
    rows = []
    for least in (None, *GATES):
        found = gated(streams, least)
        cells = [f"{one['asked']:.0%}, {one['right']:.1%}, {one['ms']:.1f}" for one in found.values()]
        rows.append(["off" if least is None else f"{least:g}", *cells])
    head = [f"{phase}: asked, right, ms a frame" for phase in PHASES]
    return markdown_table(["gate", *head], rows, tight=True)


def alert_lines(pipe: Pipeline, items: Iterable[Item], kind: str) -> list[str]:
    """The exam's questions of a kind: decided in one prefill, and answered; lines of Markdown."""
    same = right = 0
    times = list[tuple[float, float]]()
    for item in items:
        decided = pipe.decide(item.image, item.prompt, OPTIONS[item.kind], labels="texts")
        answered = pipe.generate(item.image, item.prompt, max_new_tokens=8)
        same += decided.answer == answered.text.strip()
        right += decided.answer == item.answer
        times.append((answered.timings.total, decided.timings.total))
    theirs, ours = zip(*times, strict=True)
    found = ratio(theirs, ours)
    return [
        f"{same} of {len(times)} questions ({kind}) are decided as they are answered, {right} rightly.",
        f"An answer takes {spread(theirs)['median']:.1f} ms, a decision {spread(ours)['median']:.1f} ms: "
        f"{found['ratio']:.2f} times (95 % interval {found['low']:.2f} to {found['high']:.2f}).",
    ]


def asked_of(exam: str, count: int) -> tuple[str, list[Item]]:
    """Questions of an exam whose answers are known beforehand: of the reader's, those of yes or no."""
    if exam != "reader":
        return "choices", list(held_out(count, seed=17))
    kinds = EXAMS[exam]
    items = (item for item in held_out(count * len(kinds), seed=17, kinds=kinds) if item.kind == "presence")
    return "yes or no", list(islice(items, count))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog="python -m vtp.bench.studies.watching", description="What a gate and alerts cost.")
    parser.add_argument("bundle", metavar="BUNDLE", help="of the built-in model")
    parser.add_argument("--scenes", type=int, default=10, help="streams, 0 for none (default: %(default)s)")
    parser.add_argument("--questions", type=whole, default=200, help="of the exam (default: %(default)s)")
    parser.add_argument("--exam", choices=EXAMS, default="model", help="whose (default: %(default)s)")
    parser.add_argument("--threads", type=whole, default=1, help="default: %(default)s")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("watching", lambda: _run(args), args.debug)


def _run(args: Any) -> None:
    progress, streams = Progress(), []
    with Pipeline.load(args.bundle, threads=args.threads) as pipe:
        pipe.warmup()
        for number in range(args.scenes):
            progress.step(f"stream {number + 1} of {args.scenes}")
            streams.append(ask_all(pipe, stream(number)))
        progress.step("alerts")
        kind, items = asked_of(args.exam, args.questions)
        alerts = alert_lines(pipe, items, kind)
        progress.end()
    say("\n".join([*([gate_table(streams)] if streams else []), "", *alerts]))


if __name__ == "__main__":
    sys.exit(main())
