"""Workers on a Ray cluster, or on a local one made for the run (the optional extra `ray`).

Each worker is a Ray actor: a process that opens a job once and does its chunks. Ray starts one that dies
again, if need be on another machine, and the chunk that it held is done again.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from vtp.calib.workers.local import C, Job, Local, Opened, R
from vtp.engines import UsageError, VtpError, capabilities
from vtp.engines.versions import installed_version
from vtp.runtime.bundle.folder import MANIFEST
from vtp.runtime.engine_choice import main_engine
from vtp.runtime.machine.ray_cluster import LOCAL, check_reachable, connect, set_ray_environment

_RETRIES = 3  # of one chunk, when its worker dies
_AHEAD = 4  # chunks a worker that are given out before the earliest one is back: bounds what waits here
_PATIENCE = 120.0  # seconds until a first worker must have started

Busy = dict[Any, tuple[Any, int | None]]  # what is under way: its worker, and the number of its chunk
Seals = Sequence[tuple[str, str | None]]  # path, and the sha256 of a bundle's manifest


class Worker:
    """What runs in a worker's process, made a Ray actor by `Ray`."""

    def __init__(self) -> None:
        self._opened = Opened()

    def look(self, version: str, seals: Seals) -> str:
        """The machine, and why it cannot do a job that reads these files; "" if it can."""
        host = socket.gethostname()
        here = _version()
        if here != version:
            return f"{host} has vtp-edge {here}, and this machine {version}; install the same on both"
        for path, seal in seals:
            found = Path(path)
            if not found.exists():
                return (
                    f"{host} does not see {path}; bundle, output and pictures belong on a disk that all share"
                )
            if seal is not None and _sha256(found) != seal:
                return f"{host} has another file at {path}; the bundle belongs on a disk that all share"
        return ""

    def do(self, job: Job[C, R], chunk: C) -> R:
        """Do one chunk."""
        return self._opened.work(job)(chunk)

    def release(self) -> None:
        """Close the job that is open."""
        self._opened.close()


class Ray:
    """Workers on the Ray cluster at `address` (HOST:PORT of its head, "auto", or "local" for one of its own).

    count    workers at most (default: as many as the cluster has cores for)
    threads  CPU threads, and so cores, of one worker

    Raises UsageError or VtpError, in one line, where Ray is missing or no cluster answers.
    """

    group = 8

    def __init__(self, address: str, count: int | None = None, threads: int = 1) -> None:
        set_ray_environment(address)
        self._ray, self._threads = _import(), threads
        self.here = Local()
        self._actors: list[Any] = []
        self._aside = redirect_stdout(sys.stderr)  # Ray prints there of workers that died; --json is ours
        self._connect(address, count)
        self._aside.__enter__()
        room = self._room()
        if room < 1:
            self.close()
            raise UsageError(f"no machine of Ray's cluster has the {threads} cores of --threads {threads}")
        self._count = room if count is None else min(count, room)

    def run(self, job: Job[C, R], chunks: Sequence[C]) -> Iterator[R]:
        """Results in the order of the chunks; a chunk whose worker died is done again."""
        ray = self._ray
        held, version, seals = ray.put(job), _version(), _seals(job.files())
        actors = self._hired(job)[: len(chunks)]
        busy: Busy = {actor.look.remote(version, seals): (actor, None) for actor in actors}
        idle: list[Any] = []
        done: dict[int, R] = {}
        given = taken = 0
        while taken < len(chunks):
            while idle and given < min(len(chunks), taken + _AHEAD * len(actors)):
                actor = idle.pop()
                busy[actor.do.remote(held, chunks[given])] = (actor, given)
                given += 1
            actor, number, found = self._next(busy, first=not given)
            idle.append(actor)
            if number is not None:
                done[number] = found
            elif found:
                raise VtpError(f"a worker of --ray on {found}")
            while taken in done:
                yield done.pop(taken)
                taken += 1

    def release(self) -> None:
        """Close the job that is open, here and on every worker that lives."""
        self.here.release()
        self._ray.wait(
            [actor.release.remote() for actor in self._actors],
            num_returns=len(self._actors),
            timeout=_PATIENCE,
        )

    def close(self) -> None:
        """End the workers, and a local cluster with them."""
        self.here.close()
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        self._ray.shutdown()
        self._aside.__exit__(None, None, None)

    def _connect(self, address: str, count: int | None) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        check_reachable(address)
        own: dict[str, Any] = {}
        if address == LOCAL:
            size = count or max(1, (os.cpu_count() or 1) // self._threads)
            own = {"num_cpus": size * self._threads}
        connect(self._ray.init, self._ray.shutdown, address, log_to_driver=False, **own)

    def _room(self) -> int:
        """Workers that the cluster's machines have cores for."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return sum(int(resources.get("CPU", 0)) // self._threads for resources in nodes)

    def _hired(self, job: Job[C, R]) -> list[Any]:
        """The actors, started at the first job: its engine says whether they need GPUs."""
        if not self._actors:
            gpus = 0 if capabilities(main_engine(job.engine)).on_cpu else 1
            options = {"num_cpus": self._threads, "num_gpus": gpus}
            retries = {"max_restarts": -1, "max_task_retries": _RETRIES}
            hire = self._ray.remote(Worker).options(**options, **retries)
            self._actors = [hire.remote() for _ in range(self._count)]
        return self._actors

    def _next(self, busy: Busy, first: bool) -> tuple[Any, int | None, Any]:
        """(worker, number of its chunk or None, result) of the worker that is done next."""
        ready, _ = self._ray.wait(list(busy), timeout=_PATIENCE if first else None)
        if not ready:
            raise VtpError(f"Ray started no worker in {_PATIENCE:.0f} s: its machines may be busy; try later")
        actor, number = busy.pop(ready[0])
        errors = self._ray.exceptions
        try:
            return actor, number, self._ray.get(ready[0])
        except errors.RayTaskError as error:  # what the job itself raised
            raise error.cause from error
        except errors.RayError as error:
            raise VtpError(_reason(str(error))) from error


def _import() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UsageError("--ray needs Ray: pip install 'vtp-edge[ray]'") from error
    return ray


def _reason(text: str) -> str:
    """One line about a worker that Ray could not keep alive."""
    missing = re.search(r"No module named '[\w.]+'", text)
    if missing:
        return f"Ray's workers lack a package ({missing[0]}): install 'vtp-edge[ort,ray]' on every machine"
    short = " ".join(text.split())[:200]
    return f"a worker of --ray died {_RETRIES + 1} times over one chunk, perhaps for want of memory: {short}"


def _seals(files: Sequence[Path]) -> Seals:
    return [(str(file), _sha256(file) if file.name == MANIFEST else None) for file in files]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _version() -> str:
    return installed_version("vtp-edge", "(sources)")
