"""The completion script for zsh."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator

from vtp.runtime.commands.completion.tree import FILES, FOLDERS, Command, Value

_BODY = r"""
_vtp() {
    local at=${words[1]:t} before=${words[CURRENT-1]} i=2 flag
    local -a parts flags
    at=${at/-/ }
    _vtp_at $at
    while (( i < CURRENT )) && (( ${parts[(I)${words[i]}:*]} )); do
        at="$at ${words[i]}"; (( i++ ))
        _vtp_at $at
    done
    if [[ $PREFIX == --*=* ]]; then
        flag=${PREFIX%%=*}
        compset -P '*='
        _vtp_value "$at|$flag"
    elif [[ $before == -* ]] && _vtp_value "$at|$before"; then
        return
    elif [[ $PREFIX == -* ]]; then
        _describe -o flag flags
    elif (( i == CURRENT && $#parts )); then
        _describe command parts
    else
        _vtp_value "$at|"
    fi
}
"""


def script(root: Command) -> str:
    """The script: a file `_vtp` in a folder of `fpath`, or `source <(vtp completion zsh)` after compinit."""
    commands = list(root.walk())
    names = " ".join(root.programs)
    return "\n".join(
        [
            f"#compdef {names}",
            "# Completion of vtp for zsh, made by: vtp completion zsh",
            "_vtp_at() {\n    parts=() flags=()\n    case $1 in",
            *(line for one in commands for line in _lists(one)),
            "    esac\n}",
            '# completes a flag\'s value (of the flag "": a word), or fails where none follows',
            "_vtp_value() {\n    case $1 in",
            *(line for one in commands for line in _values(one)),
            "        *) return 1 ;;\n    esac\n    return 0\n}",
            _BODY,
            'if [[ $funcstack[1] == _vtp ]]; then _vtp "$@"; else compdef _vtp ' + names + "; fi",
        ]
    )


def _lists(command: Command) -> Iterator[str]:
    yield f"        {shlex.quote(' '.join(command.path))})"
    yield f"            parts=({_described((part.path[-1], part.about) for part in command.parts)})"
    flags = ((name, flag.about) for flag in command.flags for name in flag.names)
    yield f"            flags=({_described(flags)}) ;;"


def _described(entries: Iterable[tuple[str, str]]) -> str:
    return " ".join(shlex.quote(f"{name}:{about}") for name, about in entries)


def _values(command: Command) -> Iterator[str]:
    at = " ".join(command.path)
    for flag in command.flags:
        if flag.value is not None:
            for name in flag.names:
                yield f"        {shlex.quote(f'{at}|{name}')}) {_action(flag.value)} ;;"
    yield f"        {shlex.quote(f'{at}|')}) {_action(command.words)} ;;"


def _action(value: Value) -> str:
    """What completes a value; `:` where nothing can be offered."""
    names = [f"compadd -- {' '.join(map(shlex.quote, value.names))}"] if value.names else []
    paths = {FILES: ["_files"], FOLDERS: ["_files -/"]}.get(value.kind, [])
    return "; ".join([*names, *paths]) or ":"
