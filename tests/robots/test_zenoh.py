"""vtp-zenoh and vtp-watch zenoh:TOPIC beside clients of other makers, over a router, a process for each.

Skipped where these are missing; `make test-zenoh` brings them.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp import Pipeline

from .processes import QUESTION, ROOT, Process, environment, place_of, raw, until, write_pictures

HERE = Path(__file__).parent
NEEDED = "import zenoh, zenoh_ros2_sdk, pyzeros, onnxruntime, vtp.serve.robots.zenoh.cli"
OTHER = "what color is the circle ?"


@functools.cache
def zenoh_python() -> str | None:
    """A Python that has zenoh, both clients, vtp and ONNX Runtime; None if there is none."""
    python = os.environ.get("VTP_ZENOH_PYTHON") or str(ROOT / "build" / "zenoh" / "bin" / "python")
    try:
        where = {**os.environ, "CYDR_CACHE_DIR": str(Path(python).parents[1] / "cydr")}  # of pyzeros
        found = subprocess.run([python, "-c", NEEDED], env=where, capture_output=True, check=False)
    except OSError:
        return None
    return python if found.returncode == 0 else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(zenoh_python() is None, reason="zenoh's clients are missing; run: make test-zenoh"),
]


@contextmanager
def child(*words: str, code: int = 0, number: int | None = None) -> Iterator[Process]:
    """A process that ends, with an exit code, when its standard input does, or at a signal."""
    process = Process(words, zenoh_python())
    try:
        yield process
    finally:
        ended = process.end(number)
    assert ended == code, process.log


def script(name: str) -> str:
    return str(HERE / name)


@contextmanager
def router(port: int) -> Iterator[Process]:
    with child(script("zenoh_router.py"), str(port)) as process:
        until(lambda: process.lines, process)
        yield process


@contextmanager
def peer(client: str, port: int, pictures: Path, *words: str) -> Iterator[Process]:
    with child(script("zenoh_peer.py"), client, str(port), str(pictures), *words) as process:
        until(lambda: process.lines, process)
        yield process


@contextmanager
def node(bundle: Path, port: int, *words: str, number: int = signal.SIGTERM) -> Iterator[Process]:
    """vtp-zenoh; whichever signal ends it, it ends well."""
    given = ["--prompt", QUESTION, "--engine", "ort-cpu", "--threads", "1", "--connect", at(port)]
    with child("-m", "vtp.serve.robots.zenoh.cli", str(bundle), *given, *words, number=number) as process:
        until(lambda: told(process, "asking about"), process)
        yield process


def at(port: int) -> str:
    return f"tcp/127.0.0.1:{port}"


def told(process: Process, words: str) -> list[str]:
    """Lines of its log with these words."""
    return [line for line in list(process.log) if words in line]


def came(process: Process, topic: str) -> list[Any]:
    return [line["data"] for line in list(process.lines) if line.get("topic") == topic]


def answers(process: Process) -> list[dict[str, Any]]:
    return [json.loads(text) for text in came(process, "/vtp/answer_json")]


def asked(process: Process, what: str) -> Any:
    """What a peer sees of the graph."""
    number = time.monotonic_ns()
    process.write(**{what: number})
    (line,) = until(lambda: [one for one in list(process.lines) if one.get("id") == number], process)
    return line["result"]


def of_vtp(tokens: list[str]) -> list[str]:
    return [token for token in tokens if token.split("/")[8] == "vtp"]


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def jpegs(scenes: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = []
    for scene in scenes:
        file = BytesIO()
        Image.fromarray(scene).save(file, "JPEG", quality=95)
        made.append({"format": "jpeg", "data": file.getvalue()})
    return write_pictures(tmp_path_factory.mktemp("jpegs") / "jpeg.json", made)


@pytest.mark.parametrize(("client", "number"), [("sdk", signal.SIGTERM), ("pyzeros", signal.SIGINT)])
def test_a_client_of_another_maker_gets_the_pipelines_answers(
    client: str,
    number: int,
    bundle: Path,
    pipeline: Pipeline,
    scenes: list[np.ndarray],
    pictures: Path,
    port: int,
) -> None:
    """640x480: stamps, answers, what is attached, the graph, another question, tokens at the end."""
    wanted = [pipeline.generate(scene, QUESTION).text for scene in scenes]
    with router(port), peer(client, port, pictures, "--fps", "15") as other:
        began = time.time_ns()
        with node(bundle, port, number=number) as robot:
            other.write(camera=True)
            until(lambda: {place_of(said) for said in answers(other)} >= {0, 1, 2, 3}, robot, other)
            check_graph(other, client)
            other.write(prompt=OTHER)
            until(lambda: answers(other)[-1]["prompt"] == OTHER, robot, other)
            other.write(camera=False)
            assert len(of_vtp(asked(other, "tokens"))) == 6  # the node, three publishers, two subscriptions
        until(lambda: not of_vtp(asked(other, "tokens")), other)
        ended = time.time_ns()
    (line,) = told(robot, " failures")
    assert line.endswith(" dropped, 0 failures\n")
    assert not told(robot, "not answered")
    check_answers(other, wanted)
    said = [one for one in answers(other) if one["prompt"] == OTHER]
    assert said[0]["text"] == pipeline.generate(scenes[place_of(said[0])], OTHER).text
    check_attached(other, began, ended)


def check_answers(other: Process, wanted: list[str]) -> None:
    published = {one["stamp_ns"]: one["picture"] for one in other.lines if "stamp_ns" in one}
    found = answers(other)
    stamps = [said["stamp"]["sec"] * 10**9 + said["stamp"]["nanosec"] for said in found]
    assert stamps == sorted(set(stamps))  # none twice, none out of order
    for said, stamp in zip(found, stamps, strict=True):
        assert published[stamp] == place_of(said)
        if said["prompt"] == QUESTION:
            assert said["text"] == wanted[place_of(said)]
    assert came(other, "/vtp/answer") == [said["text"] for said in found]
    numbers = [said["number"] for said in found]
    assert [said["dropped"] for said in found[1:]] == [later - one - 1 for one, later in pairwise(numbers)]


def check_attached(other: Process, began: int, ended: int) -> None:
    gids = {}
    for topic in ("/vtp/answer", "/vtp/answer_json"):
        attached = [one for one in other.lines if one.get("attached") == topic]
        assert [one["sequence"] for one in attached] == list(range(1, len(attached) + 1))
        times = [one["ns"] for one in attached]
        assert times == sorted(times)
        assert began < times[0] < times[-1] < ended
        (gids[topic],) = {one["gid"] for one in attached}
        assert len(bytes.fromhex(gids[topic])) == 16
    assert len(set(gids.values())) == 2


def check_graph(other: Process, client: str) -> None:
    """What the SDK's `topic list` shows."""
    if client == "sdk":
        topics = dict(asked(other, "graph"))
        assert topics["/image"] == ["sensor_msgs/msg/Image"]
        for name, kind in (
            ("answer", "String"),
            ("answer_json", "String"),
            ("prompt", "String"),
            ("alert", "Bool"),
        ):
            assert topics[f"/vtp/{name}"] == [f"std_msgs/msg/{kind}"]


def test_compressed_pictures_another_domain_and_an_alert(
    bundle: Path, pipeline: Pipeline, jpegs: Path, port: int
) -> None:
    alert = "is there a star ?"
    with router(port), peer("pyzeros", port, jpegs, "--fps", "5") as other:
        with node(bundle, port, "--compressed", "--alert", alert, "--threshold", "0.2") as robot:
            other.write(camera=True)
            until(lambda: len(answers(other)) > 1, robot, other)
        with node(bundle, port, "--compressed", "--domain", "77", "--stale-after", "0.5") as robot:
            until(lambda: told(robot, "no frame has come on /image/compressed"), robot)
            assert any(token.startswith("@ros2_lv/77/") for token in of_vtp(asked(other, "tokens")))
    said = answers(other)[0]
    assert said["alert"]["question"] == alert
    assert said["alert"]["raised"] is (said["alert"]["probability"] >= 0.2)


def test_messages_that_are_damaged_are_told_and_counted(
    bundle: Path, scenes: list[np.ndarray], pictures: Path, port: int
) -> None:
    bad = damaged(scenes[0])
    with router(port), peer("sdk", port, pictures, "--fps", "5") as other, node(bundle, port) as robot:
        for data in bad.values():
            other.write(raw=data.hex())
            time.sleep(0.1)  # or the next one takes its place, and nobody asks about it
        until(lambda: told(robot, "a frame was not answered"), robot)
        other.write(prompt="x" * 70_000)
        until(lambda: told(robot, "the prompt stays as it was: prompt has 70000 characters"), robot, other)
        other.write(camera=True)
        until(lambda: answers(other), robot, other)
    (line,) = told(robot, " failures")
    assert line.endswith(f", {len(bad)} failures\n")
    assert not told(robot, "Traceback")


def damaged(scene: np.ndarray) -> dict[str, bytes]:
    """Messages that are none, in CDR by rosbags where they are in CDR at all."""
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    types = store.types
    header = types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](1, 2), "bad")

    def image(**changed: Any) -> bytes:
        fields = {**raw("rgb8", scene), **changed}
        data = np.frombuffer(fields["data"], np.uint8)
        message = types["sensor_msgs/msg/Image"](
            header, fields["height"], fields["width"], fields["encoding"], 0, fields["step"], data
        )
        return bytes(store.serialize_cdr(message, "sensor_msgs/msg/Image"))

    whole = image()
    return {
        "nothing": b"",
        "no CDR": b"{}" * 20,
        "short": whole[:1000],
        "only a header": whole[:4],
        "wrong step": image(step=100),
        "step too large": image(step=2**32 - 1),
        "unserved encoding": image(encoding="bayer_rggb8"),
        "huge": image(height=2**32 - 1, width=2**32 - 1),
        "empty": image(height=0, width=0, data=b""),
    }


def test_a_router_that_is_missing_lost_and_back_is_told(bundle: Path, pictures: Path, port: int) -> None:
    words = [zenoh_python() or "", "-m", "vtp.serve.robots.zenoh.cli", str(bundle), "--prompt", "x"]
    done = subprocess.run(
        [*words, "--connect", at(port)], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"vtp-zenoh: error: no zenoh router answers at {at(port)} (waited 5 s); start"
    )
    assert done.stderr.count("\n") == 1
    with router(port) as first, node(bundle, port) as robot:
        first.end()
        until(lambda: told(robot, f"lost the router at {at(port)}; trying again"), robot)
        with router(port), peer("pyzeros", port, pictures, "--fps", "5") as other:
            until(lambda: told(robot, f"the router at {at(port)} is back"), robot)
            other.write(camera=True)
            until(lambda: answers(other), robot, other)
            other.write(camera=False)
            until(lambda: told(robot, "the newest frame is 1."), robot)
            until(lambda: told(robot, "no frame comes on /image: the newest is 5."), robot)


def test_a_node_that_is_killed_leaves_no_tokens(bundle: Path, pictures: Path, port: int) -> None:
    with router(port), peer("pyzeros", port, pictures) as other:
        words = [
            str(bundle),
            "--prompt",
            QUESTION,
            "--engine",
            "ort-cpu",
            "--threads",
            "1",
            "--connect",
            at(port),
        ]
        with child("-m", "vtp.serve.robots.zenoh.cli", *words, code=-9, number=signal.SIGKILL) as robot:
            until(lambda: told(robot, "asking about"), robot)
            until(lambda: len(of_vtp(asked(other, "tokens"))) == 6, robot, other)
        until(lambda: not of_vtp(asked(other, "tokens")), other)


def test_vtp_watch_asks_about_a_topic(
    bundle: Path, pipeline: Pipeline, scenes: list[np.ndarray], pictures: Path, port: int
) -> None:
    source = f"zenoh:{at(port)}#/image"
    words = [str(bundle), source, "--prompt", QUESTION, "--engine", "ort-cpu", "--threads", "1"]
    with router(port), peer("sdk", port, pictures, "--fps", "10") as other:
        other.write(camera=True)
        with child("-m", "vtp.serve.streams.cli", *words, "--until", "4", "--json") as watch:
            watch.wait()
    published = {one["stamp_ns"]: one["picture"] for one in other.lines if "stamp_ns" in one}
    frames = [line for line in watch.lines if "frame" in line]
    assert len(frames) == 4
    for said in frames:
        place = published[said["frame"]["stamp_ns"]]
        assert (said["frame"]["clock"], said["frame"]["name"]) == ("ros", f"camera_{place}")
        assert said["text"] == pipeline.generate(scenes[place], QUESTION).text
