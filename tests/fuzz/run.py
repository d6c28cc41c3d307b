"""make fuzz: hostile cases in worker processes; a line per area, and a file for each kind of bad case found.

    python tests/fuzz/run.py --seconds 60 | --cases 10000 [--seed N] [--areas bundles,graphs] [--workers N]
    python tests/fuzz/run.py --replay tests/fuzz/cases

A case must end in an answer (the right one, where an oracle knows it) or in one line of VtpError. All else is
bad: any other exception, death by a signal, a hang, memory without a bound, a wrong answer, a message of
several lines or with control characters, anything printed, anything written elsewhere.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pool import Worker
from subject import ROOT, Subject, make

# Areas, and how often each has its turn.
AREAS = {
    "bundles": 4,
    "graphs": 3,
    **({"openvino": 1} if util.find_spec("openvino") else {}),
    "templates": 4,
    "tokenizers": 3,
    "pictures": 4,
    "prompts": 4,
    "options": 4,
    "questions": 4,
    "checkpoints": 1,
}
FOUND = ROOT / "build/fuzz/bad"


@dataclass
class Tally:
    """What an area's cases came to."""

    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def line(self, area: str) -> str:
        """One line for people."""
        total, told = sum(self.kinds.values()), [f"{self.kinds[one]:,} {one}" for one in KINDS]
        return f"{area:<12} {total:>6,} cases: {', '.join(told)} ({self.seconds:.0f} s)"


KINDS = ("answered", "refused", "bad")


@dataclass
class Bad:
    """One kind of bad outcome: where it was seen first, and how often."""

    area: str
    steps: Any
    why: str
    count: int = 1


class Session:
    """All that one run does and finds."""

    def __init__(self, cases: Iterator[dict[str, Any]], until: float, subject: Subject) -> None:
        self._cases, self._until, self._subject = cases, until, subject
        self._lock = threading.Lock()
        self.tallies: dict[str, Tally] = {}
        self.bad: dict[str, Bad] = {}

    def work(self) -> None:
        """Ask one worker until cases or time run out."""
        worker = Worker(self._subject)
        try:
            while (case := self._next()) is not None:
                started = time.monotonic()
                steps, verdict = worker.ask(case)
                if verdict["kind"] == "bad" and "file" not in case:
                    steps = shorter(worker, case["area"], steps, verdict["why"])
                self._note(case, steps, verdict, time.monotonic() - started)
        finally:
            worker.close()

    def _next(self) -> dict[str, Any] | None:
        with self._lock:
            return None if time.monotonic() > self._until else next(self._cases, None)

    def _note(self, case: dict[str, Any], steps: Any, verdict: dict[str, str], seconds: float) -> None:
        with self._lock:
            tally = self.tallies.setdefault(case["area"], Tally())
            tally.kinds[verdict["kind"]] += 1
            tally.seconds += seconds
            if verdict["kind"] == "bad":
                key = f"{case['area']} {kind_of(verdict['why'])}"
                if key in self.bad:
                    self.bad[key].count += 1
                else:
                    self.bad[key] = Bad(case["area"], steps, verdict["why"])


def kind_of(why: str) -> str:
    """What makes two bad outcomes the same: the exception and its place, or the first words."""
    return re.sub(r"\d+", "0", why.split(": ")[0]) if ".py" not in why else why.split(": ")[0]


def shorter(worker: Worker, area: str, steps: Any, why: str) -> Any:
    """The steps without those that the outcome does not need."""
    place = 0
    while isinstance(steps, list) and len(steps) > 1 and place < len(steps):
        fewer = steps[:place] + steps[place + 1 :]
        _, verdict = worker.ask({"area": area, "steps": fewer})
        if verdict["kind"] == "bad" and kind_of(verdict["why"]) == kind_of(why):
            steps = fewer
        else:
            place += 1
    return steps


def draw_cases(seed: int, areas: list[str], count: int | None) -> Iterator[dict[str, Any]]:
    """Cases by their seeds, the areas in turn."""
    turn = [area for area in areas for _ in range(AREAS[area])]
    turn = [turn[place * 7 % len(turn)] for place in range(len(turn))] if len(turn) % 7 else turn
    numbers = itertools.count() if count is None else range(count)
    for number in numbers:
        yield {"area": turn[number % len(turn)], "seed": f"{seed}/{number}"}


def kept_cases(source: Path) -> Iterator[dict[str, Any]]:
    """Cases that were kept as files."""
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    for path in files:
        kept = json.loads(path.read_text(encoding="utf-8"))
        yield {"area": kept["area"], "steps": kept["steps"], "file": path.name}


def report(session: Session) -> int:
    """Print a line per area and one per kind of bad case, which is kept; the exit code."""
    for area in AREAS:
        if area in session.tallies:
            print(session.tallies[area].line(area))
    FOUND.mkdir(parents=True, exist_ok=True)
    for number, bad in enumerate(session.bad.values()):
        path = FOUND / f"{bad.area}-{number}.json"
        path.write_text(json.dumps({"area": bad.area, "why": bad.why, "steps": bad.steps}, indent=1) + "\n")
        print(f"BAD {bad.area} x{bad.count}: {bad.why[:300]!s} [{path.relative_to(ROOT)}]")
    return 1 if session.bad else 0


def main() -> int:
    """Run what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--seconds", type=float)
    add("--cases", type=int)
    add("--seed", type=int, default=0)
    add("--areas", default=",".join(AREAS))
    add("--workers", type=int, default=2)
    add("--replay", type=Path)
    add("--subject", help="JSON of folders that are there already (default: made in build/fuzz/subject)")
    args = parser.parse_args()
    subject = Subject(**json.loads(args.subject)) if args.subject else make(ROOT / "build/fuzz/subject")
    if args.replay:
        cases = kept_cases(args.replay)
    else:
        count = args.cases if args.cases or args.seconds else 2000
        cases = draw_cases(args.seed, args.areas.split(","), count)
    session = Session(cases, time.monotonic() + (args.seconds or float("inf")), subject)
    threads = [threading.Thread(target=session.work) for _ in range(args.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return report(session)


if __name__ == "__main__":
    sys.exit(main())
