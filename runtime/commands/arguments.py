"""Flags that several commands have: the same names, defaults and help, written once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from vtp.engines import AUTO, UsageError, engine_names
from vtp.engines.errors import shown
from vtp.runtime.commands.console import note, real_number, whole_number
from vtp.runtime.hub.bundles import local_bundle

_Number = TypeVar("_Number", int, float)
A_BUNDLE = "a folder that vtp-export made, or ORG/NAME[@REVISION] of the Hugging Face hub"


def take_bundle(prog: str, given: str, as_json: bool = False) -> Path:
    """The folder of a BUNDLE: of the hub's it is fetched, with notes and progress bars unless `as_json`."""
    return local_bundle(
        given, say=(lambda _: None) if as_json else lambda line: note(prog, line), bars=not as_json
    )


def whole(text: str) -> int:
    """argparse's type of a flag that takes a whole number."""
    return _read(whole_number, text)


def real(text: str) -> float:
    """argparse's type of a flag that takes a number."""
    return _read(real_number, text)


def suggest(action: argparse.Action, names: Iterable[str]) -> None:
    """Have a shell's completion offer these values of a flag, which takes others as well."""
    action.suggestions = tuple(names)  # type: ignore[attr-defined]


class Once(argparse.Action):
    """A flag that is given once: the first of two values would be left out in silence."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        first = getattr(namespace, self.dest)
        if first is not self.default:
            parser.error(
                f"argument {option_string}: given twice, {shown(first)} and {shown(values)}; choose one"
            )
        setattr(namespace, self.dest, values)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """`--debug`, which every command has: see `run_command`."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def add_json(parser: argparse.ArgumentParser, what: str = "print one JSON object") -> None:
    """`--json`, for output that programs read."""
    parser.add_argument("--json", action="store_true", help=what)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """`--engine`, by name or "auto"."""
    names = engine_names()
    engine = parser.add_argument(
        "--engine",
        default=AUTO,
        metavar="ENGINE[,STAGE=ENGINE...]",
        help=f"one of {', '.join(names)} (default: %(default)s); stages that another one runs behind it",
    )
    suggest(engine, [AUTO, *(name for name in names if name != AUTO)])


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


def _read(reader: Callable[[str, str], _Number], text: str) -> _Number:
    """`reader`'s number of a flag's text, or argparse's error with the same words."""
    try:
        return reader("", text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).lstrip()) from None
