"""Flags that the commands of vtp-calib share, and what they stand for: questions, and a bundle examined."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from vtp.calib.data import FORMATS, Sample, load_samples
from vtp.calib.examiner import NEW_TOKENS, Examiner
from vtp.calib.journal import Journal
from vtp.calib.metrics import METRICS, choose_metric
from vtp.engines import UsageError
from vtp.runtime import Pipeline


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of data, metric, engine and report."""
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help="questions: JSONL, or a VQA set's file")
    add("--format", default="auto", help=f"{', '.join(FORMATS)} (default: %(default)s)")
    add("--images", metavar="DIR", help="folder of the pictures (default: beside the data)")
    add("--annotations", metavar="FILE", help="VQAv2's second file")
    add("--limit", type=int, metavar="N", help="use the first N questions")
    add("--metric", default="auto", help=f"{', '.join(METRICS)} (default: %(default)s)")
    add("--max-new-tokens", type=int, default=NEW_TOKENS, metavar="N", help="default: %(default)s")
    add("--engine", default="auto", help="engine (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads of one operator (default: all cores)")
    add("--out", metavar="DIR", help="folder of the journal and the report (default: beside the bundle)")
    add("--json", action="store_true", help="print the result as JSON")
    add("--debug", action="store_true", help="show tracebacks")


def read_samples(args: argparse.Namespace) -> tuple[list[Sample], str]:
    """The questions and the metric they allow."""
    paths = [None if path is None else Path(path) for path in (args.images, args.annotations)]
    samples = load_samples(Path(args.data), args.format, *paths)
    for name in ("limit", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is not a whole number of at least 1")
    samples = samples[: args.limit]
    return samples, choose_metric(args.metric, samples[0].answers)


def open_examiner(
    stack: ExitStack,
    args: argparse.Namespace,
    bundle: str,
    samples: Sequence[Sample],
    journal: Journal,
    progress: Callable[[str], None],
) -> Examiner:
    """Open a bundle as the flags say, until `stack` closes."""
    pipe = stack.enter_context(Pipeline.load(bundle, args.engine, args.threads))
    return Examiner(pipe, samples, journal, max_new_tokens=args.max_new_tokens, progress=progress)
