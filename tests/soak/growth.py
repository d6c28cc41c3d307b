"""What a process holds, and whether that grows."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from vtp.bench.common.resident import resident

SAMPLES = 50  # of a run
_ROOM_MB, _ROOM_SHARE = 16.0, 0.03  # what an allocator may keep for itself between two fifths of a run


@dataclass(frozen=True)
class Sample:
    """Resident memory in MB, open descriptors, threads."""

    resident: float
    descriptors: int
    threads: int


def look(number: int | None = None) -> Sample:
    """What this process holds now, without what only waits to be collected; or what another one holds."""
    gc.collect()
    process = Path("/proc/self" if number is None else f"/proc/{number}")
    descriptors = sum(1 for _ in (process / "fd").iterdir())
    threads = sum(1 for _ in (process / "task").iterdir())
    listing = number is None  # a descriptor of this process's own
    return Sample(resident(process / "status") / 2**20, descriptors - listing, threads)


def ask(
    kinds: Mapping[str, Callable[[], None]],
    seconds: float,
    least: int,
    chance: random.Random,
    look: Callable[[], Sample] = look,
) -> tuple[Counter[str], list[Sample]]:
    """Ask in random order for so long, and at least so often; what was asked, and samples all along."""
    done: Counter[str] = Counter()
    samples: list[Sample] = []
    began = time.monotonic()
    names = list(kinds)
    for number in count(1):
        kind = chance.choice(names)
        kinds[kind]()
        done[kind] += 1
        part = min(number / least, (time.monotonic() - began) / seconds if seconds else 1.0)
        if part * SAMPLES >= len(samples) + 1:
            samples.append(look())
        if part >= 1:
            break
    return done, samples


def course(samples: Sequence[Sample]) -> str:
    """What a run's last line says of its samples, from a fifth of the run on: growth that ends is seen to."""
    fifths = [samples[min(len(samples) * part // 5, len(samples) - 1)] for part in range(1, 6)]
    first, last = fifths[0], fifths[-1]
    return (
        f"resident {', '.join(f'{one.resident:.1f}' for one in fifths)} MB at each fifth, "
        f"descriptors {first.descriptors} to {last.descriptors}, threads {first.threads} to {last.threads}"
    )


def grown(samples: Sequence[Sample], pooled: int = 0) -> list[str]:
    """What grew from the second fifth of a run (the first is set-up) to its last; a line each.

    `pooled` are the threads that a pool may still make: it makes one only when all it has are at work, which
    a short run's second fifth need not have seen.
    """
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    if len(samples) < 5:
        return ["too short a run: fewer than five samples"]
    lines = []
    before, after = (statistics.median(one.resident for one in some) for some in (early, late))
    if after - before > max(_ROOM_MB, _ROOM_SHARE * before):
        lines.append(f"resident memory grew from {before:.1f} to {after:.1f} MB")
    counts: dict[str, Callable[[Sample], int]] = {
        "descriptors": lambda one: one.descriptors,
        "threads": lambda one: one.threads,
    }
    for name, counted in counts.items():
        most, last = max(map(counted, early)), min(map(counted, late))
        room = pooled if name == "threads" else 0
        if last > most + room:  # even the fewest of the end are more than the most of the beginning
            lines.append(f"{name} grew from {most} to {last}")
    return lines
