"""Workers seen from outside: asked a case at a time, restarted when they die, killed when they hang."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from subject import Subject

HANG = 120.0  # seconds of waiting; processor time is the worker's own limit


class Worker:
    """One worker process."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def ask(self, case: dict[str, Any]) -> tuple[Any, dict[str, str]]:
        """A case's steps and its verdict."""
        process = self._started()
        assert process.stdin is not None
        steps: Any = case.get("steps")
        try:
            process.stdin.write(json.dumps(case).encode() + b"\n")
            process.stdin.flush()
            steps = self._line()["steps"]
            verdict = self._line()
            if verdict.pop("spoilt", ""):  # what was written outside would be seen again
                self.close()
            return steps, verdict
        except TimeoutError:
            self.close()
            return steps, {"kind": "bad", "why": f"no answer in {HANG:.0f} s"}
        except (OSError, EOFError):
            return steps, {"kind": "bad", "why": self._crash_message()}

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._rest = b""
            command = [sys.executable, str(Path(__file__).with_name("worker.py")), self._subject.to_json()]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            )
        return self._process

    def _line(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        until, stream = time.monotonic() + HANG, self._process.stdout
        while b"\n" not in self._rest:
            if not select.select([stream], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            piece = os.read(stream.fileno(), 1 << 16)
            if not piece:
                raise EOFError
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def _crash_message(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(HANG)
        except subprocess.TimeoutExpired:
            code = 0
        self.close()
        if code == -signal.SIGXCPU:
            return "took too much processor time"
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"left with code {code}"
