"""Replicas without Ray: the same door and the same replicas, in this process; what gets lost on the way."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from vtp.engines import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.serve.cli import main
from vtp.serve.http.errors import ApiError
from vtp.serve.scale.call import Call, answered
from vtp.serve.scale.cluster import fitting, lost
from vtp.serve.scale.front import Remote, make_front, model_of
from vtp.serve.scale.replica import Plan, Replica
from vtp.serve.scale.samples import merged
from vtp.serve.settings import Settings

from .client import CHAT, PATIENCE, Site, data_url, serving, shown, wait_until, words

OPTIONS = {"threads": 1, "slots": 1, "queue": 1}


class Here:
    """A cluster whose replicas are in this process, one of each model.

    lose    how many more messages come before the replica is lost; None: it never is
    absent  no replica takes what is asked
    """

    def __init__(self, plans: list[Plan]) -> None:
        self.replicas = 1
        self.lose: int | None = None
        self.absent = False
        self.closed = False
        self.cancelled = 0
        self.held: dict[str, Replica] = {}
        self._plans = plans

    def start(self, label: str, given_up: Callable[[], bool]) -> None:
        self.held = {plan.name: Replica(plan) for plan in self._plans}

    def ask(self, name: str, call: Call, body: bytes) -> Any:
        return Coming(self, self.held[name].answer(call, body))

    def get(self, name: str, path: str) -> bytes:
        return asyncio.run(self.held[name].get(path))

    def describe(self, name: str) -> dict[str, Any]:
        return asyncio.run(self.held[name].describe())

    async def texts(self) -> dict[str, dict[str, str]]:
        return {name: dict([await replica.metrics()]) for name, replica in self.held.items()}

    def running(self) -> dict[str, int]:
        return dict.fromkeys(self.held, 0 if self.absent else 1)

    def close(self) -> None:
        self.closed = True
        for replica in self.held.values():
            replica._models.close(drain=False)


class Coming:
    """An answer one message at a time: how many come together otherwise depends on the machine's speed."""

    def __init__(self, cluster: Here, messages: Any) -> None:
        self._cluster, self._messages = cluster, messages
        self._here: list[Any] = []

    async def next(self) -> Any:
        if self._cluster.absent:
            await asyncio.Event().wait()
        if self._cluster.lose is not None:
            if not self._cluster.lose:
                raise lost()
            self._cluster.lose -= 1
        if not self._here:
            some = await anext(self._messages, None)
            if some is None:
                return None
            self._here = list(some)
        first, self._here = self._here[:1], self._here[1:]
        return first

    async def cancel(self) -> None:
        self._cluster.cancelled += 1
        await self._messages.aclose()


@contextmanager
def behind(plans: list[Plan], settings: Settings | None = None, arrival: float = 30) -> Iterator[Site]:
    """The real server, whose requests go on to replicas."""
    models = Remote(Here(plans), [plan.name for plan in plans], arrival)  # type: ignore[arg-type]
    models.load("test")
    settings = settings or Settings(grace_seconds=5)
    with closing(models), serving(models, settings, make_front(models, settings)) as site:
        yield site


@pytest.fixture(scope="module")
def plans(exported: Callable[[str], Any]) -> list[Plan]:
    bundles = {"one": exported("vispruner").folder, "two": exported("adaptprune").folder}
    return [
        Plan.of(name, str(folder), options=OPTIONS, settings=Settings(ping_seconds=0.1))
        for name, folder in bundles.items()
    ]


@pytest.fixture
def pair(plans: list[Plan]) -> Iterator[Site]:
    with behind(plans, arrival=0.2) as site:
        yield site


def cluster(site: Site) -> Any:
    return site.models.cluster  # type: ignore[attr-defined]


def asked(picture: Image.Image) -> list[dict[str, Any]]:
    return [shown(picture), words("how many ?")]


def said(events: list[Any]) -> str:
    deltas = [one["choices"][0]["delta"] for one in events if isinstance(one, dict) and "choices" in one]
    return "".join(delta.get("content", "") for delta in deltas)


# -- the door ------------------------------------------------------------------------------------------------


def test_answers_are_the_pipelines(pair: Site, plans: list[Plan], picture: Image.Image) -> None:
    for plan in plans:
        with Pipeline.load(plan.bundle, threads=1) as pipeline:
            wanted = pipeline.generate(picture, "how many ?", max_new_tokens=20).raw_text
        assert pair.chat(asked(picture), max_tokens=20, model=plan.name).text == wanted
        stream = pair.chat(asked(picture), max_tokens=20, model=plan.name, stream=True)
        assert said(stream.events) == wanted and stream.events[-1] is None
    assert cluster(pair).cancelled == 0


def test_decisions_are_the_pipelines(pair: Site, plans: list[Plan], picture: Image.Image) -> None:
    question = {"type": "choice", "question": "what is it ?", "options": ["red", "blue"]}
    body = {"images": [data_url(picture)], "questions": [question], "model": "two"}
    answer = pair.send("/v1/decisions", body).json["answers"]["0"]
    with Pipeline.load(plans[1].bundle, threads=1) as pipeline:
        wanted = pipeline.decide(picture, "what is it ?", ["red", "blue"])
    assert answer["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-6)


def test_lists_hold_every_model(pair: Site) -> None:
    assert [one["id"] for one in pair.send("/v1/models").json["data"]] == ["one", "two"]
    assert [one["name"] for one in pair.send("/api/tags").json["models"]] == ["one:latest", "two:latest"]
    assert pair.send("/v1/models/two").json["id"] == "two"
    missing = pair.send("/v1/models/three")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


def test_a_key_is_asked_for_here_and_never_sent_on(plans: list[Plan], picture: Image.Image) -> None:
    with behind(plans[:1], Settings(key="secret")) as site:
        body = {"messages": [{"role": "user", "content": asked(picture)}], "max_tokens": 2}
        assert site.send(CHAT, body).status == 401
        assert site.send(CHAT, body, headers={"Authorization": "Bearer secret"}).status == 200
        assert site.send("/health").status == 200
    names = {name for name, _ in Call("POST", CHAT, b"application/json").scope(3)["headers"]}
    assert names == {b"host", b"content-length", b"content-type"}


def test_metrics_say_whose_they_are(pair: Site, picture: Image.Image) -> None:
    assert pair.chat(asked(picture), max_tokens=2, model="two").status == 200
    families = list(text_string_to_metric_families(pair.send("/metrics").content.decode()))
    found = {one.name: one.samples for one in families}
    assert len(found) == len(families)  # each metric's lines are together
    done = [one for one in found["vtp_requests"] if one.name == "vtp_requests_total"]
    assert [(one.labels["model"], one.value) for one in done] == [("two", 1)]
    assert "-" in done[0].labels["replica"]
    running = {one.labels["model"]: one.value for one in found["vtp_replicas_running"]}
    assert running == {"one": 1, "two": 1}


# -- what gets lost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1])
def test_a_replica_that_dies_is_an_error_with_a_status(pair: Site, picture: Image.Image, before: int) -> None:
    cluster(pair).lose = before
    for stream in (False, True):
        cluster(pair).lose = before
        refused = pair.chat(asked(picture), stream=stream)
        assert (refused.status, refused.error["type"]) == (503, "unavailable_error")
        assert refused.headers["retry-after"] == "1"
    cluster(pair).lose = None
    assert pair.chat(asked(picture), max_tokens=2).status == 200


@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
def test_a_stream_says_that_it_broke_off(pair: Site, picture: Image.Image, path: str) -> None:
    """Where it has begun: after nothing, and the first piece."""
    cluster(pair).lose = 2
    ollama = path != CHAT
    turn = {"role": "user", "content": "how many ?" if ollama else asked(picture)}
    answer = pair.send(path, {"messages": [turn], "stream": True, "max_tokens": 100})
    assert answer.status == 200
    if ollama:
        assert "has ended; send it again" in json.loads(answer.content.splitlines()[-1])["error"]
    else:
        assert answer.events[-1] is None and answer.events[-2]["error"]["type"] == "unavailable_error"


def test_without_a_replica_nobody_waits_for_ever(pair: Site, picture: Image.Image) -> None:
    cluster(pair).absent = True
    refused = pair.chat(asked(picture))
    assert (refused.status, refused.error["message"]) == (
        503,
        "no replica of the model takes requests now; try again later",
    )
    assert pair.send("/health/ready").status == 503 and pair.send("/health").status == 200


def test_who_goes_away_and_who_is_stopped(plans: list[Plan], picture: Image.Image) -> None:
    """Requests that no replica takes yet: one client goes, the other is told that the server stops."""
    with behind(plans[:1], Settings(grace_seconds=0.3)) as site:
        cluster(site).absent = True
        body = {"messages": [{"role": "user", "content": asked(picture)}]}
        site.open_raw(body).close()
        wait_until(lambda: cluster(site).cancelled == 1)
        answers: list[Any] = []
        waits = threading.Thread(target=lambda: answers.append(site.send(CHAT, body)))
        waits.start()
        wait_until(lambda: len(site.models._under_way) == 1)  # type: ignore[attr-defined]
        site.server.stop()
        waits.join(PATIENCE)
        assert answers[0].status == 503 and "is stopping, and ended this" in answers[0].error["message"]
    assert cluster(site).closed


def test_a_client_that_stops_reading_is_one_that_left() -> None:
    """The application in the replica is told, and what it raises then is nobody's."""
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"{}"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        told.append((await receive())["type"])
        raise RuntimeError("nobody reads this")

    async def run() -> None:
        messages = answered(app, Call("POST", "/"), b"{}")
        assert [one["type"] for one in await anext(messages)] == ["http.response.start"]
        await messages.aclose()
        for _ in range(3):
            await asyncio.sleep(0)

    asyncio.run(run())
    assert told == ["http.disconnect"]


# -- where a request goes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "wanted"),
    [
        (CHAT, b'{"model": "two"}', "two"),
        (CHAT, b'{"model": ""}', "one"),
        (CHAT, b'{"model": null}', "one"),
        (CHAT, b'{"model": 3}', "one"),
        (CHAT, b"{", "one"),
        (CHAT, b"[]", "one"),
        (CHAT, b"", "one"),
        (CHAT, b'{"name": "two"}', "one"),
        ("/api/show", b'{"name": "two:latest"}', "two"),
        ("/api/chat", b'{"model": "two:latest"}', "two"),
        ("/v1/models/two", b"", "two"),
    ],
)
def test_a_request_goes_to_its_model(path: str, body: bytes, wanted: str) -> None:
    assert asyncio.run(model_of(path, body, ["one", "two"])) == wanted


def test_an_unknown_model_is_refused_here() -> None:
    for path, body in ((CHAT, b'{"model": "two:latest"}'), ("/api/chat", b'{"model": "x"}')):
        with pytest.raises(ApiError, match="this server has 'one', 'two'"):
            asyncio.run(model_of(path, body, ["one", "two"]))


# -- what replicas check -------------------------------------------------------------------------------------


def test_a_replica_refuses_another_bundle_and_another_version(plans: list[Plan], tmp_path: Path) -> None:
    with pytest.raises(VtpError, match="has another bundle at"):
        Replica(replace(plans[0], seal="0" * 64))
    with pytest.raises(VtpError, match=r"does not see .*; bundles belong on a disk that all share"):
        Replica(replace(plans[0], bundle=str(tmp_path)))
    with pytest.raises(VtpError, match=r"and vtp-serve 0\.0; install the same on both"):
        Replica(replace(plans[0], version="0.0"))


@pytest.mark.parametrize(
    ("cores", "count", "threads"),
    [([8], 2, 4), ([3, 3], 3, 1), ([4, 4, 4], 5, 2), ([2], 3, 0), ([], 1, 0), ([1, 16], 4, 4)],
)
def test_cores_are_shared_out(cores: list[int], count: int, threads: int) -> None:
    assert fitting(cores, count) == threads


def test_texts_are_merged_by_metric() -> None:
    one = '# HELP a A.\n# TYPE a gauge\na{x="}"} 1\n# HELP b B.\n# TYPE b gauge\nb 2\n'
    assert merged({"p": one, "q": one.replace("1", "3")}) == (
        '# HELP a A.\n# TYPE a gauge\na{replica="p",x="}"} 1\na{replica="q",x="}"} 3\n'
        '# HELP b B.\n# TYPE b gauge\nb{replica="p"} 2\nb{replica="q"} 2\n'
    )


# -- flags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replicas", "2"], "--replicas belongs to --ray"),
        (["--ray", "local", "--replicas", "0"], "--replicas 0 is not a number of processes; give 1 or more"),
        (["--ray", "local", "--shadow", "x"], "--shadow compares within one process"),
    ],
)
def test_flags_that_do_not_go_together(
    plans: list[Plan], flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([plans[0].bundle, "--port", "0", *flags]) == 2
    assert said in capsys.readouterr().err


def test_without_ray(
    plans: list[Plan], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    assert main([plans[0].bundle, "--port", "0", "--ray", "local"]) == 2
    assert "--ray needs Ray Serve: pip install 'vtp-edge[ray]'" in capsys.readouterr().err


def test_a_local_ray_without_a_token_is_refused(plans: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    from vtp.serve.scale.cluster import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UsageError, match="is not started without a token; unset RAY_AUTH_MODE"):
        Cluster("local", plans, 1)
