"""An interrupted command that takes its time says that it is stopping, and one that does not says nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from vtp.runtime.commands.stopping import saying_so


@pytest.fixture(autouse=True)
def nobody_listens() -> None:
    assert signal.set_wakeup_fd(-1) == -1


# Signals are raised in processes of their own: test workers have threads and handlers of libraries.
SLOW = """
import signal, sys, threading
from vtp.runtime.commands.stopping import saying_so
said, number = threading.Event(), int(sys.argv[1])
def hear(*_): raise KeyboardInterrupt
signal.signal(number, hear)
try:
    with saying_so(said.set, patience=0.01):
        try:
            signal.raise_signal(number)
        finally:
            heard = said.wait(60)
except KeyboardInterrupt:
    print("said" if heard else "silent", signal.set_wakeup_fd(-1))
"""
QUICK = """
import signal, threading
from vtp.runtime.commands.stopping import saying_so
said, threads = [], threading.active_count()
try:
    with saying_so(lambda: said.append(1), patience=60):
        signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    with saying_so(lambda: said.append(1), patience=0):
        pass
    print(said, threading.active_count() - threads)
"""


def ran(script: str, *argv: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", script, *argv], capture_output=True, text=True, check=False, timeout=100
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_slow_end_is_said(number: int) -> None:
    assert ran(SLOW, str(int(number))) == ("said -1\n", "")


def test_a_quick_end_is_not_said() -> None:
    assert ran(QUICK) == ("[] 0\n", "")


def test_other_threads_and_other_listeners_are_let_be() -> None:
    here, there = os.pipe()
    os.set_blocking(there, False)
    signal.set_wakeup_fd(there)
    with saying_so(lambda: None):
        pass
    assert signal.set_wakeup_fd(-1) == there
    os.close(here), os.close(there)

    def work() -> None:
        with saying_so(lambda: None):
            done.append(threading.active_count())

    done: list[int] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done and signal.set_wakeup_fd(-1) == -1


def test_a_command_says_it_on_standard_error() -> None:
    script = (
        "import os, signal, time\n"
        "from vtp.runtime.commands import console\n"
        "def work():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
        "    finally:\n"
        "        time.sleep(2.5)\n"
        "raise SystemExit(console.run_command('vtp-x', work))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "vtp-x: note: stopping…\nvtp-x: error: interrupted; nothing was left behind\n"
