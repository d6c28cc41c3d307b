"""A build in a process of its own: its memory and its crashes are not the caller's.

Run as a module, this file is that child: a job as JSON on standard input, progress as JSON lines on standard
output, the result or the error as the last of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtp.engines.child import python_command
from vtp.engines.disk.whole import whole_file
from vtp.engines.errors import VtpError
from vtp.engines.tensorrt.library import BuildOptions, Step, build_engine


def run_build(job: Mapping[str, Any], step: Step) -> dict[str, Any]:
    """Run a build in a process of its own; its result, or VtpError for however it ended."""
    name = Path(job["path"]).name
    # What TensorRT itself prints goes aside: the last of it is the reason when nothing else tells one.
    with tempfile.TemporaryFile() as aside:
        child = subprocess.Popen(
            python_command("vtp.engines.tensorrt.build_process"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=aside,
            text=True,
        )
        try:
            answer = _follow(child, job, step)
        finally:
            child.kill()  # an interrupt leaves no build behind; a child that ended does not mind
            code = child.wait()
        if "bytes" in answer:
            return answer
        if "error" in answer:
            raise VtpError(answer["error"])
        aside.seek(0)
        said = " ".join(aside.read()[-300:].decode(errors="replace").split())
    raise VtpError(_crash_message(name, code, said))


def _follow(child: Any, job: Mapping[str, Any], step: Step) -> dict[str, Any]:
    """Hand the job over, report progress, return the last word ({} when there was none)."""
    with contextlib.suppress(BrokenPipeError), child.stdin:
        json.dump(job, child.stdin)
    answer: dict[str, Any] = {}
    for line in child.stdout:
        word = _word(line)
        if "phase" in word:
            step(word["phase"], word["done"], word["total"])
        elif word:
            answer = word
    child.wait()
    return answer


def _word(line: str) -> dict[str, Any]:
    """What a line of the child says; {} for what a library prints."""
    try:
        return json.loads(line) if line.startswith("{") else {}
    except ValueError:
        return {}


def _crash_message(name: str, code: int, said: str) -> str:
    if code == -signal.SIGKILL:
        return (
            f"building {name} was killed: most likely the machine ran out of memory; "
            "free memory or add swap, then run the same command again"
        )
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"building {name} ended without an engine ({how}){': ' + said if said else ''}"


class _Reporter:
    """Progress as JSON lines: every new phase, and at most ten lines a second within one."""

    def __init__(self) -> None:
        self._said = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0 or now - self._said > 0.1:
            self._said = now
            _say({"phase": phase, "done": done, "total": total})


def _say(data: Mapping[str, Any]) -> None:
    print(json.dumps(data), flush=True)


def _child() -> None:
    """The build process: read the job, build, write the engine and the timing cache, say how it went."""
    job = json.load(sys.stdin)
    timing = Path(job["timing_cache"])
    known = timing.read_bytes() if timing.is_file() else b""
    try:
        options = BuildOptions(**job["options"])
        built = build_engine(job["path"], job["engine"], job["profile"], options, known, _Reporter())
    except VtpError as error:
        _say({"error": str(error)})
        raise SystemExit(error.exit_code) from None
    Path(job["output"]).write_bytes(built.plan)
    if built.timing_cache:
        with whole_file(timing) as fresh:
            fresh.write_bytes(built.timing_cache)
    _say({"bytes": built.plan.nbytes, "sha256": hashlib.sha256(built.plan).hexdigest()})


if __name__ == "__main__":
    _child()
