"""What a tower reduction costs in right answers: every method with and without it, on the reader's exam.

    python -m vtp.bench.studies.towers [--count 600] [--methods all] [--towers none,ipcv:0.35,…]

Each pair of a method and a reduction becomes a bundle of the reader and answers the same questions (ONNX
Runtime CPU, float32, greedy). A method that reads what a reduced tower does not give is left out behind it.
The difference to the same method without a reduction has a 95 % interval of a paired bootstrap that draws
pictures. The operations of the towers are counted from the graphs. Answers are kept in the work folder, and a
run with the same questions goes on from there; --report FILE writes the table between that page's marks.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.common.flops import count as count_flops
from vtp.bench.studies.methods.report import with_table
from vtp.bench.studies.paired import interval, take_exam
from vtp.engines import UsageError, VtpError
from vtp.engines.disk.whole import whole_file
from vtp.export.cli import quiet_libraries
from vtp.export.exporter import Request, export
from vtp.export.keep_counts import parse_keep
from vtp.export.pruners import picture_methods
from vtp.runtime import Pipeline
from vtp.runtime.commands.arguments import add_debug, add_threads, whole
from vtp.runtime.commands.console import Parser, Progress, run_command
from vtp.runtime.commands.tables import markdown_table
from vtp.scenes import model_dir
from vtp.scenes.exam import EXAMS, SEED, Item, held_out

NONE = "none"
TOWERS = "none,ipcv:0.35,tome:32,downsample:280"  # the three reductions do about the same work
KEEP = "128,64,32"
BEGIN, END = "<!-- towers: begin -->", "<!-- towers: end -->"


@dataclass(frozen=True)
class Taken:
    """What one method answered behind one tower.

    gflop   of the vision encoder's graph, in 10^9 operations
    right   bool [keep-counts, questions]
    """

    method: str
    tower: str
    gflop: float
    right: np.ndarray

    def of(self, kinds: np.ndarray | None = None) -> np.ndarray:
        """Rates by keep-count, of the questions that `kinds` marks."""
        return (self.right if kinds is None else self.right[:, kinds]).mean(axis=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(
        prog="python -m vtp.bench.studies.towers", description="What a tower reduction costs in answers."
    )
    add = parser.add_argument
    add("--count", type=whole, default=600, help="questions (default: %(default)s)")
    add("--methods", default="all", help="names, or all (default: %(default)s)")
    add("--towers", default=TOWERS, help="reductions, none first (default: %(default)s)")
    add("--keep", default=KEEP, help="keep-counts (default: %(default)s)")
    add("--seed", type=whole, default=SEED, help="seed of the exam (default: %(default)s)")
    add_threads(parser, type=whole)
    add("--work", default="build/towers", help="folder for bundles and answers (default: %(default)s)")
    add("--report", metavar="FILE", help="a Markdown page with the table's marks")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("towers", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    quiet_libraries()
    methods = [NONE, *(name for name in _methods(args.methods) if name != NONE)]
    towers, progress = args.towers.split(","), Progress()
    if towers[0] != NONE:
        raise UsageError(f"--towers {args.towers} does not begin with none, which the others are compared to")
    items = list(held_out(args.count, args.seed, EXAMS["reader"]))
    taken = {}
    for tower in towers:
        for method in methods:
            progress.step(f"{method} behind tower {tower}: {len(items)} questions")
            try:
                taken[method, tower] = _take(args, method, tower, items)
            except UsageError as error:  # reads what this tower does not give
                if tower == NONE:
                    raise
                progress.step(f"left out: {error}")
    progress.end()
    text = markdown(taken, items, sorted(parse_keep(args.keep), reverse=True))
    print(text)
    if args.report:
        page = Path(args.report)
        page.write_text(with_table(page.read_text(encoding="utf-8"), text, BEGIN, END), encoding="utf-8")


def _methods(text: str) -> list[str]:
    if text != "all":
        return text.split(",")
    return [name for name in picture_methods() if name != "change"]  # which compares pictures of a camera


def _take(args: argparse.Namespace, method: str, tower: str, items: Sequence[Item]) -> Taken:
    """The answers that an earlier run left, or new ones."""
    stem = Path(args.work) / f"{method}-{tower.replace(':', '-')}"
    file = stem.with_name(f"{stem.name}.json")
    wanted = {"seed": args.seed, "questions": len(items), "keep": args.keep}
    held = json.loads(file.read_text()) if file.exists() else {}
    if any(held.get(key) != value for key, value in wanted.items()):
        held = {**wanted, **_asked(args, method, tower, items, stem)}
        with whole_file(file) as aside:
            aside.write_text(json.dumps(held) + "\n")
    return Taken(method, tower, held["gflop"], np.array(held["right"], bool))


def _asked(
    args: argparse.Namespace, method: str, tower: str, items: Sequence[Item], folder: Path
) -> dict[str, Any]:
    keep = None if method == NONE else args.keep
    request = Request(
        folder, str(model_dir("reader")), method, keep, tower=tower, verify="none", overwrite=True
    )
    export(request)
    with Pipeline.load(folder) as pipe:
        visual, encoder = pipe.manifest.visual, pipe.manifest.stages_of("encoder")[0].file
        inputs = pipe.manifest.graphs[encoder].inputs.values()
        ones = {axis: 1 for value in inputs for axis in value.shape if isinstance(axis, str)}
    keeps = [visual.count] if keep is None else sorted(parse_keep(keep), reverse=True)
    right = take_exam(folder, items, keeps, args.threads)
    work = count_flops(folder / encoder, ones)
    if work.unknown:
        raise VtpError(f"{folder / encoder}: {work.unknown} operators' work could not be counted")
    gflop = work.total / 1e9
    shutil.rmtree(folder)  # ten megabytes each; the answers are what is kept
    return {"gflop": gflop, "right": right.astype(int).tolist()}


def markdown(taken: Mapping[tuple[str, str], Taken], items: Sequence[Item], keeps: Sequence[int]) -> str:
    """Three tables: all questions by method and keep-count, what a tower costs by kind, and signs alone."""
    towers = list(dict.fromkeys(tower for _, tower in taken))
    pictures = [item.picture for item in items]
    kinds = {kind: np.array([item.kind == kind for item in items]) for kind in EXAMS["reader"]}
    parts = [_costs(taken, towers, pictures, kinds, keeps), _rates(taken, towers, keeps, None)]
    titles = ["Mean over the methods", "Every method, all questions"]
    for kind in ("sign", "count"):
        parts.append(_rates(taken, towers, keeps, kinds[kind]))
        titles.append(f"Every method, {kind}")
    return "\n\n".join(f"### {title}\n\n{part}" for title, part in zip(titles, parts, strict=True))


def _costs(
    taken: Mapping[tuple[str, str], Taken],
    towers: Sequence[str],
    pictures: Sequence[int],
    kinds: Mapping[str, np.ndarray],
    keeps: Sequence[int],
) -> str:
    """Unpruned and pruned apart: rates, and the difference to no reduction with its interval.

    Pruned is the mean over the methods that have every tower.
    """
    rows = []
    methods = [method for method in _pruning(taken) if all((method, tower) in taken for tower in towers)]
    for tower in towers:
        for name, place in [("all", -1), *((str(keep), place) for place, keep in enumerate(keeps))]:
            mine, base = (_mean_rows(taken, each, place, methods) for each in (tower, NONE))
            if mine is None or base is None:
                continue
            low, high = (100 * end for end in interval(mine - base, pictures))
            difference = f"{100 * (mine - base).mean():+.1f} ({low:+.1f} to {high:+.1f})"
            by_kind = [f"{100 * mine[kind].mean():.1f}" for kind in kinds.values()]
            gflop = next(one.gflop for (_, which), one in taken.items() if which == tower)
            right = f"{100 * mine.mean():.1f}"
            rows.append([tower, f"{gflop:.2f}", name, right, "" if tower == NONE else difference, *by_kind])
    header = ["tower", "GFLOP", "kept", "right, %", "difference (95 %)", *kinds]
    return markdown_table(header, rows, left=1, tight=True)


def _mean_rows(
    taken: Mapping[tuple[str, str], Taken], tower: str, place: int, methods: Sequence[str]
) -> np.ndarray | None:
    """Each question's share of right answers over `methods` at one keep-count; -1: unpruned."""
    if place < 0:
        return taken[NONE, tower].right[0].astype(float) if (NONE, tower) in taken else None
    rows = [taken[method, tower].right[place] for method in methods]
    return np.mean(rows, axis=0) if rows else None


def _rates(
    taken: Mapping[tuple[str, str], Taken],
    towers: Sequence[str],
    keeps: Sequence[int],
    kinds: np.ndarray | None,
) -> str:
    heads = [f"{tower}, {keep}" for tower in towers for keep in keeps]
    rows = []
    for method in sorted(_pruning(taken), key=lambda method: -taken[method, NONE].of(kinds).mean()):
        cells = []
        for tower in towers:
            one = taken.get((method, tower))
            cells += [f"{100 * rate:.1f}" for rate in one.of(kinds)] if one else [""] * len(keeps)
        rows.append([method, *cells])
    return markdown_table(["method", *heads], rows, left=1, tight=True)


def _pruning(taken: Mapping[tuple[str, str], Taken]) -> list[str]:
    return [method for method in dict.fromkeys(method for method, _ in taken) if method != NONE]


if __name__ == "__main__":
    sys.exit(main())
