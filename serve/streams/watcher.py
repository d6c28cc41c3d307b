"""A standing question about a stream: the newest frame each time that the model is free."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import quoted_argument, shown
from vtp.runtime.generation.arguments import is_number
from vtp.runtime.generation.options import OptionKeywords, takes_options
from vtp.runtime.media.pictures import PictureError
from vtp.runtime.pipeline import Pipeline
from vtp.serve.streams.alerts import Alert, AlertReading
from vtp.serve.streams.answer import FrameAnswer
from vtp.serve.streams.asking import Asker, Cancelled
from vtp.serve.streams.capture import Capture
from vtp.serve.streams.frames import Frame, Source
from vtp.serve.streams.gate import Gate
from vtp.serve.streams.left_out import LeftOut

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's own from Python 3.11 on

_LONGEST = 86400.0  # seconds of `every` and `timeout`


class Watcher:
    """Iterates answers about a source's frames, with `for` or `async for`; a context manager.

    A thread of its own reads the source and keeps only the newest frame. The model runs in the thread that
    iterates (of `async for`, in one thread of the watcher's own), each time about the newest frame. Pipeline
    and watcher serve one iteration at a time; the pipeline is not closed with the watcher.
    """

    @takes_options
    def __init__(
        self,
        pipeline: Pipeline,
        source: Source,
        prompt: str | None = None,
        *,
        alerts: Sequence[Alert] = (),
        gate: Gate | None = None,
        every: float = 0.0,
        every_frame: bool = False,
        timeout: float | None = None,
        tell: Callable[[str], None] = lambda line: None,
        on_alert: Callable[[AlertReading, Frame], None] = lambda reading, frame: None,
        clock: Callable[[], float] = time.monotonic,
        **options: Unpack[OptionKeywords],
    ) -> None:
        """Check everything; nothing is read before the first answer is wanted, or `start`.

        prompt       what to ask about every frame; None: the alerts only
        alerts       questions of yes or no about the same frames, each of one prefill, before the prompt.
                     With more than one question, load the pipeline with `vision_feature_cache=1`: the image
                     stages then run once for all of them (with `stream_reuse=True` they do as well)
        gate         asks nothing while little changes
        every        ask at most once in so many seconds
        every_frame  drop nothing: the source waits until each frame was asked about
        timeout      seconds without a frame after which the iteration ends with VtpError; None: wait
        tell         called with a line about a frame that could not be asked about
        on_alert     called at once, in the thread that iterates, with a reading that has an event
        clock        gives the ages' time, as the frames' `arrived` do
        options      of every answer: see `GenerateOptions`

        Raises UsageError for a bad argument, and for a bundle that answers about clips.
        """
        _check_kinds(pipeline, source, alerts, gate)
        check_single(pipeline)
        check_asks(prompt, alerts)
        self.asked = self.skipped = 0
        self._on_alert, self._clock, self._gate = on_alert, clock, gate
        self._left_out = LeftOut(tell)
        self._asker = Asker(pipeline, dict(options), alerts)
        self._every = check_every(every)
        self._prompt = None if prompt is None else self._asker.check(prompt)
        self._capture = Capture(source, every_frame, check_timeout(timeout))
        # A watcher that is dropped without `stop` must not leave a thread that reads on.
        weakref.finalize(self, self._capture.abandon)
        self._started, self._stopped = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._asked_prompt = self._prompt
        self._last, self._skipped, self._due = -1, 0, 0.0  # since the answer before
        self._seen: Image.Image | None = None  # the picture of the last answer, held for who shows it
        self._executor: ThreadPoolExecutor | None = None

    # -- while it runs ---------------------------------------------------------------------------------------

    @property
    def prompt(self) -> str | None:
        """What is asked beside the alerts. Set it from any thread: it holds from the next frame on.

        Setting it raises UsageError for a prompt that cannot be served, and the one before still holds.
        """
        return self._prompt

    @prompt.setter
    def prompt(self, text: str) -> None:
        self._prompt = self._asker.check(text)

    @property
    def seen(self) -> int:
        """Frames that came from the source."""
        return self._capture.seen

    @property
    def stopped(self) -> bool:
        """Whether it was stopped, or the source is over."""
        return self._stopped.is_set()

    def start(self) -> None:
        """Begin to read the source; the first answer does so as well. A watcher starts once."""
        with self._lock:
            if self._stopped.is_set():
                raise VtpError("this watcher was stopped; make another one to go on")
            if not self._started.is_set():
                self._asker.begin()
                self._started.set()
                self._capture.start()

    def stop(self) -> None:
        """End the iteration, an answer that is being written included; safe from any thread, repeatedly."""
        self._stopped.set()
        self._asker.cancel()
        with self._lock:  # not amid a start
            self._capture.stop()

    # -- answers ---------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[FrameAnswer]:
        return self

    def __next__(self) -> FrameAnswer:
        """The answer about the newest frame. Raises StopIteration when it is over, and VtpError if the source
        is over and none of its frames could be asked about."""
        try:
            while (frame := self._next_frame()) is not None:
                if (answer := self._answer(frame)) is not None:
                    return answer
            self._check_asked()
        except BaseException:
            self.stop()
            raise
        self.stop()
        raise StopIteration

    def __aiter__(self) -> AsyncIterator[FrameAnswer]:
        return self

    async def __anext__(self) -> FrameAnswer:
        """The same without blocking the event loop; a task that is cancelled stops the watcher."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "vtp-watcher")
        step = asyncio.get_running_loop().run_in_executor(self._executor, next, self, None)
        try:
            if (answer := await asyncio.shield(step)) is not None:
                return answer
        except BaseException:  # of the step, or the task is cancelled
            await self.aclose()
            await asyncio.gather(step, return_exceptions=True)
            raise
        await self.aclose()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """`stop` without blocking the event loop, and the end of the watcher's own thread."""
        executor, self._executor = self._executor, None
        await asyncio.to_thread(self.stop)
        if executor is not None:
            await asyncio.to_thread(executor.shutdown)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Watcher:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- one answer ------------------------------------------------------------------------------------------

    def _next_frame(self) -> Frame | None:
        """Wait until it is time, then for a frame; None when it is over."""
        if not self._started.is_set() and not self._stopped.is_set():
            self.start()
        if self._stopped.wait(max(0.0, self._due - time.monotonic())):
            return None
        frame = self._capture.take()
        return None if self._stopped.is_set() else frame

    def _answer(self, frame: Frame) -> FrameAnswer | None:
        """None for a frame that is not asked about, and for an answer that was stopped."""
        prompt, taken = self._prompt, self._clock()
        try:
            picture = frame.load()
        except VtpError as error:
            self._left_out.add(frame, error)
            return None
        if (change := self._change(picture, prompt)) is None:
            self._skipped, self.skipped = self._skipped + 1, self.skipped + 1
            return None
        self._due = time.monotonic() + self._every
        try:
            alerts = self._read_alerts(picture, frame)
            result = None if prompt is None else self._asker.answer(picture, prompt)
        except Cancelled:
            return None
        except PictureError as error:  # too long and thin for the model, for example
            self._left_out.add(frame, error)
            self._due = 0.0
            return None
        return self._answered(
            picture,
            FrameAnswer(
                frame=frame,
                prompt=prompt,
                result=result,
                alerts=alerts,
                asked_age=taken - frame.arrived,
                age=self._clock() - frame.arrived,
                dropped=max(0, frame.number - self._last - 1 - self._skipped),
                skipped=self._skipped,
                change=change if self._gate else None,
                seen=weakref.ref(picture),
            ),
        )

    def _answered(self, picture: Image.Image, answer: FrameAnswer) -> FrameAnswer:
        self.asked += 1
        self._last, self._skipped, self._seen = answer.frame.number, 0, picture
        return answer

    def _check_asked(self) -> None:
        """At the end: what was left out is told; VtpError if that was all there was."""
        if self._stopped.is_set():
            return
        self._left_out.end()
        if self._left_out.reason and not self.asked:
            raise VtpError(
                f"no frame of {shown(self._capture.source_name)} could be asked about; the last was left "
                f"out: {self._left_out.reason}"
            )

    def _change(self, picture: Image.Image, prompt: str | None) -> float | None:
        """How much the gate finds changed; None if it holds the picture back."""
        if self._gate is None:
            return 1.0
        if prompt != self._asked_prompt:
            self._gate.reset()
            self._asked_prompt = prompt
        return self._gate.change(picture)

    def _read_alerts(self, picture: Image.Image, frame: Frame) -> tuple[AlertReading, ...]:
        readings = []
        for reading in self._asker.read_alerts(picture, self._clock):
            readings.append(reading)
            if reading.event:
                self._on_alert(reading, frame)
        return tuple(readings)


def check_single(pipeline: Pipeline) -> None:
    """Raise UsageError for a bundle that answers about clips."""
    if (frames := pipeline.manifest.image.frames) is not None:
        raise UsageError(
            f"this bundle answers about clips of {frames} frames, and a stream is asked about one frame at a "
            "time; give a bundle made without --frames, or ask about a clip with vtp-run --video"
        )


def check_asks(prompt: object, alerts: Sequence[object]) -> None:
    """Raise UsageError where nothing would be asked."""
    if prompt is None and not alerts:
        raise UsageError("nothing is asked: give a prompt, or at least one alert")


def check_every(value: object) -> float:
    """Seconds between two questions. Raises UsageError."""
    return _seconds("every", value, 0.0)


def check_timeout(value: object) -> float | None:
    """Seconds without a frame; None: wait. Raises UsageError."""
    return None if value is None else _seconds("timeout", value, 0.001)


def _check_kinds(pipeline: object, source: object, alerts: object, gate: object) -> None:
    """Raise UsageError for what would fail later, in another thread or at the end."""
    if not isinstance(pipeline, Pipeline):
        raise UsageError(f"{quoted_argument(pipeline)} is not a Pipeline; give Pipeline.load(BUNDLE)")
    if not all(hasattr(source, name) for name in ("name", "close", "__iter__")):
        raise UsageError(
            f"{quoted_argument(source)} is not a source of frames; give open_source(...) of a camera, URL, "
            "file or folder, or PushedFrames"
        )
    if not isinstance(alerts, list | tuple):
        raise UsageError(f"alerts {quoted_argument(alerts)} is not a list; give alerts=[Alert(...)]")
    for alert in alerts:
        if not isinstance(alert, Alert):
            raise UsageError(f"{quoted_argument(alert)} is not an Alert; give alerts=[Alert(...)]")
    if gate is not None and not isinstance(gate, Gate):
        raise UsageError(f"gate {quoted_argument(gate)} is not a Gate; give gate=Gate(...)")


def _seconds(name: str, value: object, least: float) -> float:
    if not is_number(value) or not least <= value <= _LONGEST:
        raise UsageError(
            f"{name} {quoted_argument(value)} is not a number of seconds; give {least:g} to {_LONGEST:g}"
        )
    return float(value)
