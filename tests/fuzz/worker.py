"""A worker: cases in as JSON lines, verdicts out, under limits of memory and processor time.

Before a case runs its steps are written, so that a crash can be told; a crash is the parent's to see.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from subject import ROOT, Subject, Wrong

MEMORY = 2 << 30  # bytes of address space that a case may take
SECONDS = 20  # of processor time


def main() -> None:
    """Answer cases until standard input ends."""
    subject = Subject(**json.loads(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # gigabytes of it would be written
    answers = os.fdopen(os.dup(1), "w")
    noise = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
    for number in (1, 2):
        os.dup2(noise.fileno(), number)
    with tempfile.TemporaryDirectory(prefix="vtp-fuzz-") as name:
        room = Room(Path(name))
        areas: dict[str, Any] = {}
        for line in sys.stdin:
            asked = json.loads(line)
            steps, verdict = asked.get("steps"), {"kind": "bad", "why": ""}
            try:
                if asked["area"] not in areas:
                    module = importlib.import_module(f"areas.{asked['area']}")
                    areas[asked["area"]] = module.Area(subject, room.scratch)
                area = areas[asked["area"]]
                steps = steps or area.draw(random.Random(asked["seed"]))
            except Exception as error:  # the good subject itself is refused
                verdict["why"] = f"start of {asked['area']}: {type(error).__name__} {error} {_where(error)}"
            print(json.dumps({"steps": steps}), file=answers, flush=True)
            if not verdict["why"]:
                verdict = judge(area, steps, room, noise)
            print(json.dumps(verdict), file=answers, flush=True)


class Room:
    """Folders of a worker: one to work in, and others in which nothing may change."""

    def __init__(self, root: Path) -> None:
        self.scratch, self.outside, self.here = (root / one for one in ("scratch", "outside", "here"))
        for folder in (self.scratch, self.outside, self.here):
            folder.mkdir()
        (self.outside / "secret").write_text("not to be read or written")
        os.chdir(self.here)
        self._before = self._look()

    def _look(self) -> list[tuple[str, int, int]]:
        found = [path for folder in (self.outside, self.here) for path in folder.iterdir()]
        found += self.scratch.parent.iterdir()
        return sorted((str(path), path.lstat().st_size, path.lstat().st_mode) for path in found)

    def changed(self) -> bool:
        """Whether something was written outside the scratch folder."""
        now = [entry for entry in self._look() if entry[0] != str(self.scratch)]
        return now != [entry for entry in self._before if entry[0] != str(self.scratch)]


def judge(area: Any, steps: Any, room: Room, noise: Any) -> dict[str, str]:
    """The verdict about one case: "answered", "refused" or "bad", and why."""
    noise.seek(0)
    noise.truncate()
    _limit()
    verdict = _run(area, steps)
    if room.changed():
        verdict = {"kind": "bad", "why": "wrote outside its folder", "spoilt": "yes"}
    elif verdict["kind"] != "bad":
        noise.seek(0)
        text = noise.read(400).decode(errors="replace")
        if text:
            verdict = {"kind": "bad", "why": f"noise: {text!r}"}
    return verdict


def _limit() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


def _run(area: Any, steps: Any) -> dict[str, str]:
    from vtp.engines import VtpError

    try:
        area.run(steps)
    except VtpError as error:
        return bad_line(str(error)) or {"kind": "refused", "why": str(error)}
    except Wrong as error:
        return {"kind": "bad", "why": f"wrong: {error}"[:500]}
    except BaseException as error:
        return {"kind": "bad", "why": f"{type(error).__name__} {_where(error)}: {str(error)[:200]!r}"}
    return {"kind": "answered", "why": ""}


def bad_line(text: str) -> dict[str, str] | None:
    """A verdict about a message that is not one bounded line without control characters."""
    from vtp.engines.errors import MESSAGE_LENGTH, UNSAFE

    if not text.strip() or UNSAFE.search(text) or len(text) > MESSAGE_LENGTH:
        return {"kind": "bad", "why": f"message of {len(text)} characters: {text[:300]!r}"}
    return None


def _where(error: BaseException) -> str:
    """The innermost line of this project's own code."""
    own = [
        f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(ROOT) and ".venv" not in frame.filename
    ]
    return own[-1] if own else "?"


if __name__ == "__main__":
    main()
