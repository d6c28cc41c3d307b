"""The part of vtp-export that is about layouts: its flags, and what is printed of a folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtp.engines import UsageError
from vtp.engines.errors import shown
from vtp.export.method_files import DEFAULT, NONE
from vtp.runtime.commands.arguments import suggest, take_bundle

if TYPE_CHECKING:
    from vtp.export.layouts.transformers_js.folder import Written
    from vtp.export.request import Request

BUNDLE, TRANSFORMERS_JS = "bundle", "transformers.js"
LAYOUTS = (BUNDLE, TRANSFORMERS_JS)
# Flags that say what is exported, each with its default: of a bundle that exists all that is decided.
_DECIDED: dict[str, Any] = {
    **dict.fromkeys(("keep_tokens", "prune_ratio", "dtype", "max_length", "image_size", "frames")),
    **dict.fromkeys(("image_fit", "then", "oldest_onnxruntime")),
    "method": DEFAULT,
    "tower": NONE,
    "target": "ort",
    "share": "picture",
    "restore": False,
    "method_option": [],
    "tower_option": [],
    "then_option": [],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser."""
    layout = parser.add_argument(
        "--layout",
        default=BUNDLE,
        help="what the folder is for: bundle (vtp's own commands) or transformers.js, which npm's "
        "@huggingface/transformers loads in Node and in browsers (default: %(default)s)",
    )
    suggest(layout, LAYOUTS)
    parser.add_argument(
        "--from-bundle",
        metavar="BUNDLE",
        help="with --layout transformers.js: lay out this bundle of --model, such as one that vtp-calib "
        "quantised, instead of exporting; with --push-to-hub alone: push it",
    )


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for a layout that does not exist, and for flags that do not go with it."""
    if args.layout not in LAYOUTS:
        raise UsageError(f"unknown layout '{shown(args.layout)}'; choose one of {', '.join(LAYOUTS)}")
    if args.from_bundle is None:
        return
    if args.layout == BUNDLE and args.push_to_hub is None:
        raise UsageError(
            f"--from-bundle goes with --layout {TRANSFORMERS_JS} or --push-to-hub: it is a bundle already"
        )
    given = [name for name, usual in _DECIDED.items() if getattr(args, name) != usual]
    if given:
        flag = given[0].replace("_", "-")
        raise UsageError(f"--{flag} is decided in the bundle of --from-bundle; leave out --{flag}")


def make(
    args: argparse.Namespace,
    request: Request,
    progress: Callable[[str], None],
    note: Callable[[str], None],
) -> Written:
    """Write the folder that the flags ask for."""
    from vtp.export.layouts.transformers_js.folder import export_folder, lay_out

    if args.from_bundle is None:
        return export_folder(request, progress, note)
    source = take_bundle("vtp-export", args.from_bundle, args.json)
    written = lay_out(source, args.model, request.output, args.overwrite, progress, args.verify)
    if not written.browsers:
        note("this bundle's pruner computes in float64, which browsers do not: the folder is for Node")
    return written


def summary(written: Written) -> dict[str, Any]:
    """What --json prints."""
    manifest = written.manifest
    return {
        "folder": str(written.folder),
        "layout": TRANSFORMERS_JS,
        "method": manifest.method.name,
        "visual_tokens": {"before": manifest.visual.count, "after": manifest.visual.keep[0]},
        "dtype": dict(written.dtypes),
        "browsers": written.browsers,
        "bytes": sum(path.stat().st_size for path in _files(written.folder)),
        "parity": {**manifest.parity, TRANSFORMERS_JS: dict(written.checked)},
    }


def report(written: Written) -> str:
    """What is printed of a folder."""
    manifest, checked = written.manifest, written.checked
    names = ", ".join(f"{name} {dtype}" for name, dtype in written.dtypes.items())
    size = sum(path.stat().st_size for path in _files(written.folder)) / 1e6
    fidelity = "the folder was not compared with its bundle (only --verify full does)"
    if "tokens" in checked:
        fidelity = (
            f"{checked['equal']} of {checked['tokens']} greedy tokens equal the bundle's, logits within "
            f"{checked['relative']:.1e} of a row's length"
        )
    return "\n".join(
        [
            f"{manifest.method.name}: visual tokens {manifest.visual.count} → {manifest.visual.keep[0]}; "
            f"{size:.1f} MB in {shown(written.folder)}",
            names,
            f"fidelity: {fidelity}",
            f"next: README.md in {shown(written.folder)} says how {TRANSFORMERS_JS} loads it",
        ]
    )


def _files(folder: Path) -> list[Path]:
    """Each file once, whatever names it has."""
    found = {path.stat().st_ino: path for path in folder.rglob("*") if path.is_file()}
    return list(found.values())
