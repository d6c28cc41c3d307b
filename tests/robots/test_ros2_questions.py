"""Parameters, questions and alerts of a running vtp-ros2. Skipped where ROS 2 is missing."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from vtp import Pipeline

from ..once import Once
from .processes import (
    QUESTION,
    Peer,
    camera,
    node,
    parameters,
    place_of,
    raw,
    ros_python,
    until,
    write_pictures,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ros_python() is None, reason="ROS 2 is not installed; run: make test-ros"),
]

OTHER = "what color is the circle ?"


def test_parameters_change_while_it_runs(
    bundle: Path, pipeline: Pipeline, scenes: list[np.ndarray], pictures: Path, talk: Peer
) -> None:
    with node(*parameters(bundle)), camera(pictures):
        talk.more("json")
        assert talk.set(keep_tokens=16) == [True, ""]
        (said,) = talk.more("json", where=lambda one: one["visual_tokens"]["after"] == 16)
        assert said["text"] == pipeline.generate(scenes[place_of(said)], QUESTION, keep_tokens=16).text
        assert talk.set(max_tokens=1) == [True, ""]
        talk.more("json", where=lambda one: one["finish_reason"] == "length")
        assert talk.set(max_tokens=64, prompt=OTHER) == [True, ""]
        (said,) = talk.more("json", where=lambda one: one["prompt"] == OTHER)
        assert said["text"] == pipeline.generate(scenes[place_of(said)], OTHER, keep_tokens=16).text
        talk.prompt(text=QUESTION)
        talk.more("json", where=lambda one: one["prompt"] == QUESTION)
        assert talk.get(name="prompt") == QUESTION


def test_a_node_asks_once_when_it_is_called(
    bundle: Path, pipeline: Pipeline, scenes: list[np.ndarray], pictures: Path, talk: Peer
) -> None:
    with node(*parameters(bundle, rate=0)) as robot:
        until(lambda: talk.state() == "active", robot)
        success, reason = talk.ask()
        assert not success
        assert reason.startswith("no frame came in 5 s")
        with camera(pictures):
            talk.more("diagnostics", 2, where=lambda one: one["values"].get("frames", "0") != "0")
            assert not talk.topic("json")
            for _ in range(3):
                success, text = talk.ask()
                assert success
                (said,) = until(lambda: talk.topic("json")[-1:], robot)
                assert text == pipeline.generate(scenes[place_of(said)], QUESTION).text
            assert talk.set(prompt=OTHER) == [True, ""]  # another question, once
            success, text = talk.ask()
            (said,) = until(lambda: talk.topic("json")[3:], robot)
            assert (success, said["prompt"]) == (True, OTHER)
            assert text == pipeline.generate(scenes[place_of(said)], OTHER).text
        assert len(talk.topic("json")) == 4


def test_a_whole_number_is_taken_for_a_rate_and_holds(bundle: Path, pictures: Path, talk: Peer) -> None:
    with node(*parameters(bundle, rate=2)), camera(pictures):
        answers = talk.more("json", 4)
        assert talk.get(name="rate") == 2
    asked = [
        said["stamp"]["sec"] * 1e3 + said["stamp"]["nanosec"] / 1e6 + said["asked_age_ms"] for said in answers
    ]
    assert min(later - earlier for earlier, later in pairwise(asked)) > 499


def test_stream_reuse_recomputes_what_changed(
    once: Once, scenes: list[np.ndarray], talk: Peer, tmp_path: Path
) -> None:
    """The rows of every frame are those that the pipeline recomputes of the same frames in their order."""
    from vtp.export.exporter import Request, export

    wishes = {"method": "vispruner", "keep_tokens": "57", "tower": "stc:0.25", "verify": "none"}
    made = once.folder("ros/stc", lambda part: export(Request(part, **wishes)))
    moved = scenes[0].copy()
    moved[200:260, 300:360] = 255
    seen = [scenes[0], moved]
    shown = write_pictures(tmp_path / "moving.json", [raw("rgb8", scene) for scene in seen])
    with node(*parameters(made, stream_reuse="true")), camera(shown):
        talk.more("json", where=lambda said: said["tower"]["rows"] < said["tower"]["of"])
        successful, reason = talk.set(stream_reuse=False)
        assert (successful, "stream_reuse is in use while the node is active" in reason) == (False, True)
        assert talk.get(name="stream_reuse") is True
        assert "--tower stc" in talk.describe(name="stream_reuse")
    answers = talk.topic("json")
    assert answers[0]["tower"].keys() == {"rows", "of"}  # nothing was there to reuse
    with Pipeline.load(made, "ort-cpu", threads=1, stream_reuse=True) as alone:
        for said in answers:
            wanted = alone.generate(seen[place_of(said)], QUESTION)
            assert (said["text"], said["tower"]) == (wanted.text, wanted.timings.tower)


def test_a_bundle_without_it_is_refused_at_configure(bundle: Path, talk: Peer) -> None:
    why = (
        "this bundle makes no use of earlier pictures; leave out stream_reuse, or export it with --tower stc"
    )
    with node("--unconfigured", *parameters(bundle, stream_reuse="true")) as robot:
        assert not talk.change(label="configure")
        assert talk.state() == "unconfigured"
        talk.more("diagnostics", where=lambda one: one["level"] == 2 and why in one["message"])
        assert sum(why in line for line in robot.log) == 1
        assert talk.set(stream_reuse=False) == [True, ""]
        assert talk.change(label="configure")


def test_alerts_come_with_their_probability(
    bundle: Path, pipeline: Pipeline, scenes: list[np.ndarray], pictures: Path, talk: Peer
) -> None:
    """The built-in model was not taught yes and no: only the order of its probabilities is used here."""
    question = "is there a star ?"
    shares = [pipeline.decide(scene, question).probabilities["yes"] for scene in scenes]
    edge = (max(shares) + min(shares)) / 2
    given = {"alert": question, "alert_threshold": edge, "alert_hysteresis": 0.0, "prompt": "''"}
    with node(*parameters(bundle, **given)) as robot, camera(pictures) as eye:
        seen = lambda: {place_of(said) for said in talk.topic("json")}  # noqa: E731
        until(lambda: seen() >= {0, 1, 2, 3}, robot, eye, talk)
        assert talk.set(prompt=QUESTION) == [True, ""]
        talk.more(
            "json", where=lambda one: one["prompt"] == QUESTION and one["alert"]["question"] == question
        )
        answers = talk.topic("json")
        until(lambda: len(talk.topic("alert")) >= len(answers), talk)
    raised = [said["alert"]["raised"] for said in answers]
    assert talk.topic("alert")[: len(answers)] == raised
    assert set(raised) == {True, False}
    for said in answers:
        share = shares[place_of(said)]
        assert said["alert"]["probability"] == pytest.approx(share, abs=1e-5)
        assert said["alert"]["raised"] == (share >= edge)
    assert not [said for said in answers if not said["prompt"] and said["finish_reason"] != "decided"]
