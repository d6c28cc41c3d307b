"""A bundle in fewer bits for measuring speed: what `vtp-calib quantize` makes, without asking what it costs.

    python -m vtp.bench.common.fewer_bits BUNDLE OUT [--vision int8|none] [--decoder int4|int8|none]
        [--prompt decoder|int8] [--pictures 2]

Random weights answer nothing, so no accuracy is measured and no floor held; the speed of a product does not
depend on its weights' values. int4 is rounded to the nearest as ONNX Runtime's own quantiser does it, a head
tied to the embedding included, so that a peer whose graph that quantiser made has the same codes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vtp.bench.cli import whole
from vtp.calib.data import Sample
from vtp.calib.quantize.quantizer import Quantizer, Wish
from vtp.engines import UsageError
from vtp.runtime.bundle.folder import Bundle, open_bundle, whole_bundle
from vtp.runtime.commands.arguments import add_debug, add_threads
from vtp.runtime.commands.console import Parser, Progress, run_command
from vtp.scenes import examples_dir

ENGINE = "ort-cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(
        prog="python -m vtp.bench.common.fewer_bits",
        description="Quantise a bundle without measuring its accuracy.",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a float bundle")
    add("out", metavar="OUT", help="folder of the new bundle")
    add("--vision", default="int8", help="int8 or none (default: %(default)s)")
    add("--decoder", default="none", help="int4, int8 or none (default: %(default)s)")
    add("--prompt", default="decoder", help="decoder, or int8 beside int4 (default: %(default)s)")
    add("--pictures", default="2", help="built-in pictures to calibrate on (default: %(default)s)")
    add_threads(parser)
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("fewer_bits", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    if args.vision not in ("int8", "none") or args.decoder not in ("int4", "int8", "none"):
        raise UsageError(
            f"--vision {args.vision} --decoder {args.decoder}: choose int8 or none; int4, int8 or none"
        )
    if args.prompt not in ("decoder", "int8"):
        raise UsageError(f"--prompt {args.prompt}: choose decoder or int8")
    head = "int8" if args.decoder == "int8" else "int4"
    wish = Wish(args.vision, args.decoder, head=head, nearest=True, prompt=args.prompt)
    threads = None if args.threads is None else whole("threads", args.threads)
    pictures, progress = whole("pictures", args.pictures), Progress()
    progress.step(f"quantise {args.bundle} on {pictures} pictures")
    made = write_quantised(open_bundle(args.bundle), Path(args.out), wish, pictures, threads)
    progress.end()
    left = sum(bool(one.left) for one in made.judged)
    print(f"written: {args.out}; {len(made.judged) - left} layers in fewer bits, {left} left in float")


def write_quantised(
    bundle: Bundle, folder: Path, wish: Wish, pictures: int, threads: int | None
) -> Quantizer:
    """Write `bundle` as wished into `folder`, replacing what is there; returns what judged its layers."""
    quantizer = Quantizer(bundle, wish)
    found = sorted(examples_dir().glob("*.png"))
    samples = [Sample(found[number % len(found)], "what ?") for number in range(pictures)]
    with whole_bundle(folder, overwrite=True) as aside:
        quantizer.observe(aside / "probe", samples, ENGINE, threads, lambda _: None)
        quantizer.write(aside, set())
    return quantizer


if __name__ == "__main__":
    sys.exit(main())
