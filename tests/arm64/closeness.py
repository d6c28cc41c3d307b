"""How close a pruner's choice was, where two machines kept different tokens.

    python -m tests.arm64.closeness JOBS.json        (on the machine with the first answers)

The inputs of the pruner's graph are moved at random, ever farther, until its choice turns on this machine
alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines import open_graph
from vtp.runtime.bundle.folder import open_bundle

from .asking import ENGINE, Job, choice_file, read

Feeds = dict[str, np.ndarray]
Choose = Callable[[Feeds], np.ndarray]
STEPS = [10 ** (power / 2) for power in range(-14, -1)]  # 1e-7 to 0.1, two a decade
DRAWS = 4


def main() -> int:
    """Write {question: closeness} beside the answers of every job whose other machine kept other tokens."""
    for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        job = Job(**one)
        found, wanted = read(job.file), read(job.wanted)
        if "answers" not in found or "answers" not in wanted:
            continue
        pairs = enumerate(zip(found["answers"], wanted["answers"], strict=True))
        told = {at: closeness(job, at) for at, (mine, other) in pairs if mine["kept"] != other["kept"]}
        Path(closeness_file(job.file)).write_text(json.dumps(told), encoding="utf-8")
    return 0


def closeness_file(file: str) -> str:
    """Where the closeness of a job's differing questions lies."""
    return str(Path(file).with_suffix(".close"))


def closeness(job: Job, at: int) -> dict[str, Any]:
    """Of the first pruner that chose otherwise; if the walk shows none, of the closest.

    file     its graph
    moved    how far its inputs there are from those here: the largest of all rows, relative to the row
    turned   the least such movement, at random, by which its choice turns here; None if none up to 0.1 does
    same     whether it chooses the same here, given the numbers from there
    """
    assert job.wanted is not None
    judged = []
    for here, there in zip(stages(job.wanted, at), stages(job.file, at), strict=True):
        file = str(here.pop("graph"))
        there.pop("graph")
        mine, other = here.pop("out"), there.pop("out")
        here, there = (
            {name.removeprefix("in "): array for name, array in one.items()} for one in (here, there)
        )
        with closing(open_graph(open_bundle(job.folder).path(file), ENGINE)) as engine:

            def choose(feeds: Feeds, engine: Any = engine) -> np.ndarray:
                given = {name: engine.put(array) for name, array in feeds.items()}
                return engine.run(given)["keep_indices"].numpy()  # type: ignore[no-any-return]

            told = {"file": file, "moved": movement(there, here), "turned": turning_point(choose, here)}
            judged.append({**told, "same": bool(np.array_equal(choose(there), other))})
        if not np.array_equal(mine, other):
            return judged[-1]
    return min(judged, key=lambda one: one["turned"] or np.inf)


def stages(file: str, at: int) -> Iterator[Feeds]:
    """What `save_choices` wrote of a question, stage by stage."""
    number = 0
    while (path := choice_file(file, at, number)).is_file():
        with np.load(path) as arrays:
            yield dict(arrays)
        number += 1


def movement(there: Feeds, here: Feeds) -> float:
    """The largest length of a row's difference, as a share of the row's length, of all float inputs."""
    most = [0.0]
    for name, array in here.items():
        if array.dtype.kind == "f":
            mine, other = (one.astype(np.float64).reshape(-1, one.shape[-1]) for one in (array, there[name]))
            lengths = np.linalg.norm(mine, axis=1)
            rows = np.linalg.norm(mine - other, axis=1)[lengths > 0] / lengths[lengths > 0]
            most.append(float(rows.max(initial=0.0)))
    return max(most)


def turning_point(choose: Choose, feeds: Feeds) -> float | None:
    """The least of STEPS by which inputs, moved at random, turn a choice; None if none does."""
    rng, chosen = np.random.default_rng(5), choose(feeds)
    for step in STEPS:
        if any(not np.array_equal(choose(moved(feeds, step, rng)), chosen) for _ in range(DRAWS)):
            return step
    return None


def moved(feeds: Feeds, step: float, rng: np.random.Generator) -> Feeds:
    """Every row of the float inputs moved in a random direction by `step` of its length."""
    return {
        name: _moved(array, step, rng) if array.dtype.kind == "f" else array for name, array in feeds.items()
    }


def _moved(array: np.ndarray, step: float, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(array.shape)
    noise /= np.linalg.norm(noise, axis=-1, keepdims=True)
    away = array + step * np.linalg.norm(array.astype(np.float64), axis=-1, keepdims=True) * noise
    return away.astype(array.dtype)


if __name__ == "__main__":
    sys.exit(main())
