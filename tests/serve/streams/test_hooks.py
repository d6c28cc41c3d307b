"""What alerts set off: a user's command, a webhook. Neither makes the watch wait, and no value is run."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from vtp.engines import UsageError
from vtp.serve.streams.sinks.hooks import Command, Hook, Webhook

ALERTED: dict[str, Any] = {
    "source": "cam",
    "question": "$(touch stolen) `touch stolen`; touch stolen \" ' \0 ?",
    "answer": "yes",
    "event": "raised",
    "probability": 0.75,
    "label_mass": 0.9,
    "frame": {"number": 7, "stamp_ns": 123, "clock": "unix", "name": "$(touch stolen)"},
}


def wait_for(what: Callable[[], bool]) -> None:
    """At most ten seconds."""
    for _ in range(1000):
        if what():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


# -- commands ------------------------------------------------------------------------------------------------


def test_a_command_gets_json_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Command(f"sh -c 'cat > {tmp_path}/in; env > {tmp_path}/env'")(ALERTED)
    assert json.loads((tmp_path / "in").read_text()) == ALERTED
    told = dict(line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines())
    assert told["VTP_ALERT"] == ALERTED["question"].replace("\0", "")
    assert (told["VTP_EVENT"], told["VTP_PROBABILITY"], told["VTP_FRAME"]) == ("raised", "0.75", "7")
    assert (told["VTP_STAMP_NS"], told["VTP_SOURCE"]) == ("123", "cam")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env", "in"]  # nothing of it was run


def test_a_command_that_does_not_read_is_let_be() -> None:
    Command("true")({**ALERTED, "question": "x" * 2**20})


def test_a_command_that_fails_says_how() -> None:
    with pytest.raises(OSError, match="it left with 3"):
        Command("sh -c 'exit 3'")(ALERTED)


def test_a_command_that_runs_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    line = f"sh -c '(while true; do date > {mark}; sleep 0.05; done) & wait'"
    with pytest.raises(OSError, match=r"it ran for more than 0\.5 s and was ended"):
        Command(line, seconds=0.5)(ALERTED)
    assert mark.exists()
    mark.unlink()
    time.sleep(0.3)
    assert not mark.exists()


@pytest.mark.parametrize("line", ["", "   ", "no-such-program-here -x", "sh -c 'unfinished"])
def test_a_command_that_cannot_run_is_refused_at_once(line: str) -> None:
    with pytest.raises(UsageError, match="--on-alert"):
        Command(line)


# -- webhooks ------------------------------------------------------------------------------------------------


class Receiver:
    """Takes POSTs and answers `status`."""

    def __init__(self) -> None:
        self.status, self.location = 200, ""
        self.bodies: list[Any] = []
        self.key: str | None = None
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.bodies.append((self.headers["Content-Type"], json.loads(body)))
                receiver.key = self.headers["Authorization"]
                self.send_response(receiver.status)
                if receiver.location:
                    self.send_header("Location", receiver.location)
                self.end_headers()

            def log_message(self, *words: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook?token=secret"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.server.shutdown()
    one.server.server_close()


def test_a_webhook_gets_the_alert(receiver: Receiver) -> None:
    Webhook(receiver.url)(ALERTED)
    assert receiver.bodies == [("application/json", ALERTED)] and receiver.key is None
    Webhook(receiver.url.replace("://", "://user:s%40cret@"))(ALERTED)
    assert receiver.key == f"Basic {base64.b64encode(b'user:s@cret').decode()}"


def test_failures_are_told_once_and_without_secrets(receiver: Receiver) -> None:
    told: list[str] = []
    hook = Hook("--webhook", Webhook(receiver.url), told.append)
    for count, status in enumerate((500, 500, 200, 503), 1):
        receiver.status = status
        hook.put(ALERTED)
        wait_for(lambda count=count: len(receiver.bodies) == count and not hook.busy)  # type: ignore[misc]
    hook.close()
    name = receiver.url.partition("?")[0]
    assert told == [f"--webhook failed: {name} answered {code}" for code in (500, 503)]


def test_a_webhook_that_nobody_answers_says_so() -> None:
    with pytest.raises(OSError) as caught:
        Webhook("http://user:secret@127.0.0.1:9/hook")(ALERTED)
    assert str(caught.value) == "http://127.0.0.1:9/hook: Connection refused"


def test_a_webhook_follows_no_redirect(receiver: Receiver) -> None:
    """The alert would not come along, and the password would."""
    receiver.status, receiver.location = 302, "http://127.0.0.1:9/elsewhere"
    with pytest.raises(OSError, match="answered 302"):
        Webhook(receiver.url.replace("://", "://user:secret@"))(ALERTED)


@pytest.mark.parametrize("url", ["ftp://user:secret@host/x", "http://", "http://[::1", "host/x", ""])
def test_only_the_web_is_told(url: str) -> None:
    with pytest.raises(UsageError, match="is not an http:// or https:// URL") as caught:
        Webhook(url)
    assert "secret" not in str(caught.value)


# -- never in the way ----------------------------------------------------------------------------------------


class Slow:
    """An action that takes until it is let go."""

    def __init__(self) -> None:
        self.go, self.done, self.ended = threading.Event(), 0, 0

    def __call__(self, alerted: Any) -> None:
        self.go.wait(10)
        self.done += 1

    def end(self) -> None:
        self.ended += 1
        self.go.set()


def test_putting_never_waits_and_too_many_are_told_once() -> None:
    told: list[str] = []
    slow = Slow()
    hook = Hook("--on-alert", slow, told.append)
    for _ in range(40):
        hook.put(ALERTED)
    assert len(told) == 1 and "16 alerts wait for it already" in told[0]
    slow.go.set()
    hook.close()
    assert slow.done in (16, 17) and slow.ended == 0


def test_what_hangs_is_ended_at_the_end() -> None:
    told: list[str] = []
    slow = Slow()
    hook = Hook("--on-alert", slow, told.append)
    for _ in range(3):
        hook.put(ALERTED)
    wait_for(lambda: hook._waiting.qsize() == 2)
    hook.close(seconds=0.1)
    assert slow.ended == 1
    assert told == ["--on-alert is not done, and is ended; 2 more alerts are left out"]


AMID = """
import json, signal, sys, threading, time
from pathlib import Path
from vtp.serve.streams.sinks.hooks import Command, Hook
log, alerted = Path(sys.argv[1]), json.loads(sys.argv[2])
hook = Hook("--on-alert", Command(f"sh -c 'echo $$ >> {log}; exec sleep 60'"), print)
for _ in range(3):
    hook.put(alerted)
while not (log.exists() and log.read_text().endswith(chr(10))):
    time.sleep(0.01)
threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
try:
    hook.close(seconds=30)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_amid_the_last_wait_ends_the_command(tmp_path: Path) -> None:
    """Nothing is left running, nor started for the alerts that waited; in a process of its own."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", AMID, str(log), json.dumps(ALERTED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    told = "--on-alert is not done, and is ended; 2 more alerts are left out\ninterrupted\n"
    assert (done.stdout, done.stderr) == (told, "")
    started = log.read_text().split()
    assert len(started) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(started[0]), 0)


def test_whatever_fails_the_next_alert_is_told() -> None:
    told, done = list[str](), list[Any]()

    def act(alerted: Any) -> None:
        if alerted == 1:
            raise RuntimeError("can't start new thread")
        done.append(alerted)

    act.end = lambda: None  # type: ignore[attr-defined]
    hook = Hook("--webhook", act, told.append)  # type: ignore[arg-type]
    hook.put(1)  # type: ignore[arg-type]
    hook.put(2)  # type: ignore[arg-type]
    hook.close()
    assert told == ["--webhook failed: can't start new thread"] and done == [2]
