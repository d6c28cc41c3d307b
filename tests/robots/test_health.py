"""What /diagnostics says, by frame age, drops, latency and failures; alarms; the JSON of an answer."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from vtp.runtime.decisions.decision import Decision
from vtp.runtime.result import Result, Timings, VisualTokens
from vtp.serve.robots.answers import Alarm, Answer, Received
from vtp.serve.robots.health import Health, Level
from vtp.serve.robots.settings import Phase

SECOND = 10**9
START = 1000 * SECOND


def frame(seconds: float, number: int = 0, stamp: bool = True) -> Received:
    taken = START + int(seconds * SECOND)
    return Received(SimpleNamespace(), number, taken if stamp else 0, "camera", taken)


def result() -> Result:
    timings = Timings(stages={"vision_encoder": 1.5}, ttft=20.0, tpot=2.0, total=30.0)
    return Result("a cup", [1, 2], VisualTokens(576, 57), [], timings, 9, "eos")


def decision(yes: float) -> Decision:
    shares = {"yes": yes, "no": 1 - yes}
    return Decision("yes_no", shares, "yes", None, 0.9, VisualTokens(576, 57), [], 7, Timings(total=11.0))


def active() -> Health:
    health = Health()
    health.activated(START, "/image")
    return health


def said(health: Health, at: Received, age: float, dropped: int = 0) -> None:
    asked = at.taken_ns + int(age * SECOND) // 2
    health.said(Answer(at, "what ?", result(), asked, at.taken_ns + int(age * SECOND), dropped))


@pytest.mark.parametrize(
    ("after", "level", "words"),
    [
        (0.5, Level.OK, "answering"),
        (1.0, Level.OK, "answering"),
        (1.1, Level.WARN, "the newest frame is 1.1 s old"),
        (5.0, Level.WARN, "the newest frame is 5.0 s old"),
        (5.1, Level.ERROR, "no frame comes on /image: the newest is 5.1 s old"),
        (-0.9, Level.OK, "answering"),
        (-1.5, Level.WARN, "the newest frame's stamp is 1.5 s ahead of this node's clock"),
    ],
)
@pytest.mark.parametrize("stamp", [True, False])
def test_the_level_follows_the_newest_frames_age(after: float, level: Level, words: str, stamp: bool) -> None:
    health, newest = active(), frame(2, stamp=stamp)
    health.received(newest)
    said(health, newest, 0.1)
    report = health.report(Phase.ACTIVE, newest.came_ns + int(after * SECOND), 1.0)
    assert (report.level, report.message) == (level, words)
    assert float(report.values["frame_age_ms"]) == after * 1e3


@pytest.mark.parametrize(("after", "level"), [(0.9, Level.OK), (1.1, Level.ERROR)])
def test_a_camera_that_never_sent_is_an_error_after_a_while(after: float, level: Level) -> None:
    report = active().report(Phase.ACTIVE, START + int(after * SECOND), 1.0)
    assert (report.level, report.message) == (
        level,
        f"no frame has come on /image for {after:.1f} s, since activation",
    )


def test_failures_stand_until_the_next_answer() -> None:
    health, one = active(), frame(0)
    health.received(one)
    assert health.report(Phase.ACTIVE, START, 1.0).message == "waiting for the first answer"
    health.failed("the engine broke")
    report = health.report(Phase.ACTIVE, START, 1.0)
    assert (report.level, report.message) == (Level.ERROR, "the engine broke")
    assert report.values["failures"] == "1"
    said(health, one, 0.1)
    assert health.report(Phase.ACTIVE, START, 1.0).level is Level.OK


def test_figures_are_counted_and_begin_anew_with_an_activation() -> None:
    health = active()
    for number in range(5):
        health.received(frame(number / 10, number))
    said(health, frame(0), 0.05)
    said(health, frame(0.4, 4), 0.25, dropped=3)
    assert health.report(Phase.ACTIVE, START + SECOND, 1.0).values == {
        "state": "active",
        "frames": "5",
        "answers": "2",
        "dropped": "3",
        "failures": "0",
        "frame_age_ms": "600.0",
        "latency_ms": "250.0",
        "inference_ms": "30.0",
        "visual_tokens": "57 of 576",
    }
    health.activated(START, "/other")
    values = health.report(Phase.ACTIVE, START, 1.0).values
    assert values == {"state": "active", "frames": "0", "answers": "0", "dropped": "0", "failures": "0"}


@pytest.mark.parametrize("phase", [Phase.UNCONFIGURED, Phase.INACTIVE])
def test_a_node_that_is_not_active_is_well_unless_a_transition_failed(phase: Phase) -> None:
    health = active()
    assert health.report(phase, START + 100 * SECOND, 1.0).level is Level.OK
    assert health.report(phase, START, 1.0).message == phase.name.lower()
    health.failed("no bundle")
    assert health.report(phase, START, 1.0).level is Level.ERROR
    health.cleared()
    assert health.report(phase, START, 1.0).level is Level.OK


def test_an_alarm_has_hysteresis() -> None:
    alarm = Alarm()
    shares = [0.5, 0.59, 0.6, 0.55, 0.41, 0.4, 0.39, 0.41, 0.59, 0.7]
    raised = [alarm.decide(share, threshold=0.6, hysteresis=0.2) for share in shares]
    assert raised == [False, False, True, True, True, True, False, False, False, True]


# -- JSON ----------------------------------------------------------------------------------------------------


def told(**fields: Any) -> dict[str, Any]:
    at = Received(None, 7, 12 * SECOND + 34, "front camera", 13 * SECOND)
    given = {"frame": at, "prompt": "what ?", "result": result(), "alert": None, **fields}
    line = Answer(
        asked_ns=at.stamp_ns + 2_500_000, said_ns=at.stamp_ns + 80_000_000, dropped=2, **given
    ).to_json()
    assert "\n" not in line
    return json.loads(line)


def test_the_json_of_an_answer() -> None:
    assert told() == {
        "stamp": {"sec": 12, "nanosec": 34},
        "frame_id": "front camera",
        "number": 7,
        "asked_age_ms": 2.5,
        "age_ms": 80.0,
        "dropped": 2,
        "prompt": "what ?",
        "text": "a cup",
        "finish_reason": "eos",
        "visual_tokens": {"before": 576, "after": 57},
        "timings": {"vision_encoder": 1.5, "ttft": 20.0, "tpot": 2.0, "total": 30.0},
    }


def test_the_json_of_an_alert() -> None:
    alert = ("is it ?", decision(0.75), True)
    wanted = {
        "question": "is it ?",
        "raised": True,
        "probability": 0.75,
        "label_mass": 0.9,
        "timings": {"ttft": 0.0, "tpot": 0.0, "total": 11.0},
    }
    assert told(alert=alert)["alert"] == wanted
    alone = told(alert=alert, result=None, prompt="")
    assert alone["alert"] == wanted
    assert (alone["text"], alone["finish_reason"], alone["timings"]["total"]) == ("yes", "decided", 11.0)


def test_a_frame_without_a_stamp_has_its_age_from_when_it_came() -> None:
    at = Received(None, 0, 0, "", 13 * SECOND)
    answer = Answer(at, "what ?", result(), 13 * SECOND + 1_000_000, 13 * SECOND + 5_000_000, 0)
    said = json.loads(answer.to_json())
    assert (said["stamp"], said["asked_age_ms"], said["age_ms"]) == ({"sec": 0, "nanosec": 0}, 1.0, 5.0)
