"""vtp completion: prints the script that completes vtp's commands in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

from vtp.runtime.commands.arguments import add_debug
from vtp.runtime.commands.completion import bash, fish, zsh
from vtp.runtime.commands.completion.tree import read_commands
from vtp.runtime.commands.console import Parser, run_command, say

PROG = "vtp completion"
SHELLS = {"bash": bash.script, "zsh": zsh.script, "fish": fish.script}
_HOW = (
    "Write it to a file that the shell reads at its start: in bash by `source FILE` in ~/.bashrc, in zsh as "
    "a file _vtp in a folder of fpath, in fish as ~/.config/fish/conf.d/vtp.fish."
)


def build_parser() -> argparse.ArgumentParser:
    """The flags of vtp completion."""
    parser = Parser(prog=PROG, description="Print what completes these commands in a shell.", epilog=_HOW)
    parser.add_argument("shell", choices=list(SHELLS), help="which shell it is for")
    add_debug(parser)
    return parser


def main(argv: Sequence[str], parsers: Callable[[], Mapping[str, argparse.ArgumentParser]]) -> int:
    """Print one shell's script; returns the exit code.

    parsers  makes the commands' parsers by name, as `read_commands` takes them
    """
    args = build_parser().parse_args(argv)
    return run_command(PROG, lambda: say(SHELLS[args.shell](read_commands(parsers()))), args.debug)
