"""What can be typed: commands, their flags and the values of these, read from argparse parsers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

FILES, FOLDERS, WORDS, NOTHING = "files", "folders", "words", ""  # what a value may be
_FILE, _FOLDER = re.compile("FILE|OUT|SOURCE"), re.compile("DIR|FOLDER|BUNDLE")

_PLAIN = re.compile(r"[\w.:/+-]+")  # what no shell expands


@dataclass(frozen=True)
class Value:
    """What stands behind a flag, or alone: `names` are offered, and files or folders beside them.

    Names that a shell would expand are left out.
    """

    kind: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flag:
    """A flag by all its names; `value` is None where none follows it."""

    names: tuple[str, ...]
    about: str
    value: Value | None


@dataclass(frozen=True)
class Command:
    """A command: `path` are the words that begin it, such as ("vtp", "calib", "keep").

    program  what it calls itself, such as "vtp-calib keep"
    words    what it takes without a flag
    """

    path: tuple[str, ...]
    program: str
    about: str
    flags: tuple[Flag, ...]
    words: Value
    parts: tuple[Command, ...] = ()

    def walk(self) -> Iterator[Command]:
        """This command and those below it."""
        yield self
        for part in self.parts:
            yield from part.walk()

    @property
    def programs(self) -> list[str]:
        """What is typed first, of this command and its parts: those that are programs of their own."""
        return [one.program for one in (self, *self.parts) if " " not in one.program]


def read_commands(parsers: Mapping[str, argparse.ArgumentParser]) -> Command:
    """The dispatcher `vtp` over commands by name; the parser of "" is its own."""
    own = read_parser(parsers[""], ("vtp",), "")
    parts = tuple(
        read_parser(parser, ("vtp", name), parser.description or "")
        for name, parser in parsers.items()
        if name
    )
    return Command(own.path, own.program, own.about, own.flags, own.words, parts)


def read_parser(parser: argparse.ArgumentParser, path: tuple[str, ...], about: str) -> Command:
    """One parser, and those of its sub-commands."""
    flags, words, parts = list[Flag](), list[Value](), list[Command]()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {choice.dest: choice.help or "" for choice in action._choices_actions}
            parts += [
                read_parser(part, (*path, name), told.get(name, "")) for name, part in action.choices.items()
            ]
        elif action.option_strings:
            flags.append(_flag(action, parser))
        else:
            words.append(_value(action))
    return Command(path, parser.prog, about, tuple(flags), _merged(words), tuple(parts))


def _flag(action: argparse.Action, parser: argparse.ArgumentParser) -> Flag:
    alone = action.nargs == 0
    about = parser._get_formatter()._expand_help(action) if action.help else ""
    return Flag(tuple(action.option_strings), " ".join(about.split()), None if alone else _value(action))


def _value(action: argparse.Action) -> Value:
    """By what the action says of itself: choices, names to offer, or how its value is called."""
    offered = map(str, action.choices or getattr(action, "suggestions", None) or ())
    names = tuple(name for name in offered if _PLAIN.fullmatch(name))
    called = str(action.metavar or "")
    if _FILE.search(called):
        return Value(FILES, names)
    if _FOLDER.search(called):
        return Value(FOLDERS, names)
    return Value(WORDS if names else NOTHING, names)


def _merged(words: list[Value]) -> Value:
    """What may stand at any of several places."""
    kinds = {word.kind for word in words}
    kind = next((one for one in (FILES, FOLDERS, WORDS) if one in kinds), NOTHING)
    return Value(kind, tuple(name for word in words for name in word.names))
