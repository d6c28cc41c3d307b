"""The completion script for bash."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from vtp.runtime.commands.completion.tree import NOTHING, Command, Value

_BODY = r"""
_vtp() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} at=${COMP_WORDS[0]##*/} i=1
    COMPREPLY=()
    # bash takes --flag=value apart
    if [[ $cur == "=" ]]; then cur=; elif [[ $prev == "=" ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi
    at=${at/-/ }
    while (( i < COMP_CWORD )) && [[ " $(_vtp_parts "$at") " == *" ${COMP_WORDS[i]} "* ]]; do
        at="$at ${COMP_WORDS[i]}"; i=$((i+1))
    done
    local value="$(_vtp_value "$at" "$prev")"
    if [[ -z $value ]]; then
        if [[ $cur == -* ]]; then value="words $(_vtp_flags "$at")"
        elif (( i == COMP_CWORD )) && [[ -n "$(_vtp_parts "$at")" ]]; then value="words $(_vtp_parts "$at")"
        else value="$(_vtp_value "$at" "")"; fi
    fi
    COMPREPLY=($(compgen -W "${value#* }" -- "$cur"))
    local how path
    case $value in
        files\ *) how=-f ;;
        folders\ *) how=-d ;;
        *) return ;;
    esac
    compopt -o filenames 2>/dev/null
    # line by line, since a file may be called "*"
    while IFS= read -r path; do COMPREPLY+=("$path"); done < <(compgen $how -- "$cur")
}
"""


def script(root: Command) -> str:
    """The script: `source <(vtp completion bash)` takes it in."""
    commands = list(root.walk())
    return "\n".join(
        [
            "# Completion of vtp for bash, made by: vtp completion bash",
            *_function("_vtp_parts", "$1", [(_at(one), _parts(one)) for one in commands]),
            *_function("_vtp_flags", "$1", [(_at(one), _flags(one)) for one in commands]),
            '# kind of a flag\'s value (of the flag "": of a word), and names to offer',
            *_function("_vtp_value", "$1|$2", [case for one in commands for case in _values(one)]),
            _BODY,
            f"complete -F _vtp {' '.join(root.programs)}",
        ]
    )


def _function(name: str, key: str, cases: Sequence[tuple[str, str]]) -> Iterator[str]:
    """A function that prints the text of the first case."""
    yield f'{name}() {{\n    case "{key}" in'
    for pattern, text in cases:
        if text:
            yield f"        {pattern}) echo {shlex.quote(text)} ;;"
    yield "    esac\n}"


def _at(command: Command) -> str:
    return shlex.quote(" ".join(command.path))


def _parts(command: Command) -> str:
    return " ".join(part.path[-1] for part in command.parts)


def _flags(command: Command) -> str:
    return " ".join(name for flag in command.flags for name in flag.names)


def _values(command: Command) -> Iterator[tuple[str, str]]:
    at = " ".join(command.path)
    for flag in command.flags:
        if flag.value is not None:
            yield "|".join(shlex.quote(f"{at}|{name}") for name in flag.names), _text(flag.value)
    if command.words.kind != NOTHING:
        yield shlex.quote(f"{at}|"), _text(command.words)


def _text(value: Value) -> str:
    return f"{value.kind or 'any'} {' '.join(value.names)}"
