"""One frame's questions: the alerts, each from one prefill, then the prompt. Any thread may cancel them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.runtime.bundle.stream_info import uses_earlier
from vtp.runtime.decisions.answer import DecisionAnswer, decide
from vtp.runtime.decisions.decision import Decision
from vtp.runtime.decisions.question import Question
from vtp.runtime.generation.options import GenerateOptions
from vtp.runtime.pipeline import Pipeline
from vtp.runtime.result import Result
from vtp.serve.streams.alerts import Alert, AlertReading, AlertState

# What an alert takes of the options for answers.
_SHARED = ("keep_tokens", "budget_ms", "allow_special_tokens")


def feature_cache(questions: int, stream_reuse: bool) -> int:
    """How many pictures' vision features a pipeline keeps, for questions about one frame to share them.

    With `stream_reuse` the vision stages keep the last picture themselves.
    """
    return int(questions > 1 and not stream_reuse)


class Cancelled(Exception):
    """The watch was stopped amid a frame's questions."""


class Asker:
    """Asks a pipeline; `cancel` ends it for good, before the next stage or token.

    With more than one question, a pipeline that was loaded with `vision_feature_cache=1` runs the image
    stages once for all of them.
    """

    def __init__(self, pipeline: Pipeline, options: dict[str, Any], alerts: Sequence[Alert]) -> None:
        """Check the alerts' questions. Raises UsageError."""
        self._pipeline, self._options = pipeline, options
        shared = {name: options[name] for name in _SHARED if name in options}
        self._decision_options = GenerateOptions(max_new_tokens=1, **shared)
        self._states = [AlertState(alert) for alert in alerts]
        self._questions = [alert.asked for alert in alerts]
        self._lock = threading.Lock()
        self._cancelled = False
        self._cancel_current: Callable[[], None] = _nothing
        for question in self._questions:
            self._prepared(_blank(), question)

    def check(self, prompt: str) -> str:
        """The prompt, after all that can be checked of it and of the options without a frame."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError("the prompt is empty, or no text; ask something about the picture")
        self._pipeline.prepare(_blank(), prompt, None, GenerateOptions(**self._options))
        return prompt

    def begin(self) -> None:
        """Reuse nothing of pictures that were asked about before this stream's. Raises Busy."""
        if uses_earlier(self._pipeline.manifest):
            with self._pipeline.claimed() as runner:
                runner.images.forget()

    def answer(self, picture: Image.Image, prompt: str) -> Result:
        """The prompt's answer. Raises Cancelled."""
        stream = self._pipeline.stream(picture, prompt, **self._options)
        with self._running(stream.cancel):
            for _ in stream:
                pass
        return stream.result

    def read_alerts(self, picture: Image.Image, clock: Callable[[], float]) -> Iterator[AlertReading]:
        """A reading of every alert, one after the other. Raises Cancelled."""
        for state, question in zip(self._states, self._questions, strict=True):
            yield state.read(self._decide(picture, question), clock())

    def cancel(self) -> None:
        """End what runs, and refuse all that comes."""
        with self._lock:
            self._cancelled = True
            self._cancel_current()

    def _decide(self, picture: Image.Image, question: Question) -> Decision:
        answer = self._prepared(picture, question)
        with self._running(answer.request.stop_signal.cancel), self._pipeline.claimed() as runner:
            return decide(runner, answer)

    def _prepared(self, picture: Image.Image, question: Question) -> DecisionAnswer:
        return self._pipeline.prepare_decision(picture, question, self._decision_options)

    @contextmanager
    def _running(self, cancel: Callable[[], None]) -> Iterator[None]:
        """Let `cancel` end the body, which then raises Cancelled."""
        with self._lock:
            if self._cancelled:
                raise Cancelled
            self._cancel_current = cancel
        try:
            yield
        except VtpError:
            if self._cancelled:
                raise Cancelled from None
            raise
        finally:
            with self._lock:
                self._cancel_current = _nothing
        if self._cancelled:
            raise Cancelled


def _nothing() -> None:
    pass


def _blank() -> Image.Image:
    return Image.new("RGB", (64, 64))
