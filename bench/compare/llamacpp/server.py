"""A llama-server in a process of its own: opened once, asked over HTTP, ended."""

from __future__ import annotations

import ctypes
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vtp.bench.compare.llamacpp.built import binary
from vtp.engines import VtpError

HOST = "127.0.0.1"
_OPENING_S, _ANSWER_S = 600.0, 900.0
_PR_SET_PDEATHSIG = 1  # of prctl(2)


class LlamaServer:
    """A server on a model's two files; a context manager.

    `more` are flags beside the model's, the address and the threads.
    """

    def __init__(
        self, text: Path, vision: Path, threads: int, log: Path, slots: int = 1, more: Sequence[str] = ()
    ) -> None:
        """Start it and wait until it answers. VtpError if it does not."""
        self.port, self.log = _free_port(), log
        command = [str(binary("llama-server")), "--model", str(text), "--mmproj", str(vision)]
        command += ["--host", HOST, "--port", str(self.port), "--threads", str(threads)]
        command += ["--parallel", str(slots), "--cache-ram", "0", "--verbosity", "4", *more]
        with log.open("w") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=_end_with_parent
            )
        self.pid = self._process.pid
        self._wait()
        self.marker = str(self.ask("/props").get("media_marker", "<__media__>"))

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON answer to GET `path`, or to POST with `body`. VtpError if it refuses or has ended."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_ANSWER_S)
        try:
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
        except OSError as error:
            raise VtpError(f"llama-server did not answer {path}: {error}; see {self.log}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise VtpError(
                f"llama-server refused {path} with {answer.status}: {said[:200].decode(errors='replace')}"
            )
        return json.loads(said)

    def logged(self, start: int = 0) -> str:
        """What its log holds from byte `start` on."""
        with self.log.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self) -> None:
        end = time.monotonic() + _OPENING_S
        while not self._is_ready():
            if self._process.poll() is not None:
                raise VtpError(f"llama-server left with {self._process.returncode}; see {self.log}")
            if time.monotonic() > end:
                self.close()
                raise VtpError(f"llama-server was not ready after {_OPENING_S:g} s; see {self.log}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return bool(self.ask("/health").get("status") == "ok")
        except VtpError:
            return False


def _end_with_parent() -> None:
    """In the child: end when the parent does, however that ends (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return int(one.getsockname()[1])
