"""A watcher over frames that a test hands to it: which are asked about, what answers say, how it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from vtp.engines import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.serve.streams.frames import Frame
from vtp.serve.streams.newest import Newest, PushedFrames
from vtp.serve.streams.watcher import Watcher

PROMPT = "what is it ?"


def picture(number: int) -> np.ndarray:
    """Noise that differs from number to number."""
    return np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def frame(number: int, arrived: float | None = None) -> Frame:
    return Frame(picture(number), number, number * 10**9, time.monotonic() if arrived is None else arrived)


class Given:
    """A source of frames that are there already; counts how often it was closed."""

    name = "given"

    def __init__(self, frames: list[Frame]) -> None:
        self.frames, self.closed = frames, 0

    def __iter__(self) -> Iterator[Frame]:
        return iter(self.frames)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def pipe(exported: Callable[[str], Any]) -> Iterator[Pipeline]:
    with Pipeline.load(exported("vispruner").folder, threads=1) as pipeline:
        yield pipeline


def no_thread_is_left() -> bool:
    return not [one for one in threading.enumerate() if one.name.startswith(("vtp-capture", "vtp-watcher"))]


# -- the slot ------------------------------------------------------------------------------------------------


def test_a_slot_gives_the_newest_and_counts_what_it_replaced() -> None:
    slot: Newest[int] = Newest()
    assert [slot.put(number) for number in range(4)] == [True] * 4
    assert (slot.take(), slot.dropped) == (3, 3)
    with pytest.raises(TimeoutError):
        slot.take(timeout=0.01)
    slot.put(4)
    slot.close()
    assert (slot.take(), slot.take(), slot.put(5)) == (4, None, False)


def test_a_slot_that_waits_drops_nothing() -> None:
    slot: Newest[int] = Newest()

    def put_all() -> None:
        for number in range(200):
            slot.put(number, wait=True)
        slot.close()

    thread = threading.Thread(target=put_all)
    thread.start()
    taken = list(iter(slot.take, None))
    thread.join()
    assert (taken, slot.dropped) == (list(range(200)), 0)


def test_close_wakes_who_waits_to_put() -> None:
    slot: Newest[int] = Newest()
    slot.put(0)
    told: list[bool] = []
    thread = threading.Thread(target=lambda: told.append(slot.put(1, wait=True)))
    thread.start()
    slot.close()
    thread.join(10)
    assert told == [False]


# -- answers -------------------------------------------------------------------------------------------------


def test_every_frame_is_answered_as_the_pipeline_does(pipe: Pipeline) -> None:
    source = Given([frame(number) for number in range(5)])
    with Watcher(pipe, source, PROMPT, every_frame=True, max_new_tokens=6, keep_tokens=3) as watcher:
        answers = list(watcher)
    assert [one.frame.number for one in answers] == [0, 1, 2, 3, 4]
    for one in answers:
        right = pipe.generate(picture(one.frame.number), PROMPT, max_new_tokens=6, keep_tokens=3)
        assert (one.text, one.result.token_ids) == (right.text, right.token_ids)
        assert one.visual_tokens == (16, 3)
        assert one.dropped == 0 and {"vision_encoder", "decoder", "ttft"} <= set(one.stages)
    assert (watcher.seen, watcher.asked) == (5, 5)
    assert source.closed and no_thread_is_left()


def test_only_the_newest_frame_is_asked_about(pipe: Pipeline) -> None:
    go_on, all_came = threading.Event(), threading.Event()

    class Held(Given):
        def __iter__(self) -> Iterator[Frame]:
            yield frame(0)
            go_on.wait(10)
            yield from map(frame, range(1, 8))
            all_came.set()

    with Watcher(pipe, Held([]), PROMPT, max_new_tokens=2) as watcher:
        assert next(watcher).frame.number == 0
        go_on.set()
        assert all_came.wait(10)
        answer = next(watcher)
        assert list(watcher) == []
    assert (answer.frame.number, answer.dropped, watcher.seen, watcher.asked) == (7, 6, 8, 2)


def test_frames_are_pushed_from_another_thread(pipe: Pipeline) -> None:
    source = PushedFrames("pushed")
    with Watcher(pipe, source, PROMPT, max_new_tokens=1) as watcher:
        watcher.start()
        for number in range(3):
            source.put(frame(number))
            assert next(watcher).frame.number == number
    assert not source.put(frame(3))


def test_ages_are_those_of_the_clock(pipe: Pipeline) -> None:
    times = iter([10.0, 10.5])
    source = Given([frame(0, arrived=9.75)])
    answer = next(Watcher(pipe, source, PROMPT, max_new_tokens=1, clock=lambda: next(times)))
    assert (answer.asked_age, answer.age) == (0.25, 0.75)
    told = answer.to_json()["frame"]
    assert told == {
        "number": 0,
        "stamp_ns": 0,
        "clock": "unix",
        "name": "",
        "asked_age_ms": 250.0,
        "age_ms": 750.0,
    }


def test_the_prompt_changes_while_it_runs(pipe: Pipeline) -> None:
    source = Given([frame(number) for number in range(4)])
    with Watcher(pipe, source, PROMPT, every_frame=True, max_new_tokens=3) as watcher:
        first = next(watcher)
        watcher.prompt = "another one"
        with pytest.raises(UsageError, match="empty"):
            watcher.prompt = " "
        second = next(watcher)
    assert (first.prompt, second.prompt) == (PROMPT, "another one")
    assert second.text == pipe.generate(picture(1), "another one", max_new_tokens=3).text


def test_a_damaged_frame_is_told_and_left_out(pipe: Pipeline) -> None:
    told: list[str] = []
    broken = Frame(b"\xff\xd8\xff not a jpeg", 1, 0, time.monotonic())
    source = Given([frame(0), broken, frame(2)])
    answers = list(Watcher(pipe, source, PROMPT, every_frame=True, max_new_tokens=1, tell=told.append))
    assert [one.frame.number for one in answers] == [0, 2]
    assert len(told) == 1 and told[0].startswith("frame 1 is left out: ")


# -- how it ends ---------------------------------------------------------------------------------------------


def test_stop_ends_a_wait_and_an_answer(pipe: Pipeline) -> None:
    source = PushedFrames("silent")
    watcher = Watcher(pipe, source, PROMPT)
    threading.Timer(0.2, watcher.stop).start()
    assert list(watcher) == [] and watcher.stopped and no_thread_is_left()
    with pytest.raises(VtpError, match="was stopped"):
        watcher.start()


def test_a_silent_source_ends_with_one_line(pipe: Pipeline) -> None:
    watcher = Watcher(pipe, PushedFrames("the camera"), PROMPT, timeout=0.1)
    with pytest.raises(VtpError, match=r"no frame came from the camera for 0\.1 s"):
        next(watcher)
    assert watcher.stopped and no_thread_is_left()


def test_what_a_source_raises_comes_out(pipe: Pipeline) -> None:
    class Failing(Given):
        def __iter__(self) -> Iterator[Frame]:
            yield from self.frames
            raise VtpError("the cable is out")

    watcher = Watcher(pipe, Failing([frame(0)]), PROMPT, every_frame=True, max_new_tokens=1)
    assert next(watcher).frame.number == 0
    with pytest.raises(VtpError, match="the cable is out"):
        next(watcher)


def test_asyncio_iterates_the_same(pipe: Pipeline) -> None:
    async def watch() -> list[int]:
        source = Given([frame(number) for number in range(3)])
        async with Watcher(pipe, source, PROMPT, every_frame=True, max_new_tokens=1) as watcher:
            return [one.frame.number async for one in watcher]

    assert asyncio.run(watch()) == [0, 1, 2] and no_thread_is_left()


def test_a_cancelled_task_leaves_nothing_behind(pipe: Pipeline) -> None:
    async def watch() -> None:
        watcher = Watcher(pipe, PushedFrames("silent"), PROMPT)
        task = asyncio.ensure_future(watcher.__anext__())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert watcher.stopped

    asyncio.run(watch())
    assert no_thread_is_left()


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "the prompt is empty, or no text"),
        ({"every": -1}, "every -1 is not a number of seconds"),
        ({"timeout": 0}, "timeout 0 is not a number of seconds"),
        ({"keep_tokens": 5}, "keep"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_read(
    pipe: Pipeline, arguments: dict[str, Any], line: str
) -> None:
    with pytest.raises(UsageError, match=line):
        Watcher(pipe, Given([]), **{"prompt": PROMPT, **arguments})
