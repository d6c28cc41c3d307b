"""Answers that end before their text does: cancelled, or out of time, on a clock that the test turns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.runtime.generation import stopping
from vtp.runtime.generation.stopping import Clock, StopSignal
from vtp.runtime.media import pictures
from vtp.runtime.stages.runner import StageRunner
from vtp.runtime.stages.stage import Stage

PROMPT = "what shape is the red ?"
OTHER = Image.new("RGB", (60, 60), "green")


@pytest.fixture(scope="module")
def pipe(exported: Callable[[str], Any]) -> Iterator[Pipeline]:
    with Pipeline.load(exported("vispruner").folder, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def names(pipe: Pipeline) -> list[str]:
    """The stages up to the first token, in their order."""
    keep = pipe.manifest.visual.default_keep
    return [info.name for when in ("image", "prefill") for info in pipe.manifest.stages_for(when, keep)]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds on the clock of answers; the test turns it."""
    seconds = [0.0]
    monkeypatch.setattr(stopping, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    return seconds


def before_each(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, act: Callable[[Any], object]
) -> None:
    """Have a method call `act` with its object first."""
    method = getattr(owner, name)

    def wrapped(self: Any, *args: Any, **options: Any) -> Any:
        act(self)
        return method(self, *args, **options)

    monkeypatch.setattr(owner, name, wrapped)


def in_a_thread(act: Callable[[], object]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


# -- cancel --------------------------------------------------------------------------------------------------


def test_no_stage_runs_after_a_cancel(
    pipe: Pipeline, picture: Image.Image, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled from another thread while a stage runs, for every stage up to the first token."""
    assert len(names) >= 5
    for place, last in enumerate(names):
        stream, ran = pipe.stream(picture, PROMPT), list[str]()

        def act(stage: Stage, last: str = last, stream: Any = stream, ran: list[str] = ran) -> None:
            ran.append(stage.info.name)
            if stage.info.name == last:
                in_a_thread(stream.cancel)

        with monkeypatch.context() as patch:
            before_each(patch, Stage, "run", act)
            assert list(stream) == []
        assert ran == names[: place + 1]
        assert stream.result.finish_reason == "cancelled"
        assert (stream.result.raw_text, stream.result.token_ids) == ("", [])
    assert pipe.generate(picture, PROMPT, max_new_tokens=1).token_ids  # and the pipeline is free


def test_no_piece_comes_after_a_cancel(
    pipe: Pipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a new one nor what was held back for a stop string; cancelled between pieces, or in a step."""
    whole = pipe.generate(picture, PROMPT, max_new_tokens=30).raw_text
    first = next(pipe.stream(picture, PROMPT, max_new_tokens=30))
    stop = whole[len(first) : len(first) + 3] + "never there"
    for options in ({}, {"stop": stop}):
        stream = pipe.stream(picture, PROMPT, max_new_tokens=30, **options)
        pieces, tokens = [next(stream)], list(stream.result.token_ids)
        stream.cancel()
        pieces += stream
        assert pieces == [first] and stream.result.raw_text == first
        assert stream.result.finish_reason == "cancelled"
        assert stream.result.token_ids == tokens
        stream = pipe.stream(picture, PROMPT, max_new_tokens=30, **options)

        def in_a_step(_: object, stream: Any = stream) -> None:
            if stream._answer.result.raw_text:
                in_a_thread(stream.cancel)

        with monkeypatch.context() as patch:
            before_each(patch, StageRunner, "step", in_a_step)
            assert list(stream) == [first]
        assert stream.result.raw_text == first and stream.result.token_ids == tokens


def test_several_pictures_stop_between_their_runs(
    pipe: Pipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = pipe.manifest.graphs["vision_encoder.onnx"].axes
    monkeypatch.setitem(axes, "batch", [*axes["batch"][:-1], 1])
    stream, ran = pipe.stream([picture, OTHER, picture], PROMPT), list[str]()

    def act(stage: Stage) -> None:
        ran.append(stage.info.name)
        if ran.count("vision_encoder") == 2:
            stream.cancel()

    before_each(monkeypatch, Stage, "run", act)
    assert list(stream) == [] and ran.count("vision_encoder") == 2 and ran[-1] == "vision_encoder"


# -- time ----------------------------------------------------------------------------------------------------


def test_time_that_is_up_ends_the_prompts_stages(
    pipe: Pipeline, picture: Image.Image, names: list[str], now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage takes a second here."""
    ran: list[str] = []
    before_each(monkeypatch, Stage, "run", lambda stage: ran.append(stage.info.name))
    before_each(monkeypatch, Stage, "run", lambda _: now.__setitem__(0, now[0] + 1))
    for seconds in range(1, len(names) + 1):
        ran.clear()
        result = pipe.generate(picture, PROMPT, timeout_ms=seconds * 1000)
        assert ran == names[:seconds]
        assert (result.finish_reason, result.raw_text, result.token_ids) == ("timeout", "", [])
        assert result.timings.total == pytest.approx(seconds * 1000) and result.timings.ttft == 0
    assert pipe.generate(picture, PROMPT, max_new_tokens=3, timeout_ms=1e9).finish_reason == "length"


@pytest.mark.parametrize("stop", [None, "never there"])
def test_time_that_is_up_keeps_the_text_so_far(
    pipe: Pipeline, picture: Image.Image, now: list[float], monkeypatch: pytest.MonkeyPatch, stop: str | None
) -> None:
    """Each step takes a second here; the partial answer is the whole one's beginning."""
    wanted = pipe.generate(picture, PROMPT, max_new_tokens=4)
    before_each(monkeypatch, StageRunner, "step", lambda _: now.__setitem__(0, now[0] + 1))
    stream = pipe.stream(picture, PROMPT, max_new_tokens=30, timeout_ms=3500, stop=stop)
    pieces = list(stream)
    assert stream.result.finish_reason == "timeout"
    assert stream.result.token_ids == wanted.token_ids
    assert "".join(pieces) == stream.result.raw_text == wanted.raw_text


def test_a_text_that_ends_in_time_has_its_own_reason(
    pipe: Pipeline, picture: Image.Image, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    before_each(monkeypatch, StageRunner, "step", lambda _: now.__setitem__(0, now[0] + 1))
    assert pipe.generate(picture, PROMPT, max_new_tokens=3, timeout_ms=2500).finish_reason == "length"


def test_batches_end_with_what_there_is(
    pipe: Pipeline, picture: Image.Image, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches of two: time is up in the steps of the second, or before it."""
    images, prompts = [picture, OTHER, OTHER, picture], [PROMPT, PROMPT, "how many ?", PROMPT]
    whole = pipe.generate_batch(images, prompts, max_new_tokens=6, batch_size=2)
    before_each(monkeypatch, StageRunner, "step_rows", lambda _: now.__setitem__(0, now[0] + 1))
    loads: list[object] = []
    monkeypatch.setattr(
        pictures,
        "load_image",
        lambda *given, load=pictures.load_image: loads.append(given) or load(*given),
    )
    for seconds, second in ((7.5, 3), (5.5, 1), (2.5, 0)):
        now[0] = 0
        loads.clear()
        cut = pipe.generate_batch(images, prompts, max_new_tokens=6, batch_size=2, timeout_ms=seconds * 1e3)
        first = min(6, int(seconds) + 1)
        assert [len(one.token_ids) for one in cut] == [first, first, second, second]
        assert len(loads) == (4 if second else 2)  # nothing is decoded for an answer that does not begin
        for one, wanted in zip(cut, whole, strict=True):
            done = len(one.token_ids) == 6
            assert one.finish_reason == (wanted.finish_reason if done else "timeout")
            assert one.token_ids == wanted.token_ids[: len(one.token_ids)]
            assert wanted.raw_text.startswith(one.raw_text.rstrip("\ufffd"))


def test_a_stream_that_waits_for_its_reader_takes_no_time(
    pipe: Pipeline, picture: Image.Image, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    before_each(monkeypatch, Stage, "run", lambda _: now.__setitem__(0, now[0] + 1))
    wanted = pipe.generate(picture, PROMPT, max_new_tokens=2).timings
    stream = pipe.stream(picture, PROMPT, max_new_tokens=2, timeout_ms=wanted.total + 1)
    now[0] += 1000
    assert list(stream) and stream.result.finish_reason == "length"
    assert stream.result.timings.ttft == pytest.approx(wanted.ttft) and wanted.ttft >= 5000
    assert stream.result.timings.total == pytest.approx(wanted.total)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "5", [5], 10**400])
def test_a_timeout_that_is_none(pipe: Pipeline, picture: Image.Image, value: Any) -> None:
    for act in (
        lambda: pipe.generate(picture, PROMPT, timeout_ms=value),
        lambda: pipe.stream(picture, PROMPT, timeout_ms=value),
        lambda: pipe.generate_batch([picture], [PROMPT], timeout_ms=value),
    ):
        with pytest.raises(UsageError, match=r"timeout_ms .* is not a number of milliseconds above 0"):
            act()
    assert StopSignal(Clock(), np.float32(1e9)).reason is None


# -- arguments -----------------------------------------------------------------------------------------------


class Odd:
    """A value that cannot be shown, and equals everything."""

    def __repr__(self) -> str:
        raise RuntimeError("no\nname")

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


ODD: list[Any] = [
    *(float("nan"), float("inf"), -float("inf"), -0.5, -1, 0, True, False, np.bool_(True), 1 + 2j),
    *(
        "1",
        "",
        b"1",
        [],
        [1],
        [-(10**5000)],
        {},
        {1},
        (),
        object(),
        Odd(),
        Odd,
        10**400,
        -(10**5000),
        1e-320,
        1.5,
    ),
    *(np.array([1, 2]), np.array(1), np.array([]), np.float64("nan"), np.float32(-1), np.int8(-1)),
    *(np.datetime64("2026"), "\ud800", range(3), iter([1]), Ellipsis),
]
NUMBERS = ["max_new_tokens", "keep_tokens", "budget_ms", "temperature", "top_p", "seed", "timeout_ms", "stop"]


@pytest.mark.parametrize("name", NUMBERS)
def test_arguments_are_served_or_refused_in_one_line(pipe: Pipeline, picture: Image.Image, name: str) -> None:
    refused = 0
    for value in ODD:
        options: dict[str, Any] = {"max_new_tokens": 2, name: value}
        for act in (
            lambda options=options: pipe.stream(picture, PROMPT, **options),
            lambda options=options: pipe.generate_batch([picture], [PROMPT], **options),
        ):
            try:
                act()
            except VtpError as error:
                refused += 1
                assert isinstance(error, UsageError) and "\n" not in str(error) and len(str(error)) < 300
                text = str(error).removeprefix("prompt 1 of 1: ")
                assert text.startswith((name, "a stop string"))
    assert refused > len(ODD)


def test_pictures_are_served_or_refused_in_one_line(pipe: Pipeline) -> None:
    for value in [*ODD, None, [None], [[]], {"image": 1}]:
        with pytest.raises(VtpError) as caught:
            pipe.generate(value, PROMPT)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64])
def test_numpys_numbers_are_numbers(pipe: Pipeline, picture: Image.Image, kind: Any) -> None:
    options = {"max_new_tokens": 3, "temperature": 1, "top_p": 1, "seed": 127, "keep_tokens": 6}
    wanted = pipe.generate_batch([picture] * 2, [PROMPT] * 2, **options)
    found = pipe.generate_batch(
        [picture] * 2, [PROMPT] * 2, **{name: kind(value) for name, value in options.items()}
    )
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]


@pytest.mark.parametrize("threads", [100_000, 10**30])
def test_threads_that_no_machine_has_use_for_are_refused(
    exported: Callable[[str], Any], threads: int
) -> None:
    """Each would take memory and a place in the kernel's queue: 100,000 stop a small machine."""
    with pytest.raises(UsageError, match="more than this machine has use for; choose 1 to"):
        Pipeline.load(exported("vispruner").folder, "ort-cpu", threads=threads)
