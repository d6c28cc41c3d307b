"""The part of vtp-export that is about the hub: its flags, the checks before an export, and what is said."""

from __future__ import annotations

import argparse
from pathlib import Path

from vtp.engines.errors import UsageError, VtpError
from vtp.export.hub.push import RECORD, Pushed, Say, check_target, push, push_transformers_js
from vtp.export.layouts.command import BUNDLE
from vtp.runtime.bundle.folder import MANIFEST
from vtp.runtime.commands.arguments import take_bundle
from vtp.runtime.shell import command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser."""
    parser.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="also put the result into this repository of the Hugging Face hub, with a model card; the token "
        "is that of hf auth login, or HF_TOKEN (with --from-bundle: push that bundle, and export nothing)",
    )
    parser.add_argument("--private", action="store_true", help="make that repository for you alone")


def check(args: argparse.Namespace) -> None:
    """Refuse, before an export, flags that do not go together and a repository that cannot be written to."""
    if args.push_to_hub is None:
        if args.private:
            raise UsageError("--private is of a repository on the hub; give --push-to-hub ORG/NAME as well")
        return
    if is_push_alone(args) and (args.model is not None or args.output is not None):
        given = "--model" if args.model is not None else "--output"
        raise UsageError(f"the bundle of --from-bundle is pushed as it is; leave out {given}")
    check_target(args.push_to_hub, MANIFEST if args.layout == BUNDLE else RECORD, args.private)


def is_push_alone(args: argparse.Namespace) -> bool:
    """Whether a bundle that exists is pushed, and nothing exported."""
    return args.from_bundle is not None and args.layout == BUNDLE


def push_alone(args: argparse.Namespace, say: Say) -> Pushed:
    """Push the bundle of --from-bundle."""
    bundle = take_bundle("vtp-export", args.from_bundle, args.json)
    return push(bundle, args.push_to_hub, args.private, say, bars=not args.json)


def push_made(args: argparse.Namespace, folder: Path, say: Say) -> Pushed:
    """Push what was just made; if that fails, the line says where it lies."""
    send = push if args.layout == BUNDLE else push_transformers_js
    try:
        return send(folder, args.push_to_hub, args.private, say, bars=not args.json)
    except VtpError as error:
        again = ""
        if args.layout == BUNDLE:
            again = f"; push it with: {_again(args, folder)}"
        raise VtpError(f"{error} (the folder is whole in {folder}{again})") from error


def _again(args: argparse.Namespace, folder: Path) -> str:
    private = ["--private"] if args.private else []
    return command_line("vtp-export", "--from-bundle", folder, "--push-to-hub", args.push_to_hub, *private)


def report(pushed: Pushed, args: argparse.Namespace) -> str:
    """What is printed of it."""
    lines = [f"pushed: {pushed.url} (commit {pushed.commit})"]
    if args.layout == BUNDLE:
        run = command_line(
            "vtp-run", pushed.repo, "--image", "PICTURE", "--prompt", "what color is the star ?"
        )
        lines.append(f"anywhere: {run}")
    return "\n".join(lines)
