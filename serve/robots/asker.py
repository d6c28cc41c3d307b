"""Asks the model about the newest message, in a thread of its own: callbacks only hand messages over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime

import numpy as np

from vtp.engines import VtpError
from vtp.engines.errors import shown
from vtp.runtime.decisions.decision import Decision
from vtp.runtime.media.cut_off import cut_off_line
from vtp.serve.robots.answers import Alarm, Answer, Received
from vtp.serve.robots.images import picture_of
from vtp.serve.robots.model import Model
from vtp.serve.robots.settings import Settings
from vtp.serve.streams.newest import Newest

__all__ = ["Asker"]

_LOOK_UP = 0.2  # seconds without a message after which the settings are read again
_NO_FRAME = 5.0  # seconds that a single question waits for one


class Asker:
    """Keeps the newest message, and asks about it whenever the model is free and `rate` allows.

    Every public method is safe from any thread. An asker starts once.
    """

    def __init__(
        self,
        model: Model,
        settings: Callable[[], Settings],
        now_ns: Callable[[], int],
        said: Callable[[Answer], None],
        failed: Callable[[str], None],
        noted: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Nothing runs before `start`.

        settings  the parameters as they are now
        now_ns    the node's clock
        said      called in the asker's thread with each answer, and
        failed    with a line about a message that could not be answered
        noted     with a line about pictures that the model does not see whole, once for each size, and about
                  an alert whose answers the model would not give, once for each alert
        """
        self._model, self._settings, self._now_ns = model, settings, now_ns
        self._said, self._failed, self._noted = said, failed, noted
        self._doubted: set[str] = set()  # alerts
        self._sizes: set[tuple[int, int]] = set()  # of pictures that were looked at, (width, height)
        self._newest: Newest[Received] = Newest()
        self._stopped = threading.Event()
        self._wake = threading.Condition()
        self._waiting: list[Future[Answer]] = []
        self._due = 0.0  # by time.monotonic(): when `rate` allows the next answer
        self._last = -1  # the message asked about before
        self._alarm = Alarm()
        self._thread = threading.Thread(target=self._run, name="vtp-asker", daemon=True)

    def start(self) -> None:
        """Begin to ask; nothing is reused of what was asked about before."""
        self._model.begin()
        self._thread.start()

    def put(self, received: Received) -> None:
        """Hand a message over, in place of one that was not asked about; never waits."""
        self._newest.put(received)

    def ask(self) -> Answer:
        """Answer once, whatever `rate` says, about the newest message, or the next one if it was answered.

        Raises VtpError if no message comes, it cannot be answered, or the asker is stopped.
        """
        future: Future[Answer] = Future()
        with self._wake:
            if self._stopped.is_set():
                raise _stopped()
            self._waiting.append(future)
            self._wake.notify_all()
        try:
            return future.result(_NO_FRAME)
        except NotInTime:
            if self._give_up(future):
                raise VtpError(
                    f"no frame came in {_NO_FRAME:g} s; is a camera running, and image remapped to it ?"
                ) from None
            return future.result()  # the model has the frame

    def _give_up(self, future: Future[Answer]) -> bool:
        """Want no answer any more; False if the model has a frame for it already."""
        with self._wake:
            if future in self._waiting:
                self._waiting.remove(future)
            return future.cancel()

    def poke(self) -> None:
        """The settings have changed: look at them."""
        with self._wake:
            self._wake.notify_all()

    def stop(self) -> None:
        """End, an answer that is being written included, and wait until the thread is gone."""
        with self._wake:
            self._model.cancel(self._stopped)
            self._wake.notify_all()
        self._newest.close()
        if self._thread.is_alive():
            self._thread.join()
        for future in self._claim():
            future.set_exception(_stopped())

    # -- in its thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._is_due():
            if (received := self._take()) is None:
                continue
            futures, rate = self._claim(), self._settings().rate
            if not futures and not rate:  # who wanted it gave up
                continue
            self._due = time.monotonic() + (1 / rate if rate else 0)
            self._serve(received, futures)

    def _serve(self, received: Received, futures: list[Future[Answer]]) -> None:
        """Answer, and tell everyone who waits."""
        try:
            answer = self._answer(received)
        except Exception as error:  # an engine's own error must not end the node
            self._fail(futures, error)
            return
        if answer is not None:
            self._said(answer)
        for future in futures:
            if answer is None:
                future.set_exception(_stopped())
            else:
                future.set_result(answer)

    def _is_due(self) -> bool:
        """Wait until a question is to be asked; False when stopped."""
        with self._wake:
            while not self._stopped.is_set() and not self._waiting:
                rate = self._settings().rate
                left = self._due - time.monotonic() if rate else None
                if left is not None and left <= 0:
                    break
                self._wake.wait(left)
            return not self._stopped.is_set()

    def _take(self) -> Received | None:
        """The newest message; None if none comes soon, or it has waited here for so long that it is stale."""
        try:
            received = self._newest.take(_LOOK_UP)
        except TimeoutError:
            return None
        if received is None or self._now_ns() - received.came_ns > self._settings().stale_after * 1e9:
            return None
        return received

    def _claim(self) -> list[Future[Answer]]:
        """Who waits for an answer, and has not given up."""
        with self._wake:
            claimed, self._waiting = self._waiting, []
        return [future for future in claimed if future.set_running_or_notify_cancel()]

    def _answer(self, received: Received) -> Answer | None:
        settings, asked = self._settings(), self._now_ns()
        picture = picture_of(received.message)
        self._note_sides(picture.shape[1], picture.shape[0])
        result = None
        if settings.prompt.strip():
            result = self._model.ask(picture, settings, self._stopped)
            if result is None:
                return None
        alert = self._decide(picture, settings)
        dropped, self._last = received.number - self._last - 1, received.number
        return Answer(received, settings.prompt, result, asked, self._now_ns(), dropped, alert)

    def _note_sides(self, width: int, height: int) -> None:
        """Say how much of the sides the model does not see, once for each size."""
        if (width, height) in self._sizes:
            return
        self._sizes.add((width, height))
        if line := cut_off_line(self._model.pipeline.manifest.image, width, height):
            self._noted(line)

    def _decide(self, picture: np.ndarray, settings: Settings) -> tuple[str, Decision, bool] | None:
        if not settings.alert.strip():
            return None
        decision = self._model.decide(picture, settings)
        raised = self._alarm.decide(
            decision.probabilities["yes"], settings.alert_threshold, settings.alert_hysteresis
        )
        if settings.alert not in self._doubted and (line := decision.doubt):
            self._doubted.add(settings.alert)
            self._noted(line)
        return settings.alert, decision, raised

    def _fail(self, futures: list[Future[Answer]], error: Exception) -> None:
        line = str(error) if isinstance(error, VtpError) else f"{type(error).__name__}: {shown(error)}"
        self._failed(line)
        for future in futures:
            future.set_exception(VtpError(line))


def _stopped() -> VtpError:
    return VtpError("the node was deactivated before it had answered; activate it and ask again")
