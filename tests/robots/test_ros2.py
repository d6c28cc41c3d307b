"""vtp-ros2 over the real middleware: rclpy's publishers, services and clocks, in processes of their own.

Skipped where ROS 2 is missing; `make test-ros` brings it.
"""

from __future__ import annotations

import signal
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp import Pipeline
from vtp.serve.robots.images import image_rgb

from .processes import (
    QUESTION,
    Peer,
    Process,
    camera,
    node,
    parameters,
    peer,
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

GREY = np.array([0.299, 0.587, 0.114])


# -- the camera's frames, the pipeline's answers -------------------------------------------------------------


def test_answers_are_the_pipelines_about_frames_that_were_published(
    bundle: Path, pipeline: Pipeline, scenes: list[np.ndarray], pictures: Path, talk: Peer
) -> None:
    """640x480 at 30 Hz: the newest frame each time, its own stamp, its own answer."""
    wanted = [pipeline.generate(scene, QUESTION) for scene in scenes]
    assert len({one.text for one in wanted}) == len(scenes)
    with node(*parameters(bundle)) as robot, camera(pictures) as eye:
        talk.more("json", 3)
        until(lambda: {place_of(said) for said in talk.topic("json")} >= {0, 1, 2, 3}, robot, eye, talk)
        talk.more("json", 20)
    published = {one["stamp_ns"]: one["picture"] for one in eye.lines}
    answers = talk.topic("json")
    stamps = [said["stamp"]["sec"] * 10**9 + said["stamp"]["nanosec"] for said in answers]
    assert stamps == sorted(set(stamps))  # none twice, none out of order
    for said, stamp in zip(answers, stamps, strict=True):
        assert published[stamp] == place_of(said)
        assert said["text"] == wanted[place_of(said)].text
        assert said["visual_tokens"] == wanted[place_of(said)].visual_tokens._asdict()
        assert said["finish_reason"] == wanted[place_of(said)].finish_reason
        assert said["prompt"] == QUESTION
        assert set(said["timings"]) == set(wanted[0].timings.to_dict())
        assert 0 <= said["asked_age_ms"] <= said["age_ms"]
    until(lambda: len(talk.topic("answer")) >= len(answers), talk)
    assert talk.topic("answer") == [said["text"] for said in answers]
    # Only the newest is asked about: what came between two answers was dropped, and is counted.
    numbers = [said["number"] for said in answers]
    gaps = [later - earlier - 1 for earlier, later in pairwise(numbers)]
    assert [said["dropped"] for said in answers[1:]] == gaps
    assert sum(gaps) > 0
    # When a frame is taken, the one after it has not come: no frame is older than the camera's longest pause,
    # and what the slowest inference may hold up the middleware's threads for.
    order = sorted(published)
    pause = max(later - earlier for earlier, later in pairwise(order)) / 1e6
    slowest = max(said["timings"]["total"] for said in answers)
    assert max(said["asked_age_ms"] for said in answers[1:]) <= pause + slowest


YUV = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def yuyv(scene: np.ndarray) -> np.ndarray:
    """BT.601 of limited range: bytes [H,W,2], two pixels with their mean chroma."""
    values = scene.astype(float) @ YUV.T / 255
    made = np.empty((*scene.shape[:2], 2), np.uint8)
    made[..., 0] = np.rint(16 + 219 * values[..., 0])
    for start, channel in ((0, 1), (1, 2)):
        made[:, start::2, 1] = np.rint(128 + 224 * (values[:, ::2, channel] + values[:, 1::2, channel]) / 2)
    return made


def alpha(scene: np.ndarray) -> np.ndarray:
    return np.dstack([scene, np.arange(scene[..., 0].size, dtype=np.uint8).reshape(scene.shape[:2])])


def encoded(scene: np.ndarray, kind: str, name: str) -> dict[str, Any]:
    file = BytesIO()
    Image.fromarray(scene).save(file, kind)
    return {"format": name, "data": file.getvalue()}


ENCODED = {
    "rgb8": lambda scene: raw("rgb8", scene, 7),
    "bgr8": lambda scene: raw("bgr8", scene[..., ::-1], 64),
    "rgba8": lambda scene: raw("rgba8", alpha(scene)),
    "bgra8": lambda scene: raw("bgra8", alpha(scene[..., ::-1]), 3),
    "mono8": lambda scene: raw("mono8", np.rint(scene @ GREY).astype(np.uint8)[..., None], 1),
    "yuyv": lambda scene: raw("yuyv", yuyv(scene), 32),
    "yuv422_yuy2": lambda scene: raw("yuv422_yuy2", yuyv(scene)),
    "uyvy": lambda scene: raw("uyvy", yuyv(scene)[..., ::-1]),
    "yuv422": lambda scene: raw("yuv422", yuyv(scene)[..., ::-1], 2),
    "jpeg": lambda scene: encoded(scene, "JPEG", "jpeg"),
    "jpeg-bgr8": lambda scene: encoded(scene, "JPEG", "rgb8; jpeg compressed bgr8"),
    "png": lambda scene: encoded(scene, "PNG", "png"),
}


def reference(name: str, scene: np.ndarray, fields: dict[str, Any]) -> np.ndarray:
    """The pixels that should arrive."""
    if "format" in fields:
        return np.asarray(Image.open(BytesIO(fields["data"])))
    if name == "mono8":
        return np.repeat(np.rint(scene @ GREY).astype(np.uint8)[..., None], 3, 2)
    if name.startswith(("yu", "uy")):  # held to OpenCV and the formula in test_images.py
        return image_rgb(**fields)
    return scene


@pytest.mark.parametrize("transport", ["raw", "compressed"])
def test_every_encoding_arrives(
    bundle: Path, pipeline: Pipeline, scenes: list[np.ndarray], talk: Peer, tmp_path: Path, transport: str
) -> None:
    """One node; cameras come and go."""
    with node(*parameters(bundle, image_transport=transport)) as robot:
        for name, make in ENCODED.items():
            fields = [make(scene) for scene in scenes]
            if ("format" in fields[0]) == (transport == "raw"):
                continue
            arrived = [reference(name, *pair) for pair in zip(scenes, fields, strict=True)]
            wanted = [pipeline.generate(pixels, QUESTION).text for pixels in arrived]
            assert len(set(wanted)) > 1 or name == "mono8"
            with camera(write_pictures(tmp_path / f"{name}.json", fields)) as eye:
                said = answers_about_all(talk, robot, eye)
            assert [one["text"] for one in said] == [wanted[place_of(one)] for one in said], name


def answers_about_all(talk: Peer, *processes: Process) -> list[dict[str, Any]]:
    """Answers from now on, until there is one about each of the four pictures."""
    before = len(talk.topic("json"))
    answers = lambda: talk.topic("json")[before:]  # noqa: E731
    until(lambda: {place_of(said) for said in answers()} >= {0, 1, 2, 3}, talk, *processes)
    return answers()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"encoding": "bayer_rggb8"}, "'bayer_rggb8' are not served"),
        ({"step": 1919}, "step 1919, but 1920 bytes"),
    ],
)
def test_frames_that_cannot_be_read_are_told_and_the_next_ones_answered(
    bundle: Path, scenes: list[np.ndarray], talk: Peer, tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    good = raw("rgb8", scenes[0])
    told = lambda one: one["level"] == 2 and words in one["message"]  # noqa: E731
    with node(*parameters(bundle)) as robot:
        with camera(write_pictures(tmp_path / "bad.json", [{**good, **wrong}])):
            (said,) = talk.more("diagnostics", where=told)
            assert int(said["values"]["failures"]) > 0
            success, message = talk.ask()
            assert (success, words in message) == (False, True)
        with camera(write_pictures(tmp_path / "good.json", [good])):
            talk.more("json")
            talk.more("diagnostics", where=lambda one: one["level"] == 0)
    assert (
        sum("was not answered" in line for line in robot.log) < 10
    )  # not one for each of 30 frames a second


# -- lifecycle -----------------------------------------------------------------------------------------------


def test_transitions(bundle: Path, pictures: Path, talk: Peer) -> None:
    with node("--unconfigured", *parameters(bundle)) as robot, camera(pictures):
        assert talk.state() == "unconfigured"
        assert talk.ask() == [False, "the node is not active; activate it and ask again"]
        assert not talk.subscribers(topic="/image")
        assert talk.change(label="configure")
        assert talk.state() == "inactive"
        assert not talk.topic("json")
        assert talk.change(label="activate")
        talk.more("json", 2)
        (image,) = until(lambda: talk.subscribers(topic="/image"), robot)
        assert image == {
            "node": "vtp",
            "reliability": "BEST_EFFORT",
            "durability": "VOLATILE",
            "type": "sensor_msgs/msg/Image",
        }
        assert talk.change(label="deactivate")
        assert talk.state() == "inactive"
        until(lambda: not talk.subscribers(topic="/image"), robot)
        said = len(talk.topic("json"))
        talk.more("diagnostics", 2, where=lambda one: one["message"] == "inactive")
        assert len(talk.topic("json")) == said  # nothing is asked while inactive
        assert talk.change(label="activate")
        talk.more("json", 2)
        assert talk.change(label="deactivate")
        assert talk.change(label="cleanup")
        assert talk.state() == "unconfigured"
        talk.more("diagnostics", where=lambda one: one["message"] == "unconfigured")
        assert talk.change(label="configure")
        assert talk.change(label="activate")
        talk.more("json", 2)
        assert talk.change(label="shutdown")
        assert talk.state() == "finalized"


def test_it_says_that_it_is_configuring_while_it_loads(bundle: Path, talk: Peer) -> None:
    with peer() as other, node("--unconfigured", *parameters(bundle)):
        assert (talk.state(), other.state()) == ("unconfigured", "unconfigured")
        talk.write(id=0, do="change", label="configure")
        states = []
        while "inactive" not in states:
            states.append(other.state())
            other.get(name="rate")  # and parameters are answered as well
        assert "configuring" in states


def test_activating_again_and_again_leaves_no_thread(bundle: Path, pictures: Path, talk: Peer) -> None:
    def again() -> None:
        assert talk.change(label="deactivate")
        assert talk.change(label="activate")
        talk.more("json")

    with node(*parameters(bundle)) as robot, camera(pictures):
        talk.more("json")
        for _ in range(4):  # the executor's own threads start as they are needed
            again()
        threads = robot.threads()
        for _ in range(12):
            again()
        assert robot.threads() < threads + 6


def test_a_bundle_that_is_missing_leaves_the_node_unconfigured(
    bundle: Path, talk: Peer, tmp_path: Path
) -> None:
    with node("--unconfigured", *parameters(tmp_path / "nowhere")) as robot:
        assert not talk.change(label="configure")
        assert talk.state() == "unconfigured"
        talk.more("diagnostics", where=lambda one: one["level"] == 2 and "no bundle at" in one["message"])
        assert any("no bundle at" in line for line in robot.log)
        assert talk.set(bundle=str(bundle)) == [True, ""]
        assert talk.change(label="configure")
        assert talk.state() == "inactive"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_well(bundle: Path, pictures: Path, talk: Peer, number: int) -> None:
    """Also where a shell put it into the background, whose children ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with node(*parameters(bundle)) as robot, camera(pictures):
            talk.more("json")
            robot.signal(number)
            assert robot.wait() == 0
            assert not [line for line in robot.log if "Traceback" in line]
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_ends_although_somebody_waits_for_an_answer(bundle: Path, talk: Peer) -> None:
    with node(*parameters(bundle)) as robot:
        until(lambda: talk.state() == "active", robot)
        talk.write(id=0, do="ask")
        talk.more("diagnostics")  # the question is with the node
        robot.signal(signal.SIGTERM)
        assert robot.wait() == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["/nowhere", "--prompt", "what ?"], 1, "no bundle at"),
        (["--prompt", "what ?"], 2, "there is no bundle: set the parameter bundle"),
        (["--ros-args", "-p", "rate:=-1.0"], 2, "rate -1.0 is not allowed; give 0 to 1000"),
        (["--ros-args", "-p", "prompt:=true"], 2, "prompt must be text, not True"),
        (["--ros-args", "-p", "image_transport:=theora"], 2, "choose raw or compressed"),
        (["--ros-args", "-p", "rate"], 1, "ROS 2 cannot start"),
    ],
)
def test_bad_starts_are_one_line(words: list[str], code: int, said: str) -> None:
    process = Process(["-m", "vtp.serve.robots.ros2", *words])
    assert process.wait() == code
    told = [line for line in process.log if line.startswith("vtp-ros2: error: ")]
    assert len(told) == 1
    assert said in told[0]
    assert not [line for line in process.log if "Traceback" in line]


# -- clocks, cameras, QoS ------------------------------------------------------------------------------------


def test_a_camera_that_dies_and_comes_back(bundle: Path, pictures: Path, talk: Peer) -> None:
    with node(*parameters(bundle, stale_after=0.5)) as robot:
        talk.more(
            "diagnostics",
            where=lambda one: one["level"] == 2 and "no frame has come on /image" in one["message"],
        )
        with camera(pictures) as eye:
            talk.more("json", 3)
            talk.more("diagnostics", where=lambda one: one["level"] == 0 and one["message"] == "answering")
            eye.signal(signal.SIGKILL)
            assert eye.wait() == -signal.SIGKILL
        talk.more(
            "diagnostics", where=lambda one: one["level"] == 1 and "the newest frame is" in one["message"]
        )
        talk.more(
            "diagnostics",
            where=lambda one: one["level"] == 2 and "no frame comes on /image" in one["message"],
        )
        assert talk.state() == "active"
        said = len(talk.topic("json"))
        with camera(pictures):
            answers = talk.more("json", 3)
            (status,) = talk.more("diagnostics", where=lambda one: one["level"] == 0)
        assert robot.running
    values = status["values"]
    assert int(values["answers"]) >= said + len(answers) - 1
    assert int(values["frames"]) >= int(values["answers"]) + int(values["dropped"])
    assert float(values["latency_ms"]) >= float(values["inference_ms"]) > 0
    assert values["visual_tokens"] == "57 of 576"
    assert status["name"] == "vtp: answers"


def test_ages_are_by_the_nodes_clock(bundle: Path, pictures: Path, talk: Peer) -> None:
    """With use_sim_time: a simulation's clock stands at 100 s, its camera's stamps at 97.5 s."""
    with node(*parameters(bundle, use_sim_time="true", stale_after=2.0)) as robot:
        until(lambda: talk.state() == "active", robot)
        with camera(pictures, "--stamp", "97500000000"):

            def ticked() -> list[dict[str, Any]]:
                talk.tick(seconds=97, nanoseconds=500_000_000)
                return [said for said in talk.topic("json") if said["asked_age_ms"] == 0.0]

            said = until(ticked, robot, talk)[-1]
            assert said["stamp"] == {"sec": 97, "nanosec": 500_000_000}
            assert said["age_ms"] == 0.0  # its clock stands still
        talk.tick(seconds=100)
        (status,) = talk.more("diagnostics", where=lambda one: one["level"] == 1)
        assert status["message"] == "the newest frame is 2.5 s old"
        assert status["values"]["frame_age_ms"] == "2500.0"


def test_a_camera_without_stamps(bundle: Path, pictures: Path, talk: Peer) -> None:
    """The age is then counted from when the frame came."""
    with node(*parameters(bundle)), camera(pictures, "--stamp", "0"):
        said = talk.more("json", 2)[-1]
        assert said["stamp"] == {"sec": 0, "nanosec": 0}
        assert 0 <= said["asked_age_ms"] < said["age_ms"] < 60_000


def test_topics_are_remapped_and_qos_overridden(bundle: Path, pictures: Path, talk: Peer) -> None:
    given = parameters(bundle, **{"qos_overrides./front/image.subscription.reliability": "reliable"})
    with (
        node(*given, "-r", "image:=/front/image", "-r", "~/answer_json:=/elsewhere") as robot,
        camera(pictures, "--ros-args", "-r", "image:=/front/image"),
    ):
        (image,) = until(lambda: talk.subscribers(topic="/front/image"), robot)
        assert image["reliability"] == "RELIABLE"
        until(lambda: talk.state() == "active", robot)
        # A reliable subscriber is not given what a best-effort camera sends: the override is in force.
        (status,) = talk.more("diagnostics", where=lambda one: one["level"] == 2)
        assert "no frame has come on /front/image" in status["message"]


def test_compressed_topics_lie_beside_the_remapped_one(
    bundle: Path, scenes: list[np.ndarray], talk: Peer, tmp_path: Path
) -> None:
    files = write_pictures(tmp_path / "jpeg.json", [encoded(scene, "JPEG", "jpeg") for scene in scenes])
    with (
        node(*parameters(bundle, image_transport="compressed"), "-r", "image:=/front/image"),
        camera(files, "--ros-args", "-r", "image/compressed:=/front/image/compressed"),
    ):
        talk.more("json", 2)
