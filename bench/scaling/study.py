"""What a request costs as it grows: visual tokens, tokens kept, text, prompts in a batch, streams.

    python -m vtp.bench.scaling.study [BUNDLE | --shape NAME] [--rounds 3] [--quick] [--out DIR]

Visual tokens grow by pictures in the prompt, each with the bundle's N: the work of that many tiles of one
picture. One axis changes at a time, from a request of one picture, few tokens kept and a short prompt. All
points take turns, round after round, forwards and backwards, so that a slow moment of the machine meets all.
Every measurement is written down at once; a run that was ended goes on where it stood. Writes docs/scaling.md
(what was written there by hand about the reasons stays), docs/scaling.json and docs/scaling.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vtp.bench.cli import stamp, whole
from vtp.bench.common.checkout import place
from vtp.bench.common.kept_turns import KeptLines
from vtp.bench.report import check_plot
from vtp.bench.scaling.report import write_report
from vtp.bench.scaling.run import ENGINE, Point, streams, together
from vtp.bench.shapes.cached_bundle import BESIDE, Wanted, check, run_export
from vtp.engines import UsageError
from vtp.engines.disk.files import free_disk
from vtp.runtime.bundle.folder import MANIFEST, Bundle, open_bundle
from vtp.runtime.bundle.memory import PROCESS
from vtp.runtime.commands.arguments import add_debug, add_threads
from vtp.runtime.commands.console import Parser, Progress, run_command
from vtp.runtime.machine.facts import look
from vtp.scenes import examples_dir

KEEPS = (16, 32, 64, 128, 192, 288, 432)
KEEP = 64  # where other axes vary
MOST = {"pictures": 5, "batch": 8, "streams": 4}
TEXTS = (32, 64, 128, 256, 512, 1024)
SHAPED = "LlavaForConditionalGeneration"  # the shapes with
COUNT = 576  # visual tokens a picture
MAX_LENGTH = 4096  # five pictures of 576, the longest text and an answer fit


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog="python -m vtp.bench.scaling.study", description="What a request costs as it grows.")
    add = parser.add_argument
    add("bundle", nargs="?", metavar="BUNDLE", help="a folder that vtp-export made, of any method")
    add("--shape", default="llava-ov-0.5b", help="instead: a shape, random weights (default: %(default)s)")
    add(
        "--quick",
        action="store_true",
        help="the built-in model, one round, few points; docs stay as they are",
    )
    add("--rounds", help="turns of every point (default: 3)")
    add("--tokens", default="9", help="tokens of every answer (default: %(default)s)")
    add_threads(parser, "CPU threads of one stream (default: all cores)")
    add("--work", metavar="DIR", help="folder for models and bundles (default: build/bench of the checkout)")
    add("--make-only", action="store_true", help="make the bundle, and measure nothing yet")
    add(
        "--out",
        metavar="DIR",
        help="checkout whose docs/ are written (default: the current folder; with --quick: --work)",
    )
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("scaling", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    rounds = whole("rounds", args.rounds) if args.rounds else 1 if args.quick else 3
    tokens = whole("tokens", args.tokens)
    threads = whole("threads", args.threads) if args.threads else os.cpu_count() or 1
    check_plot("scaling.png")
    work = place(args.work, "--work", "build/bench")
    out = work if args.quick and args.out is None else place(args.out, "--out")
    progress = Progress()
    bundle = open_bundle(args.bundle or _make(args, work, progress.step))
    if args.make_only:
        progress.end()
        return
    study = Study(bundle, rounds, tokens, threads, args.quick)
    journal = work / f"scaling-{bundle.folder.name}.jsonl"
    study.measure(journal, progress.step)
    progress.end()
    command = "make scaling" + (f' SCALING="--rounds {rounds}"' if rounds != 3 else "")
    print(write_report({"command": command, **study.results()}, out))
    journal.unlink()
    print(f"\ndocs/scaling.md, .json and .png written in {out}")


def _make(args: argparse.Namespace, work: Path, progress: Callable[[str], None]) -> Path:
    """The bundle of a shape (or, for --quick, of the built-in model) with every keep-count; made once."""
    name = "builtin" if args.quick else args.shape
    folder, model = work / name / "scaling", work / name / "model"
    if (folder / MANIFEST).exists():
        return folder
    source: list[str] = []
    if not args.quick:
        from vtp.bench.shapes.models import find_shape, write_shape

        if find_shape(name).architecture != SHAPED:
            raise UsageError(
                f"shape {name} has no {COUNT} visual tokens a picture, from which the axes are made; choose "
                "llava-ov-0.5b or llava-1.5-7b, or give a BUNDLE with keep-counts of your own"
            )
        check(Wanted(name, "none", None, "float32", ENGINE, work), look().memory.usable, free_disk(work))
        if not model.exists():
            progress(f"make a {name} with random weights")
            write_shape(name, model, "float32")
        source = ["--model", str(model), "--max-length", str(MAX_LENGTH)]
    progress(f"export {name} with vispruner")
    keeps = ",".join(map(str, (*KEEPS, COUNT)))
    run_export([*source, "--method", "vispruner", "--keep-tokens", keeps, "-o", str(folder)])
    return folder


class Study:
    """The points of every axis, and what was measured at them."""

    def __init__(self, bundle: Bundle, rounds: int, tokens: int, threads: int, quick: bool) -> None:
        self.bundle, self.rounds, self.tokens, self.threads = bundle, rounds, tokens, threads
        self.axes, self.dropped = axes(bundle, tokens, quick)
        self._fit_streams()
        self.settings = {
            "bundle": str(bundle.folder.resolve()),
            "rounds": rounds,
            "tokens": tokens,
            "threads": threads,
            "quick": quick,
            "versions": stamp()["versions"],
        }
        self.runs: list[dict[str, Any]] = []

    def measure(self, journal: Path, progress: Callable[[str], None]) -> None:
        """Take every round of every point that `journal` does not hold yet."""
        kept = KeptLines(journal, self.settings)
        self.runs = kept.entries
        points = list(dict.fromkeys(point for line in self.axes.values() for point in line))
        for several in (False, True):
            group = [point for point in points if (point.streams > 1) == several]
            # One stream is measured again beside several: with their threads, not with all.
            group += [dataclasses.replace(group[0], streams=1)] if several and group else []
            threads = 1 if several else self.threads
            self._measure(sorted(group, key=lambda point: point.streams), threads, kept, progress)

    def _measure(
        self, points: list[Point], threads: int, kept: KeptLines, progress: Callable[[str], None]
    ) -> None:
        done = {(Point(**run["point"]), run["threads"], run["round"]) for run in self.runs}
        left = [
            (number, point)
            for number in range(self.rounds)
            for point in (points if number % 2 else points[::-1])
            if (point, threads, number) not in done
        ]
        if not left:
            return
        count = max(point.streams for _, point in left)
        progress(f"open the bundle in {count} process{'es' if count > 1 else ''}")
        image = examples_dir() / "scene.png"
        with streams(count, self.bundle.folder, image, threads, self.tokens) as benches:
            for place, (number, point) in enumerate(left, start=1):
                progress(f"{place} of {len(left)}: round {number + 1}, {_told(point)}")
                taken = {"round": number, "threads": threads, **together(benches, point)}
                kept.add({"point": dataclasses.asdict(point), **taken})

    def _fit_streams(self) -> None:
        """Drop points whose processes would not fit in memory."""
        weights = sum(info.bytes for info in self.bundle.manifest.files.values())
        room, each = look().memory.usable, int(BESIDE * weights) + PROCESS
        fits = [point for point in self.axes["streams"] if not room or point.streams * each <= room]
        for point in self.axes["streams"]:
            if point not in fits:
                self.dropped.append(
                    f"{point.streams} streams take about {point.streams * each / 1e9:.1f} GB of memory; "
                    f"{room / 1e9:.1f} GB are free"
                )
        self.axes["streams"] = fits

    def results(self) -> dict[str, Any]:
        """Everything for the report."""
        manifest = self.bundle.manifest
        return {
            "model": self.bundle.folder.parent.name
            if manifest.model.name == "model"
            else manifest.model.name,
            "method": manifest.method.name,
            "dtype": manifest.dtype,
            "count": manifest.visual.count,
            "rounds": self.rounds,
            "tokens": self.tokens,
            "threads": self.threads,
            "machine": stamp(),
            "axes": {name: [dataclasses.asdict(point) for point in line] for name, line in self.axes.items()},
            "runs": self.runs,
            "dropped": self.dropped,
        }


def axes(bundle: Bundle, tokens: int, quick: bool) -> tuple[dict[str, list[Point]], list[str]]:
    """Axis -> its points, and in words what the bundle has no room for."""
    manifest = bundle.manifest
    count, held = manifest.visual.count, sorted(manifest.visual.keep)
    few = min(held, key=lambda keep: abs(keep - KEEP))
    room = manifest.model.max_length - tokens - 1
    base = Point(keep=few)
    texts = [text for text in TEXTS if count + text + 16 <= room]  # a word may be several tokens
    most = 1 if manifest.single_picture_stages else MOST["pictures"]
    pictures = [number for number in range(1, most + 1) if number * count + TEXTS[0] + 16 <= room]
    if not texts or not pictures:
        raise UsageError(
            f"{bundle.folder} holds {manifest.model.max_length} positions, which {count} visual and "
            f"{TEXTS[0]} text tokens fill; export it with a larger --max-length"
        )
    many = _thin([dataclasses.replace(base, pictures=number) for number in pictures], quick)
    found = {
        "visual tokens": many,
        "visual tokens, all kept": [dataclasses.replace(point, keep=held[-1]) for point in many],
        "tokens kept": _thin([dataclasses.replace(base, keep=keep) for keep in held], quick),
        "text tokens": _thin([dataclasses.replace(base, text=text) for text in texts], quick),
        "batch": _thin([dataclasses.replace(base, batch=size) for size in _doubled("batch")], quick),
        # One stream is the point where all axes begin.
        "streams": [
            dataclasses.replace(base, streams=size) for size in _doubled("streams")[1 : 2 if quick else None]
        ],
    }
    dropped = [f"{text} text tokens: longer than the bundle" for text in TEXTS if text not in texts]
    if len(pictures) < most:
        dropped.append(f"more than {pictures[-1] * count} visual tokens: longer than the bundle")
    if most == 1:
        dropped.append(f"more than {count} visual tokens: the bundle takes one picture a prompt")
    return found, dropped


def _doubled(name: str) -> list[int]:
    return [size for size in (1, 2, 4, 8) if size <= MOST[name]]


def _thin(points: list[Point], quick: bool) -> list[Point]:
    """For --quick, the first two only."""
    return points[:2] if quick else points


def _told(point: Point) -> str:
    one = Point()
    parts = [
        f"{name} {value}"
        for name, value in dataclasses.asdict(point).items()
        if value != getattr(one, name) or name == "keep"
    ]
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
