"""Held-out questions as files: pictures and a JSONL, as vtp-calib reads them.

python -m vtp.scenes.questions --count 1000 --seed 7 [--exam reader] -o DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vtp.engines import UsageError
from vtp.runtime.commands.console import Parser, run_command
from vtp.scenes.exam import EXAMS, SEED, held_out

FILE = "questions.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog="python -m vtp.scenes.questions", description="Write held-out questions as files.")
    parser.add_argument("--count", type=int, default=1000, help="questions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the exam (default: %(default)s)")
    parser.add_argument(
        "--exam", choices=EXAMS, default="model", help="for which model (default: %(default)s)"
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return run_command("questions", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise UsageError(f"count {args.count} asks nothing; choose at least 1")
    print(write_questions(Path(args.output), args.count, args.seed, EXAMS[args.exam]))


def write_questions(folder: Path, count: int, seed: int, kinds: tuple[str, ...] = EXAMS["model"]) -> Path:
    """Write `count` questions and their pictures (PNG, lossless); returns the JSONL's path."""
    folder.mkdir(parents=True, exist_ok=True)
    file, last = folder / FILE, ""
    with file.open("w", encoding="utf-8") as out:
        for item in held_out(count, seed, kinds):
            picture = f"{item.picture:05d}.png"
            if picture != last:  # several questions in a row share one
                item.image.save(folder / picture)
                last = picture
            line = {"image": picture, "prompt": item.prompt, "answer": item.answer, "kind": item.kind}
            out.write(json.dumps(line) + "\n")
    return file


if __name__ == "__main__":
    sys.exit(main())
