"""make kill: writers ended at every border and at any time, full disks, readers and writers at once.

    python -m tests.kill [--kills N] [--bundles A B] [--exports N] [--seed N]

After every moment what is there opens whole, old or new; answers are its own; the next run leaves nothing.
One summary line; exit code 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vtp.engines import VtpError
from vtp.engines.disk.exchange import exchange

from . import moments
from .bundles import make_bundles
from .moments import Tally
from .works import WORKS, Work

READERS = 2


def main() -> int:
    """See the module's words."""
    parser = argparse.ArgumentParser(prog="tests.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="moments (default: %(default)s)")
    parser.add_argument(
        "--bundles", nargs=2, type=Path, metavar="DIR", help="two that differ; else made here"
    )
    parser.add_argument("--exports", type=int, default=3, metavar="N", help="real exports to kill")
    parser.add_argument("--no-mount", action="store_true", help="leave small disks out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vtp-kill-") as name:
        root, chance, tally = Path(name), random.Random(args.seed), Tally()
        bundles = tuple(args.bundles) if args.bundles else make_bundles(root)
        known = [json.loads(_reader("answer", str(bundle))) for bundle in bundles]
        works = {kind: work(root / kind.replace(" ", "-"), bundles) for kind, work in WORKS.items()}
        watched = [works["overwrite"], works["two renames"]]
        for work in watched:
            work.prepare()
        with readers(root, [work.target for work in watched], known, tally):
            run(works, args.kills, chance, tally)
            writers_at_once(watched, max(2, args.kills // 10), tally)
        if not args.no_mount:
            real_full_disk(root, bundles, tally)
        killed_exports(root, args.exports, chance, tally)
        if not exchange(root, root):
            print("this disk cannot exchange folders: only the fallback was tried")
    for line in tally.bad[:20]:
        print(f"bad: {line}")
    done = ", ".join(f"{count} {kind}" for kind, count in tally.moments.items())
    print(f"kill: {done}; {len(tally.bad)} bad; {time.monotonic() - began:.0f} s (seed {args.seed})")
    return int(bool(tally.bad))


def run(works: dict[str, Work], count: int, chance: random.Random, tally: Tally) -> None:
    """Moments of all kinds in turn: of ten six placed, two random, two full disks."""
    placed = {kind: moments.borders_of(work) for kind, work in works.items()}
    roomy = {kind: moments.borders_of(work, room=True) for kind, work in works.items()}
    kinds = list(works)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        work, turn = works[kind], number // len(kinds)
        if (number + turn) % 5 == 3:
            moments.random_kill(work, kind, chance, tally)
        elif (number + turn) % 5 == 4:
            moments.full_disk(work, kind, chance.randrange(roomy[kind]), tally)
        else:  # spread over all of the borders, the last ones included: there the swap lies
            most, turns = placed[kind], -(-count // len(kinds))
            place = most - 1 - turn * most // turns if turn % 2 else chance.randrange(most)
            moments.placed_kill(work, kind, place, tally)


def writers_at_once(works: list[Work], count: int, tally: Tally) -> None:
    """Two writers of one target, one of them killed."""
    for number in range(count):
        work = works[number % len(works)]
        work.prepare()
        other = os.fork()
        if other == 0:
            code = moments.BROKEN
            try:
                for _ in range(3):
                    work.write()
                code = moments.DONE
            finally:
                os._exit(code)
        moments.in_child(work.write, killed_after=0.002 * (number % 7))
        if os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]):
            tally.bad.append(f"of two writers at once the one that was not killed failed ({number})")
        moments.look(work, "two writers at once", 0, {0}, tally)
        tally.count("pairs of writers")


@contextmanager
def readers(root: Path, targets: list[Path], known: list[dict], tally: Tally) -> Iterator[None]:
    """Processes that load the targets all the time, and what they saw."""
    (root / "known.json").write_text(json.dumps(known))
    command = [sys.executable, "-m", "tests.kill.reader", "loop"]
    loops = [
        subprocess.Popen(
            [*command, str(target), str(root / "known.json"), str(root / "stop")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for target in targets
        for _ in range(READERS // 2)
    ]
    try:
        yield
        (root / "stop").touch()
        for one in loops:
            seen = json.loads(one.communicate(timeout=120)[0])
            tally.moments["loads"] = tally.moments.get("loads", 0) + sum(seen["seen"])
            tally.bad += [f"a reader: {line}" for line in seen["bad"]]
    finally:
        for one in loops:
            one.kill()
            one.wait()


def real_full_disk(root: Path, bundles: tuple[Path, ...], tally: Tally) -> None:
    """A disk in memory that is too small, by more and more; only root may mount one."""
    need = sum(file.stat().st_size for file in bundles[0].iterdir()) >> 10
    for share in (0.2, 0.7, 1.05, 1.3, 1.9):
        place = root / "small-disk"
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={int(need * share)}k", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            print("no small disk could be mounted: /dev/full and failing calls were tried instead")
            return
        try:
            _fill(WORKS["overwrite"](place / "in", bundles), share, tally)
        finally:
            subprocess.run(["umount", place], check=True)
        tally.count("small disks")


def _fill(work: Work, share: float, tally: Tally) -> None:
    work.place.mkdir()
    said = f"a disk of {share:g} bundles"
    for _ in range(2):  # the first makes it, the second replaces it: twice the room
        code = moments.in_child(work.write)
        if code not in (moments.DONE, moments.REFUSED):
            tally.bad.append(f"{said}: it ended with {code}")
        if work.left():
            tally.bad.append(f"{said}: left {work.left()}")
        if work.target.exists() and work.bad():
            tally.bad.append(f"{said}: {work.bad()}")


def killed_exports(root: Path, count: int, chance: random.Random, tally: Tally) -> None:
    """vtp-export itself: killed, asked to end, and then left alone."""
    place, target = root / "exports", root / "exports" / "bundle"
    command = [sys.executable, "-m", "vtp.export.cli", "--verify", "none", "-o", str(target), "--overwrite"]
    for number in range(count):
        ending = (signal.SIGKILL, signal.SIGTERM)[number % 2]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as one:
            try:
                one.wait(timeout=4 + 16 * chance.random())
            except subprocess.TimeoutExpired:
                one.send_signal(ending)
        left = sorted(path.name for path in place.iterdir() if path != target) if place.exists() else []
        if ending == signal.SIGTERM and left:
            tally.bad.append(f"an export that was asked to end left {left}")
        _check_export(target, tally)
        tally.count("real exports")
    if count:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        if done.returncode or sorted(path.name for path in place.iterdir()) != [target.name]:
            tally.bad.append(f"after killed exports: exit code {done.returncode}, {list(place.iterdir())}")
        _check_export(target, tally)


def _check_export(target: Path, tally: Tally) -> None:
    from vtp.runtime.bundle.folder import open_bundle

    try:
        if target.exists():
            open_bundle(target, check_hashes=True)
    except VtpError as error:
        tally.bad.append(f"a killed export: {error}")


def _reader(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.kill.reader", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
