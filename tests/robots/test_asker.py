"""The asker, on a real bundle and without ROS: the newest message each time, single questions, its end."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from vtp import Pipeline
from vtp.engines import UsageError, VtpError
from vtp.export.exporter import Request, export
from vtp.serve.robots.answers import Answer, Received
from vtp.serve.robots.asker import Asker
from vtp.serve.robots.model import Model
from vtp.serve.robots.settings import Settings

from ..conftest import Made
from ..once import Once

PATIENCE = 30.0
ASKING = Settings(prompt="what is it ?", max_tokens=4, rate=1000.0)


@dataclass
class Image:
    """The fields of sensor_msgs/Image."""

    data: bytes
    encoding: str = "rgb8"
    height: int = 24
    width: int = 32
    step: int = 96


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)


class Gated(Model):
    """A model that takes each frame only when it is let."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        self.began, self.may = threading.Semaphore(0), threading.Semaphore(0)

    def ask(self, picture: np.ndarray, settings: Settings, stopped: threading.Event) -> Any:
        self.began.release()
        assert self.may.acquire(timeout=PATIENCE)
        return super().ask(picture, settings, stopped)


@dataclass
class Desk:
    """An asker, and what it said."""

    model: Gated
    settings: Settings = ASKING
    now_ns: int = 10**12
    said: queue.Queue[Answer] = field(default_factory=queue.Queue)
    failed: queue.Queue[str] = field(default_factory=queue.Queue)
    noted: list[str] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.asker = Asker(
            self.model,
            lambda: self.settings,
            lambda: self.now_ns,
            self.said.put,
            self.failed.put,
            self.noted.append,
        )

    def put(self, **fields: Any) -> None:
        """A message of a picture of its own."""
        message = replace(Image(pixels(self.count).tobytes()), **fields)
        self.asker.put(Received(message, self.count, self.now_ns - 10**6, "eye", self.now_ns))
        self.count += 1

    def taken(self) -> None:
        """Wait until the model has a frame."""
        assert self.model.began.acquire(timeout=PATIENCE)

    def let(self) -> Answer:
        """Let the model answer."""
        self.model.may.release()
        return self.said.get(timeout=PATIENCE)


@pytest.fixture
def pipeline(exported: Callable[[str], Made]) -> Iterator[Pipeline]:
    with Pipeline.load(exported("vispruner").folder, "ort-cpu", threads=1) as opened:
        yield opened


@pytest.fixture
def desk(pipeline: Pipeline) -> Iterator[Desk]:
    yield from started(Desk(Gated(pipeline)))


@pytest.fixture
def idle(pipeline: Pipeline) -> Iterator[Desk]:
    """One that answers only what is asked for."""
    yield from started(Desk(Gated(pipeline), replace(ASKING, rate=0.0)))


def started(made: Desk) -> Iterator[Desk]:
    made.asker.start()
    yield made
    made.model.may.release(100)
    made.asker.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "vtp-asker"]


def test_the_newest_message_is_asked_about_and_the_others_are_counted(desk: Desk, pipeline: Pipeline) -> None:
    desk.put()
    desk.taken()
    for _ in range(4):
        desk.put()
    first = desk.let()
    desk.taken()
    desk.now_ns += 5 * 10**6
    second = desk.let()
    assert [(one.frame.number, one.dropped) for one in (first, second)] == [(0, 0), (4, 3)]
    for one in (first, second):
        wanted = pipeline.generate(pixels(one.frame.number), "what is it ?", max_new_tokens=4)
        assert one.result is not None
        assert (one.text, one.result.token_ids) == (wanted.text, wanted.token_ids)
        assert one.visual_tokens == wanted.visual_tokens
    assert second.asked_ns - second.frame.taken_ns == 10**6
    assert second.said_ns - second.asked_ns == 5 * 10**6
    (line,) = desk.noted  # once for the size of both
    assert line.startswith("24% of a picture of 32x24 is cut off at its sides")


def test_settings_hold_from_the_next_frame_on(desk: Desk) -> None:
    desk.put()
    desk.taken()
    desk.settings = replace(desk.settings, prompt="and now ?", keep_tokens=3)
    assert desk.let().prompt == "what is it ?"
    desk.put()
    desk.taken()
    answer = desk.let()
    assert (answer.prompt, answer.visual_tokens.after) == ("and now ?", 3)


def later(work: Callable[[], Any]) -> queue.Queue[Any]:
    """What a thread's work gave, or raised."""
    done: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            done.put(work())
        except VtpError as error:
            done.put(str(error))

    threading.Thread(target=run, daemon=True).start()
    return done


def test_without_a_rate_only_what_is_asked_for_is_answered(idle: Desk) -> None:
    idle.put()
    idle.put()
    assert not idle.model.began.acquire(timeout=0.5)
    asked = later(idle.asker.ask)
    idle.taken()
    answer = idle.let()
    assert asked.get(timeout=PATIENCE) is answer
    assert (answer.frame.number, answer.dropped) == (1, 1)
    idle.put()
    assert not idle.model.began.acquire(timeout=0.5)
    idle.settings = replace(idle.settings, rate=1000.0)
    idle.asker.poke()
    idle.taken()
    assert idle.let().frame.number == 2


def test_a_question_that_gave_up_is_not_answered(idle: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtp.serve.robots.asker._NO_FRAME", 0.3)
    with pytest.raises(VtpError, match=r"no frame came in 0\.3 s"):
        idle.asker.ask()
    idle.put()
    assert not idle.model.began.acquire(timeout=0.5)


def test_a_question_waits_for_a_model_that_has_the_frame(idle: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtp.serve.robots.asker._NO_FRAME", 0.2)
    idle.put()
    asked = later(idle.asker.ask)
    idle.taken()
    with pytest.raises(queue.Empty):
        asked.get(timeout=0.5)
    assert idle.let() is asked.get(timeout=PATIENCE)


def test_what_lies_there_for_too_long_is_not_asked_about(idle: Desk) -> None:
    """As with a camera that died while nobody asked."""
    idle.settings = replace(idle.settings, stale_after=2.0)
    idle.put()
    idle.now_ns += 3 * 10**9
    asked = later(idle.asker.ask)
    assert not idle.model.began.acquire(timeout=0.5)
    idle.put()
    idle.taken()
    assert idle.let().frame.number == 1
    assert asked.get(timeout=PATIENCE).frame.number == 1


@pytest.mark.parametrize("error", [RuntimeError("the engine broke"), VtpError("it cannot")])
def test_failures_are_told_and_the_next_frame_is_answered(
    idle: Desk, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*given: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(idle.model, "ask", broken)
        idle.put()
        asked = later(idle.asker.ask)
        assert str(error) in idle.failed.get(timeout=PATIENCE)
        assert str(error) in asked.get(timeout=PATIENCE)
    idle.put()
    asked = later(idle.asker.ask)
    idle.taken()
    assert idle.let() is asked.get(timeout=PATIENCE)


def test_a_message_that_cannot_be_read_is_a_failure(desk: Desk) -> None:
    desk.put(step=95)
    assert "step 95, but 96 bytes" in desk.failed.get(timeout=PATIENCE)
    desk.put()
    desk.taken()
    assert desk.let().frame.number == 1


def test_stopping_ends_what_waits_and_what_runs(pipeline: Pipeline) -> None:
    desk = Desk(Gated(pipeline))
    desk.asker.start()
    desk.put()
    desk.taken()
    asked = later(desk.asker.ask)
    stopping = later(desk.asker.stop)
    desk.model.may.release()
    stopping.get(timeout=PATIENCE)
    assert "deactivated before it had answered" in asked.get(timeout=PATIENCE)
    with pytest.raises(VtpError, match="deactivated"):
        desk.asker.ask()
    assert desk.said.empty()
    assert pipeline.generate(pixels(0), "what ?", max_new_tokens=1)  # the pipeline is free


def test_an_alert_shares_the_frame_with_the_question(once: Once) -> None:
    """On the built-in model, whose words yes and no are."""
    made = once.folder("builtin-none", lambda part: export(Request(part, method="none")))
    settings = replace(ASKING, bundle=str(made), threads=1, alert="is it ?", alert_threshold=1e-9)
    settings = replace(settings, alert_hysteresis=0.0)
    model = Model.load(settings)
    said: queue.Queue[Answer] = queue.Queue()
    asker = Asker(model, lambda: settings, lambda: 10**12, said.put, pytest.fail)
    asker.start()
    asker.put(Received(Image(pixels(0).tobytes()), 0, 0, "eye", 10**12))
    answer = said.get(timeout=PATIENCE)
    asker.stop()
    assert answer.alert is not None
    question, decision, raised = answer.alert
    assert (question, raised) == ("is it ?", True)
    assert set(decision.timings.reused_stages) == {"vision_encoder", "projector"}  # the encoder ran once
    with model.pipeline as pipe:
        assert decision.probabilities == pipe.decide(pixels(0), "is it ?").probabilities
        assert answer.text == pipe.generate(pixels(0), "what is it ?", max_new_tokens=4).text


def test_with_stream_reuse_the_tower_recomputes_what_changed(
    exported: Callable[[str], Made],
) -> None:
    """Four of 17 rows, as the pipeline alone does; each activation begins with a whole picture."""
    made = str(exported("stc").folder)
    settings = replace(ASKING, bundle=made, engine="ort-cpu", threads=1, stream_reuse=True)
    model = Model.load(settings)
    scene = np.full((24, 32, 3), 90, np.uint8)
    scene[:, :16] = 200
    later = scene.copy()
    later[2:8, 4:10] = 0
    for _ in range(2):
        said: queue.Queue[Answer] = queue.Queue()
        asker = Asker(model, lambda: settings, lambda: 10**12, said.put, pytest.fail)
        asker.start()
        answers = []
        for number, picture in enumerate((scene, later)):
            asker.put(Received(Image(picture.tobytes()), number, 0, "eye", 10**12))
            answers.append(said.get(timeout=PATIENCE))
        asker.stop()
        assert [json.loads(one.to_json())["tower"]["rows"] for one in answers] == [17, 4]
    model.close()
    with Pipeline.load(made, "ort-cpu", threads=1, stream_reuse=True) as alone:
        for picture, answer in zip((scene, later), answers, strict=True):
            wanted = alone.generate(picture, "what is it ?", max_new_tokens=4)
            assert answer.result is not None and answer.result.token_ids == wanted.token_ids
            assert json.loads(answer.to_json())["tower"] == wanted.timings.tower


# -- the model -----------------------------------------------------------------------------------------------


def test_a_model_is_loaded_checked_and_warm(exported: Callable[[str], Made]) -> None:
    settings = Settings(
        bundle=str(exported("vispruner").folder), prompt="what ?", threads=1, engine="ort-cpu"
    )
    model = Model.load(settings)
    assert model.ask(pixels(0), settings, threading.Event()) is not None
    model.close()
    with pytest.raises(VtpError, match="closed"):
        model.ask(pixels(0), settings, threading.Event())


def test_without_stream_reuse_a_method_of_changes_is_told_of(exported: Callable[[str], Made]) -> None:
    settings = replace(ASKING, bundle=str(exported("change").folder), engine="ort-cpu", threads=1)
    for reuse, notes in ((False, 1), (True, 0)):
        model = Model.load(replace(settings, stream_reuse=reuse))
        told = [line for line in model.notes if "without the parameter stream_reuse" in line]
        model.close()
        assert len(told) == notes


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"bundle": ""}, "there is no bundle: set the parameter bundle"),
        ({"bundle": "/nowhere"}, "no bundle at"),
        ({"prompt": ""}, "there is no question"),
        ({"keep_tokens": 5}, "keep_tokens 5 is not in this bundle, which holds 3, 6"),
        ({"prompt": "<image>"}, "<image>"),
        ({"prompt": "word " * 500}, "tokens"),
        ({"prompt": "", "alert": "word " * 500}, "tokens"),
        ({"engine": "none-such"}, "none-such"),
        (
            {"stream_reuse": True},
            "makes no use of earlier pictures; leave out stream_reuse, or export it with",
        ),
    ],
)
def test_settings_that_the_bundle_does_not_take(
    exported: Callable[[str], Made], values: dict[str, Any], why: str
) -> None:
    good = Settings(bundle=str(exported("vispruner").folder), prompt="what ?", threads=1, engine="ort-cpu")
    with pytest.raises((UsageError, VtpError), match=why):
        Model.load(replace(good, **values))
