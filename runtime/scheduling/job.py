"""One request between its submission and its end: what the queue, the rows and the worker pass on."""

from __future__ import annotations

import time
from concurrent.futures import Future

import numpy as np

from vtp.engines import VtpError
from vtp.engines.errors import shown
from vtp.runtime.generation.answer import Answer
from vtp.runtime.generation.stopping import CANCELLED
from vtp.runtime.scheduling.delivery import Delivery


class Job:
    """A request, its answer, and where the pieces go.

    `over` says that nothing more will be written; who ends it then tells the queue, and after that
    `deliver`s the end, so that a caller who reacts to it finds the place free.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.delivery = Delivery()
        self.over = False
        self.error: Exception | None = None
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.loading: Future[None] | None = None  # of its pictures, by the loader

    def start(self) -> None:
        """Note that it runs from now on."""
        self.note_wait()
        self.started = time.perf_counter()

    def note_wait(self) -> None:
        """Enter how long it has waited into its timings."""
        waited = time.perf_counter() - self.submitted
        self.answer.request.timings.stages["queue"] = waited * 1e3

    @property
    def seconds(self) -> float | None:
        """How long it has run; None before it started."""
        return None if self.started is None else time.perf_counter() - self.started

    @property
    def loaded(self) -> bool:
        """Whether nothing is gained by waiting for its pictures."""
        return self.loading is None or self.loading.done()

    def load(self) -> None:
        """Have its pictures decoded; raises what is wrong with them."""
        if self.loading is None:
            self.answer.request.load()
        else:
            self.loading.result()

    def take(self, logits: np.ndarray, room: int) -> None:
        """Write the next token, by its logits [V]; `room` as for `Answer.ends`."""
        piece, self.over = self.answer.take(logits, room)
        self._put(piece)

    @property
    def stop_reason(self) -> str | None:
        """Why it must end now; None while it may go on."""
        return self.answer.request.stop_signal.reason

    def interrupt(self, reason: str) -> None:
        """End it early, with what there is."""
        self.over = True
        self.answer.interrupt(reason)
        if reason != CANCELLED:
            self._put(self.answer.finish())

    def fail(self, error: Exception) -> None:
        """End it with an error, which becomes one line for the caller."""
        self.over, self.error = True, _one_line(error)

    def deliver(self) -> None:
        """Tell the caller that it is over."""
        self.answer.request.pictures.release()
        self.delivery.end(self.error)

    def _put(self, piece: str) -> None:
        if piece:
            self.delivery.put(piece)


def _one_line(error: Exception) -> Exception:
    if isinstance(error, VtpError):
        return error
    wrapped = VtpError(f"this request failed: {type(error).__name__}: {shown(error)}")
    wrapped.__cause__ = error
    return wrapped
