"""Flags that the commands of vtp-calib share, and what they stand for: questions, and a bundle examined."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from vtp.calib.baselines.smaller import SmallerPicture
from vtp.calib.data import FORMATS, Sample, load_samples
from vtp.calib.keep.examiner import NEW_TOKENS, Examiner
from vtp.calib.keep.journal import Journal
from vtp.calib.metrics import METRICS, choose_metric
from vtp.calib.truth import with_truth
from vtp.calib.workers.cluster import Ray
from vtp.calib.workers.local import Local, Workers
from vtp.engines import UsageError
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.commands.arguments import (
    add_debug,
    add_engine,
    add_json,
    add_threads,
    suggest,
    take_bundle,
    whole,
)
from vtp.runtime.engine_choice import choose_engines
from vtp.runtime.hub.names import display_name

PROG = "vtp-calib"


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of data, metric, engine and report."""
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help="questions: JSONL, or a VQA set's file")
    suggest(add("--format", default="auto", help=f"{', '.join(FORMATS)} (default: %(default)s)"), FORMATS)
    add("--images", metavar="DIR", help="folder of the pictures (default: beside the data)")
    add("--annotations", metavar="FILE", help="VQAv2's second file")
    add("--truth", metavar="FILE", help="JSONL of another model's answers, instead of the data's own")
    add("--limit", type=whole, metavar="N", help="use the first N questions")
    metric = add("--metric", default="auto", help=f"{', '.join(METRICS)} (default: %(default)s)")
    suggest(metric, METRICS)
    add("--max-new-tokens", type=whole, default=NEW_TOKENS, metavar="N", help="default: %(default)s")
    add_engine(parser)
    add_threads(parser, "CPU threads of one operator (all cores; 1 on Ray)", type=whole)
    add("--ray", metavar="ADDRESS", help="work on a Ray cluster: HOST:PORT of its head, auto, or local")
    add("--workers", type=whole, metavar="N", help="workers on Ray at most (default: by the cluster's cores)")
    add(
        *("--journal", "--out"),  # the earlier name stays
        dest="out",
        metavar="DIR",
        help="folder of the journal of answers, from which a run goes on, and of the report (default: beside "
        "the bundle; --out is the same)",
    )
    add_json(parser, "print the result as JSON")
    add_debug(parser)


def read_samples(args: argparse.Namespace) -> tuple[list[Sample], str]:
    """The questions and the metric they allow."""
    paths = [None if path is None else Path(path) for path in (args.images, args.annotations)]
    samples = load_samples(Path(args.data), args.format, *paths)
    for name in ("limit", "max_new_tokens", "threads", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not a whole number of at least 1")
    samples = samples[: args.limit]
    if args.truth is not None:
        samples = with_truth(samples, Path(args.truth))
    return samples, choose_metric(args.metric, samples[0].answers)


def open_workers(stack: ExitStack, args: argparse.Namespace) -> Workers:
    """Who does the work, until `stack` closes: this process, or a Ray cluster."""
    if args.ray is None and args.workers is not None:
        raise UsageError("--workers belongs to --ray; without --ray this process does the work")
    workers: Workers = Local() if args.ray is None else Ray(args.ray, args.workers, threads_of(args) or 1)
    stack.callback(workers.close)
    return workers


def open_examiner(
    args: argparse.Namespace,
    bundle: str,
    samples: Sequence[Sample],
    journal: Journal,
    workers: Workers,
    progress: Callable[[str], None],
) -> Examiner:
    """A bundle to examine as the flags say."""
    opened = open_bundle(take_bundle(PROG, bundle, args.json))
    engine = choose_engines(opened, args.engine, threads=threads_of(args)).label
    return Examiner(
        opened,
        engine,
        threads_of(args),
        samples,
        journal,
        workers,
        max_new_tokens=args.max_new_tokens,
        progress=progress,
    )


def smaller_picture(args: argparse.Namespace, out: Path, progress: Callable[[str], None]) -> SmallerPicture:
    """What makes bundles of smaller pictures, in the journal's folder."""
    return SmallerPicture(args.model, out, progress)


def beside(bundle: Bundle, ending: str) -> Path:
    """A folder beside a bundle's, with its name and an ending; for one of the hub, in the current folder."""
    name = f"{display_name(bundle.folder)}-{ending}"
    return Path(name) if bundle.origin else bundle.folder.parent / name


def threads_of(args: argparse.Namespace) -> int | None:
    """CPU threads of one operator; None: all cores."""
    return args.threads if args.ray is None else args.threads or 1
