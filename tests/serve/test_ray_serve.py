"""vtp-serve on a local Ray: two bundles, two replicas of each, which die, fill up and lose their clients.

Runs where Ray Serve is installed: make test-ray.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtp.runtime import Pipeline

from .client import CHAT, Answer, shown, wait_until, words

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'vtp-edge[ray]'")
parser = pytest.importorskip("prometheus_client.parser")

STAND_IN = Path(__file__).parents[1] / "stand_ins/held_replicas"
COMMAND = "import sys; sys.path.remove(''); from vtp.serve.cli import main; sys.exit(main())"
START = 180.0


class Served:
    """vtp-serve in a process of its own, in a folder with modules that must not be imported."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.hold = folder / "hold"
        for name in ("llguidance", "vtp", "onnxruntime"):
            (folder / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
        paths = [str(STAND_IN), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.errors = (folder / "errors.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments, "--ray", "local", "--threads", "1", "--port", "0"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "VTP_TEST_HOLD": str(self.hold)},
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        assert self.process.stdout is not None
        self.said: list[str] = []
        while not self.said or not self.said[-1].startswith("try: "):
            line = self.process.stdout.readline()
            assert line, self.complaints()
            self.said.append(line.rstrip("\n"))
        self.port = int(self.said[-2].split(" ")[2].rpartition(":")[2])

    def complaints(self) -> str:
        self.errors.flush()
        return Path(self.errors.name).read_text()

    def send(self, path: str, body: Any = None, **headers: str) -> Answer:
        answer = self.open(path, body, **headers)
        return Answer(answer.status, dict(answer.headers.items()), answer.read())

    def open(self, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        """A request of which only the headers of the answer were read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START)
        data = None if body is None else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, data, headers)
        return connection.getresponse()

    def samples(self, name: str, **labels: str) -> dict[str, float]:
        """Replica -> value of a metric."""
        text = self.send("/metrics").content.decode()
        found = [one for family in parser.text_string_to_metric_families(text) for one in family.samples]
        return {
            one.labels.get("replica", ""): one.value
            for one in found
            if one.name == name and labels.items() <= one.labels.items()
        }

    def placed(self, model: str) -> int:
        """Requests that a model's replicas answer or keep waiting."""
        names = ("vtp_requests_running", "vtp_requests_waiting")
        return int(sum(sum(self.samples(name, model=model).values()) for name in names))

    def replicas(self, model: str) -> list[int]:
        """Their processes."""
        return [int(one.rpartition("-")[2]) for one in self.samples("vtp_slots", model=model)]

    def end(self) -> int:
        """SIGTERM, then its exit code."""
        self.hold.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.errors.close()


@pytest.fixture(scope="module")
def folders(exported: Callable[[str], Any]) -> dict[str, Path]:
    return {"one": exported("vispruner").folder, "two": exported("adaptprune").folder}


@pytest.fixture(scope="module")
def served(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two bundles, two replicas of each, each with one slot and a queue of one."""
    names = [part for name in folders for part in ("--name", name)]
    limits = ["--slots", "1", "--queue", "1", "--ping-seconds", "0.1"]
    paths = [str(folder) for folder in folders.values()]
    server = Served(tmp_path_factory.mktemp("ray"), *paths, *names, "--replicas", "2", *limits)
    try:
        yield server
    finally:
        server.end()


@pytest.fixture
def held(served: Served) -> Iterator[Path]:
    """While this file exists no answer goes beyond its second token."""
    served.hold.touch()
    yield served.hold
    served.hold.unlink(missing_ok=True)
    wait_until(lambda: not served.placed("one") + served.placed("two"))


@pytest.fixture(scope="module")
def right(folders: dict[str, Path], picture: Image.Image) -> dict[str, str]:
    """Model -> what its bundle says of the picture without any server."""
    texts = {}
    for name, folder in folders.items():
        with Pipeline.load(folder, threads=1) as pipeline:
            texts[name] = pipeline.generate(picture, "how many ?", max_new_tokens=20).raw_text
    assert len(set(texts.values())) == 2
    return texts


def body_of(picture: Image.Image, **fields: Any) -> dict[str, Any]:
    content = [shown(picture), words("how many ?")]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 20, **fields}


def text_of(events: list[Any]) -> str:
    deltas = [one["choices"][0]["delta"] for one in events if isinstance(one, dict) and "choices" in one]
    return "".join(delta.get("content", "") for delta in deltas)


def test_it_says_what_is_served(served: Served) -> None:
    assert served.said[:2] == [
        "one: ready on ort-cpu, 2 replicas on Ray, 1 at a time each, keeps 6 of 16 visual tokens",
        "two: ready on ort-cpu, 2 replicas on Ray, 1 at a time each, keeps 7 of 16 visual tokens",
    ]
    assert served.send("/health/ready").json == {"status": "ok"}
    for path, key, name in (
        ("/v1/models", "data", "id"),
        ("/models", "data", "id"),
        ("/api/ps", "models", ""),
    ):
        assert [one[name or "name"] for one in served.send(path).json[key]] == (
            ["one", "two"] if name else ["one:latest", "two:latest"]
        )
    assert served.send("/v1/models/two").json["vtp"]["method"] == "adaptprune"
    assert served.send("/api/show", {"model": "two:latest"}).json["model_info"]["vtp.method"] == "adaptprune"
    assert b"<html" in served.send("/").content


@pytest.mark.parametrize("model", ["one", "two"])
def test_answers_are_the_pipelines_streamed_and_not(
    served: Served, right: dict[str, str], picture: Image.Image, model: str
) -> None:
    whole = served.send(CHAT, body_of(picture, model=model))
    assert (whole.status, whole.text, whole.json["model"]) == (200, right[model], model)
    stream = served.send(CHAT, body_of(picture, model=model, stream=True))
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.events[-1] is None and text_of(stream.events) == right[model]
    lines = served.send(
        "/api/generate",
        {
            "model": f"{model}:latest",
            "prompt": "how many ?",
            "options": {"num_predict": 20},
            "images": [shown(picture)["image_url"]["url"].partition(",")[2]],
        },
    ).content.splitlines()
    assert "".join(json.loads(line)["response"] for line in lines) == right[model]


def test_a_request_without_a_model_gets_the_first(
    served: Served, right: dict[str, str], picture: Image.Image
) -> None:
    assert served.send(CHAT, body_of(picture)).text == right["one"]


def test_errors_are_those_of_one_process(served: Served, picture: Image.Image) -> None:
    unknown = served.send(CHAT, body_of(picture, model="three"))
    assert (unknown.status, unknown.error["code"]) == (404, "model_not_found")
    assert unknown.error["message"] == "there is no model 'three'; this server has 'one', 'two'"
    wrong = served.send(CHAT, {**body_of(picture, model="two"), "temperature": 3})
    assert (wrong.status, wrong.error["param"]) == (400, "temperature")
    number = served.send(CHAT, body_of(picture, model=5))
    assert (number.status, number.error["param"]) == (400, "model")
    long = served.send(CHAT, {"messages": [{"role": "user", "content": "how many ? " * 200}], "model": "two"})
    assert (long.status, long.error["code"]) == (400, "context_length_exceeded")
    assert served.send("/nowhere").status == 404 and served.send(CHAT).status == 405
    assert served.send("/health", Host="evil.example").status == 403
    assert served.send(CHAT, body_of(picture), Origin="http://evil.example").status == 403


def test_both_replicas_work_and_a_full_model_refuses(
    served: Served, held: Path, right: dict[str, str], picture: Image.Image
) -> None:
    """Two slots and two waiting places: four requests are taken, the fifth is told when to come again."""
    with ThreadPoolExecutor(4) as pool:
        asked = []
        for number in range(1, 5):  # one after the other: at once, three may go to one replica
            asked.append(pool.submit(served.send, CHAT, body_of(picture, model="one")))
            wait_until(lambda number=number: served.placed("one") == number)
        assert sorted(served.samples("vtp_requests_running", model="one").values()) == [1, 1]
        full = served.send(CHAT, body_of(picture, model="one", stream=True))
        assert (full.status, full.error["code"]) == (429, "queue_full")
        assert int(full.headers["retry-after"]) >= 1
        other = pool.submit(served.send, CHAT, body_of(picture, model="two"))
        held.unlink()
        assert [one.result().raw_text for one in asked] == [right["one"]] * 4
        assert other.result().raw_text == right["two"]


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_place(
    served: Served, held: Path, picture: Image.Image, stream: bool
) -> None:
    before = sum(served.samples("vtp_requests_total", model="two", status="499").values())
    data = json.dumps(body_of(picture, model="two", stream=stream, max_tokens=100)).encode()
    raw = socket.create_connection(("127.0.0.1", served.port), timeout=START)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
    raw.sendall(head.encode() + data)
    wait_until(lambda: served.placed("two") == 1)
    raw.close()
    # Only an answer that was told to end goes on while the others are held.
    wait_until(lambda: sum(served.samples("vtp_requests_total", model="two", status="499").values()) > before)
    held.unlink()
    wait_until(lambda: served.placed("two") == 0)


def test_a_replica_that_is_killed_is_replaced(
    served: Served, held: Path, right: dict[str, str], picture: Image.Image
) -> None:
    """What it was answering gets an error, streamed or not; the next requests are answered."""
    first = set(served.replicas("two"))
    with ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(served.send, CHAT, body_of(picture, model="two", stream=True))
        wait_until(lambda: served.placed("two") == 1)
        whole = pool.submit(served.send, CHAT, body_of(picture, model="two"))
        wait_until(lambda: served.placed("two") == 2)
        wait_until(lambda: len(first) == 2)
        for process in first:
            os.kill(process, signal.SIGKILL)
        ended, refused = streamed.result(), whole.result()
    held.unlink()
    assert (refused.status, refused.error["type"]) == (503, "unavailable_error")
    assert refused.error["message"] == "the process that answered this request has ended; send it again"
    assert ended.events[-1] is None and ended.events[-2] == {"error": refused.error}
    assert served.send(CHAT, body_of(picture, model="one")).text == right["one"]
    assert served.send(CHAT, body_of(picture, model="two")).text == right["two"]
    wait_until(lambda: len(set(served.replicas("two")) - first) == 2)
    assert served.send("/health/ready").status == 200
    assert "Traceback" not in served.complaints()


def test_one_dies_and_the_other_goes_on(served: Served, right: dict[str, str], picture: Image.Image) -> None:
    wait_until(lambda: len(served.replicas("one")) == 2)
    os.kill(served.replicas("one")[0], signal.SIGKILL)
    answers = [served.send(CHAT, body_of(picture, model="one")) for _ in range(8)]
    assert [answer.text for answer in answers] == [right["one"]] * 8


def test_many_at_once_are_shared_out(served: Served, right: dict[str, str], picture: Image.Image) -> None:
    """What is refused comes again, as clients do; nothing is lost, nothing differs."""
    wait_until(lambda: len(served.replicas("one")) == 2)

    def ask(number: int) -> str:
        while (
            answer := served.send(CHAT, body_of(picture, stream=number % 2 == 0, model="one"))
        ).status == 429:
            time.sleep(0.02)
        assert answer.status == 200, answer.content
        return answer.text if number % 2 else text_of(answer.events)

    with ThreadPoolExecutor(8) as pool:
        assert Counter(pool.map(ask, range(40))) == {right["one"]: 40}
    done = served.samples("vtp_requests_total", model="one", status="200")
    assert sum(1 for count in done.values() if count >= 5) == 2


def test_it_stops_when_all_are_answered(
    folders: dict[str, Path], tmp_path: Path, right: dict[str, str], picture: Image.Image
) -> None:
    """SIGTERM: the stream that runs goes on, new requests are refused, then every process is gone."""
    server = Served(tmp_path, str(folders["one"]), "--name", "one")
    server.hold.touch()
    stream = server.open(CHAT, body_of(picture, stream=True))
    replicas = server.replicas("one")
    assert len(replicas) == 1
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.send("/health/ready").status == 503)
    refused = server.send(CHAT, body_of(picture))
    assert (refused.status, refused.error["message"]) == (503, "the server is stopping; try again later")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(stream.read()))
    reader.start()
    server.hold.unlink()
    reader.join(60)
    assert text_of(Answer(200, {}, read[0]).events) == right["one"]
    assert server.process.wait(60) == 0
    assert server.complaints() == ""
    wait_until(lambda: not any(Path(f"/proc/{process}").exists() for process in replicas))
