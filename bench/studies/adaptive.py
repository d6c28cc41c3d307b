"""Would choosing the keep-count picture by picture pay? Two keep-counts by a cue, against one at equal mean.

    python -m vtp.bench.studies.adaptive BUNDLE --keep 32,64,96 [--count 1000] [--seed 31]

The cue is how peaked the encoder's attention scores are: the share that the largest hold. On a random half of
the pictures its threshold and direction are set so that pictures get the smaller or the larger keep-count and
use the middle one on average; on the other half it is compared with the middle one for all. Gains are points
of exact match, mean and 95 % range over 200 halvings. docs/calibration.md tells what came of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vtp.engines import UsageError, VtpError, open_graph
from vtp.export.keep_counts import parse_keep
from vtp.runtime import Pipeline
from vtp.runtime.commands.arguments import add_debug, add_threads, whole
from vtp.runtime.commands.console import Parser, Progress, run_command, table
from vtp.runtime.media.images import load_image
from vtp.runtime.preprocess import preprocess
from vtp.scenes.exam import by_picture, held_out, is_right

ANSWER_TOKENS, HALVINGS = 12, 200
ENCODER, SCORES = "vision_encoder.onnx", "attention_scores"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(
        prog="python -m vtp.bench.studies.adaptive", description="A keep-count for every picture?"
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="holds the keep-counts; of a method that reads attention scores")
    add("--keep", default="32,64,96", help="smaller, middle and larger keep-count (default: %(default)s)")
    add("--count", type=whole, default=1000, help="questions (default: %(default)s)")
    add("--seed", type=whole, default=31, help="seed of the exam (default: %(default)s)")
    add_threads(parser, type=whole)
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("adaptive", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    keeps = sorted(parse_keep(args.keep))
    if len(keeps) != 3:
        raise UsageError(f"--keep {args.keep} is not three keep-counts: smaller, middle, larger")
    progress = Progress()
    progress.step(f"{args.count} questions at {args.keep}")
    right, scores = examine(Path(args.bundle), keeps, args.count, args.seed, args.threads)
    progress.end()
    print("exact match by keep-count:", dict(zip(keeps, right.mean(axis=0).round(3).tolist(), strict=True)))
    rows = []
    for largest in keeps:
        cue = peak(scores, largest)
        sides = [gains(right, cue, keeps, side) for side in ("static", "mixed")]
        rows.append(
            [str(largest), *(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" for mean, low, high in sides)]
        )
    low, middle, high = keeps
    header = ["scores summed", f"{low}/{high} against {middle}", f"against {low}/{high} by lot"]
    print(table(header, rows))


def examine(
    folder: Path, keeps: Sequence[int], count: int, seed: int, threads: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Share of right answers [pictures, keep-counts] and the encoder's scores [pictures, N]."""
    right, scores = [], []
    with Pipeline.load(folder, threads=threads, vision_feature_cache=1) as pipe:
        graph = pipe.manifest.graphs.get(ENCODER)
        if graph is None or SCORES not in graph.outputs:
            raise VtpError(f"{folder} has no {SCORES}: give a bundle of vispruner, fastervlm or focal")
        encoder = open_graph(pipe.bundle.path(ENCODER), pipe.engine, threads)
        for group in by_picture(held_out(count, seed)):
            items = list(group)
            pixels = preprocess(load_image(items[0].image), pipe.manifest.image)
            dtype = graph.inputs["pixel_values"].dtype
            scores.append(encoder.run({"pixel_values": encoder.put(pixels.astype(dtype))})[SCORES].numpy()[0])
            line = []
            for keep in keeps:
                answers = [
                    pipe.generate(
                        item.image, item.prompt, keep_tokens=keep, max_new_tokens=ANSWER_TOKENS
                    ).text
                    for item in items
                ]
                marks = [is_right(text, item.answer) for text, item in zip(answers, items, strict=True)]
                line.append(np.mean(marks))
            right.append(line)
    return np.array(right), np.array(scores)


def peak(scores: np.ndarray, largest: int) -> np.ndarray:
    """Share [pictures] of all scores [pictures, N] that the `largest` ones hold."""
    order = -np.sort(-scores.astype(np.float64), axis=1)
    return order[:, :largest].sum(axis=1) / order.sum(axis=1)


def gains(
    right: np.ndarray, cue: np.ndarray, keeps: Sequence[int], against: str, seed: int = 0
) -> tuple[float, float, float]:
    """Points gained on the halves that set nothing: mean, and 2.5 % and 97.5 % of the halvings.

    right    [pictures, 3] at smaller, middle and larger keep-count; cue [pictures]
    against  "static": all pictures at the middle one (by interpolation at the mean that was used); "mixed":
             the same two keep-counts by lot, which shows what the cue knows
    """
    rng, low, high = np.random.default_rng(seed), keeps[0], keeps[2]
    share = (keeps[1] - low) / (high - low)  # of pictures that get the larger one
    found = []
    for _ in range(HALVINGS):
        order = rng.permutation(len(right))
        known, fresh = order[: len(order) // 2], order[len(order) // 2 :]
        sign = _direction(right[known, 2] - right[known, 0], cue[known], share)
        more = sign * cue[fresh] > np.quantile(sign * cue[known], 1 - share)
        adaptive = np.where(more, right[fresh, 2], right[fresh, 0]).mean()
        used = np.where(more, high, low).mean()
        points = [0, 1, 2] if against == "static" else [0, 2]
        base = np.interp(used, [keeps[point] for point in points], right[fresh][:, points].mean(axis=0))
        found.append(100 * (adaptive - base))
    least, most = np.quantile(found, (0.025, 0.975))
    return float(np.mean(found)), float(least), float(most)


def _direction(worth: np.ndarray, cue: np.ndarray, share: float) -> int:
    """1 where pictures of a large cue gain more from the larger keep-count, else -1."""
    large, small = cue > np.quantile(cue, 1 - share), cue < np.quantile(cue, share)
    return 1 if worth[large].mean() >= worth[small].mean() else -1


if __name__ == "__main__":
    sys.exit(main())
