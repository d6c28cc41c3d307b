"""vtp-calib: how many visual tokens a task needs, found on the user's own data."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from vtp.calib import stats
from vtp.calib.arguments import (
    PROG,
    beside,
    open_examiner,
    open_workers,
    read_samples,
    shared_arguments,
    smaller_picture,
)
from vtp.calib.baselines import against
from vtp.calib.keep import report, search
from vtp.calib.keep.examiner import Examiner, Marks, score
from vtp.calib.keep.journal import Answer, Journal
from vtp.calib.keep.wrong import Kinds
from vtp.calib.quantize import command as quantizing
from vtp.calib.workers.local import Workers
from vtp.engines import UsageError
from vtp.engines.errors import shown
from vtp.engines.versions import own_version
from vtp.runtime.bundle.folder import check_own, open_bundle, set_calibration
from vtp.runtime.bundle.memory import bundle_memory
from vtp.runtime.commands.arguments import A_BUNDLE, real, take_bundle
from vtp.runtime.commands.console import Parser, Progress, run_command, say, say_json, table
from vtp.runtime.engine_choice import main_engine
from vtp.runtime.hub.names import display_name

_RESUMES = "every answer so far is written down, and the same command goes on from there"


def build_parser() -> argparse.ArgumentParser:
    """The flags of vtp-calib and its commands."""
    parser = Parser(
        prog=PROG,
        description="Choose how many visual tokens to keep and how few bits to use, on your own data.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    _keep_arguments(commands.add_parser("keep", help="choose a bundle's keep-count and make it the default"))
    _score_arguments(commands.add_parser("score", help="compare bundles on the same questions"))
    quantizing.add_arguments(
        commands.add_parser("quantize", help="a bundle in fewer bits, and what it costs")
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of vtp-calib; returns the exit code."""
    args = build_parser().parse_args(argv)
    work = {"keep": _keep, "score": _score, "quantize": quantizing.run}[args.command]
    return run_command(f"{PROG} {args.command}", lambda: work(args), args.debug, _RESUMES)


def _keep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help=A_BUNDLE)
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--floor", type=real, metavar="R", help="share of the unpruned score to hold (0.97)")
    goal.add_argument("--budget-ms", type=real, metavar="MS", help="time to the first token, in the median")
    goal.add_argument(
        "--budget-mb", type=real, metavar="MB", help="memory, as vtp-doctor tells it beforehand"
    )
    parser.add_argument("--reference", metavar="BUNDLE", help="a bundle that keeps every token")
    parser.add_argument("--dry-run", action="store_true", help="leave the bundle as it is")
    against.against_argument(parser)
    parser.add_argument("--markdown", action="store_true", help="print the result as a table to paste")
    shared_arguments(parser)


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE[:K]", help="a bundle, or one at a keep-count")
    against.against_argument(parser)
    shared_arguments(parser)


# -- keep ----------------------------------------------------------------------------------------------------


def _keep(args: argparse.Namespace) -> None:
    """Ask at keep-counts until the goal is met, write the reports, and set the bundle's default."""
    goal = _goal(args)
    floor = goal.get("floor")
    samples, metric = read_samples(args)
    bundle, progress = open_bundle(take_bundle(PROG, args.bundle, args.json)), Progress()
    folder = bundle.folder
    if not args.dry_run:
        check_own(bundle)
    out = Path(args.out) if args.out else beside(bundle, "calib")
    with ExitStack() as stack:
        journal = Journal(out / "answers.jsonl")
        stack.callback(journal.close)
        workers = open_workers(stack, args)
        opened = partial(
            open_examiner, args, samples=samples, journal=journal, workers=workers, progress=progress.step
        )
        examiner = opened(str(folder))
        baselines = against.Baselines(args.against, opened, metric, smaller_picture(args, out, progress.step))
        baselines.check(examiner.bundle.manifest)
        baselines.unpruned = unpruned = _unpruned(args, examiner, journal, workers, progress.step)
        reference = score(unpruned, samples, metric, unpruned)
        manifest = examiner.bundle.manifest
        trials = search.Trials(lambda keep: examiner.marks(keep, metric, unpruned), reference)
        if floor is not None:
            found = search.smallest_holding(manifest.visual.keep, floor, trials)
        elif args.budget_mb is not None:
            found = search.best_fitting(_needs_mb(examiner), args.budget_mb, trials)
            goal["needs_mb"] = round(_needs_mb(examiner)[found.chosen.keep], 1)
        else:
            found = search.best_within(manifest.visual.keep, args.budget_ms, trials)
        marks = found.chosen.marks
        besides = baselines.beside(f"{manifest.method.name}:{marks.keep}", examiner, marks.keep, marks.scores)
        progress.end()
    record = _record(found, goal, metric, len(samples), examiner, stats.mean(reference))
    record["against"] = [one.to_json() for one in besides]
    kinds = Kinds(samples, metric, unpruned)
    report.write_csv(out / "keep.csv", found, floor, kinds)
    drawn = report.draw(out / "keep.png", found, f"{manifest.method.name} on {Path(args.data).name}")
    if not args.dry_run:
        set_calibration(folder, found.chosen.keep, record, manifest)
    if args.json:
        wrong = {str(tried.keep): kinds.to_json(tried.marks.scores) for tried in found.tried}
        say_json({**record, "keep": found.chosen.keep, "wrong": wrong, **bundle.stated_origin})
        against.report(besides, baselines.notes, f"{PROG} keep", quiet=True)
        return
    if args.markdown:
        say(report.markdown(found, floor, kinds, _caption(args, examiner, metric, reference)))
        against.report(besides, baselines.notes, f"{PROG} keep", quiet=True)
        return
    say(report.text(found, floor))
    say("")
    against.report(besides, baselines.notes, f"{PROG} keep", hint=baselines.hint)
    chosen, done = found.chosen, "left as it is" if args.dry_run else "now the bundle's default"
    say(f"\nkeep {chosen.keep} of {manifest.visual.count} visual tokens: {done}")
    say(f"{len(samples)} questions, metric {metric}; unpruned {stats.mean(reference)}")
    say(report.wrong(found, kinds, reference))
    picture = f", {shown(out / 'keep.png')}" if drawn else " (for a picture: [calib])"
    say(f"report: {shown(out / 'keep.csv')}{picture}")
    line = report.finer(manifest, manifest.visual.keep, chosen.keep)
    if line:
        say(f"a finer grid: {line}")


def _caption(args: argparse.Namespace, examiner: Examiner, metric: str, unpruned: Sequence[float]) -> str:
    """What a table that is pasted elsewhere has to say beside its figures."""
    manifest, measured = examiner.bundle.manifest, examiner.conditions
    truth = "" if args.truth is None else f" against the answers in {Path(args.truth).name}"
    return (
        f"{manifest.model.name}, {manifest.method.name}, {manifest.visual.count} visual tokens unpruned; "
        f"{len(examiner.samples)} questions of {Path(args.data).name}{truth}, metric {metric}, "
        f"unpruned {stats.mean(unpruned)}; {measured.engine} on {measured.machine}, vtp {own_version()}."
    )


def _goal(args: argparse.Namespace) -> dict[str, Any]:
    """What the choice has to meet, by the flag's name; a floor of 0.97 where none is given.

    Raises UsageError, before anything runs, for a floor or a budget that is none.
    """
    given = {name: getattr(args, name) for name in ("floor", "budget_ms", "budget_mb")}
    goal = {name: value for name, value in given.items() if value is not None} or {"floor": 0.97}
    for name, value in goal.items():
        if name == "floor" and not 0 < value <= 1:
            raise UsageError(f"--floor {value:g} is not a share of the unpruned score; give above 0, up to 1")
        if not 0 < value < math.inf:
            flag, unit = name.replace("_", "-"), "milliseconds" if name == "budget_ms" else "megabytes"
            raise UsageError(f"--{flag} {value:g} is not a budget; give a finite number of {unit} above 0")
    return goal


def _needs_mb(examiner: Examiner) -> dict[int, float]:
    """Keep-count -> an upper bound of the memory that a pipeline which uses it takes, in MB."""
    bundle = examiner.bundle
    keeps = bundle.manifest.visual.keep
    return {keep: bundle_memory(bundle, main_engine(examiner.engine), keep).total / 1e6 for keep in keeps}


def _unpruned(
    args: argparse.Namespace,
    examiner: Examiner,
    journal: Journal,
    workers: Workers,
    progress: Callable[[str], None],
) -> list[Answer]:
    """Answers with every visual token: of the bundle itself if it holds that keep-count, or of another."""
    visual = examiner.bundle.manifest.visual
    if args.reference is not None:
        other = open_examiner(args, args.reference, examiner.samples, journal, workers, progress)
        held = other.bundle.manifest
        if held.visual.count not in held.visual.keep:
            raise UsageError(
                f"--reference {args.reference} prunes; give a bundle of vtp-export --method none"
            )
        return other.answers(held.visual.count)
    if visual.count not in visual.keep:
        raise UsageError(
            f"this bundle does not hold all {visual.count} tokens to compare with; give --reference, a "
            "bundle of vtp-export --method none"
        )
    return examiner.answers(visual.count)


def _record(
    found: search.Search,
    goal: dict[str, Any],
    metric: str,
    count: int,
    examiner: Examiner,
    unpruned: stats.Estimate,
) -> dict[str, Any]:
    """What the manifest remembers: the goal, what was measured at every keep-count tried, and where."""
    return {
        **goal,
        "metric": metric,
        "questions": count,
        "engine": examiner.engine,
        "conditions": examiner.conditions.to_json(),
        "unpruned": [unpruned.value, unpruned.low, unpruned.high],
        "tried": {
            str(tried.keep): {
                "score": [tried.score.value, tried.score.low, tried.score.high],
                "share": [tried.share.value, tried.share.low, tried.share.high],
                "ttft_ms": round(tried.marks.ttft, 3),
            }
            for tried in found.tried
        },
    }


# -- score ---------------------------------------------------------------------------------------------------


def _score(args: argparse.Namespace) -> None:
    samples, metric = read_samples(args)
    if metric == "agreement":
        raise UsageError("vtp-calib score needs answers in the data; vtp-calib keep does without")
    out, progress = Path(args.out or "vtp-calib-score"), Progress()
    rows: list[tuple[str, Marks]] = []
    besides: list[against.Beside] = []
    with ExitStack() as stack:
        journal = Journal(out / "answers.jsonl")
        stack.callback(journal.close)
        workers = open_workers(stack, args)
        opened = partial(
            open_examiner, args, samples=samples, journal=journal, workers=workers, progress=progress.step
        )
        baselines = against.Baselines(args.against, opened, metric, smaller_picture(args, out, progress.step))
        examined = [_examined(text, opened) for text in args.bundles]
        for _, examiner, _ in examined:
            baselines.check(examiner.bundle.manifest)
        for name, examiner, count in examined:
            rows.append((name, examiner.marks(count, metric)))
            besides += baselines.beside(name, examiner, count, rows[-1][1].scores)
    progress.end()
    found = [_compared(name, marks, rows[0][1]) for name, marks in rows]
    if args.json:
        beaten = [one.to_json() for one in besides]
        say_json({"metric": metric, "questions": len(samples), "bundles": found, "against": beaten})
        against.report(besides, baselines.notes, f"{PROG} score", quiet=True)
        return
    header = ["bundle", "score (95 %)", f"against {shown(rows[0][0])} (95 %)", "TTFT ms"]
    say(table(header, [_line(row, number) for number, row in enumerate(found)]))
    say(f"\n{len(samples)} questions, metric {metric}, paired bootstrap")
    if any(row["ttft_of_an_earlier_run"] for row in found):
        say(
            f"* taken by an earlier run, from {shown(out / 'answers.jsonl')}: what else the machine did then "
            "is not known; another --journal takes all times anew"
        )
    against.report(besides, baselines.notes, f"{PROG} score", hint=baselines.hint)


def _at(text: str) -> tuple[str, int | None]:
    """Split BUNDLE:K; a bundle without K keeps its default."""
    bundle, colon, keep = text.rpartition(":")
    if colon and keep.isascii() and keep.isdecimal():
        return bundle, int(keep)
    return text, None


def _examined(text: str, opened: Callable[[str], Examiner]) -> tuple[str, Examiner, int]:
    """What BUNDLE[:K] is called, its examiner, and the keep-count."""
    bundle, keep = _at(text)
    examiner = opened(bundle)
    count = _keep_of(examiner, text, keep)
    return f"{display_name(bundle)}:{count}", examiner, count


def _keep_of(examiner: Examiner, text: str, keep: int | None) -> int:
    visual = examiner.bundle.manifest.visual
    if keep is not None and keep not in visual.keep:
        raise UsageError(f"{text}: this bundle holds {', '.join(map(str, visual.keep))}; choose one of them")
    return visual.default_keep if keep is None else keep


def _compared(name: str, marks: Marks, first: Marks) -> dict[str, Any]:
    one, gap = stats.mean(marks.scores), stats.difference(marks.scores, first.scores)
    return {
        "bundle": name,
        "score": [one.value, one.low, one.high],
        "difference": [gap.value, gap.low, gap.high],
        "within_noise": gap.low <= 0 <= gap.high,
        "ttft_ms": round(marks.ttft, 3),
        "ttft_of_an_earlier_run": marks.earlier,
    }


def _line(row: dict[str, Any], number: int) -> list[str]:
    gap = "-"
    if number:
        noise = ", noise" if row["within_noise"] else ""
        value, low, high = row["difference"]
        gap = f"{value:+.3f} ({low:+.3f} to {high:+.3f}{noise})"
    ttft = f"{row['ttft_ms']:.1f}{'*' if row['ttft_of_an_earlier_run'] else ''}"
    return [row["bundle"], str(stats.Estimate(*row["score"])), gap, ttft]


if __name__ == "__main__":
    sys.exit(main())
