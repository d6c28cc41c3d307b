"""The bundle behind a node: opened and warmed once, then asked about one picture at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.runtime.bundle.stream_info import grey_line, uses_earlier
from vtp.runtime.decisions.decision import Decision
from vtp.runtime.decisions.question import Question
from vtp.runtime.generation.options import GenerateOptions
from vtp.runtime.generation.stopping import CANCELLED
from vtp.runtime.generation.stream import Stream
from vtp.runtime.pipeline import Pipeline
from vtp.runtime.result import Result
from vtp.serve.robots.settings import Settings, check_asks
from vtp.serve.streams.asking import feature_cache

__all__ = ["Model"]


class Model:
    """A pipeline, and how a node's settings ask it. One thread asks; `cancel` and `check` are for any."""

    def __init__(self, pipeline: Pipeline, notes: Sequence[str] = ()) -> None:
        """`notes` are lines for the log about this bundle on this machine."""
        self.pipeline, self.notes = pipeline, tuple(notes)
        self._lock = threading.Lock()
        self._stream: Stream | None = None

    @classmethod
    def load(cls, settings: Settings) -> Model:
        """Open the bundle, check that the settings fit it, and run it once on a blank picture.

        Raises VtpError for a bundle that cannot be opened here, UsageError for settings that do not fit it.
        """
        if not settings.bundle:
            raise UsageError("there is no bundle: set the parameter bundle to a folder that vtp-export made")
        check_asks(settings)
        pipeline = Pipeline.load(
            settings.bundle,
            settings.engine,
            settings.threads or None,
            vision_feature_cache=feature_cache(_questions(settings), settings.stream_reuse),
            stream_reuse=settings.stream_reuse,
        )
        try:
            _check_single(pipeline)
            model = cls(pipeline, _notes(pipeline, settings))
            model.check(settings)
            pipeline.warmup()
        except BaseException:
            pipeline.close()
            raise
        return model

    def check(self, settings: Settings) -> None:
        """Raise UsageError or VtpError for questions and counts that this bundle does not take."""
        blank = Image.new("RGB", (64, 64))
        if settings.prompt.strip():
            self.pipeline.prepare(blank, settings.prompt, None, _options(settings))
        if settings.alert.strip():
            question = Question.of(settings.alert)
            self.pipeline.prepare_decision(blank, question, _options(settings, 1))

    def begin(self) -> None:
        """Reuse nothing of pictures that were asked about before."""
        if uses_earlier(self.pipeline.manifest):
            with self.pipeline.claimed() as runner:
                runner.images.forget()

    def ask(self, picture: np.ndarray, settings: Settings, stopped: threading.Event) -> Result | None:
        """The answer to the standing question; None if it was cancelled, or `stopped` before it began."""
        stream = self.pipeline.stream(picture, settings.prompt, **vars(_options(settings)))
        with self._lock:
            if stopped.is_set():
                return None
            self._stream = stream
        try:
            for _ in stream:
                pass
        finally:
            with self._lock:
                self._stream = None
        return None if stream.result.finish_reason == CANCELLED else stream.result

    def decide(self, picture: np.ndarray, settings: Settings) -> Decision:
        """How likely the alert's answers are."""
        keep = settings.keep_tokens or None
        return self.pipeline.decide(picture, settings.alert, keep_tokens=keep)

    def cancel(self, stopped: threading.Event) -> None:
        """Set `stopped`, and end an answer that is being written."""
        with self._lock:
            stopped.set()
            if self._stream is not None:
                self._stream.cancel()

    def close(self) -> None:
        """Free the graphs."""
        self.pipeline.close()


def _options(settings: Settings, most: int | None = None) -> GenerateOptions:
    return GenerateOptions(
        max_new_tokens=most or settings.max_tokens, keep_tokens=settings.keep_tokens or None
    )


def _questions(settings: Settings) -> int:
    return bool(settings.alert) + bool(settings.prompt)


def _notes(pipeline: Pipeline, settings: Settings) -> list[str]:
    line = grey_line(pipeline.manifest.stages, "the parameter stream_reuse")
    return [*pipeline.notes, *([line] if line and not settings.stream_reuse else [])]


def _check_single(pipeline: Pipeline) -> None:
    if (frames := pipeline.manifest.image.frames) is not None:
        raise VtpError(
            f"this bundle answers about clips of {frames} frames, and a node asks about one frame at a time; "
            "give a bundle made without --frames"
        )
