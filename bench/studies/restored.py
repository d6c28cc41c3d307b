"""Does --restore help? Every method with it and without it, on the same held-out questions.

    python -m vtp.bench.studies.restored [--methods vispruner,fastv,random] [--keep 64,32,16] [--count 500]

Exports each method twice (all keep-counts in it), asks both the same questions and prints a Markdown table
of exact match, with the paired difference and its 95 % interval (bootstrap).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vtp.bench.studies.accuracy import ANSWER_TOKENS
from vtp.calib import stats
from vtp.export.cli import quiet_libraries
from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline
from vtp.runtime.commands.arguments import add_debug, whole
from vtp.runtime.commands.console import Parser, Progress, run_command
from vtp.runtime.commands.tables import markdown_table
from vtp.scenes.exam import EXAMS, Item, held_out, score

HEADER = ["method", "kept of 576", "plain %", "restored %", "difference, points (95 %)"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(
        prog="python -m vtp.bench.studies.restored",
        description="Methods with --restore and without it on held-out questions.",
    )
    parser.add_argument("--count", type=whole, default=500, help="questions (default: %(default)s)")
    parser.add_argument("--methods", default="vispruner,fastv,random", help="default: %(default)s")
    parser.add_argument("--keep", default="64,32,16", help="keep-counts (default: %(default)s)")
    parser.add_argument("--exam", choices=EXAMS, default="model", help="which exam (default: %(default)s)")
    parser.add_argument("--model", help="model folder (default: the built-in one)")
    parser.add_argument("--seed", type=whole, default=2027, help="seed of the exam (default: %(default)s)")
    parser.add_argument("--threads", type=whole, help="CPU threads of one operator (default: all cores)")
    parser.add_argument("--work", default="build/restored", help="folder for the bundles")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("restored", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    started, progress = time.monotonic(), Progress()
    quiet_libraries()
    items = list(held_out(args.count, args.seed, EXAMS[args.exam]))
    rows = []
    for method in args.methods.split(","):
        marks = {restore: _marks(args, method, restore, items, progress) for restore in (False, True)}
        rows += [_row(method, keep, marks[False][keep], marks[True][keep]) for keep in marks[True]]
    progress.end()
    print(markdown_table(HEADER, rows, left=1, tight=True))
    print(f"\n{len(items)} questions, seed {args.seed}, {time.monotonic() - started:.0f} s")


def _marks(
    args: argparse.Namespace, method: str, restore: bool, items: Sequence[Item], progress: Progress
) -> dict[int, list[float]]:
    """Keep-count -> 1 or 0 for every question."""
    name = f"{method}{' restored' if restore else ''}"
    progress.step(f"export {name}")
    folder = Path(args.work) / name.replace(" ", "-")
    request = Request(folder, args.model, method, args.keep, restore=restore, overwrite=True, verify="none")
    export(request)
    found: dict[int, list[float]] = {}
    with Pipeline.load(folder, threads=args.threads, vision_feature_cache=1) as pipe:
        for keep in sorted(pipe.keep_counts, reverse=True):
            progress.step(f"{name} at {keep}: {len(items)} questions")
            found[keep] = [_mark(pipe, item, keep) for item in items]
    return found


def _mark(pipe: Pipeline, item: Item, keep: int) -> float:
    answer = pipe.generate(item.image, item.prompt, keep_tokens=keep, max_new_tokens=ANSWER_TOKENS).text
    return score([item], [answer])["all"].rate


def _row(method: str, keep: int, plain: Sequence[float], restored: Sequence[float]) -> list[str]:
    one, two = (100 * sum(marks) / len(marks) for marks in (plain, restored))
    gap = stats.difference(restored, plain)
    value, low, high = (100 * part for part in (gap.value, gap.low, gap.high))
    return [method, str(keep), f"{one:.1f}", f"{two:.1f}", f"{value:+.1f} ({low:+.1f} to {high:+.1f})"]


if __name__ == "__main__":
    sys.exit(main())
