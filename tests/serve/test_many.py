"""Many clients at once: those that go away, those that find no place, those that have to wait."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from vtp.runtime import Pipeline
from vtp.runtime.generation.answer import Answer as Writing
from vtp.runtime.scheduler import Scheduler
from vtp.serve.settings import Settings

from ..stand_ins.prompt_gate import Gate
from .client import CHAT, Site, serving, shown, wait_until, words


@pytest.fixture
def busy(exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Site, Gate]]:
    """A server of one slot and a queue of two, whose prompts wait at a gate; a ping comes every 0.1 s."""
    settings = Settings(ping_seconds=0.1, grace_seconds=0.5)
    gate = Gate(monkeypatch)
    with (
        Scheduler.load(exported("vispruner").folder, threads=1, slots=1, queue=2) as scheduler,
        serving({"tiny": scheduler}, settings) as site,
    ):
        try:
            yield site, gate
        finally:
            gate.open()


def body_of(picture: Image.Image, **fields: Any) -> dict[str, Any]:
    content = [shown(picture), words("how many ?")]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 100, **fields}


def reset(raw: socket.socket) -> None:
    """Leave at once, without a word."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def all_cancelled(scheduler: Scheduler) -> bool:
    """Whether every request that runs was told to end."""
    running = list(scheduler._queue._running.values())
    return all(job.answer.request.stop_signal.cancelled for job in running)


# -- clients that go away ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_who_goes_away_frees_the_place(
    busy: tuple[Site, Gate], picture: Image.Image, stream: bool, leave: Callable[[socket.socket], None]
) -> None:
    """One that runs and one that waits; the next client is answered."""
    site, gate = busy
    scheduler = site.models.lookup("tiny").scheduler
    running = site.open_raw(body_of(picture, stream=stream))
    assert gate.entered.acquire(timeout=60)
    waiting = site.open_raw(body_of(picture, stream=stream))
    wait_until(lambda: scheduler.stats().waiting == 1)
    leave(waiting)
    wait_until(lambda: scheduler.stats().waiting == 0)
    leave(running)
    wait_until(lambda: all_cancelled(scheduler))
    gate.open()
    wait_until(lambda: scheduler.stats().running == 0)
    assert scheduler.stats().cancelled == 2 and scheduler.stats().tokens == 0
    assert site.send(CHAT, body_of(picture, max_tokens=3)).status == 200
    wait_until(lambda: 'status="499"} 2' in site.send("/metrics").content.decode())


def test_who_leaves_amid_the_question(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is asked, and nobody is told of an error."""
    for leave in (socket.socket.close, reset):
        raw = socket.create_connection(("127.0.0.1", site.port))
        raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9000\r\n\r\n{{".encode())
        assert site.send("/health").status == 200
        leave(raw)
    wait_until(lambda: len(site.server.server_state.connections) <= 1)
    wait_until(lambda: not site.server.server_state.tasks)
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def test_who_leaves_amid_an_answer_ends_it(
    exported: Callable[[str], Any], picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first chunk was read, then the client is gone: the answer ends long before its length."""
    go_on = threading.Event()
    take = Writing.take

    def slowly(writing: Writing, *arguments: Any) -> Any:
        if len(writing.result.token_ids) == 2:
            assert go_on.wait(60)
        return take(writing, *arguments)

    monkeypatch.setattr(Writing, "take", slowly)
    with Scheduler.load(exported("vispruner").folder, threads=1, slots=1) as scheduler:
        scheduler.pipeline.manifest.text.__dict__["eos_token_ids"] = ()
        with serving({"tiny": scheduler}) as site:
            raw = site.open_raw(body_of(picture, stream=True))
            file = raw.makefile("rb")
            while b'"role":"assistant"' not in file.readline():
                pass
            file.close()
            raw.close()
            wait_until(lambda: all_cancelled(scheduler))
            go_on.set()
            wait_until(lambda: scheduler.stats().running == 0)
            made = scheduler.stats().tokens
            assert scheduler.stats().cancelled == 1 and 1 <= made <= 3
            counted = f'vtp_generation_tokens_total{{model="tiny"}} {float(made)}'
            wait_until(lambda: counted in site.send("/metrics").content.decode())


# -- the queue -----------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_back(busy: tuple[Site, Gate], picture: Image.Image) -> None:
    site, gate = busy
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(site.send, CHAT, body_of(picture, max_tokens=2))]
        assert gate.entered.acquire(timeout=60)
        asked += [pool.submit(site.send, CHAT, body_of(picture, max_tokens=2)) for _ in range(2)]
        scheduler = site.models.lookup("tiny").scheduler
        wait_until(lambda: scheduler.stats().waiting == 2)
        for stream in (False, True):
            answer = site.send(CHAT, body_of(picture, stream=stream))
            assert answer.status == 429, answer.content
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.error["type"] == "rate_limit_error" and answer.error["code"] == "queue_full"
        gate.open()
        assert [one.result(60).status for one in asked] == [200] * 3


def test_many_clients_get_their_own_answers(
    exported: Callable[[str], Any], alone: Pipeline, picture: Image.Image
) -> None:
    """Streamed and not, of unequal length: each is what the pipeline says of it alone."""
    texts = [f"how many {word} ?" for word in ("red", "blue", "star", "circle") * 4]
    wanted = [
        alone.generate(picture, text, max_new_tokens=5 + 3 * place).raw_text
        for place, text in enumerate(texts)
    ]
    with (
        Scheduler.load(exported("vispruner").folder, threads=1, slots=4) as scheduler,
        serving({"tiny": scheduler}) as site,
        ThreadPoolExecutor(8) as pool,
    ):

        def ask(place: int) -> str:
            content = [shown(picture), words(texts[place])]
            answer = site.chat(content, max_tokens=5 + 3 * place, stream=bool(place % 2))
            assert answer.status == 200
            if not place % 2:
                return answer.text
            deltas = [event["choices"][0]["delta"] for event in answer.events if isinstance(event, dict)]
            return "".join(delta.get("content", "") for delta in deltas)

        assert list(pool.map(ask, range(len(texts)))) == wanted


# -- streams -------------------------------------------------------------------------------------------------


def test_a_stream_that_has_to_wait_is_kept_alive(busy: tuple[Site, Gate], picture: Image.Image) -> None:
    site, gate = busy
    raw = site.open_raw(body_of(picture, stream=True, max_tokens=3))
    file = raw.makefile("rb")
    assert file.readline().startswith(b"HTTP/1.1 200")
    pings = 0
    while pings < 3:
        pings += file.readline() == b": ping\n"
    gate.open()
    rest = []
    while not rest or rest[-1] != b"data: [DONE]\n":
        rest.append(file.readline())
    assert any(b'"role":"assistant"' in line for line in rest)
    raw.close()


def test_an_error_after_the_headers_is_an_event(
    busy: tuple[Site, Gate], picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, gate = busy

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("secret of /home")

    monkeypatch.setattr(Writing, "begin", broken)
    raw = site.open_raw(body_of(picture, stream=True))
    file = raw.makefile("rb")
    while file.readline() != b": ping\n":
        pass
    gate.open()
    lines = []
    while not lines or lines[-1] != b"data: [DONE]\n":
        lines.append(file.readline())
    (line,) = [line for line in lines if b"error" in line]
    error = json.loads(line[6:])["error"]
    assert error["type"] == "server_error" and "home" not in error["message"]
    raw.close()


# -- loading and stopping ------------------------------------------------------------------------------------


def test_while_it_loads(exported: Callable[[str], Any], picture: Image.Image) -> None:
    from vtp.serve.http.models import Models

    models = Models(names=["tiny"])
    with serving(models) as site:
        for path in ("/health", "/health/ready", "/v1/models"):
            assert site.send(path).status == 503
        assert site.send("/health").json == {"status": "loading"}
        answer = site.send(CHAT, body_of(picture))
        assert (answer.status, answer.error["message"]) == (503, "the server is loading; try again later")
        assert answer.error["type"] == "unavailable_error" and answer.headers["retry-after"] == "1"
        with Scheduler.load(exported("vispruner").folder, threads=1) as scheduler:
            models.add("tiny", scheduler)
            models.loaded()
            assert site.send("/health/ready").json == {"status": "ok"}
            assert site.send(CHAT, body_of(picture, max_tokens=2)).status == 200


def test_while_it_stops(busy: tuple[Site, Gate], picture: Image.Image) -> None:
    """New requests are refused, running ones end as they would."""
    site, gate = busy
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.send, CHAT, body_of(picture, max_tokens=3))
        assert gate.entered.acquire(timeout=60)
        site.server.stop()
        answer = site.send(CHAT, body_of(picture))
        assert (answer.status, answer.error["message"]) == (503, "the server is stopping; try again later")
        assert site.send("/health/ready").status == 503
        assert (site.send("/health").status, site.send("/health").json) == (200, {"status": "stopping"})
        gate.open()
        assert running.result(60).status == 200


def test_who_takes_too_long_at_the_end_is_told(busy: tuple[Site, Gate], picture: Image.Image) -> None:
    """After the grace time requests are cancelled: 503, or an event with that error."""
    site, gate = busy
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(site.send, CHAT, body_of(picture))
        assert gate.entered.acquire(timeout=60)
        stream = pool.submit(site.send, CHAT, body_of(picture, stream=True))
        scheduler = site.models.lookup("tiny").scheduler
        wait_until(lambda: scheduler.stats().waiting == 1)
        site.server.stop()
        last = stream.result(60).events[-2:]
        assert last[1] is None and "stopping" in last[0]["error"]["message"]
        gate.open()
        assert whole.result(60).status == 503
