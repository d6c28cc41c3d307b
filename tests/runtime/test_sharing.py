"""A pipeline that is asked from several threads, and what it says of itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

import vtp.runtime
from vtp.engines import UsageError, VtpError
from vtp.runtime import Busy, Pipeline

from .test_pipeline import PROMPT, refuse


def test_busy_is_an_error_of_its_own(pipe: Pipeline, picture: Image.Image) -> None:
    stream = pipe.stream(picture, PROMPT, max_new_tokens=20)
    next(stream)
    asks: list[Callable[[], object]] = [
        lambda: pipe.generate(picture, PROMPT),
        lambda: pipe.generate(picture, PROMPT, wait=0.01),
        lambda: pipe.generate(picture, PROMPT, wait=True, timeout_ms=10),
        lambda: pipe.generate_batch([picture], [PROMPT], wait=0.01),
        lambda: pipe.decide(picture, PROMPT, ["red", "blue"], labels="texts", wait=0.01),
        lambda: next(pipe.stream(picture, PROMPT, wait=0.01)),
    ]
    for ask in asks:
        with pytest.raises(Busy, match="wait=SECONDS"):
            ask()
    stream.close()
    assert issubclass(Busy, VtpError) and not issubclass(Busy, UsageError)
    assert pipe.generate(picture, PROMPT, max_new_tokens=1, wait=True).token_ids


def test_threads_that_wait_are_all_answered(pipe: Pipeline, picture: Image.Image) -> None:
    wanted = pipe.generate(picture, PROMPT, max_new_tokens=6).token_ids
    answers: list[list[int]] = []

    def ask() -> None:
        for _ in range(4):
            answers.append(pipe.generate(picture, PROMPT, max_new_tokens=6, wait=60).token_ids)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [wanted] * 16


def test_what_waits_when_the_pipeline_is_closed_is_told(
    exported: Callable[[str], Any], picture: Image.Image
) -> None:
    pipe = Pipeline.load(exported("vispruner").folder, threads=1)
    stream = pipe.stream(picture, PROMPT, max_new_tokens=20)
    next(stream)
    told: list[str] = []

    def ask() -> None:
        try:
            pipe.generate(picture, PROMPT, wait=True)
        except VtpError as error:
            told.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    pipe.close()
    stream.close()
    thread.join()
    assert len(told) == 1 and "this pipeline is closed" in told[0]


@pytest.mark.parametrize("wait", [-1, float("nan"), float("inf"), "1", None, 1e30])
def test_a_wait_that_is_no_time_is_refused(pipe: Pipeline, picture: Image.Image, wait: Any) -> None:
    refuse(r"wait .* is not a time; give seconds", lambda: pipe.generate(picture, PROMPT, wait=wait))


def test_a_pipeline_says_what_it_is(exported: Callable[[str], Any], pipe: Pipeline) -> None:
    folder = exported("vispruner").folder
    assert pipe.keep_counts == (3, 6)
    assert repr(pipe) == (
        f"<Pipeline '{folder}' on ort-cpu: vispruner, 16 → 6 visual tokens (keep_counts 3, 6)>"
    )
    with Pipeline.load(folder, "ort-cpu", 1) as other:
        pass
    assert f"'{folder}' closed: vispruner" in repr(other)


def test_types_that_signatures_name_are_exported() -> None:
    for name in ("Busy", "Images", "Messages", "NO_PICTURE", "Pipeline", "Result", "Stream"):
        assert name in vtp.runtime.__all__ and hasattr(vtp.runtime, name)
    assert vtp.runtime.Images is vtp.runtime.pipeline.Images
