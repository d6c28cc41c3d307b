"""The requests that decode together: each in a row of the cache, joining and leaving between steps."""

from __future__ import annotations

import time
from collections.abc import Generator

import numpy as np

from vtp.runtime.generation.loop import prefill
from vtp.runtime.generation.stopping import Interrupted
from vtp.runtime.scheduling.job import Job
from vtp.runtime.scheduling.queue import Queue
from vtp.runtime.stages.slots import Slots


class Rows:
    """Row i of the caches belongs to `jobs[i]`; None: a hole, which the next to join takes or the last row.

    One request at a time joins: its pictures are encoded in pieces, between steps of the others. It has no
    row before its prompt is read, but one is left for it.

    step_keep  the keep-count whose stages serve the steps of all; None: each request's own (one slot)
    """

    def __init__(self, slots: Slots, queue: Queue, step_keep: int | None) -> None:
        self._slots, self._queue, self._step_keep = slots, queue, step_keep
        self._jobs: list[Job | None] = []
        self._joining: tuple[Job, Generator[None, None, None]] | None = None

    @property
    def empty(self) -> bool:
        """Whether no request has a row, or joins."""
        return self.stepless and self._joining is None

    @property
    def stepless(self) -> bool:
        """Whether no request takes steps."""
        return not self._jobs

    @property
    def may_join(self) -> bool:
        """Whether a row is free, and no request joins."""
        return self._joining is None and (len(self._jobs) < self._slots.count or None in self._jobs)

    def leave_interrupted(self) -> None:
        """Free the rows of requests that were cancelled, or whose time is over, and of one that joins."""
        for job in filter(None, list(self._jobs)):
            if reason := job.stop_reason:
                job.interrupt(reason)
        self._leave()
        if self._joining is not None and (reason := self._joining[0].stop_reason):
            self._joining[0].interrupt(reason)
            self._end_joining()

    def begin(self, job: Job) -> None:
        """Let a request join: `join` then does the work."""
        self._joining = job, self._joined(job)

    def join(self) -> None:
        """One piece of the work of the request that joins, if one does."""
        if self._joining is None:
            return
        job, pieces = self._joining
        try:
            if next(pieces, pieces) is None:  # there is more to do
                return
        except Interrupted as error:
            job.interrupt(error.reason)
        except Exception as error:  # whatever it is, it is this request's alone
            job.fail(error)
        self._end_joining()

    def compact(self) -> None:
        """Fill holes with the last rows, so that steps compute no row in vain."""
        while None in self._jobs:
            hole, last = self._jobs.index(None), len(self._jobs) - 1
            if hole < last:
                self._slots.move(last, hole)
            self._jobs[hole] = self._jobs[last]
            self._jobs.pop()

    def step(self) -> None:
        """One token for every row; there is no hole."""
        jobs = [job for job in self._jobs if job is not None]
        runner, keep = self._slots.first(len(jobs)), self._step_keep or jobs[0].answer.request.keep
        answers, started = [job.answer for job in jobs], time.perf_counter()
        logits = runner.step_rows(
            keep, [answer.token for answer in answers], [answer.position for answer in answers]
        )
        self._queue.step(len(jobs), time.perf_counter() - started)
        for row, (job, room) in enumerate(zip(jobs, runner.rooms().tolist(), strict=True)):
            job.answer.position += 1
            _take(job, logits[row], room)
        self._leave()

    def fail(self, error: Exception) -> None:
        """End all requests: what they share went wrong."""
        for job in filter(None, self._jobs):
            if not job.over:
                job.fail(error)
        self._leave()
        self._jobs.clear()

    def _joined(self, job: Job) -> Generator[None, None, None]:
        """Encode a request's pictures, read its prompt into a free row, and write its first token.

        Raises Interrupted if there is no time left for it.
        """
        request = job.answer.request
        pictures, check = request.pictures, request.stop_signal.check
        check()
        job.load()
        check()
        encoded = yield from self._slots.encode(request.keep, pictures.pixels, request.timings, check)
        place = self._jobs.index(None) if None in self._jobs else len(self._jobs)
        runner = self._slots.row(place)
        logits = prefill(runner, job.answer, encoded)
        pictures.release()
        check()
        job.take(logits, runner.room())
        if not job.over:
            self._jobs[place : place + 1] = [job]

    def _end_joining(self) -> None:
        """The request that joined has its row, or is over."""
        assert self._joining is not None
        job, pieces = self._joining
        self._joining = None
        pieces.close()
        if job.over:
            self._queue.end(job)

    def _leave(self) -> None:
        """Turn the rows of requests that are over into holes."""
        for place, job in enumerate(self._jobs):
            if job is not None and job.over:
                self._jobs[place] = None
                self._queue.end(job)
        while self._jobs and self._jobs[-1] is None:
            self._jobs.pop()


def _take(job: Job, logits: np.ndarray, room: int) -> None:
    """Write a token; what goes wrong is this request's alone."""
    try:
        if reason := job.stop_reason:
            job.interrupt(reason)
        else:
            job.take(logits, room)
    except Exception as error:
        job.fail(error)
