"""Where commands begin: the dispatcher says the same as each command, and Ctrl-C ends their imports."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomllib

import vtp
from vtp.entry import COMMANDS, COMPLETION, _parsers, main, start

from .test_house import HEAVY, PROJECT, ROOT

NEAR = "vtp: error: unknown command '{}'; did you mean '{}'? see vtp --help\n"
LIST = f"; commands: {', '.join(COMMANDS)}, completion; see vtp --help\n"
ENDED = "error: interrupted; nothing was left behind\n"


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    return _parsers()


def python(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python of its own, where Ctrl-C means what it means at a terminal."""
    begin = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    return subprocess.run(
        [sys.executable, *flags, "-c", begin + script], capture_output=True, text=True, check=False
    )


# -- the table -----------------------------------------------------------------------------------------------


def test_every_command_has_its_program() -> None:
    scripts = PROJECT["project"]["scripts"]
    assert scripts == {"vtp": "vtp.entry:main"} | {
        f"vtp-{name}": f"vtp.entry:vtp_{name}" for name in COMMANDS
    }
    for name in COMMANDS:
        entry = getattr(import_module("vtp.entry"), f"vtp_{name}")
        assert (entry.func, entry.args) == (start, (name,))


def test_the_list_says_what_each_command_says_of_itself(parsers: dict[str, argparse.ArgumentParser]) -> None:
    for name, (_, about) in {**COMMANDS, "completion": COMPLETION}.items():
        assert about == parsers[name].description


def test_help_lists_every_command_and_loads_nothing() -> None:
    script = "import sys; from vtp.entry import main; main(['--help']); "
    done = python(f"{script} print([name for name in sys.modules if name.startswith(('vtp.', 'numpy'))])")
    *lines, loaded = done.stdout.splitlines()
    assert (loaded, done.stderr) == ("['vtp.entry']", "")
    for name, (_, about) in {**COMMANDS, "completion": COMPLETION}.items():
        assert f"  {name:<12}{about}" in lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["exprot"], NEAR.format("exprot", "export")),
        (["vtp-doctr"], NEAR.format("vtp-doctr", "doctor")),
        (["\x1b[2Jqqq"], f"vtp: error: unknown command '\\x1b[2Jqqq'{LIST}"),
        ([], f"vtp: error: give a command{LIST}"),
        (["--bundle"], f"vtp: error: unknown option '--bundle'{LIST}"),
    ],
)
def test_what_is_not_a_command_is_one_line(
    words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (main(words), *capfd.readouterr()) == (2, "", said)


def test_python_m_vtp_is_the_dispatcher() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vtp", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == f"vtp {vtp.__version__}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_what_cannot_be_printed_is_one_line_and_a_reader_may_leave() -> None:
    command = [sys.executable, "-m", "vtp"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*command, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    said = "vtp: error: cannot write to standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*command, "--version"], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


# -- the same as the command itself --------------------------------------------------------------------------


def outcome(call: object, argv: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    try:
        code = call(argv)  # type: ignore[operator]
    except SystemExit as stop:
        code = stop.code
    return (code, *capfd.readouterr())


@pytest.mark.parametrize("name", [*COMMANDS, "completion"])
def test_every_command_tells_its_version(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    program = "vtp completion" if name == "completion" else f"vtp-{name}"
    said = f"{program.partition(' ')[0]} {PROJECT['project']['version']}\n"
    assert outcome(main, [name, "--version"], capfd) == (0, said, "")


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("run", []),
        ("run", ["nowhere", "--prompt", "x"]),
        ("calib", ["keep", "--help"]),
        ("serve", ["nowhere"]),
        ("ros2", ["--nothing", "--ros-args", "-p", "rate:=2"]),
    ],
)
def test_the_dispatcher_says_what_the_command_says(
    command: str, argv: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an extra is missing: `serve` needs starlette."""
    monkeypatch.setitem(sys.modules, "starlette", None)
    own = outcome(import_module(COMMANDS[command][0]).main, argv, capfd)
    assert outcome(main, [command, *argv], capfd) == own
    assert own[1] or own[2].startswith(f"vtp-{command}: error: ")
    if command == "serve":
        assert "pip install 'vtp-edge[serve]'" in own[2]


def test_every_command_is_known_without_any_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"ort", "export", "serve"} <= set(extras)
    absent = HEAVY | {"onnxruntime", "openvino", "starlette", "uvicorn", "llguidance", "av", "mcap", "ray"}
    absent |= {"matplotlib", "rclpy", "cv2", "zenoh"}
    blocked = f"import sys; sys.modules.update(dict.fromkeys({sorted(absent)})); "
    done = python(f"{blocked} from vtp.entry import _parsers; print(*_parsers())")
    assert (done.stdout.split(), done.stderr) == ([*COMMANDS, "completion"], "")


# -- Ctrl-C --------------------------------------------------------------------------------------------------

# Ctrl-C comes while the command's module is looked for.
IMPORTING = """
import os, signal, sys, importlib.abc
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from vtp.entry import main
sys.exit(main([{command!r}, "--help"]))
"""


@pytest.mark.parametrize("command", ["run", "ros2", "completion"])
def test_ctrl_c_while_modules_are_imported_is_one_line(command: str) -> None:
    module = {**COMMANDS, "completion": COMPLETION}[command][0]
    done = python(f"exec({IMPORTING.format(module=module.rpartition('.')[0], command=command)!r})")
    program = "vtp completion" if command == "completion" else f"vtp-{command}"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{program}: {ENDED}")


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    """As a shell has it for what runs in the background."""
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN); "
    script = IMPORTING.format(module="vtp.runtime.commands", command="doctor")
    done = python(f"{ignored} exec({script!r})")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: vtp-doctor" in done.stdout


def test_ctrl_c_belongs_to_the_command_once_it_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its own handling cleans up; what comes before that is one line, or a traceback if it is asked for."""
    before = signal.getsignal(signal.SIGINT)

    def interrupted(argv: list[str]) -> int:
        assert signal.getsignal(signal.SIGINT) is before
        raise KeyboardInterrupt

    monkeypatch.setattr("vtp.entry.import_module", lambda name: SimpleNamespace(main=interrupted))
    assert (main(["run"]), *capfd.readouterr()) == (130, "", f"vtp-run: {ENDED}")
    monkeypatch.setattr(sys, "argv", ["vtp-run", "--debug"])
    with pytest.raises(KeyboardInterrupt):
        start("run")
