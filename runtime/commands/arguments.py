"""Flags that several commands have: the same names, defaults and help, written once."""

from __future__ import annotations

import argparse
from typing import Any

from vtp.engines import AUTO, engine_names


def add_debug(parser: argparse.ArgumentParser) -> None:
    """`--debug`, which every command has: see `run_command`."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def add_json(parser: argparse.ArgumentParser, what: str = "print one JSON object") -> None:
    """`--json`, for output that programs read."""
    parser.add_argument("--json", action="store_true", help=what)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """`--engine`, by name or "auto"."""
    names = ", ".join(engine_names())
    parser.add_argument(
        "--engine",
        default=AUTO,
        metavar="ENGINE[,STAGE=ENGINE...]",
        help=f"one of {names} (default: %(default)s); stages that another one runs behind it",
    )


def add_threads(
    parser: argparse.ArgumentParser, what: str = "CPU threads (default: all cores)", **more: Any
) -> None:
    """`--threads`, as text that `whole_number` reads unless `more` has a type."""
    parser.add_argument("--threads", metavar="N", help=what, **more)


def add_keep_tokens(parser: argparse.ArgumentParser, what: str) -> None:
    """`--keep-tokens` of a bundle, as text that `whole_number` reads; None: the bundle's default."""
    parser.add_argument("--keep-tokens", metavar="K", help=what)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """`--overwrite`, of commands that make a bundle."""
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
