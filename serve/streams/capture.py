"""The thread that reads a source, so that it never waits for the model."""

from __future__ import annotations

import threading
import time

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import quoted_argument, shown
from vtp.serve.streams.frames import Frame, Source
from vtp.serve.streams.newest import Newest

_PATIENCE = 2.0  # seconds that a source has to end its iteration


class Capture:
    """Reads a source in a thread of its own and keeps the newest frame, or, with `every_frame`, waits until
    each was taken.

    seen  frames that came
    """

    def __init__(self, source: Source, every_frame: bool = False, timeout: float | None = None) -> None:
        self.seen = 0
        self._source = source
        self._every_frame = every_frame or getattr(source, "every_frame", False)
        self._timeout = timeout
        self._newest: Newest[Frame] = Newest()
        self._error: BaseException | None = None
        self._heard = time.monotonic()
        self._handing_over = False
        self._given_up = False
        # A daemon: a driver that hangs in a read must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="vtp-capture", daemon=True)

    @property
    def source_name(self) -> str:
        """How messages call the source."""
        return self._source.name

    def start(self) -> None:
        """Begin to read."""
        self._heard = time.monotonic()
        self._thread.start()

    def take(self) -> Frame | None:
        """The newest frame, waiting for one; None when the source is over.

        Raises what the source raised, and VtpError if nothing came for as long as `timeout` seconds.
        """
        try:
            frame = self._newest.take(self._patience())
        except TimeoutError:
            raise VtpError(
                f"no frame came from {shown(self.source_name)} for {self._timeout:g} s; check the source, "
                "or wait longer with --timeout"
            ) from None
        if frame is None and self._error is not None:
            raise self._error
        return frame

    def stop(self) -> None:
        """End reading, and wait until the thread is gone; safe from any thread, more than once.

        A thread that hangs in a driver's read is waited for once, for two seconds; it ends with that read.
        """
        self.abandon()
        if self._thread.is_alive() and not self._given_up and self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)
            self._given_up = self._thread.is_alive()

    def abandon(self) -> None:
        """End reading and wait for nothing."""
        self._newest.close()
        self._newest.clear()
        self._source.close()

    def _patience(self) -> float | None:
        if self._timeout is None or self._handing_over:
            return None
        return max(0.0, self._heard + self._timeout - time.monotonic())

    def _hand_over(self, frame: Frame) -> bool:
        """Put it into the slot; what it waits there for the model is not a silence of the source."""
        self._handing_over = True
        taken = self._newest.put(frame, wait=self._every_frame)
        self._heard, self._handing_over = time.monotonic(), False
        return taken

    def _run(self) -> None:
        try:
            for frame in self._source:
                _check_frame(frame, self.source_name)
                self.seen += 1
                if not self._hand_over(frame):
                    break
        except BaseException as error:  # for the thread that takes frames to raise
            self._error = error
        finally:
            self._newest.close()


def _check_frame(frame: object, source: str) -> None:
    """Raise UsageError for what a source of the caller's own may give instead of frames."""
    if not isinstance(frame, Frame):
        raise UsageError(
            f"{shown(source)} gave {quoted_argument(frame)}, which is not a Frame; give Frame(picture, "
            "number, stamp_ns, arrived)"
        )
