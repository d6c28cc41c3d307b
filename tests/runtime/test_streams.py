"""Streams of a pipeline: pieces, cancelling, other threads, closing."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from vtp.engines import VtpError
from vtp.runtime import Pipeline

from .test_pipeline import PROMPT, refuse


def test_pieces_add_up(pipe: Pipeline, picture: Image.Image) -> None:
    stream = pipe.stream(picture, PROMPT, max_new_tokens=20)
    refuse("has not started", lambda: stream.result, VtpError)
    pieces = list(stream)
    whole = pipe.generate(picture, PROMPT, max_new_tokens=20)
    assert "".join(pieces) == stream.result.raw_text == whole.raw_text
    assert len(pieces) > 1 and all(pieces)
    assert list(stream) == []


def test_an_abandoned_stream_frees_the_pipeline_at_once(pipe: Pipeline, picture: Image.Image) -> None:
    gc.disable()
    try:
        for piece in pipe.stream(picture, PROMPT, max_new_tokens=50):
            assert piece
            break
        assert pipe.generate(picture, PROMPT, max_new_tokens=1).token_ids
    finally:
        gc.enable()


def test_a_stream_that_never_started_holds_nothing(pipe: Pipeline, picture: Image.Image) -> None:
    waiting = pipe.stream(picture, PROMPT)
    assert pipe.generate(picture, PROMPT, max_new_tokens=1).token_ids
    assert next(waiting)
    waiting.close()


def test_a_second_generation_is_refused_while_a_stream_is_open(pipe: Pipeline, picture: Image.Image) -> None:
    stream = pipe.stream(picture, PROMPT, max_new_tokens=20)
    first = next(stream)
    refuse("busy", lambda: pipe.generate(picture, PROMPT), VtpError)
    other = pipe.stream(picture, PROMPT)
    refuse("busy", lambda: next(other), VtpError)
    rest = "".join(stream)
    assert first + rest == pipe.generate(picture, PROMPT, max_new_tokens=20).raw_text  # undisturbed


def test_and_from_another_thread(pipe: Pipeline, picture: Image.Image) -> None:
    stream = pipe.stream(picture, PROMPT, max_new_tokens=20)
    next(stream)
    seen: list[BaseException] = []

    def other() -> None:
        try:
            pipe.generate(picture, PROMPT)
        except VtpError as error:
            seen.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    stream.close()
    assert len(seen) == 1 and "one Pipeline per thread" in str(seen[0])
    assert pipe.generate(picture, PROMPT, max_new_tokens=1).token_ids


def test_many_threads_get_the_answer_or_a_refusal(pipe: Pipeline, picture: Image.Image) -> None:
    wanted = pipe.generate(picture, PROMPT, max_new_tokens=10).token_ids
    answers: list[list[int]] = []
    refusals: list[str] = []

    def ask() -> None:
        for _ in range(5):
            try:
                answers.append(pipe.generate(picture, PROMPT, max_new_tokens=10).token_ids)
            except VtpError as error:
                refusals.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers and all(answer == wanted for answer in answers)
    assert all("busy" in refusal for refusal in refusals)
    assert len(answers) + len(refusals) == 20


def test_cancel_ends_a_stream(pipe: Pipeline, picture: Image.Image) -> None:
    stream = pipe.stream(picture, PROMPT, max_new_tokens=50)
    next(stream)
    stream.cancel()
    list(stream)
    assert stream.result.finish_reason == "cancelled"
    assert len(stream.result.token_ids) < 10
    assert pipe.generate(picture, PROMPT, max_new_tokens=1).token_ids


def test_cancel_before_the_start(pipe: Pipeline, picture: Image.Image) -> None:
    stream = pipe.stream(picture, PROMPT)
    stream.cancel()
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled" and stream.result.token_ids == []


def test_cancel_from_another_thread(pipe: Pipeline, picture: Image.Image) -> None:
    stream = pipe.stream(picture, PROMPT, max_new_tokens=100)
    for number, _ in enumerate(stream):
        if number == 1:
            thread = threading.Thread(target=stream.cancel)
            thread.start()
            thread.join()
    assert stream.result.finish_reason == "cancelled"


def test_an_error_half_way_frees_the_pipeline(
    pipe: Pipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtp.runtime.generation.sampling import Sampler

    def broken(*_: object) -> int:
        raise VtpError("the model gave NaN")

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "pick", broken)
        refuse("NaN", lambda: pipe.generate(picture, PROMPT), VtpError)
    assert pipe.generate(picture, PROMPT, max_new_tokens=1).token_ids


@pytest.mark.parametrize("act", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_pipeline_is_not_copied(pipe: Pipeline, act: Callable[[Pipeline], object]) -> None:
    refuse(
        r"cannot be pickled or copied, .*load the bundle again, .*Pipeline\.load", lambda: act(pipe), VtpError
    )


# -- closing -------------------------------------------------------------------------------------------------


def test_a_closed_pipeline_is_refused(exported: Callable[[str], Any], picture: Image.Image) -> None:
    with Pipeline.load(exported("none").folder, threads=1) as pipe:
        result = pipe.generate(picture, PROMPT, max_new_tokens=1)
    pipe.close()
    assert result.token_ids
    refuse("this pipeline is closed", lambda: pipe.generate(picture, PROMPT), VtpError)


@pytest.mark.parametrize("name", ["none", "adaptprune"])
def test_closing_under_an_open_stream_is_said(
    exported: Callable[[str], Any], picture: Image.Image, name: str
) -> None:
    """Never a short answer that says it is whole."""
    pipe = Pipeline.load(exported(name).folder, threads=1)
    stream = pipe.stream(picture, PROMPT, max_new_tokens=30)
    next(stream)
    pipe.close()
    refuse("this pipeline is closed", lambda: list(stream), VtpError)
    assert stream.result.finish_reason == "cancelled"
