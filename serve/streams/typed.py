"""New prompts that are typed, or written into standard input, while a watch runs."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress

from vtp.engines import VtpError
from vtp.serve.streams.watcher import Watcher

_LONGEST = 2**16  # bytes of one line
_LOOK = 0.2  # seconds between two looks at whether the watch is over


def is_typed(descriptor: int = 0) -> bool:
    """Whether somebody may type there: a terminal, in whose foreground this process is (or reading would
    stop it)."""
    with suppress(OSError):
        return os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp()
    return False


class TypedPrompts:
    """Reads lines in a thread of its own, each the prompt from the next frame on; empty lines are left out.

    tell  called with a line for a prompt that is refused, or taken
    """

    def __init__(self, watcher: Watcher, tell: Callable[[str], None], descriptor: int = 0) -> None:
        self._watcher, self._tell, self._descriptor = watcher, tell, descriptor
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vtp-prompts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End reading."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        held = b""
        with suppress(OSError, ValueError):  # closed by somebody
            while not self._over.is_set():
                if not select.select([self._descriptor], [], [], _LOOK)[0]:
                    continue
                read = os.read(self._descriptor, _LONGEST)
                *lines, held = (held + read).split(b"\n")
                for line in lines if read else [held]:  # the last one may lack its end
                    self._take(line)
                if not read:
                    return
                held = held[: _LONGEST + 1]  # enough to see that it is too long

    def _take(self, line: bytes) -> None:
        if len(line) > _LONGEST:
            self._tell(f"the question stays as it is: a line of more than {_LONGEST} bytes is left out")
            return
        if not (text := line.decode("utf-8", "replace").strip()):
            return
        try:
            self._watcher.prompt = text
        except VtpError as error:
            self._tell(f"the question stays as it is: {error}")
        else:
            self._tell(f"the question is now: {text}")
