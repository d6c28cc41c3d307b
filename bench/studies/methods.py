"""Every method side by side: accuracy on held-out questions and time to first token, at several keep-counts.

    python -m vtp.bench.studies.methods [--count 500] [--methods all] [--keep 192,128,64,32,16] [--resume]

Each method becomes one bundle of the built-in model, with every keep-count in it, and answers the same
questions through the pipeline (ONNX Runtime CPU, float32, greedy). Then all bundles are timed in turn, round
after round, so that a slow moment of the machine meets all of them. Writes docs/methods.json, the page and
the plot made from it, and the table in docs/methods.md. What a method answered is kept in the work folder:
--resume goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vtp.bench.studies.methods_report import write_report
from vtp.engines import UsageError, VtpError
from vtp.engines.disk.whole import whole_file
from vtp.export.cli import quiet_libraries
from vtp.export.exporter import Request, export
from vtp.export.keep_counts import parse_keep
from vtp.export.pruners import find_method, picture_methods
from vtp.runtime import Pipeline
from vtp.runtime.commands.arguments import add_debug, whole
from vtp.runtime.commands.console import Parser, Progress, run_command
from vtp.scenes.exam import SEED, Item, blank, by_picture, held_out, is_right

NONE = "none"
KEEP = "192,128,64,32,16"
ANSWER_TOKENS = 12  # the longest answer of the exam has fewer
ROUNDS = 9
ROOT = Path(__file__).resolve().parents[2]  # through the link in vtp/


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog="python -m vtp.bench.studies.methods", description="Every method side by side.")
    add = parser.add_argument
    add("--count", type=whole, default=500, help="questions (default: %(default)s)")
    add("--methods", default="all", help="names, or all (default: %(default)s)")
    add("--keep", default=KEEP, help="keep-counts (default: %(default)s)")
    add("--seed", type=whole, default=SEED, help="seed of the exam (default: %(default)s)")
    add("--rounds", type=whole, default=ROUNDS, help="timed runs of every bundle (default: %(default)s)")
    add("--work", default="build/methods", help="folder for bundles and answers (default: %(default)s)")
    add("--resume", action="store_true", help="keep bundles and answers that the work folder holds")
    add("--no-timing", action="store_true", help="stop after the questions and write no report")
    add("--out", default=str(ROOT), help="checkout whose docs/ are written (default: this one)")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("methods", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    """Export every method, let it take the exam, time first tokens in turns, and write the report."""
    quiet_libraries()
    names, work, progress = _names(args.methods), Path(args.work), Progress()
    keeps = sorted(parse_keep(args.keep), reverse=True)
    items = list(held_out(args.count, args.seed))
    answers = {}
    for name in names:
        wanted = {"seed": args.seed, "questions": len(items), "keep": keeps}
        answers[name] = _held(work, name, wanted) if args.resume else None
        if answers[name] is None:
            progress.step(f"export {name}")
            keep = None if name == NONE else args.keep
            folder = export(Request(work / name, None, name, keep, overwrite=True)).folder
            progress.step(f"{name}: {len(items)} questions at {args.keep if keep else 'all tokens'}")
            answers[name] = {**wanted, "right": take_exam(folder, items)}
            _write(work / f"{name}.json", answers[name])
    if args.no_timing:
        progress.end()
        return
    progress.step(f"time to first token, {args.rounds} rounds")
    times = time_to_first_token({name: work / name for name in names}, items[0], args.rounds)
    progress.end()
    results = _results(args, names, items, answers, times)
    write_report(results, Path(args.out))
    print(f"{len(names)} methods: methods.json, measured.md, methods.md and methods.png of docs/ written")


def _names(text: str) -> list[str]:
    known = [name for name in picture_methods() if name != "change"]  # which compares pictures of a camera
    names = known if text == "all" else [NONE, *(name for name in text.split(",") if name != NONE)]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown method '{name}'; methods: {', '.join(known)}")
    return names


def _held(work: Path, name: str, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The answers that an earlier run left, if they are to the same questions."""
    file = work / f"{name}.json"
    if not (file.exists() and (work / name).is_dir()):
        return None
    held = json.loads(file.read_text())
    return held if all(held.get(key) == value for key, value in wanted.items()) else None


def _write(file: Path, data: object) -> None:
    """Write beside, then swap in: a kill leaves the old file or the new one."""
    with whole_file(file) as aside:
        aside.write_text(json.dumps(data) + "\n")


def take_exam(folder: Path, items: Sequence[Item]) -> dict[str, list[int]]:
    """Answer every question at every keep-count of a bundle; 1 for a right answer, by keep-count.

    A picture is encoded once for its questions and keep-counts. "blank" holds the answers to a grey picture,
    for a bundle that keeps everything.
    """
    with Pipeline.load(folder, vision_feature_cache=1) as pipe:
        visual = pipe.manifest.visual
        right: dict[str, list[int]] = {str(keep): [] for keep in visual.keep}
        for group in by_picture(items):
            for item in group:
                for keep in visual.keep:
                    right[str(keep)].append(_right(pipe, item, keep))
        if visual.keep == [visual.count]:
            grey = blank(items[0].image)
            right["blank"] = [_right(pipe, item, visual.count, grey) for item in items]
    return right


def _right(pipe: Pipeline, item: Item, keep: int, image: Any = None) -> int:
    picture = item.image if image is None else image
    result = pipe.generate(picture, item.prompt, keep_tokens=keep, max_new_tokens=ANSWER_TOKENS)
    return int(is_right(result.text, item.answer))


def time_to_first_token(bundles: Mapping[str, Path], item: Item, rounds: int) -> dict[str, dict[str, Any]]:
    """Median milliseconds per method and keep-count: `ttft`, and `pruner` of it, over interleaved rounds."""
    if rounds < 1:
        raise UsageError(f"rounds {rounds} measures nothing; choose at least 1")
    seen: dict[str, dict[str, dict[str, list[float]]]] = {}
    with ExitStack() as stack:
        pipes = {name: stack.enter_context(Pipeline.load(folder)) for name, folder in bundles.items()}
        for number in range(rounds + 1):  # the first one warms up
            for name, pipe in pipes.items():
                for keep in pipe.manifest.visual.keep:
                    timings = pipe.generate(
                        item.image, item.prompt, keep_tokens=keep, max_new_tokens=1
                    ).timings
                    pruners = {stage.name for stage in pipe.manifest.stages_of("pruner")}
                    pruner = sum(ms for stage, ms in timings.stages.items() if stage in pruners)
                    if number:
                        row = seen.setdefault(name, {}).setdefault(str(keep), {"ttft": [], "pruner": []})
                        row["ttft"].append(timings.ttft)
                        row["pruner"].append(pruner)
    return {
        name: {
            keep: {part: round(statistics.median(values), 2) for part, values in row.items()}
            for keep, row in rows.items()
        }
        for name, rows in seen.items()
    }


def _results(
    args: argparse.Namespace,
    names: Sequence[str],
    items: Sequence[Item],
    answers: Mapping[str, Any],
    times: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """One row for each method and keep-count: right answers, also by kind of question, and its times."""
    rows = []
    for name in names:
        for keep, right in answers[name]["right"].items():
            if len(right) != len(items):
                raise VtpError(
                    f"{name} answered {len(right)} of {len(items)} questions; run without --resume"
                )
            kinds: dict[str, list[int]] = {}
            for item, one in zip(items, right, strict=True):
                kinds.setdefault(item.kind, []).append(one)
            rows.append(
                {
                    "method": name,
                    "site": "-" if name == NONE else find_method(name).site,
                    "keep": keep if keep == "blank" else int(keep),
                    "right": sum(right),
                    "kinds": {kind: [sum(ones), len(ones)] for kind, ones in kinds.items()},
                    **({} if keep == "blank" else times[name][keep]),
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


if __name__ == "__main__":
    sys.exit(main())
