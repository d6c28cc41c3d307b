"""Every method side by side: accuracy on held-out questions and time to first token, at several keep-counts.

    python -m vtp.bench.studies.methods [--count 500] [--methods all] [--keep 192,128,64,32,16] [--resume]
    python -m vtp.bench.studies.methods --add --methods downsample,random

Each method becomes one bundle of the built-in model, with every keep-count in it, and answers the same
questions through the pipeline (ONNX Runtime CPU, float32, greedy); "downsample" is no method but a smaller
picture with as many tokens. Then all bundles are timed in turn, round after round, so that a slow moment of
the machine meets all of them. Writes docs/methods.json, the page and the plot made from it, and the table in
docs/methods.md. What a method answered is kept in the work folder: --resume goes on from there.

--add asks the methods named and puts their rows beside those of docs/methods.json, if the model is the one
that was asked then: every token kept, it must answer as many of the same questions. It takes no times: a row
that had one keeps it, a new one has none until the whole study runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.studies.methods import asked
from vtp.bench.studies.methods.asked import BLANK, NONE, Cell
from vtp.bench.studies.methods.report import write_report
from vtp.calib.baselines.smaller import DOWNSAMPLE
from vtp.engines import UsageError, VtpError
from vtp.export.cli import quiet_libraries
from vtp.export.keep_counts import parse_keep
from vtp.export.pruners import find_method, picture_methods
from vtp.runtime.commands.arguments import add_debug, add_threads, whole
from vtp.runtime.commands.console import Parser, Progress, run_command
from vtp.scenes.exam import SEED, Item, held_out

KEEP = "192,128,64,32,16"
ROUNDS = 9
ROOT = Path(__file__).resolve().parents[3]  # through the link in vtp/
_TIMES = ("ttft", "pruner")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog="python -m vtp.bench.studies.methods", description="Every method side by side.")
    add = parser.add_argument
    add("--count", type=whole, default=500, help="questions (default: %(default)s)")
    add("--methods", default="all", help=f"names, {DOWNSAMPLE} or all (default: %(default)s)")
    add("--keep", default=KEEP, help="keep-counts (default: %(default)s)")
    add("--seed", type=whole, default=SEED, help="seed of the exam (default: %(default)s)")
    add("--rounds", type=whole, default=ROUNDS, help="timed runs of every bundle (default: %(default)s)")
    add_threads(parser, "CPU threads of one operator while questions are asked (all cores)", type=whole)
    add("--work", default="build/methods", help="folder for bundles and answers (default: %(default)s)")
    add("--resume", action="store_true", help="keep bundles and answers that the work folder holds")
    after = parser.add_mutually_exclusive_group()
    after.add_argument("--no-timing", action="store_true", help="stop after the questions, write no report")
    after.add_argument("--add", action="store_true", help="add rows to the report that is there, untimed")
    add("--out", default=str(ROOT), help="checkout whose docs/ are written (default: this one)")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("methods", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    """Export every method, let it take the exam, time first tokens in turns, and write the report."""
    quiet_libraries()
    names, work, progress = _names(args.methods), Path(args.work), Progress()
    keeps = sorted(parse_keep(args.keep), reverse=True)
    page = _page(args, keeps) if args.add else None
    items = list(held_out(args.count, args.seed))
    cells = {name: asked.cells_of(name, keeps, work) for name in names}
    answers = {name: _answers(args, name, cells[name], items, progress) for name in names}
    times: Mapping[str, Any] = {}
    if not (args.no_timing or args.add):
        progress.step(f"time to first token, {args.rounds} rounds")
        times = asked.time_to_first_token(cells, items[0], args.rounds)
    progress.end()
    if args.no_timing:
        return
    results = _results(args, cells, items, answers, times)
    if page is not None:
        results = added(results, page)
    write_report(results, Path(args.out))
    print(f"{len(names)} methods: methods.json, measured.md, methods.md and methods.png of docs/ written")


def _names(text: str) -> list[str]:
    known = [name for name in picture_methods() if name != "change"]  # which compares pictures of a camera
    known.append(DOWNSAMPLE)
    names = known if text == "all" else [NONE, *(name for name in text.split(",") if name != NONE)]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown method '{name}'; methods: {', '.join(known)}")
    return names


def _answers(
    args: argparse.Namespace, name: str, cells: Sequence[Cell], items: Sequence[Item], progress: Progress
) -> dict[str, Any]:
    """The answers that an earlier run left, or new ones."""
    file, columns = Path(args.work) / f"{name}.json", [cell.column for cell in cells]
    wanted = {"seed": args.seed, "questions": len(items), "keep": columns}
    found = asked.held(file, cells, wanted) if args.resume else None
    if found is None:
        progress.step(f"export {name}")
        asked.export_cells(name, cells)
        kept = "all tokens" if name == NONE else ", ".join(map(str, columns))
        progress.step(f"{name}: {len(items)} questions at {kept}")
        found = {**wanted, **asked.ask(name, cells, items, args.threads)}
        asked.write(file, found)
    return found


def _results(
    args: argparse.Namespace,
    cells: Mapping[str, Sequence[Cell]],
    items: Sequence[Item],
    answers: Mapping[str, Any],
    times: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """One row for each method and keep-count: right answers, also by kind of question, and what it costs."""
    rows = []
    for name, own in cells.items():
        tokens = {str(cell.column): cell.tokens for cell in own}
        for column, right in answers[name]["right"].items():
            if len(right) != len(items):
                raise VtpError(
                    f"{name} answered {len(right)} of {len(items)} questions; run without --resume"
                )
            kinds: dict[str, list[int]] = {}
            for item, one in zip(items, right, strict=True):
                kinds.setdefault(item.kind, []).append(one)
            gflop = answers[name]["gflop"].get(column)
            rows.append(
                {
                    "method": name,
                    "site": _site(name),
                    "keep": column if column == BLANK else int(column),
                    **({} if column == BLANK else {"tokens": tokens[column]}),
                    "right": sum(right),
                    "kinds": {kind: [sum(ones), len(ones)] for kind, ones in kinds.items()},
                    "answers": packed(right),
                    **({"gflop": gflop} if gflop else {}),
                    **times.get(name, {}).get(column, {}),
                }
            )
    return {
        "questions": len(items),
        "seed": args.seed,
        "rounds": args.rounds,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "rows": rows,
    }


def _site(name: str) -> str:
    return {NONE: "-", DOWNSAMPLE: "--tower"}.get(name) or find_method(name).site


def packed(right: Sequence[int]) -> str:
    """1 or 0 for every question as hexadecimal digits, the first question the highest bit of the first."""
    return np.packbits(np.array(right, np.uint8)).tobytes().hex()


# -- rows beside those of an earlier run ---------------------------------------------------------------------


def _page(args: argparse.Namespace, keeps: Sequence[int]) -> dict[str, Any]:
    """docs/methods.json; UsageError if it is not there or its exam is another."""
    file = Path(args.out) / "docs/methods.json"
    if not file.is_file():
        raise UsageError(f"--add: {file} is not there; run without --add")
    page: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    held = sorted({row["keep"] for row in page["rows"] if row["method"] != NONE}, reverse=True)
    for flag, own, theirs in (
        ("--count", args.count, page["questions"]),
        ("--seed", args.seed, page["seed"]),
        ("--keep", list(keeps), held),
    ):
        if own != theirs:
            raise UsageError(f"--add: {flag} is {own}, and the rows of {file} have {theirs}; give the same")
    return page


def added(results: Mapping[str, Any], page: Mapping[str, Any]) -> dict[str, Any]:
    """The page's rows, with those of `results` in the place of the same ones or behind them.

    Times stay, and so does what is said of the machine that took them; "again" names the methods whose
    answers are of this run and whose times are not. Raises VtpError if the model does not answer as many
    questions as then with every token kept, and to a grey picture.
    """
    before = {(row["method"], row["keep"]): row for row in page["rows"]}
    now = {(row["method"], row["keep"]): row for row in results["rows"]}
    for (name, keep), row in now.items():
        old = before.get((name, keep), {})
        says = f"{name} at {keep}: {row['right']} right, {old.get('right')} in docs/methods.json"
        if name == NONE and old.get("right") != row["right"]:
            raise VtpError(f"--add: {says}, so that was another model; run without --add")
        if old and old["right"] != row["right"]:
            print(says)
        now[name, keep] = {**row, **{part: old[part] for part in _TIMES if part in old}}
    again = {name for name, _ in now if name != NONE and any(name == other for other, _ in before)}
    again |= set(page.get("again", ()))
    return {**page, "again": sorted(again), "rows": list({**before, **now}.values())}
