"""vtp-export: one command from a model folder to a pruned bundle."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import shown
from vtp.export.hub import command as hub
from vtp.export.layouts import command as layouts
from vtp.export.method_files import (
    DEFAULT,
    NONE,
    check_method_name,
    is_outside,
    method_names,
    reduction_names,
)
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.commands.arguments import Once, add_debug, add_json, add_overwrite, suggest
from vtp.runtime.commands.console import (
    Parser,
    Progress,
    note,
    run_command,
    say,
    say_json,
    table,
    whole_number,
)
from vtp.runtime.shell import command_line

if TYPE_CHECKING:
    from vtp.export.hub.push import Pushed
    from vtp.export.request import Request

PROG = "vtp-export"
_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "onnxruntime")
CHECKED = ("full", "layers")  # modes of a parity report
_DESCRIPTION = "Split a vision-language model, prune its visual tokens, and write a bundle of ONNX graphs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add vtp-export's flags to a parser (also used by `optimum-cli export vtp`)."""
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR|HUB_ID",
        help="model folder in Hugging Face layout (default: the built-in one)",
    )
    method = add(
        "--method",
        default=DEFAULT,
        metavar="NAME|FILE.py:CLASS",
        help="pruning method (default: %(default)s)",
    )
    suggest(method, method_names())
    add(
        "--keep-tokens", metavar="K[,K...|A:B:STEP]", help="visual tokens to keep (default: the method's own)"
    )
    add("--prune-ratio", metavar="R", help="fraction of visual tokens to drop, instead of --keep-tokens")
    tower = add(
        "--tower",
        action=Once,
        default="none",
        metavar="NAME[:VALUE]",
        help="less work in the vision tower: downsample[:SIZE], ipcv[:KEEP], stc[:RECOMPUTE] (of a camera), "
        "tome[:MERGE] or none (default: %(default)s)",
    )
    suggest(tower, [NONE, *reduction_names()])
    add(
        "--tower-option", action="append", default=[], metavar="NAME=VALUE", help="an option of the reduction"
    )
    add(
        "--restore",
        action="store_true",
        help="kept visual tokens draw the attention of the dropped ones: log(N/K) is added to their logits",
    )
    share = add(
        "--share",
        default="picture",
        help="whose budget the tokens are: picture (each keeps K), tile or frame (K is dealt to a picture's "
        "tiles by their size, or to a video's frames, so that none starves) (default: %(default)s)",
    )
    suggest(share, ["picture", "tile", "frame"])
    then = add(
        "--then",
        action=Once,
        metavar="METHOD[:LAYER]",
        help="prune once more what the method kept, before decoder layer LAYER (default: the middle one): "
        "apet, dart, fastv or pyramiddrop",
    )
    suggest(then, ["apet", "dart", "fastv", "pyramiddrop"])
    add(
        "--then-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of --then: share (of the kept tokens that go on, default 1/3), or of its method",
    )
    add("--method-option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method")
    target = add(
        "--target",
        default="ort",
        help="what the bundle is for: ort, tensorrt or jetpack6 (default: %(default)s)",
    )
    suggest(target, ["ort", "tensorrt", "jetpack6"])
    add(
        "--oldest-onnxruntime",
        metavar="VERSION",
        help="the oldest ONNX Runtime that has to open the bundle (default: 1.23); from 1.30 on, masks of "
        "Gemma's and PaliGemma's decoders need fewer operations, on the CPU",
    )
    dtype = add("--dtype", help="float32 (default for target ort) or float16 (default for target tensorrt)")
    suggest(dtype, ["float32", "float16"])
    add("--max-length", metavar="N", help="positions of one conversation: text + visual tokens + answer")
    add(
        "--image-size",
        metavar="WIDTHxHEIGHT",
        help="picture size that the bundle is made for, where the model takes several (one number: a square)",
    )
    fit = add(
        "--image-fit",
        metavar="FIT",
        help="pictures of another shape: letterbox (padded, all of it is seen), stretch, crop (the sides are "
        "cut off) or refuse (default: as the model's image processor does, else letterbox)",
    )
    suggest(fit, ["letterbox", "stretch", "crop", "refuse"])
    add(
        "--frames",
        metavar="N",
        help="make a bundle for videos instead of pictures: N frames of each video are used",
    )
    verify = add(
        "--verify",
        default="full",
        help="compare the bundle with torch: full; layers, for a model larger than the memory; none "
        "(default: %(default)s)",
    )
    suggest(verify, ["full", "layers", "none"])
    layouts.add_arguments(parser)
    hub.add_arguments(parser)
    add("-o", "--output", metavar="DIR", help="folder to write (default: bundle-METHOD)")
    add_overwrite(parser)
    add("--list-methods", action="store_true", help="list the methods and exit")
    add("--list-families", action="store_true", help="list the model families and exit")
    add_json(parser, "print the result (or the list) as JSON")
    add("--markdown", action="store_true", help="print the list as a Markdown table")
    add_debug(parser)


def build_parser() -> argparse.ArgumentParser:
    """The flags of vtp-export."""
    parser = Parser(prog=PROG, description=_DESCRIPTION)
    add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of vtp-export; returns the exit code."""
    return run(build_parser().parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Do what the parsed flags say."""
    return run_command(PROG, lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    try:
        _list_or_export(args)
    except ModuleNotFoundError as error:
        if error.name not in _LIBRARIES:
            raise
        raise VtpError(
            f"{error.name} is not installed, and exporting needs it: pip install 'vtp-edge[export,ort]'"
        ) from error


def _list_or_export(args: argparse.Namespace) -> None:
    if args.list_methods or args.list_families:
        from vtp.export import listed, listing

        rows = listing.rows("methods" if args.list_methods else "families")
        say(listed.render(rows, "json" if args.json else "markdown" if args.markdown else "text"))
    else:
        _export(args)


def _export(args: argparse.Namespace) -> None:
    """Make a Request of the flags, export it, and print the report; torch is imported here."""
    layouts.check(args)
    hub.check(args)
    if hub.is_push_alone(args):
        _push_alone(args)
        return
    try:
        Path.cwd()
    except FileNotFoundError as error:  # torch's libraries would end the process without a line of ours
        raise VtpError(
            "the current folder no longer exists, and torch does not load there; change to one that does"
        ) from error
    # Imported late: --help and --list-methods should not wait for torch.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not is_outside(args.method):
        check_method_name(args.method)  # before torch is loaded, which takes seconds
    request = _request(args)
    quiet_libraries()
    progress, notes = Progress(), list[str]()
    try:
        if args.layout == layouts.BUNDLE:
            made = _bundle(args, request, progress.step, notes.append)
        else:
            written = layouts.make(args, request, progress.step, notes.append)
            made = layouts.summary(written) if args.json else layouts.report(written)
        if args.push_to_hub is not None:
            pushed = hub.push_made(args, request.output, progress.step)
            made = _joined(made, pushed, args)
    finally:
        progress.end()
    for line in notes:
        note(PROG, line)
    say(made) if isinstance(made, str) else say_json(made)


def _push_alone(args: argparse.Namespace) -> None:
    progress = Progress()
    try:
        pushed = hub.push_alone(args, progress.step)
    finally:
        progress.end()
    say_json(pushed.to_json()) if args.json else say(hub.report(pushed, args))


def _joined(made: str | dict[str, Any], pushed: Pushed, args: argparse.Namespace) -> str | dict[str, Any]:
    """What is said of an export, with what is said of its push."""
    if isinstance(made, str):
        return f"{made}\n{hub.report(pushed, args)}"
    return {**made, "hub": pushed.to_json()}


def _bundle(
    args: argparse.Namespace, request: Request, step: Callable[[str], None], note: Callable[[str], None]
) -> str | dict[str, Any]:
    """Export a bundle; what is said of it."""
    from vtp.export.exporter import export

    bundle = export(request, step, note=note)
    return _summary(bundle) if args.json else _report(bundle, request.output)


def _request(args: argparse.Namespace) -> Request:
    from vtp.export.request import Request

    default = f"{args.layout}-{Path(args.method.partition(':')[0]).stem}"
    return Request(
        output=Path(default if args.output is None else args.output),
        model=args.model,
        method=args.method,
        keep_tokens=args.keep_tokens,
        prune_ratio=None if args.prune_ratio is None else _fraction(args.prune_ratio),
        method_options=args.method_option,
        target=args.target,
        dtype=args.dtype,
        max_length=None if args.max_length is None else whole_number("max-length", args.max_length, least=0),
        image_size=None if args.image_size is None else _size(args.image_size),
        image_fit=args.image_fit,
        frames=None if args.frames is None else whole_number("frames", args.frames, least=0),
        tower=args.tower,
        tower_options=args.tower_option,
        restore=args.restore,
        share=args.share,
        then=args.then,
        then_options=args.then_option,
        verify=args.verify,
        overwrite=args.overwrite,
        oldest_onnxruntime=args.oldest_onnxruntime,
    )


def quiet_libraries() -> None:
    """Keep transformers' notes and progress bars from a command's terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"prune-ratio '{shown(text)}' is not a number from 0 to 1") from None


def _size(text: str) -> tuple[int, int]:
    """(height, width) from "640x480", which is 640 wide, or "448"."""
    edges = text.lower().split("x")
    if not (len(edges) <= 2 and all(edge.isascii() and edge.isdecimal() for edge in edges)):
        raise UsageError(
            f"image-size '{shown(text)}' is not a valid size; give WIDTHxHEIGHT in pixels, or one number"
        )
    numbers = [whole_number("image-size", edge, least=1) for edge in edges]
    return numbers[-1], numbers[0]


def _summary(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    then = manifest.method.then
    return {
        "bundle": str(bundle.folder),
        "method": manifest.method.name,
        "visual_tokens": {"before": manifest.visual.count, "after": manifest.visual.default_keep},
        "keep_tokens": manifest.visual.keep,
        "tower": manifest.tower.to_json() if manifest.tower else None,
        "restore": manifest.method.restore,
        "then": None if then is None else {"name": then.name, "layer": then.layer, "keep_tokens": then.keep},
        "bytes": sum(info.bytes for info in manifest.files.values()),
        "parity": manifest.parity,
    }


def _report(bundle: Bundle, output: Path) -> str:
    """What the command prints when it is done: stages, what was verified, and the next command."""
    manifest = bundle.manifest
    parity = manifest.parity.get("graphs", {})
    rows = [
        [
            _stage_of(manifest, file),
            file,
            f"{_megabytes(bundle, file):.2f}",
            _parity_cell(file, parity, manifest.parity),
        ]
        for file in manifest.graphs
    ]
    keeps = ", ".join(f"{manifest.visual.count} → {keep}" for keep in manifest.visual.keep)
    total = sum(info.bytes for info in manifest.files.values()) / 1e6
    return "\n".join(
        [
            table(["stage", "file", "MB", "parity"], rows),
            "",
            f"{manifest.method.name}: visual tokens {keeps}; {total:.1f} MB in {shown(output)}",
            *_then_lines(manifest),
            *_tower_lines(manifest),
            *_restore_lines(manifest),
            *_generation_lines(manifest.parity),
            "",
            *_next_lines(manifest, output),
        ]
    )


def _next_lines(manifest: Manifest, output: Path) -> list[str]:
    """The command to go on with: to ask, or, for TensorRT, to build the engines where they are to run."""
    build = command_line("vtp-build", output, "--engine", "tensorrt")
    if manifest.target == "jetpack6":
        return [f"next, on the Jetson: {build}"]
    if manifest.target != "ort":
        return [f"next, on the machine with the GPU: {build} (or --engine tensorrt-rtx)"]
    look = "--image PICTURE" if manifest.image.frames is None else "--video FOLDER"
    return [
        f'next: {command_line("vtp-run", output)} {look} --prompt "what color is the star ?"',
        f"or: {command_line('vtp-serve', output)}",
    ]


def _then_lines(manifest: Manifest) -> list[str]:
    then, keeps = manifest.method.then, manifest.visual.keep
    if then is None:
        return []
    left = ", ".join(f"{keep} → {after}" for keep, after in zip(keeps, then.keep, strict=True))
    return [f"then {then.name}: {left} before decoder layer {then.layer}"]


def _tower_lines(manifest: Manifest) -> list[str]:
    tower, stream = manifest.tower, manifest.stream
    if tower is None:
        return []
    if stream is not None:  # a picture by itself goes through whole
        return [f"tower {tower.name}: {stream.rows} of {stream.of} rows of a camera's later pictures"]
    return [f"tower {tower.name}: {tower.rows} of {tower.of} rows in its last block"]


def _restore_lines(manifest: Manifest) -> list[str]:
    visual = manifest.visual
    gains = ", ".join(f"{math.log(visual.count / keep):.2f} at {keep}" for keep in visual.keep)
    return [f"restore: attention logits of kept tokens gain {gains}"] if manifest.method.restore else []


def _stage_of(manifest: Manifest, file: str) -> str:
    """What a graph is called: its file's name, of which a pruner may have one for each keep-count."""
    pruner = any(stage.file == file for stage in manifest.stages_of("pruner"))
    return "pruner" if pruner else file.removesuffix(".onnx")


def _megabytes(bundle: Bundle, file: str) -> float:
    files = bundle.manifest.files
    return sum(files[name].bytes for name in (file, f"{file}.data") if name in files) / 1e6


def _parity_cell(file: str, graphs: dict[str, Any], parity: dict[str, Any]) -> str:
    if parity.get("mode") not in CHECKED:
        return "not checked"
    found = graphs.get(file.removesuffix(".onnx"))
    if found is None:
        worst = max(case["relative"] for case in parity["generation"].values())
        return f"end to end {worst:.1e}"
    words = [f"indices {found['indices']}"] if "indices" in found else []
    return ", ".join([*words, *([f"{found['relative']:.1e}"] if "relative" in found else [])])


def _generation_lines(parity: dict[str, Any]) -> list[str]:
    if parity.get("mode") not in CHECKED:
        return ["fidelity: not checked (--verify none)"]
    return [
        f"fidelity at {keep} kept: {case['equal']} of {case['tokens']} greedy tokens equal torch's, "
        f"logits within {case['relative']:.1e} of a row's length"
        for keep, case in parity["generation"].items()
    ] + _layer_lines(parity)


def _layer_lines(parity: dict[str, Any]) -> list[str]:
    return [
        f"borders between layers of {graph}: {len(found)} compared, within {max(found.values()):.1e}"
        for graph, found in parity.get("layers", {}).items()
    ]


if __name__ == "__main__":
    sys.exit(main())
