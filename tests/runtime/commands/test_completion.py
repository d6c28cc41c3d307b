"""Completion in the shells themselves: bash, and zsh and fish where they are installed."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from vtp.entry import COMMANDS, _parsers
from vtp.runtime.commands.completion.cli import SHELLS
from vtp.runtime.commands.completion.tree import Command, read_commands

# What is typed, the last word unfinished, and what a shell must offer for it, with nothing beside.
TYPED = {
    ("vtp", ""): {*COMMANDS, "completion"},
    ("vtp", "ex"): {"export"},
    ("vtp", "--ver"): {"--version"},
    ("vtp", "calib", ""): {"keep", "score", "quantize"},
    ("vtp-calib", "qu"): {"quantize"},
    ("vtp", "completion", ""): {"bash", "zsh", "fish"},
    ("vtp", "run", "--en"): {"--engine", "--engines"},
    ("vtp-run", "a", "--prompt", "serve", "--js"): {"--json"},
    ("vtp", "calib", "keep", "--floo"): {"--floor"},
    ("vtp", "calib", "score", "--floo"): set(),
    ("vtp-run", "--engine", "ort-"): {"ort-cpu", "ort-cuda"},
    ("vtp", "export", "--method", "vi"): {"vispruner", "visionzip", "video/"},
    ("vtp-export", "--target", ""): {"ort", "tensorrt", "jetpack6"},
    ("vtp-watch", "--labels", ""): {"letters", "texts"},
    ("vtp", "calib", "quantize", "--block", ""): {"32", "64", "128"},
    ("vtp", "run", "--image", "p"): {"picture.png"},
    ("vtp", "doctor", "p"): set(),
    ("vtp", "doctor", "v"): {"video/"},
    ("vtp", "run", "--top-p", ""): set(),
}

BASH = 'COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _vtp 2>/dev/null; echo "${COMPREPLY[@]}"'
# Its completion system wants a terminal: these stand for the parts of it that print and choose.
ZSH = r"""
compdef() { :; }
compadd() { shift; print -l -- ${(M)@:#$PREFIX*}; }
_files() {
    local -a found; found=(${~PREFIX}*(N)); [[ $1 == -/ ]] && found=(${~PREFIX}*(N/)); print -l -- $found
}
_describe() { [[ $1 == -o ]] && shift; local -a all; all=(${(P)2%%:*}); print -l -- ${(M)all:#$PREFIX*}; }
source $SCRIPT; words=("$@"); CURRENT=$#; PREFIX=${words[-1]}; _vtp; true
"""
FISH = 'source $SCRIPT; complete -C "$argv"'


@pytest.fixture(scope="module")
def tree() -> Command:
    return read_commands(_parsers())


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to complete paths in."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "picture.png").touch()
    (folder / "video").mkdir()
    return folder


def offered(shell: str, script: str, words: tuple[str, ...], desk: Path) -> set[str]:
    """What a shell offers; folders end in a slash, as they are shown."""
    file = desk.parent / f"{desk.name}.{shell}"
    file.write_text(script)
    begin = {
        "bash": ["bash", "--norc", "-c", f"source $SCRIPT; {BASH}", "bash"],
        "zsh": ["zsh", "-fc", ZSH, "z"],
    }
    command = begin.get(shell, ["fish", "--no-config", "-c", FISH])
    asked = [" ".join(words)] if shell == "fish" else words
    environment = {"SCRIPT": str(file), "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(desk)}
    done = subprocess.run(
        [*command, *asked], capture_output=True, text=True, check=True, cwd=desk, env=environment
    )
    assert not done.stderr
    lines = [line.partition("\t")[0] for line in done.stdout.splitlines()]
    found = {word for line in lines for word in (line.split() if shell == "bash" else [line]) if word}
    return {f"{word}/" if word == "video" else word for word in found}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_offers_what_fits(shell: str, tree: Command, desk: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = SHELLS[shell](tree)
    assert {words: offered(shell, script, words, desk) for words in TYPED} == TYPED


def test_bash_takes_an_equals_sign_for_a_word(tree: Command, desk: Path) -> None:
    script = SHELLS["bash"](tree)
    assert offered("bash", script, ("vtp-run", "--engine", "=", "ort-c"), desk) == {"ort-cpu", "ort-cuda"}
    assert {"auto", "ort-cpu"} <= offered("bash", script, ("vtp-run", "--engine", "="), desk)


def test_bash_takes_a_file_by_its_name_whatever_that_is(tree: Command, tmp_path: Path) -> None:
    desk = tmp_path / "desk"
    desk.mkdir()
    for name in ("*", "other.png"):
        (desk / name).touch()
    assert offered("bash", SHELLS["bash"](tree), ("vtp", "run", "--image", "*"), desk) == {"*"}


def test_every_flag_of_every_command_is_known(tree: Command) -> None:
    known = {" ".join(one.path): {name for flag in one.flags for name in flag.names} for one in tree.walk()}
    parsers = {f"vtp {name}".strip(): parser for name, parser in _parsers().items()}
    parts = parsers["vtp calib"]._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    parsers |= {f"vtp calib {name}": parser for name, parser in parts.items()}
    assert known == {
        name: {flag for action in parser._actions for flag in action.option_strings}
        for name, parser in parsers.items()
    }


def test_words_from_help_do_no_harm(desk: Path) -> None:
    """Quotes, dollars and backquotes in help are text in every shell; such values are not offered."""
    words = ["it's", "$(touch${IFS}hit)", "`touch", "plain"]
    parser = argparse.ArgumentParser(prog="vtp-x", description='it\'s `touch hit` $(touch hit) \\ "x"')
    parser.add_argument("--flag", choices=words, help="it's $(touch hit) `touch hit`: \\")
    tree = read_commands({"": argparse.ArgumentParser(prog="vtp"), "x": parser})
    for shell in filter(shutil.which, SHELLS):
        assert offered(shell, SHELLS[shell](tree), ("vtp", ""), desk) == {"x"}
        assert offered(shell, SHELLS[shell](tree), ("vtp-x", "--f"), desk) == {"--flag"}
        assert offered(shell, SHELLS[shell](tree), ("vtp-x", "--flag", ""), desk) == {"plain"}
    assert not (desk / "hit").exists()
