"""One method against others, question by question: the difference in exact match and how sure it is.

    python -m vtp.bench.studies.paired focal vispruner adaptprune [--keep 64,32,16] [--seed 2026] [--count
    1000]

A method is a name, a name with options (vispruner:positions=original,r=0.3) or the folder of a bundle that
holds the keep-counts. The first is compared with each of the others on the same questions of the built-in
model's exam. The 95 % interval is of a paired bootstrap that draws pictures, for the four questions about a
picture stand and fall together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vtp.engines import UsageError
from vtp.export.cli import quiet_libraries
from vtp.export.exporter import Request, export
from vtp.export.keep_counts import parse_keep
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import MANIFEST
from vtp.runtime.commands.arguments import add_debug, add_threads, whole
from vtp.runtime.commands.console import Parser, Progress, run_command
from vtp.runtime.commands.tables import markdown_table
from vtp.scenes.exam import SEED, Item, by_picture, held_out, is_right

ANSWER_TOKENS = 12  # the longest answer of the exam has fewer
DRAWS = 10_000


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(
        prog="python -m vtp.bench.studies.paired", description="One method against others, paired."
    )
    add = parser.add_argument
    add("first", help="method, method:option=value,... or bundle folder")
    add("others", nargs="+", help="what it is compared with, in the same form")
    add("--keep", default="192,128,64,32,16", help="keep-counts (default: %(default)s)")
    add("--count", type=whole, default=1000, help="questions (default: %(default)s)")
    add("--seed", type=whole, default=SEED, help="seed of the exam (default: %(default)s)")
    add("--model", help="model folder in the built-in model's layout (default: the built-in one)")
    add_threads(parser, type=whole)
    add("--work", default="build/paired", help="folder for the bundles (default: %(default)s)")
    add("--json", metavar="FILE", help="also write who was right on what")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("paired", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    quiet_libraries()
    specs = [args.first, *args.others]
    twice = next((spec for spec in specs if specs.count(spec) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice; a method is compared with others")
    progress, keeps = Progress(), parse_keep(args.keep)[::-1]
    items = list(held_out(args.count, args.seed))
    right: dict[str, np.ndarray] = {}
    for spec in specs:
        progress.step(f"export {spec}")
        folder = bundle(spec, args)
        progress.step(f"{spec}: {len(items)} questions at {args.keep}")
        right[spec] = take_exam(folder, items, keeps, args.threads)
    progress.end()
    print(markdown(args.first, right, keeps, [item.picture for item in items]))
    print(f"\n{len(items)} questions, seed {args.seed}; {DRAWS} draws of pictures")
    if args.json:
        plain = {spec: dict(zip(map(str, keeps), rows.tolist(), strict=True)) for spec, rows in right.items()}
        Path(args.json).write_text(json.dumps(plain) + "\n")


def bundle(spec: str, args: argparse.Namespace) -> Path:
    """The folder of a bundle: `spec` itself, or what exporting the method that it names gives."""
    if (Path(spec) / MANIFEST).exists():
        return Path(spec)
    name, _, options = spec.partition(":")
    folder = Path(args.work) / spec.replace(":", "-").replace(",", "-").replace("=", "-")
    chosen = tuple(options.split(",")) if options else ()
    return export(Request(folder, args.model, name, args.keep, method_options=chosen, overwrite=True)).folder


def take_exam(folder: Path, items: Sequence[Item], keeps: Sequence[int], threads: int | None) -> np.ndarray:
    """Which questions a bundle answers rightly: bool [keep-counts, questions]. Encodes a picture once."""
    lines: list[list[bool]] = [[] for _ in keeps]
    with Pipeline.load(folder, threads=threads, vision_feature_cache=1) as pipe:
        for group in by_picture(items):
            for line, keep in zip(lines, keeps, strict=True):
                for item in group:
                    answer = pipe.generate(
                        item.image, item.prompt, keep_tokens=keep, max_new_tokens=ANSWER_TOKENS
                    )
                    line.append(is_right(answer.text, item.answer))
    return np.array(lines)


def interval(
    difference: np.ndarray, pictures: Sequence[int], draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of difference [questions], drawing whole pictures."""
    _, which = np.unique(pictures, return_inverse=True)
    total = np.bincount(which, weights=difference)
    size = np.bincount(which)
    picks = np.random.default_rng(seed).integers(0, len(size), (draws, len(size)))
    means = total[picks].sum(axis=1) / size[picks].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def markdown(first: str, right: dict[str, np.ndarray], keeps: Sequence[int], pictures: Sequence[int]) -> str:
    """A Markdown table in percent and points, one line per keep-count and other method."""
    header = ["kept", f"{first} %", "against", "its %", "difference (95 %)"]
    header += [f"only {first} right", "only it right"]
    rows = []
    for place, keep in enumerate(keeps):
        mine = right[first][place]
        for other in [name for name in right if name != first]:
            theirs = right[other][place]
            low, high = interval(mine.astype(float) - theirs, pictures)
            gap = 100 * (mine.mean() - theirs.mean())
            row = [str(keep), f"{100 * mine.mean():.1f}", other, f"{100 * theirs.mean():.1f}"]
            row += [f"{gap:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"]
            rows.append([*row, str(int((mine & ~theirs).sum())), str(int((theirs & ~mine).sum()))])
    return markdown_table(header, rows, align="rrlr", tight=True)


if __name__ == "__main__":
    sys.exit(main())
