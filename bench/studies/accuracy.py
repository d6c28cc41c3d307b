"""The ruler: exact match of every method on the built-in model's held-out questions.

    python -m vtp.bench.studies.accuracy [--count 1000] [--methods none,random,...] [--keep 192,128,64,57,32]
    python -m vtp.bench.studies.accuracy --model scenes/reader --exam reader --count 1500
    python -m vtp.bench.studies.accuracy --methods vscan --keep 96 --then pyramiddrop:2

Exports one bundle per method (all keep-counts in it) and answers the same questions through the pipeline.
Prints a Markdown table; scenes/README.md quotes one. A picture is encoded once for its questions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vtp.export.cli import quiet_libraries
from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline
from vtp.runtime.commands.arguments import add_debug, whole
from vtp.runtime.commands.console import Parser, Progress, run_command
from vtp.runtime.commands.tables import markdown_table
from vtp.scenes.exam import EXAMS, Item, Score, blank, held_out, score

METHODS = "none,random,uniform,fastv,vispruner,adaptprune"
KEEP = "192,128,64,57,32"
ANSWER_TOKENS = 12  # the longest answer of the exam has fewer


@dataclass(frozen=True)
class Row:
    """One method at one keep-count: its scores by kind and all together."""

    method: str
    keep: int
    scores: dict[str, Score]

    @property
    def total(self) -> Score:
        """All kinds together."""
        return self.scores["all"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(
        prog="python -m vtp.bench.studies.accuracy",
        description="Accuracy of every method on held-out questions.",
    )
    parser.add_argument("--count", type=whole, default=1000, help="questions (default: %(default)s)")
    parser.add_argument("--methods", default=METHODS, help="default: %(default)s")
    parser.add_argument("--keep", default=KEEP, help="keep-counts (default: %(default)s)")
    parser.add_argument(
        "--model", help="model folder in the built-in model's layout (default: the built-in one)"
    )
    parser.add_argument("--then", metavar="METHOD[:LAYER]", help="prune once more inside the decoder")
    parser.add_argument("--exam", choices=EXAMS, default="model", help="which exam (default: %(default)s)")
    parser.add_argument("--seed", type=whole, default=2026, help="seed of the exam (default: %(default)s)")
    parser.add_argument(
        "--work", default="build/accuracy", help="folder for the bundles (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to a file")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("accuracy", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    """Export each method and let every keep-count take the exam; unpruned with a blank picture as well."""
    started, progress = time.monotonic(), Progress()
    quiet_libraries()
    items = list(held_out(args.count, args.seed, EXAMS[args.exam]))
    rows: list[Row] = []
    for method in args.methods.split(","):
        keep = None if method == "none" else args.keep
        progress.step(f"export {method}")
        request = Request(Path(args.work) / method, args.model, method, keep, then=args.then, overwrite=True)
        folder = export(request).folder
        with Pipeline.load(folder, vision_feature_cache=1) as pipe:
            for count in sorted(pipe.manifest.visual.keep, reverse=True):
                progress.step(f"{method} at {count}: {len(items)} questions")
                rows.append(Row(method, count, take_exam(pipe, items, count)))
            if method == "none":
                progress.step("a blank picture")
                count = pipe.manifest.visual.count
                rows.append(
                    Row("none, blank picture", count, take_exam(pipe, items, count, blank_picture=True))
                )
    progress.end()
    print(markdown(rows, len(items)))
    print(f"\n{len(items)} questions, seed {args.seed}, {time.monotonic() - started:.0f} s")
    if args.json:
        Path(args.json).write_text(json.dumps([_plain(row) for row in rows], indent=1) + "\n")


def take_exam(
    pipe: Pipeline, items: Sequence[Item], keep: int, blank_picture: bool = False
) -> dict[str, Score]:
    """Greedy answers of a bundle to exam items, scored by kind."""
    return score(items, [_answer(pipe, item, keep, blank_picture) for item in items])


def _answer(pipe: Pipeline, item: Item, keep: int, blank_picture: bool) -> str:
    image: Image.Image = blank(item.image) if blank_picture else item.image
    return pipe.generate(image, item.prompt, keep_tokens=keep, max_new_tokens=ANSWER_TOKENS).text


def markdown(rows: Sequence[Row], count: int) -> str:
    """A Markdown table: one line per row, exact match in percent with its 95 % interval, then by kind."""
    kinds = [kind for kind in rows[0].scores if kind != "all"]
    lines = []
    for row in rows:
        low, high = row.total.interval
        match = f"**{100 * row.total.rate:.1f}** ({100 * low:.1f}–{100 * high:.1f})"
        by_kind = [f"{100 * row.scores[kind].rate:.1f}" for kind in kinds]
        lines.append([row.method, str(row.keep), match, *by_kind])
    return markdown_table(
        ["method", "kept of 576", "exact match % (95 %)", *kinds], lines, left=1, tight=True
    )


def _plain(row: Row) -> dict[str, object]:
    rates = {kind: value.rate for kind, value in row.scores.items()}
    return {"method": row.method, "keep": row.keep, "questions": row.total.total, "exact_match": rates}


if __name__ == "__main__":
    sys.exit(main())
