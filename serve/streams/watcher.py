"""A standing question about a stream: the newest frame each time that the model is free."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import quoted_argument
from vtp.runtime.generation.arguments import is_number
from vtp.runtime.generation.options import GenerateOptions, OptionKeywords
from vtp.runtime.generation.stopping import CANCELLED
from vtp.runtime.generation.stream import Stream
from vtp.runtime.media.images import load_image
from vtp.runtime.pipeline import Pipeline
from vtp.runtime.result import Result
from vtp.serve.streams.answer import FrameAnswer
from vtp.serve.streams.capture import Capture
from vtp.serve.streams.frames import Frame, Source

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's own from Python 3.11 on

_LONGEST = 86400.0  # seconds of `every` and `timeout`


class Watcher:
    """Iterates answers about a source's frames, with `for` or `async for`; a context manager.

    A thread of its own reads the source and keeps only the newest frame. The model runs in the thread that
    iterates (of `async for`, in one thread of the watcher's own), each time about the newest frame. Pipeline
    and watcher serve one iteration at a time; the pipeline is not closed with the watcher.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        source: Source,
        prompt: str,
        *,
        every: float = 0.0,
        every_frame: bool = False,
        timeout: float | None = None,
        tell: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
        **options: Unpack[OptionKeywords],
    ) -> None:
        """Check everything; nothing is read before the first answer is wanted, or `start`.

        every        ask at most once in so many seconds
        every_frame  drop nothing: the source waits until each frame was asked about
        timeout      seconds without a frame after which the iteration ends with VtpError; None: wait
        tell         called with a line about a frame that could not be asked about
        clock        gives the ages' time, as the frames' `arrived` do
        options      of every answer: see `GenerateOptions`

        Raises UsageError for a bad argument, and for a bundle that answers about clips.
        """
        _check_single(pipeline)
        self.asked = 0
        self._pipeline, self._options, self._tell, self._clock = pipeline, options, tell, clock
        self._every = _seconds("every", every, 0.0)
        self._prompt = self._checked(prompt)
        wait = None if timeout is None else _seconds("timeout", timeout, 0.001)
        self._capture = Capture(source, every_frame, wait)
        self._started, self._stopped = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._last = -1  # the frame asked about before
        self._due = 0.0
        self._executor: ThreadPoolExecutor | None = None

    # -- while it runs ---------------------------------------------------------------------------------------

    @property
    def prompt(self) -> str:
        """What is asked. Set it from any thread: it holds from the next frame on. Raises UsageError."""
        return self._prompt

    @prompt.setter
    def prompt(self, text: str) -> None:
        self._prompt = self._checked(text)

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
                self._started.set()
                self._capture.start()

    def stop(self) -> None:
        """End the iteration, an answer that is being written included; safe from any thread, repeatedly."""
        with self._lock:
            self._stopped.set()
            if self._stream is not None:
                self._stream.cancel()
        self._capture.stop()

    # -- answers ---------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[FrameAnswer]:
        return self

    def __next__(self) -> FrameAnswer:
        """The answer about the newest frame. Raises StopIteration when it is over."""
        try:
            while (frame := self._next_frame()) is not None:
                if (answer := self._answer(frame)) is not None:
                    return answer
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
        self._due = time.monotonic() + self._every
        return None if self._stopped.is_set() else frame

    def _answer(self, frame: Frame) -> FrameAnswer | None:
        """None for a frame that cannot be decoded, and for an answer that was stopped."""
        prompt, taken = self._prompt, self._clock()
        try:
            picture = load_image(frame.picture)
        except VtpError as error:
            self._tell(f"frame {frame.number} is left out: {error}")
            return None
        result = self._ask(picture, prompt)
        if result is None:
            return None
        dropped, self._last = frame.number - self._last - 1, frame.number
        self.asked += 1
        arrived = frame.arrived
        return FrameAnswer(frame, prompt, result, taken - arrived, self._clock() - arrived, dropped)

    def _ask(self, picture: Image.Image, prompt: str) -> Result | None:
        stream = self._pipeline.stream(picture, prompt, **self._options)
        with self._lock:
            if self._stopped.is_set():
                return None
            self._stream = stream
        try:
            for _ in stream:
                pass
        finally:
            with self._lock:
                self._stream = None
        return None if stream.result.finish_reason == CANCELLED else stream.result

    def _checked(self, prompt: str) -> str:
        """The prompt, after everything that can be checked of it and of the options without a frame."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError("the prompt is empty, or no text; ask something about the picture")
        blank = Image.new("RGB", (64, 64))
        self._pipeline.prepare(blank, prompt, None, GenerateOptions(**self._options))
        return prompt


def _check_single(pipeline: Pipeline) -> None:
    if (frames := pipeline.manifest.image.frames) is not None:
        raise UsageError(
            f"this bundle answers about clips of {frames} frames, and a stream is asked about one frame at a "
            "time; give a bundle made without --frames, or ask about a clip with vtp-run --video"
        )


def _seconds(name: str, value: object, least: float) -> float:
    if not is_number(value) or not least <= value <= _LONGEST:
        raise UsageError(
            f"{name} {quoted_argument(value)} is not a number of seconds; give {least:g} to {_LONGEST:g}"
        )
    return float(value)
