"""A watcher over frames that a test hands to it: which are asked about, what answers say, how it ends."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from vtp.engines import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.serve.streams.alerts import Alert, AlertReading
from vtp.serve.streams.frames import Frame
from vtp.serve.streams.gate import Gate
from vtp.serve.streams.newest import Newest, PushedFrames
from vtp.serve.streams.watcher import Watcher, check_single

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


def test_a_gate_holds_back_what_is_as_before(pipe: Pipeline) -> None:
    still = [Frame(picture(number // 4), number, 0, time.monotonic()) for number in range(12)]
    with Watcher(pipe, Given(still), PROMPT, gate=Gate(), every_frame=True, max_new_tokens=1) as watcher:
        answers = list(watcher)
    assert [(one.frame.number, one.skipped, one.dropped) for one in answers] == [
        (0, 0, 0),
        (4, 3, 0),
        (8, 3, 0),
    ]
    assert (watcher.seen, watcher.asked, watcher.skipped) == (12, 3, 9)
    assert answers[1].to_json()["gate"] == {"change": answers[1].change, "skipped": 3}
    assert "gate" not in next(Watcher(pipe, Given(still), PROMPT, max_new_tokens=1)).to_json()


def test_a_new_prompt_passes_the_gate(pipe: Pipeline) -> None:
    still = [Frame(picture(0), number, 0, time.monotonic()) for number in range(4)]
    with Watcher(pipe, Given(still), PROMPT, gate=Gate(), every_frame=True, max_new_tokens=1) as watcher:
        next(watcher)
        watcher.prompt = "another one"
        assert next(watcher).prompt == "another one"
        assert list(watcher) == []


def test_every_is_the_least_time_between_two_questions(pipe: Pipeline) -> None:
    """Waits are counted from question to question, and the frame is the newest at the end of a wait."""

    class Ticking(Given):
        def __iter__(self) -> Iterator[Frame]:
            for number in range(60):
                yield frame(number)
                time.sleep(0.02)

    with Watcher(pipe, Ticking([]), PROMPT, every=0.25, max_new_tokens=1) as watcher:
        answers = [next(watcher) for _ in range(3)]
    taken = [one.frame.arrived + one.asked_age for one in answers]
    assert all(later - earlier >= 0.25 for earlier, later in pairwise(taken))
    assert all(one.dropped > 0 for one in answers[1:])


# -- alerts --------------------------------------------------------------------------------------------------

OPTIONS = ("red", "green", "blue")
COLORS = [Alert(PROMPT, options=OPTIONS, answer=one, threshold=0.01, hysteresis=0) for one in OPTIONS]


def test_alerts_are_the_pipelines_decisions_and_share_one_encoder_run(exported: Any) -> None:
    seen: list[tuple[str, int]] = []

    def note(reading: AlertReading, frame: Frame) -> None:
        seen.append((reading.answer, frame.number))

    with Pipeline.load(exported("vispruner").folder, threads=1, vision_feature_cache=1) as own:
        frames = [frame(number) for number in range(3)]
        options = {"every_frame": True, "max_new_tokens": 2}
        with Watcher(own, Given(frames), PROMPT, alerts=COLORS, on_alert=note, **options) as watcher:
            answers = list(watcher)
        for one in answers:
            right = own.decide(picture(one.frame.number), PROMPT, OPTIONS)
            assert [reading.probability for reading in one.alerts] == list(right.probabilities.values())
            assert {reading.label_mass for reading in one.alerts} == {right.label_mass}
            reused = [reading.decision.timings.reused_stages for reading in one.alerts]
            assert reused[0] == [] and "vision_encoder" in reused[1] and "vision_encoder" in reused[2]
            assert one.result is not None and "vision_encoder" in one.result.timings.reused_stages
    raised = [
        (reading.answer, one.frame.number) for one in answers for reading in one.alerts if reading.event
    ]
    assert seen == raised and seen


def test_with_prefix_caching_a_frame_is_read_once(exported: Any) -> None:
    """The second question about a frame reads only its own words; decisions stay what they are."""
    folder = exported("vispruner").folder
    with Pipeline.load(folder, threads=1, vision_feature_cache=1, prefix_caching=True) as own:
        with Watcher(own, Given([frame(0)]), alerts=COLORS) as watcher:
            (answer,) = list(watcher)
        right = own.decide(picture(0), PROMPT, OPTIONS)
    reused = [reading.decision.timings.reused_tokens for reading in answer.alerts]
    assert reused[0] == 0 and all(tokens >= 6 for tokens in reused[1:])  # the six visual ones at least
    for reading, share in zip(answer.alerts, right.probabilities.values(), strict=True):
        assert reading.probability == pytest.approx(share, abs=1e-5)


def test_alerts_may_be_all_that_is_asked(pipe: Pipeline) -> None:
    with Watcher(pipe, Given([frame(0)]), alerts=COLORS[:1], keep_tokens=3) as watcher:
        answer = next(watcher)
    assert (answer.text, answer.result, answer.prompt, answer.visual_tokens) == ("", None, None, (16, 3))
    told = answer.to_json()
    assert "text" not in told and told["alerts"][0]["answer"] == "red" and "ttft" in told["timings"]


def test_stop_ends_a_decision(pipe: Pipeline) -> None:
    """`on_alert` comes between two decisions, of which the second is then not made."""
    seen: list[AlertReading] = []

    def stop(reading: AlertReading, frame: Frame) -> None:
        seen.append(reading)
        watcher.stop()

    alerts = [Alert(PROMPT, options=OPTIONS, answer="red", threshold=1e-9, hysteresis=0)] * 2
    watcher = Watcher(pipe, Given([frame(0)]), PROMPT, alerts=alerts, on_alert=stop)
    assert list(watcher) == [] and watcher.asked == 0 and len(seen) == 1


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


def test_a_watcher_that_is_dropped_stops_reading(pipe: Pipeline) -> None:
    source = Given([frame(number) for number in range(3)])
    watcher = Watcher(pipe, source, PROMPT, every_frame=True, max_new_tokens=1)
    assert next(watcher).frame.number == 0 and not no_thread_is_left()
    del watcher
    gc.collect()
    assert source.closed == 1
    for thread in threading.enumerate():
        if thread.name.startswith("vtp-capture"):
            thread.join(10)
    assert no_thread_is_left()


def test_numbers_that_begin_anew_are_no_negative_loss(pipe: Pipeline) -> None:
    source = Given([frame(7), frame(0), frame(1)])
    answers = list(Watcher(pipe, source, PROMPT, every_frame=True, max_new_tokens=1))
    assert [answer.dropped for answer in answers] == [7, 0, 0]


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
        ({"prompt": None}, "nothing is asked"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "the prompt is empty, or no text"),
        ({"every": -1}, "every -1 is not a number of seconds"),
        ({"timeout": 0}, "timeout 0 is not a number of seconds"),
        ({"keep_tokens": 5}, "keep"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"gate": 0.5}, "gate 0.5 is not a Gate"),
        ({"alerts": ["on fire"]}, "'on fire' is not an Alert"),
        ({"alerts": "on fire ?"}, "alerts 'on fire .' is not a list"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_read(
    pipe: Pipeline, arguments: dict[str, Any], line: str
) -> None:
    with pytest.raises(UsageError, match=line):
        Watcher(pipe, Given([]), **{"prompt": PROMPT, **arguments})


def test_a_bundle_for_clips_is_refused(pipe: Pipeline) -> None:
    spec = replace(pipe.manifest.image, frames=8)
    with pytest.raises(UsageError, match="answers about clips of 8 frames, and a stream is asked about one"):
        check_single(cast(Pipeline, SimpleNamespace(manifest=replace(pipe.manifest, image=spec))))
