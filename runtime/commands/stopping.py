"""Says "stopping…" where an interrupted command takes longer than a moment to end.

Python acts on a signal between two of its own steps, and a library's call (a large graph that is run, or
opened) may take seconds: without a word it looks as if Ctrl-C were not heard.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["ended_by_ctrl_c", "saying_so"]

_PATIENCE = 1.0  # seconds
_ASKED = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C interrupt the body, also where it is ignored: a shell has what it puts into the background
    ignore it, and that is how launchers end nodes. In the main thread only."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def saying_so(say: Callable[[], None], patience: float = _PATIENCE) -> Iterator[None]:
    """Call `say`, in a thread of its own, if the body goes on for `patience` seconds after a signal to end.

    Nothing happens in other threads than the main one, nor where somebody else watches signals already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    here, there = socket.socketpair()
    there.setblocking(False)  # a full pipe loses a byte, and not a signal
    owner = os.getpid()
    before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(here, over, say, patience), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        _give_back(there.fileno())
        there.close()  # the watcher reads the end
        if os.getpid() == owner:  # a forked child has no such thread
            watcher.join()
        here.close()


def _watch(signals: socket.socket, over: threading.Event, say: Callable[[], None], patience: float) -> None:
    while numbers := signals.recv(64):
        if _ASKED & set(numbers):
            if not over.wait(patience):
                say()
            return


def _give_back(descriptor: int) -> None:
    """Stop listening, unless somebody (an event loop) has taken the place since."""
    now = signal.set_wakeup_fd(-1)
    if now not in (-1, descriptor):
        signal.set_wakeup_fd(now)
