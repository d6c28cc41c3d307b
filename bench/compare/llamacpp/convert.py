"""GGUF files of a LLaVA or SmolVLM: its decoder in 32, 16, 8 or 4 bits, its image encoder in 32 or 8.

    python -m vtp.bench.compare.llamacpp.convert MODEL OUT [--text f16] [--vision f32] [--longest-edge 512]

Full precision is written by the `gguf` package from the checkpoint's own tensors; llama.cpp's quantiser makes
the files in few bits from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vtp.bench.compare.llamacpp.built import quantise
from vtp.bench.compare.llamacpp.checkpoint import Checkpoint
from vtp.bench.compare.llamacpp.text_model import write_text_model
from vtp.bench.compare.llamacpp.vision_model import write_vision_model
from vtp.engines import UsageError
from vtp.runtime.commands.arguments import add_debug
from vtp.runtime.commands.console import Parser, run_command, whole_number

TEXT = ("f32", "f16", "q8_0", "q4_0")
VISION = ("f32", "q8_0")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(
        prog="python -m vtp.bench.compare.llamacpp.convert",
        description="Write a LLaVA or SmolVLM as GGUF files.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a LLaVA, Idefics3 or SmolVLM in Hugging Face layout")
    add("out", metavar="OUT", help="folder of the files")
    add("--text", default="f16", help=f"{', '.join(TEXT)} (default: %(default)s)")
    add("--vision", default="f32", help=f"{', '.join(VISION)} (default: %(default)s)")
    add(
        "--longest-edge",
        metavar="PIXELS",
        help="of a picture before it is cut into tiles (Idefics3, SmolVLM; default: the model's own)",
    )
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("convert", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    edge = None if args.longest_edge is None else whole_number("--longest-edge", args.longest_edge, 1)
    for path in (
        text_file(args.model, Path(args.out), args.text),
        vision_file(args.model, Path(args.out), args.vision, edge),
    ):
        print(f"written: {path}")


def text_path(folder: Path, bits: str) -> Path:
    """Where the decoder in `bits` lies."""
    return folder / f"text-{bits}.gguf"


def vision_path(folder: Path, bits: str, edge: int | None = None) -> Path:
    """Where the image encoder in `bits`, for a longest edge, lies."""
    return folder / f"mmproj-{bits}{'' if edge is None else f'-{edge}'}.gguf"


def text_file(model: str, folder: Path, bits: str) -> Path:
    """The decoder in `bits`, made if it is not there. Raises UsageError for other bits."""
    _check("--text", bits, TEXT)
    path = text_path(folder, bits)
    if bits in ("f32", "f16"):
        dtype = np.float32 if bits == "f32" else np.float16
        return _whole(path, lambda aside: write_text_model(Checkpoint(model), aside, dtype))
    if not path.exists():
        quantise(text_file(model, folder, "f16"), path, bits)
    return path


def vision_file(model: str, folder: Path, bits: str, edge: int | None = None) -> Path:
    """The image encoder in `bits`, made if it is not there; raises as `text_file`.

    edge  see `write_vision_model`
    """
    _check("--vision", bits, VISION)
    path = vision_path(folder, bits, edge)
    if bits == "f32":
        return _whole(path, lambda aside: write_vision_model(Checkpoint(model), aside, edge))
    if not path.exists():
        quantise(vision_file(model, folder, "f32", edge), path, bits)
    return path


def _whole(path: Path, write: Callable[[Path], None]) -> Path:
    """`path`, written aside first: a file that is there is whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        try:
            write(aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    return path


def _check(flag: str, bits: str, known: Sequence[str]) -> None:
    if bits not in known:
        raise UsageError(f"{flag} {bits}: choose one of {', '.join(known)}")


if __name__ == "__main__":
    sys.exit(main())
