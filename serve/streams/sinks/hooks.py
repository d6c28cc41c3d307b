"""What happens on an alert: a command of the user's is run, a URL is told. Never in the watch's own threads.

No value of a frame becomes a part of a command line: the command gets the alert as JSON on its standard
input, and its main values in environment variables.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from vtp.engines import UsageError
from vtp.engines.errors import shown
from vtp.serve.streams.sources.names import source_name

SECONDS = 30.0  # that a command, or a webhook, may take
_WAITING = 16  # alerts that wait for a hook that is busy
_LONGEST_VALUE = 4096  # characters of an environment variable; the system refuses very long ones
_ENDING = 5.0  # seconds that hooks have at the end of a watch
_LAST = 1.0  # seconds that a hook has after it was ended
_SENT = re.compile("[!-~]+")  # what an HTTP request can name

Alerted = Mapping[str, Any]  # an alert as JSON values: see docs/robots.md


class Action(Protocol):
    """What a hook does."""

    def __call__(self, alerted: Alerted) -> None:
        """Do it. Raises OSError, with a reason, if it fails."""
        ...

    def end(self) -> None:
        """End what is being done, from another thread."""
        ...


class Hook:
    """Runs `act` for every alert, one after the other, in a thread of its own.

    name  how messages call it
    tell  called with a line when it fails: once, until it works again
    """

    def __init__(self, name: str, act: Action, tell: Callable[[str], None]) -> None:
        self._name, self._act, self._tell = name, act, tell
        self._waiting: queue.Queue[Alerted | None] = queue.Queue(_WAITING)
        self._failing = self._over = False
        self._gone = threading.Event()  # a join that Ctrl-C ends takes a thread for over that runs on
        threading.Thread(target=self._run, name="vtp-hook", daemon=True).start()

    def put(self, alerted: Alerted) -> None:
        """Hand an alert over; never waits. Where too many wait, it is told and left out."""
        try:
            self._waiting.put_nowait(alerted)
        except queue.Full:
            self._fails(f"{_WAITING} alerts wait for it already; this one is left out")

    @property
    def busy(self) -> bool:
        """Whether alerts wait for it, or are worked on."""
        return self._waiting.unfinished_tasks > 0

    def close(self, seconds: float = _ENDING) -> None:
        """Let what waits be done, for so many seconds at most; then end it, also if Ctrl-C ends the wait."""
        end = time.monotonic() + seconds
        try:
            with suppress(queue.Full):
                self._waiting.put(None, timeout=seconds)
            self._gone.wait(max(0.0, end - time.monotonic()))
        finally:
            self._over = True
            if not self._gone.is_set():
                self._tell(f"{self._name} is not done, and is ended; {self._lost()}")
                self._act.end()
                self._gone.wait(_LAST)

    def _lost(self) -> str:
        """How many alerts wait in vain; the mark of the end is none of them."""
        waiting = sum(one is not None for one in list(self._waiting.queue))
        return f"{waiting} more alerts are left out" if waiting else "no other alert waits"

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._gone.set()

    def _work(self) -> None:
        while (alerted := self._waiting.get()) is not None and not self._over:
            try:
                self._act(alerted)
            except Exception as error:  # of no memory or no thread, too; the next alert may be told
                self._fails(str(error) or type(error).__name__)
            else:
                self._failing = False
            self._waiting.task_done()

    def _fails(self, why: str) -> None:
        if not self._failing and not self._over:
            self._tell(f"{self._name} failed: {shown(why)}")
        self._failing = True


class Command:
    """A command line of the user's, without a shell."""

    def __init__(self, line: str, seconds: float = SECONDS) -> None:
        """Read the line. Raises UsageError for one that cannot be run."""
        try:
            self._words = shlex.split(line)
        except ValueError as error:
            raise UsageError(f"--on-alert '{shown(line, 60)}' cannot be read: {error}") from None
        if not self._words or shutil.which(self._words[0]) is None:
            raise UsageError(
                f"--on-alert '{shown(line, 60)}' names no program that can be run; give one, or a line for a "
                "shell as: sh -c '...'"
            )
        self._seconds, self._ended = seconds, False
        self._running: subprocess.Popen[str] | None = None

    def __call__(self, alerted: Alerted) -> None:
        """Run it, and end it and its children if it takes too long. Raises OSError."""
        self._running = started = subprocess.Popen(
            self._words,
            stdin=subprocess.PIPE,
            stdout=2,  # standard output is for answers
            env={**os.environ, **_environment(alerted)},
            start_new_session=True,
            text=True,
        )
        if self._ended:  # meanwhile
            _end_group(started)
        try:
            with suppress(BrokenPipeError):  # it does not read its input
                started.communicate(json.dumps(alerted), self._seconds)
            code = started.wait(self._seconds)
        except subprocess.TimeoutExpired:
            raise OSError(f"it ran for more than {self._seconds:g} s and was ended") from None
        finally:
            _end_group(started)
        if code:
            raise OSError(f"it left with {code}")

    def end(self) -> None:
        """End the command that runs, and its children; one that starts now as well."""
        self._ended = True
        if self._running is not None:
            _end_group(self._running)


class Webhook:
    """A URL that gets every alert as a POST of JSON."""

    def __init__(self, url: str, seconds: float = SECONDS) -> None:
        """Raises UsageError for anything but an http or https URL."""
        parts = _split(url)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--webhook '{source_name(url)}' is not an http:// or https:// URL")
        user, _, host = parts.netloc.rpartition("@")
        self._url, self._seconds = parts._replace(netloc=host, fragment="").geturl(), seconds
        if not _SENT.fullmatch(self._url):
            raise UsageError(
                f"--webhook '{source_name(url)}' has characters that no URL has; write them as %20 and "
                "the like"
            )
        self._open = urllib.request.build_opener(_NoRedirect).open
        self._headers = {"Content-Type": "application/json"}
        if user:
            told = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
            self._headers["Authorization"] = f"Basic {told}"

    def __call__(self, alerted: Alerted) -> None:
        """Send it. Raises OSError."""
        body = json.dumps(alerted).encode()
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        try:
            self._open(request, timeout=self._seconds).close()
        except urllib.error.HTTPError as error:
            raise OSError(f"{source_name(self._url)} answered {error.code}") from None
        except Exception as error:  # of a URL that Python cannot read, too; its text may hold the URL
            why = getattr(error, "reason", None)
            why = why.strerror if isinstance(why, OSError) else why
            raise OSError(f"{source_name(self._url)}: {why or type(error).__name__}") from None

    def end(self) -> None:
        """Nothing: what is being sent ends with the process."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """To be told another address is a failure: Python would ask there with GET, the password and no alert."""

    def redirect_request(self, *request: Any) -> None:
        """Follow nothing."""


def _split(url: str) -> urllib.parse.SplitResult | None:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts if parts.port is None or parts.port else None
    except ValueError:  # such as http://[::1, or a port of 99999
        return None


def _environment(alerted: Alerted) -> dict[str, str]:
    """The alert's main values: VTP_ALERT, VTP_EVENT, VTP_PROBABILITY, VTP_FRAME, VTP_STAMP_NS, VTP_SOURCE."""
    named = {
        "VTP_ALERT": alerted["question"],
        "VTP_EVENT": alerted["event"],
        "VTP_PROBABILITY": alerted["probability"],
        "VTP_FRAME": alerted["frame"]["number"],
        "VTP_STAMP_NS": alerted["frame"]["stamp_ns"],
        "VTP_SOURCE": alerted["source"],
    }
    return {name: str(value).replace("\0", "")[:_LONGEST_VALUE] for name, value in named.items()}


def _end_group(started: subprocess.Popen[str]) -> None:
    """End what a command left running, itself included."""
    with suppress(OSError):
        os.killpg(started.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        started.wait(1.0)
