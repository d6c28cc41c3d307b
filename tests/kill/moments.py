"""One moment: a writer is ended or its disk is full, and then everything that must hold is looked at."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vtp.engines import VtpError

from . import borders
from .works import Work

DONE, REFUSED, BROKEN = 0, 7, 9
_LIMIT_S = 60.0


@dataclass
class Tally:
    """What was done and what was wrong."""

    moments: dict[str, int] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def count(self, kind: str) -> None:
        """One more moment."""
        self.moments[kind] = self.moments.get(kind, 0) + 1


def in_child(work: Callable[[], None], killed_after: float | None = None) -> int:
    """Run `work` in a forked process; its exit code, negative for a signal. A fork takes a millisecond."""
    child = os.fork()
    if child == 0:
        code = BROKEN
        try:
            work()
            code = DONE
        except VtpError as error:
            code = BROKEN if "\n" in str(error) else REFUSED
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def borders_of(work: Work, room: bool = False) -> int:
    """How many borders one writing has."""
    work.prepare()
    reading, writing = os.pipe()

    def counted() -> None:
        os.write(writing, str(borders.count(work.write, room)).encode())

    code = in_child(counted)
    os.close(writing)
    found = int(os.read(reading, 100) or b"0")
    os.close(reading)
    if code != DONE or not found:
        raise SystemExit(f"{type(work).__name__} does not even work undisturbed (exit code {code})")
    return found


def placed_kill(work: Work, name: str, number: int, tally: Tally) -> None:
    """Killed before its call `number`."""
    work.prepare()
    code = in_child(lambda: borders.kill_at(work.write, number))
    look(work, f"{name}, killed before call {number}", code, {-signal.SIGKILL, DONE}, tally)
    tally.count("placed kills")


def random_kill(work: Work, name: str, chance: random.Random, tally: Tally) -> None:
    """Killed at any time while another writer writes the same and is left alone."""
    work.prepare()
    began = time.perf_counter()
    after = chance.random() * 0.05
    code = in_child(work.write, after)
    said = f"{name}, killed after {1e3 * (time.perf_counter() - began):.1f} ms"
    look(work, said, code, {-signal.SIGKILL, DONE}, tally)
    tally.count("random kills")


def full_disk(work: Work, name: str, number: int, tally: Tally) -> None:
    """No more room at its call `number`: one line, and nothing is left at once, without a next run."""
    work.prepare()
    before = work.left() if work.place.exists() else []
    code = in_child(lambda: borders.fill_at(work.write, number))
    if work.left() != before:
        tally.bad.append(f"{name}, disk full at call {number}: left {work.left()}")
    look(work, f"{name}, disk full at call {number}", code, {REFUSED, DONE}, tally)
    tally.count("full disks")


def look(work: Work, said: str, code: int, allowed: set[int], tally: Tally) -> None:
    """What is there opens whole; the next run ends, and leaves nothing but its target."""
    if code not in allowed:
        tally.bad.append(f"{said}: it ended with {code}")
    _check(work, said, tally)
    work.prepare()
    if (code := in_child(work.write)) != DONE:
        tally.bad.append(f"{said}: the next run ended with {code}")
    _check(work, f"{said}, after the next run", tally)
    if work.left():
        tally.bad.append(f"{said}: after the next run there still is {work.left()}")


def _check(work: Work, said: str, tally: Tally) -> None:
    try:
        problem = work.bad()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        tally.bad.append(f"{said}: {problem}")
