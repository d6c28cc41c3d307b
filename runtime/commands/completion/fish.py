"""The completion script for fish."""

from __future__ import annotations

from collections.abc import Iterator

from vtp.runtime.commands.completion.tree import FILES, FOLDERS, Command, Flag, Value

_HEAD = r"""# Completion of vtp for fish, made by: vtp completion fish
# whether the words of a command line so far begin with these
function __vtp_at
    set -l words (commandline -opc)
    set words[1] (string replace -r '^.*/' '' -- $words[1])
    set words (string split -m 1 '-' -- $words[1]) $words[2..-1]
    test "$words[1..$(count $argv)]" = "$argv"
end
# whether they are these and no more
function __vtp_ends
    set -l words (commandline -opc)
    set words[1] (string replace -r '^.*/' '' -- $words[1])
    set words (string split -m 1 '-' -- $words[1]) $words[2..-1]
    test "$words" = "$argv"
end"""


def script(root: Command) -> str:
    """The script: `vtp completion fish | source` takes it in."""
    lines = (f"complete {_programs(one)} {line}" for one in root.walk() for line in _lines(one))
    fresh = (f"complete -c {name} {how}" for how in ("-e", "-f") for name in root.programs)
    return "\n".join([_HEAD, *fresh, *lines])


def _programs(command: Command) -> str:
    """The programs that take it: `vtp`, and one of its own."""
    names = dict.fromkeys([command.path[0], command.program.partition(" ")[0]])
    return " ".join(f"-c {name}" for name in names)


def _lines(command: Command) -> Iterator[str]:
    at, ends = (_quoted(f"{test} {' '.join(command.path)}") for test in ("__vtp_at", "__vtp_ends"))
    for part in command.parts:
        yield f"-n {ends} -a {_quoted(part.path[-1])} -d {_quoted(part.about)}"
    for flag in command.flags:
        yield f"-n {ends if command.parts else at} {_flag(flag)}"
    if not command.parts and (command.words.names or command.words.kind in (FILES, FOLDERS)):
        yield f"-n {at} {_taken(command.words)}"


def _flag(flag: Flag) -> str:
    names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names)
    value = "" if flag.value is None else f" -r {_taken(flag.value)}"
    return f"{names}{value} -d {_quoted(flag.about)}"


def _taken(value: Value) -> str:
    """What completes a value."""
    names = " ".join(value.names)
    if value.kind == FILES:
        return f"-F{f' -a {_quoted(names)}' if names else ''}"
    if value.kind == FOLDERS:
        return f"-f -a {_quoted(f'{names} (__fish_complete_directories)'.strip())}"
    return f"-f{f' -a {_quoted(names)}' if names else ''}"


def _quoted(text: str) -> str:
    """As fish reads it between single quotes."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
