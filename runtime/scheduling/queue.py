"""Who waits and who runs: a bounded queue, first come first served, and what it counts."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from itertools import islice

from vtp.engines import VtpError
from vtp.runtime.generation.stopping import CANCELLED, TIMEOUT
from vtp.runtime.scheduling.job import Job
from vtp.runtime.scheduling.loader import Loader
from vtp.runtime.scheduling.stats import SchedulerStats

_FIRST_GUESS = 1.0  # seconds, while no request has ended yet
_LEAST = 0.1
_SMOOTH = 0.2  # weight of the newest request in the mean


class QueueFull(VtpError):
    """The scheduler has no place for another request; `retry_after` estimates in seconds when it will."""

    def __init__(self, message: object, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Closed(VtpError):
    """The scheduler takes no further requests."""


class Queue:
    """The requests of a scheduler. Every method is safe from any thread.

    slots     requests that run at once
    capacity  requests that may wait beyond those
    loader    decodes the pictures of the next `slots` requests
    """

    def __init__(self, slots: int, capacity: int, loader: Loader) -> None:
        self._loader = loader
        self._slots, self._capacity = slots, capacity
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._mean = _FIRST_GUESS
        self._counts: Counter[str] = Counter()
        self._stages: defaultdict[str, float] = defaultdict(float)

    def check_open(self) -> None:
        """Raise `Closed` or `QueueFull` for a request that would not be taken now."""
        with self._changed:
            self._refuse()

    def add(self, job: Job) -> None:
        """Queue a request; raises `QueueFull` or `Closed`."""
        with self._changed:
            self._refuse()
            self._waiting.append(job)
            self._load_ahead()
            self._changed.notify_all()

    def wait(self) -> bool:
        """Block until a request waits; False: none does, and none will."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            return bool(self._waiting)

    def next(self, only_loaded: bool) -> Job | None:
        """The request whose turn it is, which now runs; None: nobody waits.

        only_loaded  None also while its pictures are being decoded
        """
        with self._changed:
            if not self._waiting or (only_loaded and not self._waiting[0].loaded):
                return None
            job = self._waiting.popleft()
            self._load_ahead()
            self._running[id(job)] = job
            job.start()
            return job

    def withdraw(self, job: Job) -> None:
        """End a request that must not start any more; nothing happens unless it waits."""
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        self._end_unstarted(job)

    def withdraw_late(self) -> None:
        """End every waiting request whose time is over."""
        with self._changed:
            late = [job for job in self._waiting if job.stop_reason]
        for job in late:
            self.withdraw(job)

    def end(self, job: Job) -> None:
        """Note that a request is over, and tell its caller."""
        with self._changed:
            self._running.pop(id(job), None)
            if (seconds := job.seconds) is not None:
                first = not self._counts["requests"]
                self._mean = seconds if first else self._mean + _SMOOTH * (seconds - self._mean)
            self._count(job)
        job.deliver()

    def step(self, rows: int, seconds: float) -> None:
        """Note a step of some rows."""
        with self._changed:
            self._counts["steps"] += 1
            self._counts["stepped_rows"] += rows
            self._stages["step"] += seconds

    def close(self, drain: bool) -> None:
        """Take no more requests; without `drain`, cancel those that there are."""
        with self._changed:
            self._closed = True
            waiting, running = list(self._waiting), list(self._running.values())
            self._changed.notify_all()
        if not drain:
            for job in [*running, *waiting]:
                job.answer.request.stop_signal.cancel()
                self.withdraw(job)

    def stats(self, copies: int, copied_bytes: int) -> SchedulerStats:
        """What there is now, and was so far."""
        with self._changed:
            counts = {name: self._counts[name] for name in _COUNTED}
            return SchedulerStats(
                running=len(self._running),
                waiting=len(self._waiting),
                slots=self._slots,
                queue=self._capacity,
                stage_seconds=dict(self._stages),
                copies=copies,
                copied_bytes=copied_bytes,
                **counts,
            )

    def expected_wait(self) -> float:
        """Seconds until a request that came now would have a slot, as far as the earlier ones tell."""
        with self._changed:
            ahead = len(self._running) + len(self._waiting) - self._slots + 1
            return max(0, ahead) * self._mean / self._slots if self._counts["requests"] else 0.0

    def _load_ahead(self) -> None:
        """Have pictures decoded of as many requests as could run next: each takes memory from then on."""
        self._loader.begin(islice(self._waiting, self._slots))

    def _refuse(self) -> None:
        """Raise if no request can be taken now."""
        if self._closed:
            raise Closed("this scheduler is closed; make another one")
        waiting, running = len(self._waiting), len(self._running)
        if waiting + running >= self._slots + self._capacity:
            seconds = max(self._mean / self._slots, _LEAST)
            raise QueueFull(
                f"the queue is full: {running} requests run and {waiting} wait (slots {self._slots}, queue "
                f"{self._capacity}); try again in about {seconds:.1f} s",
                seconds,
            )

    def _end_unstarted(self, job: Job) -> None:
        job.note_wait()
        job.interrupt(job.stop_reason or CANCELLED)
        self.end(job)

    def _count(self, job: Job) -> None:
        """Add a request that is over to the totals."""
        result = job.answer.result
        reason = "failed" if job.error else result.finish_reason
        self._counts["requests"] += 1
        self._counts["failed"] += reason == "failed"
        self._counts["cancelled"] += reason == CANCELLED
        self._counts["timed_out"] += reason == TIMEOUT
        self._counts["tokens"] += len(result.token_ids)
        self._counts["prompt_tokens"] += result.prompt_tokens
        if job.answer.position:  # its picture was read
            self._counts["visual_tokens_before"] += result.visual_tokens.before
            self._counts["visual_tokens_kept"] += result.visual_tokens.after
        for stage, ms in result.timings.stages.items():
            self._stages[stage] += ms / 1e3


_COUNTED = (
    "requests",
    "failed",
    "cancelled",
    "timed_out",
    "tokens",
    "prompt_tokens",
    "visual_tokens_before",
    "visual_tokens_kept",
    "steps",
    "stepped_rows",
)
