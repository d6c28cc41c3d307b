"""vtp-run: pictures or a video and a prompt, or a file of prompts, and the answers of a bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vtp.engines import UsageError, capabilities
from vtp.engines.errors import shown
from vtp.runtime.bundle.folder import check_outside
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.commands.arguments import (
    A_BUNDLE,
    add_debug,
    add_engine,
    add_json,
    add_keep_tokens,
    add_threads,
    take_bundle,
)
from vtp.runtime.commands.batch_file import Line, read_lines
from vtp.runtime.commands.console import (
    Parser,
    note,
    real_number,
    run_command,
    say,
    say_json,
    say_piece,
    table,
    whole_number,
)
from vtp.runtime.media.cut_off import cut_off_line
from vtp.runtime.media.images import load_image
from vtp.runtime.media.own_picture import OWN_PICTURE, OWN_QUESTION
from vtp.runtime.media.pictures import NO_PICTURE
from vtp.runtime.media.show_kept import (
    check_one_view,
    check_picture_path,
    save_picture,
    show_kept,
    show_kept_frames,
)
from vtp.runtime.media.videos import load_video
from vtp.runtime.opening import NEVER_RUN, NEVER_TRIED, Opening
from vtp.runtime.pipeline import DEFAULT_NEW_TOKENS, Pipeline
from vtp.runtime.result import Result

PROG = "vtp-run"
_LISTED = 16  # of more frames than these, the least and the most tokens alone are printed


def build_parser() -> argparse.ArgumentParser:
    """The flags of vtp-run."""
    parser = Parser(
        prog=PROG,
        description="Answer a prompt about a picture or a video with a bundle.",
        epilog="BUNDLE alone: a question about a picture that comes with vtp.",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help=A_BUNDLE)
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="the picture; repeat the option for more pictures (default: none, a prompt of text alone)",
    )
    add(
        "--video",
        metavar="FOLDER|FILE",
        help="instead, for a bundle made with vtp-export --frames: a folder of frames, an animated GIF or "
        "WebP, or a video file (through OpenCV)",
    )
    add("--prompt", metavar="TEXT", help="what to ask about it")
    add(
        "--batch",
        metavar="FILE.jsonl",
        help='instead: {"image": path or list of paths, "prompt": text} a line; prints a JSON object a line',
    )
    add_keep_tokens(parser, "one of the bundle's keep-counts (default: the bundle's)")
    add_engine(parser)
    add("--max-new-tokens", default=str(DEFAULT_NEW_TOKENS), metavar="N", help="default: %(default)s")
    add("--temperature", default="0", metavar="T", help="0 is greedy (default)")
    add(
        "--top-p",
        default="1",
        metavar="P",
        help="sample from the smallest set of tokens with this probability",
    )
    add("--seed", metavar="N", help="make sampling repeatable")
    add(
        "--repetition-penalty",
        metavar="P",
        help="above 1: repeat less of the prompt and the answer (default: the model's own; 1 is off)",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    add(
        "--special-tokens",
        action="store_true",
        help="keep special tokens in the answer: boxes, document tags",
    )
    add("--allow-special-tokens", action="store_true", help="let the prompt hold the model's special tokens")
    add(
        "--timeout-ms",
        metavar="MS",
        help="end the answer after this many milliseconds and return what was generated",
    )
    add(
        "--logprobs",
        metavar="N",
        help="in JSON, also how likely each token was, with N alternatives at its place (0 to 20)",
    )
    add_threads(parser)
    add("--engines", metavar="DIR", help="where vtp-build -o put TensorRT engines (default: in the cache)")
    add("--allow-cpu-nodes", action="store_true", help="on CUDA, go on even if nodes are left to the CPU")
    add(
        "--cuda-graph",
        action="store_true",
        help="on CUDA, replay image stages and single steps as CUDA graphs",
    )
    add("--show-kept", metavar="OUT.png", help="write the picture (or frames) with dropped patches dimmed")
    add("--check-hashes", action="store_true", help="compare every file's sha256 with the manifest first")
    add("--no-memory-check", action="store_true", help="load the bundle even if the memory looks too small")
    add_json(parser)
    add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of vtp-run; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(PROG, lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    own = _take_own_picture(args)
    _check_flags(args)
    lines = read_lines(Path(args.batch)) if args.batch else []
    if args.show_kept:
        check_picture_path(args.show_kept, args.image or ())
        check_outside(Path(args.show_kept))
    threads = None if args.threads is None else whole_number("threads", args.threads)
    opening = Opening(Path(args.engines) if args.engines else None, args.allow_cpu_nodes, args.cuda_graph)
    checks = {"check_hashes": args.check_hashes, "check_memory": not args.no_memory_check}
    bundle = take_bundle(PROG, args.bundle, args.json)
    with Pipeline.load(bundle, args.engine, threads, opening=opening, **checks) as pipe:
        for engine in dict.fromkeys(pipe.engines.values()):
            if not capabilities(engine).proven:
                note(PROG, NEVER_RUN if capabilities(engine).built else NEVER_TRIED.format(engine=engine))
        _check_media(pipe.manifest.image.frames, args, own)
        if args.batch:
            _answer_lines(pipe, lines, args)
        else:
            _answer_one(pipe, args)
        for line in pipe.notes:
            note(PROG, line)


def _take_own_picture(args: argparse.Namespace) -> bool:
    """Ask about vtp's own picture if neither a picture nor a prompt is given; whether that is so."""
    own = not (args.image or args.video or args.batch or args.prompt is not None)
    if own:
        args.image, args.prompt = [str(OWN_PICTURE)], OWN_QUESTION
    return own


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if args.batch and (args.image or args.video or args.prompt is not None or args.show_kept):
        raise UsageError(
            "--batch names its pictures and prompts: leave out --image, --video, --prompt and --show-kept"
        )
    if args.image and args.video:
        raise UsageError("give either --image or --video: a bundle answers about pictures or about videos")
    if not args.batch and args.prompt is None:
        raise UsageError(
            "the following arguments are required: --prompt, with --image or --video (or --batch FILE.jsonl)"
        )
    if args.show_kept and not (args.image or args.video):
        raise UsageError("--show-kept shows a picture; give --image FILE")
    if args.logprobs is not None and not (args.json or args.batch):
        raise UsageError("--logprobs is a part of the JSON: give --json as well")
    if args.show_kept and len(args.image) > 1:
        raise UsageError("--show-kept shows one picture; give one --image")


def _check_media(frames: int | None, args: argparse.Namespace, own: bool) -> None:
    """Refuse pictures for a bundle that answers about videos of `frames` frames, and the other way round."""
    if frames is None and args.video:
        raise UsageError(
            "this bundle answers about pictures, not videos: give --image, or a bundle made with vtp-export "
            "--frames"
        )
    if frames is not None and not args.video:
        given = _given(args, own)
        raise UsageError(
            f"this bundle answers about videos of {frames} frames: give --video instead of {given}"
        )
    if own:
        note(PROG, f'asked "{OWN_QUESTION}" about a picture of vtp\'s; --image and --prompt ask about yours')
    if not (args.image or args.video or args.batch):
        note(PROG, "no picture was given, so the prompt is answered as text alone; --image FILE gives one")


def _given(args: argparse.Namespace, own: bool) -> str:
    """What was given in place of a video."""
    if args.batch:
        return "--batch, which names pictures"
    return "--image" if args.image and not own else "no picture"


def _answer_one(pipe: Pipeline, args: argparse.Namespace) -> None:
    spec = pipe.manifest.image
    if args.show_kept:
        check_one_view(spec)
    if spec.frames is not None:
        images = load_video(args.video, spec.frames)
    else:
        images = [load_image(image) for image in args.image]
    stream = pipe.stream(images or NO_PICTURE, args.prompt, **_options(args))
    for number, piece in enumerate(stream):
        if not args.json:
            say_piece(piece if number else piece.removeprefix(" "))  # together `Result.text`
    if args.show_kept:
        save_picture(_shown(images, pipe.manifest, stream.result.kept), args.show_kept)
    if args.json:
        say_json(_as_data(stream.result, pipe), indent=None)
        return
    print()
    say(_report(stream.result, args.show_kept), sys.stderr)
    if why := stream.result.why_empty:
        note(PROG, f"the answer is empty: {why}")
    for line in dict.fromkeys(cut_off_line(spec, *image.size) for image in images):
        if line:
            note(PROG, line)


def _shown(images: Sequence[Image.Image], manifest: Manifest, kept: Sequence[int]) -> Image.Image:
    """The picture, or the frames of the video, with the kept tokens in colour."""
    visual, spec = manifest.visual, manifest.image
    frame = visual.frame
    if frame is None:
        return show_kept(images[0], spec, (visual.grid[0], visual.grid[1]), kept)
    firsts = [frame.first + number * frame.step for number in range(len(images))]
    return show_kept_frames(images, spec, (frame.grid[0], frame.grid[1]), firsts, kept)


def _answer_lines(pipe: Pipeline, lines: Sequence[Line], args: argparse.Namespace) -> None:
    """Print a JSON object for each line, a batch at a time."""
    options = _options(args)
    for first in range(0, len(lines), pipe.batch_size):
        some = lines[first : first + pipe.batch_size]
        seed = None if options["seed"] is None else options["seed"] + first
        images, prompts = [line.images for line in some], [line.prompt for line in some]
        for result in pipe.generate_batch(images, prompts, **{**options, "seed": seed}):
            say_json(_as_data(result, pipe), indent=None)


def _as_data(result: Result, pipe: Pipeline) -> dict[str, Any]:
    engines = {"engine": pipe.engine, "engines": pipe.engines}
    return {**result.to_json(), **engines, **pipe.bundle.stated_origin}


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of a generation."""
    return {
        "max_new_tokens": whole_number("max-new-tokens", args.max_new_tokens),
        "keep_tokens": None if args.keep_tokens is None else whole_number("keep-tokens", args.keep_tokens),
        "temperature": real_number("temperature", args.temperature),
        "top_p": real_number("top-p", args.top_p),
        "seed": None if args.seed is None else whole_number("seed", args.seed),
        "repetition_penalty": None
        if args.repetition_penalty is None
        else real_number("repetition-penalty", args.repetition_penalty),
        "stop": args.stop,
        "skip_special_tokens": not args.special_tokens,
        "allow_special_tokens": args.allow_special_tokens,
        "timeout_ms": None if args.timeout_ms is None else real_number("timeout-ms", args.timeout_ms),
        "logprobs": None if args.logprobs is None else whole_number("logprobs", args.logprobs),
    }


def _report(result: Result, kept: str | None) -> str:
    before, after = result.visual_tokens
    rows = [[name, f"{value:.2f}"] for name, value in result.timings.to_dict().items()]
    then = f" → {result.then['tokens']} before layer {result.then['layer']}" if result.then else ""
    tokens = f"visual tokens: {before} → {after}{then}{_per_frame(result)}"
    lines = ["", table(["stage", "ms"], rows), "", tokens]
    if kept:
        lines.append(f"kept tokens shown in {shown(Path(kept))}")
    return "\n".join(lines)


def _per_frame(result: Result) -> str:
    """How many patches of a video's frames were kept, in brackets; "" for a picture."""
    kept = result.kept_per_frame
    if not kept:
        return ""
    numbers = ", ".join(map(str, kept)) if len(kept) <= _LISTED else f"{min(kept)} to {max(kept)}"
    return f" (of each frame: {numbers})"


if __name__ == "__main__":
    sys.exit(main())
