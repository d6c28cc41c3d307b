"""The live page of a watch: what it shows, whom it lets in, how it ends."""

from __future__ import annotations

import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.runtime import Pipeline
from vtp.serve.streams.cli import main
from vtp.serve.streams.frames import Frame
from vtp.serve.streams.newest import PushedFrames
from vtp.serve.streams.sinks.page import Page
from vtp.serve.streams.watcher import Watcher

from .moving import moving, scene, write_video

PROMPT = "what is it ?"


class Watched:
    """A watch whose frames the test pushes, and its page."""

    def __init__(self, pipe: Pipeline) -> None:
        self.source = PushedFrames("the camera")
        self.watcher = Watcher(pipe, self.source, PROMPT, max_new_tokens=1)
        self.page = Page(self.watcher, 0, self.source.name)
        self.port = int(self.page.address.rpartition(":")[2])
        self.number = 0

    def answer(self) -> Any:
        """Push a frame, and show its answer."""
        picture = np.roll(scene(), self.number, axis=1)
        self.source.put(Frame(picture, self.number, 5, time.monotonic()))
        self.number += 1
        answer = next(self.watcher)
        self.page(answer)
        return answer

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), named)
        return connection.getresponse()


@pytest.fixture
def watched(pipe: Pipeline) -> Iterator[Watched]:
    one = Watched(pipe)
    yield one
    one.page.close()
    one.watcher.stop()
    assert not [thread for thread in threading.enumerate() if thread.name in ("vtp-page", "vtp-capture")]


def test_the_page_and_its_frame(watched: Watched) -> None:
    page = watched.ask("GET", "/")
    assert page.status == 200 and b"EventSource" in page.read()
    assert "default-src 'none'" in (page.headers["Content-Security-Policy"] or "")
    assert watched.ask("GET", "/frame.jpg").status == 404
    watched.answer()
    frame = watched.ask("GET", "/frame.jpg?0")
    assert frame.headers["Content-Type"] == "image/jpeg" and frame.headers["Cache-Control"] == "no-store"
    seen = np.asarray(Image.open(io.BytesIO(frame.read())).convert("RGB")).astype(int)
    assert np.abs(seen - scene()).mean() < 8


def test_answers_come_as_events(watched: Watched) -> None:
    told = watched.ask("GET", "/events")
    assert told.headers["Content-Type"].startswith("text/event-stream")
    for number in range(3):
        answer = watched.answer()
        line = told.readline()
        while not line.startswith(b"data: "):
            line = told.readline()
        assert json.loads(line[6:]) == {"source": "the camera", **answer.to_json()}
        assert answer.frame.number == number


def test_the_question_is_changed_from_the_page(watched: Watched) -> None:
    kind = {"Content_Type": "application/json"}
    assert watched.ask("POST", "/prompt", {"prompt": "another one"}, **kind).status == 204
    assert watched.answer().prompt == "another one"
    for body in ({"prompt": " "}, {"prompt": 3}, {"prompt": "a <image>"}, {}, [1], "x"):
        refused = watched.ask("POST", "/prompt", body, **kind)
        assert refused.status == 400 and json.loads(refused.read())["error"]["message"]
    assert watched.answer().prompt == "another one"


def test_other_pages_are_kept_out(watched: Watched) -> None:
    """A page from elsewhere in the same browser sends its origin; one that was rebound sends its name."""
    kind, prompt = {"Content_Type": "application/json"}, {"prompt": "theirs"}
    assert watched.ask("POST", "/prompt", prompt, Origin="https://evil.example", **kind).status == 403
    assert watched.ask("POST", "/prompt", prompt, Host="evil.example", **kind).status == 403
    assert watched.ask("GET", "/events", Host="evil.example").status == 403
    assert watched.ask("POST", "/prompt", prompt, Content_Type="text/plain").status == 415
    assert watched.ask("POST", "/prompt", {"prompt": "x" * 2**17}, **kind).status == 413
    assert watched.watcher.prompt == PROMPT


def test_closing_ends_readers(watched: Watched) -> None:
    told = watched.ask("GET", "/events")
    watched.page.close()
    told.read()  # to its end


def test_the_command_says_where_it_is(
    exported: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_video(tmp_path / "clip.mp4", moving(3))
    folder = str(exported("vispruner").folder)
    asked = [
        folder,
        str(clip),
        "--prompt",
        PROMPT,
        "--threads",
        "1",
        "--max-new-tokens",
        "1",
        "--every-frame",
    ]
    assert main([*asked, "--page", "0"]) == 0
    assert "note: the page is at http://127.0.0.1:" in capsys.readouterr().err
    assert main([*asked, "--page", "70000"]) == 2
    assert "page 70000 is not a valid port" in capsys.readouterr().err
