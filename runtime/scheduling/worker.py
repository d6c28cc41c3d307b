"""The one thread that owns a scheduler's graphs."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from vtp.runtime.scheduling.queue import Queue
from vtp.runtime.scheduling.rows import Rows


class Worker:
    """Runs the requests of a queue until it is closed and empty; then it lets go of what it owns.

    Knows nothing of the scheduler, so that one which is forgotten can be collected, and ends it.
    """

    def __init__(self, queue: Queue, rows: Rows, owned: ExitStack) -> None:
        self._queue, self._rows, self._owned = queue, rows, owned
        self._thread = threading.Thread(target=self._run, name="vtp-scheduler", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for its end; it must have been closed. Nothing happens in the worker's own thread."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        with self._owned:
            while not self._rows.empty or self._queue.wait():
                try:
                    self._turn()
                except Exception as error:  # of a step that all share; the next requests may fare better
                    self._rows.fail(error)

    def _turn(self) -> None:
        """One piece of a request that joins, then a step of all: none waits for more than one run of an
        encoder, or one prompt, of another."""
        rows, queue = self._rows, self._queue
        queue.withdraw_late()
        rows.leave_interrupted()
        if rows.may_join and (job := queue.next(only_loaded=not rows.stepless)) is not None:
            rows.begin(job)
        rows.join()
        rows.leave_interrupted()  # who was cancelled meanwhile
        rows.compact()
        if not rows.stepless:
            rows.step()
