"""Where every command begins: a table of them, `vtp COMMAND` beside `vtp-COMMAND`, and Ctrl-C meanwhile.

Importing this module takes no time, so that `vtp --help` does not wait and Ctrl-C is taken from the start:
while a command's own modules are imported, which is half a second and more, there is nothing to clean up, and
the process ends on the spot. After that `run_command` answers for it (`vtp.runtime.commands.console`).
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module

from vtp import __version__

# Command -> the module that holds its `main` and `build_parser`, and what it does.
COMMANDS = {
    "export": (
        "vtp.export.cli",
        "Split a vision-language model, prune its visual tokens, and write a bundle of ONNX graphs.",
    ),
    "run": ("vtp.runtime.commands.run", "Answer a prompt about a picture or a video with a bundle."),
    "serve": (
        "vtp.serve.cli",
        "Answer OpenAI's chat completions from bundles, over HTTP, until told to stop.",
    ),
    "watch": ("vtp.serve.streams.cli", "Ask about the newest frame of a stream, again and again."),
    "calib": (
        "vtp.calib.cli",
        "Choose how many visual tokens to keep and how few bits to use, on your own data.",
    ),
    "build": (
        "vtp.runtime.commands.build",
        "Build a bundle's graphs with TensorRT, on the device itself.",
    ),
    "doctor": ("vtp.runtime.commands.doctor", "Tell what this machine can run, and what a bundle needs."),
    "bench": ("vtp.bench.cli", "Measure a bundle: stages, tokens, memory, operations, limits."),
    "ros2": (
        "vtp.serve.robots.ros2",
        "Answer a question about a camera's newest picture, as a ROS 2 lifecycle node.",
    ),
    "zenoh": (
        "vtp.serve.robots.zenoh.cli",
        "Answer a question about a camera's newest picture, as a node of rmw_zenoh without ROS.",
    ),
}
COMPLETION = ("vtp.runtime.commands.completion.cli", "Print what completes these commands in a shell.")
_DONE, _FAILED, _BAD_USAGE, _INTERRUPTED = 0, 1, 2, 130
_ENDED = "interrupted; nothing was left behind"


def main(argv: list[str] | None = None) -> int:
    """Entry point of vtp, the dispatcher: `vtp run …` is `vtp-run …`; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    first = words[0] if words else ""
    if first in COMMANDS:
        return start(first, words[1:])
    if first == "completion":
        return _begin("vtp completion", COMPLETION[0], words[1:], _parsers)
    if first in ("-h", "--help"):
        return _print(_help())
    elif first == "--version":
        return _print(f"vtp {__version__}")
    return _refuse(first)


def start(command: str, argv: list[str] | None = None) -> int:
    """Entry point of `vtp-COMMAND`, which is imported now; returns the exit code.

    argv  its arguments; None: the process' own
    """
    return _begin(f"vtp-{command}", COMMANDS[command][0], argv)


def _begin(prog: str, module: str, argv: list[str] | None, *more: object) -> int:
    try:
        with _ended_by_ctrl_c(prog):
            command = import_module(module).main
        return int(command(sys.argv[1:] if argv is None else argv, *more))
    except KeyboardInterrupt:  # while its flags are read, or meant to be seen
        if "--debug" in sys.argv:
            raise
        return _say_ended(prog)


def _parsers() -> dict:
    """Every command's parser, and under "" that of `vtp` itself, for completion."""
    from vtp.runtime.commands.console import Parser

    named = {name: module for name, (module, _) in {**COMMANDS, "completion": COMPLETION}.items()}
    return {"": Parser(prog="vtp"), **{name: import_module(at).build_parser() for name, at in named.items()}}


@contextmanager
def _ended_by_ctrl_c(prog: str):  # typing takes longer than this module
    """While this holds, Ctrl-C ends the process with one line, if it would have raised KeyboardInterrupt.

    An exception would not do: libraries that are half imported turn it into others, or swallow it.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return
    with suppress(ValueError):  # in another thread than the main one, which Ctrl-C does not reach
        signal.signal(signal.SIGINT, lambda *_: os._exit(_say_ended(prog)))
    try:
        yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, before)


def _say_ended(prog: str) -> int:
    with suppress(OSError):  # standard error is closed
        os.write(2, f"{prog}: error: {_ENDED}\n".encode())
    return _INTERRUPTED


def _print(text: str) -> int:
    """Print what was asked for; one line if that is impossible, nothing if the reader left."""
    try:
        print(text, flush=True)
    except OSError as error:
        if (
            sys.stdout is not None
        ):  # what it still holds would be tried again, and complained about, at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            with suppress(OSError):
                os.write(2, f"vtp: error: cannot write to standard output: {error.strerror}\n".encode())
            return _FAILED
    return _DONE


def _help() -> str:
    listed = {**COMMANDS, "completion": COMPLETION}
    return "\n".join(
        [
            "usage: vtp [-h] [--version] COMMAND ...",
            "",
            "Visual token pruning for vision-language models: export, run, serve, measure.",
            "",
            "commands (vtp COMMAND is vtp-COMMAND; vtp COMMAND --help says more):",
            *(f"  {name:<12}{about}" for name, (_, about) in listed.items()),
            "",
            "options:",
            "  -h, --help  show this help message and exit",
            "  --version   show the version and exit",
        ]
    )


def _refuse(word: str) -> int:
    """One line about a word that is not a command, with the nearest one; or about none at all."""
    with _ended_by_ctrl_c("vtp"):
        from vtp.engines.errors import nearest, shown
    known = [*COMMANDS, "completion"]
    kind = "option" if word.startswith("-") else "command"
    what = f"unknown {kind} '{shown(word, 60)}'" if word else "give a command"
    close = nearest(word.removeprefix("vtp-"), known) if kind == "command" else ""
    rest = f"{close} see vtp --help" if close else f"; commands: {', '.join(known)}; see vtp --help"
    with suppress(OSError):
        os.write(2, f"vtp: error: {what}{rest}\n".encode())
    return _BAD_USAGE


vtp_export, vtp_run, vtp_serve = partial(start, "export"), partial(start, "run"), partial(start, "serve")
vtp_watch, vtp_calib, vtp_build = partial(start, "watch"), partial(start, "calib"), partial(start, "build")
vtp_doctor, vtp_bench, vtp_ros2 = partial(start, "doctor"), partial(start, "bench"), partial(start, "ros2")
vtp_zenoh = partial(start, "zenoh")
