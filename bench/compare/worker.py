"""A peer in a process of its own, driven line by line over pipes.

    python -m vtp.bench.compare.worker NAME prepare|serve SPEC.json

`prepare` makes what the peer opens, and leaves. `serve` opens it, says so in one JSON line, then answers
every line it is sent ("run" or "logits FILE.npy") with another. What libraries print goes to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from vtp.bench.compare.peer import Peer, Spec, peer_class
from vtp.engines import VtpError
from vtp.engines.child import python_command

LIMIT_S = 900  # of one answer, or of opening: a peer that hangs is ended, and said to


class Worker:
    """The other end: starts a peer's process, asks it, ends it. A context manager."""

    def __init__(self, name: str, spec: Spec, log: Path) -> None:
        """Start the process and wait until it has opened everything. VtpError when it cannot."""
        self.name = name
        self._log = log
        self._folder = tempfile.TemporaryDirectory()
        self._process = _start(name, "serve", spec, Path(self._folder.name), log, subprocess.PIPE)
        self.pid: int = self._read()["pid"]

    def run(self) -> dict[str, Any]:
        """One answer: tokens, ttft, tpot and parts in milliseconds."""
        return self._ask("run")

    def logits(self) -> np.ndarray:
        """Logits float32 [V] of the last prompt position."""
        file = Path(self._folder.name) / "logits.npy"
        self._ask(f"logits {file}")
        return np.load(file)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None  # a pipe
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; reading says how
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # a pipe
        late = threading.Timer(LIMIT_S, self._process.kill)
        late.start()
        try:
            line = self._process.stdout.readline()
            in_time = late.is_alive()
        finally:
            late.cancel()  # an interrupt does not wait for it
        if not line:
            how = _how(self._process.wait()) if in_time else f"took longer than {LIMIT_S} s"
            self.close()
            raise VtpError(f"peer {self.name} {how}; see {self._log}")
        answer = json.loads(line)
        if "error" in answer:
            self.close()
            raise VtpError(f"peer {self.name}: {answer['error']}; see {self._log}")
        return answer


def prepare(name: str, spec: Spec, log: Path) -> None:
    """Make what a peer opens, unless it is there. VtpError when that fails."""
    made = peer_class(name)(spec).made()
    if made is None or made.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        child = _start(name, "prepare", spec, Path(folder), log, subprocess.DEVNULL)
        try:
            code = child.wait()
        finally:
            child.kill()  # an interrupt leaves no child behind; one that ended does not mind
            child.wait()
    if code:
        raise VtpError(f"peer {name} could not be prepared: its process {_how(code)}; see {log}")


def _start(name: str, what: str, spec: Spec, folder: Path, log: Path, out: int) -> subprocess.Popen[str]:
    told = folder / "spec.json"
    told.write_text(json.dumps(dataclasses.asdict(spec)))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as errors:
        return subprocess.Popen(
            python_command("vtp.bench.compare.worker", name, what, str(told)),
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(spec.threads)},
        )


def _how(code: int) -> str:
    return f"was killed by signal {-code} (out of memory?)" if code < 0 else f"left with {code}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the peer's process."""
    name, what, told = sys.argv[1:] if arguments is None else arguments
    peer = peer_class(name)(Spec(**json.loads(Path(told).read_text())))
    if what == "prepare":
        peer.prepare()
        return 0
    # Standard output is for answers alone, whatever a library writes to file 1.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return _serve(peer, answers)


def _serve(peer: Peer, answers: TextIO) -> int:
    try:
        peer.open()
        _say(answers, {"ready": True, "pid": peer.pid})
        for line in sys.stdin:
            _say(answers, _answer(peer, line.strip()))
    except Exception as error:  # told to the other end, whatever it is
        traceback.print_exc()
        _say(answers, {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        return 1
    finally:
        peer.close()
    return 0


def _answer(peer: Peer, line: str) -> dict[str, Any]:
    command, _, rest = line.partition(" ")
    if command == "logits":
        np.save(rest, peer.first_logits())
        return {"logits": rest}
    run = peer.run()
    return {"tokens": run.tokens, "ttft": run.ttft, "tpot": run.tpot, "parts": dict(run.parts)}


def _say(answers: TextIO, data: dict[str, Any]) -> None:
    answers.write(json.dumps(data) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
