"""vtp-serve as users start it: what it says, what it refuses, how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtp.serve.cli import build_parser, curl_line, is_loopback, lan_name, main
from vtp.serve.server import listen

from .client import CHAT, PATIENCE, shown, words

COMMAND = [sys.executable, "-c", "import sys; from vtp.serve.cli import main; sys.exit(main())"]


class Started:
    """The command in a process of its own, until it has said where it listens."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments, "--port", "0", "--threads", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert self.process.stdout is not None
        self.said = []
        while not self.said or not self.said[-1].startswith("try: "):
            line = self.process.stdout.readline()
            assert line, self.process.communicate()
            self.said.append(line.rstrip("\n"))
        self.port = int(re.search(r":(\d+)", self.said[-2]).group(1))  # type: ignore[union-attr]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def ask(self, body: Any, **headers: str) -> http.client.HTTPResponse:
        """A request of which only the headers of the answer were read."""
        connection = self.connect()
        connection.request("POST", CHAT, json.dumps(body), headers)
        return connection.getresponse()

    def end(self) -> tuple[int, str]:
        """Exit code and standard error, once it has ended by itself."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[Started]:
    server = Started(*arguments, **environment)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def body_of(picture: Image.Image, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [shown(picture), words("how many ?")]}], **fields}


@pytest.fixture(scope="module")
def bundle(exported: Callable[[str], Any]) -> Path:
    folder: Path = exported("vispruner").folder
    return folder


def test_it_says_what_to_try_and_that_works(bundle: Path) -> None:
    with started(str(bundle), "--name", "tiny") as server:
        assert server.said[0] == "tiny: ready on ort-cpu, 4 at a time, keeps 6 of 16 visual tokens"
        assert server.said[1].startswith("listening on http://127.0.0.1:")
        line = server.said[2].removeprefix("try: ")
        done = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["model"] == "tiny"
        server.process.send_signal(signal.SIGINT)
        assert server.end() == (0, "")


def test_sigterm_lets_running_requests_finish(bundle: Path, picture: Image.Image) -> None:
    """A stream that has begun goes on to its end while new requests are refused; then it ends with 0."""
    with started(str(bundle), "--slots", "1") as server:
        body = body_of(picture, stream=True, max_tokens=60)
        streams = [server.ask(body) for _ in range(6)]
        idle = server.connect()
        idle.connect()
        server.process.send_signal(signal.SIGTERM)
        found: list[bytes] = []
        readers = [threading.Thread(target=lambda one=one: found.append(one.read())) for one in streams]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(PATIENCE)
        assert len(found) == 6 and all(one.endswith(b"data: [DONE]\n\n") for one in found)
        assert not [one for one in found if b"error" in one] and len({len(one) for one in found}) <= 6
        assert server.end() == (0, "")


SLOW = """
import sys, time
from vtp.serve import cli
load = cli.Scheduler.load
def slowly(*arguments, **options):
    print("loading", flush=True)
    time.sleep(1.5)
    return load(*arguments, **options)
cli.Scheduler.load = slowly
sys.exit(cli.main())
"""


def test_it_can_be_stopped_while_it_loads(bundle: Path) -> None:
    """The port answers meanwhile; the second bundle is not loaded any more, and nothing is called ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    bundles = [str(bundle), str(bundle), "--name", "one", "--name", "two"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *bundles, "--port", str(port), "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        status = None
        while status is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
                connection.request("GET", "/health")
                status = connection.getresponse().status
            except ConnectionRefusedError:
                continue
        assert status == 503
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, said, errors) == (0, "", "")
    finally:
        process.kill()


def test_a_second_ctrl_c_ends_it_at_once(bundle: Path, picture: Image.Image) -> None:
    with started(str(bundle), "--grace-seconds", "600") as server:
        raw = socket.create_connection(("127.0.0.1", server.port))
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{")
        answer = server.connect()
        answer.request("GET", "/health")
        assert answer.getresponse().status == 200  # so that the other is being read by now
        server.process.send_signal(signal.SIGINT)
        while True:
            probe = server.connect()
            probe.request("GET", "/health/ready")
            if probe.getresponse().status == 503:
                break
        server.process.send_signal(signal.SIGINT)
        code, errors = server.end()
        assert code == 130 and errors.startswith("vtp-serve: error: interrupted; ")
        raw.close()


def test_keys_come_from_flags_and_from_the_environment(bundle: Path, picture: Image.Image) -> None:
    with started(str(bundle), VTP_API_KEY="k3y") as server:
        assert '-H "Authorization: Bearer $VTP_API_KEY"' in server.said[-1]
        assert server.ask(body_of(picture, max_tokens=2)).status == 401
        answer = server.ask(body_of(picture, max_tokens=2), Authorization="Bearer k3y")
        assert answer.status == 200
    with started(str(bundle), "--api-key", "other", VTP_API_KEY="k3y") as server:
        assert server.ask(body_of(picture), Authorization="Bearer k3y").status == 401


REFUSED: list[tuple[list[str], int, str]] = [
    (["--host", "0.0.0.0"], 2, "--host 0.0.0.0 lets other machines in: give --api-key KEY"),
    (["--host", "::"], 2, "--host :: lets other machines in"),
    (["--host", ""], 2, "lets other machines in"),
    (["--host", "no.such.host.invalid", "--insecure"], 2, "host 'no.such.host.invalid' is not known"),
    (["--port", "x"], 2, "port 'x' is not a whole number"),
    (["--port", "65536"], 2, "port 65536 is not a valid port"),
    (["--slots", "0", "--port", "0"], 2, "slots 0 is not a whole number of at least 1"),
    (["--slots", "99", "--port", "0"], 2, "slots 99 is more than the 8 prompts"),
    (["--queue", "-1"], 2, "queue '-1' is not a whole number of at least 0"),
    (["--threads", "0", "--port", "0"], 2, "threads 0 is not a whole number of at least 1"),
    (["--engine", "abacus", "--port", "0"], 2, "abacus"),
    (["--name", "a", "--name", "b"], 2, "2 names are given for 1 bundles"),
    (["--name", " "], 2, "a name is empty"),
    (["--api-key", ""], 2, "the API key must be"),
    (["--api-key", "kéy"], 2, "the API key must be"),
    (["--ping-seconds", "0"], 2, "ping-seconds '0' is not a number of seconds above 0"),
    (["--grace-seconds", "nan"], 2, "grace-seconds 'nan' is not a number of seconds"),
    (["--allow-media-domain", "https://example.org"], 2, "'https://example.org' is not a valid domain"),
    (["--cors-origin", "https://example.org/"], 2, "--cors-origin 'https://example.org/' is not an origin"),
    (["--cors-origin", "https://Example.org"], 2, "is not an origin"),
    (["--cors-origin", "example.org"], 2, "is not an origin"),
    (["--allow-host", "http://example.org"], 2, "--allow-host 'http://example.org' is not a name"),
    (["--allow-host", "example.org:8000"], 2, "is not a name"),
    (["--wat"], 2, "unrecognized arguments: --wat"),
]


@pytest.mark.parametrize(("flags", "code", "line"), REFUSED)
def test_what_it_refuses(
    bundle: Path, flags: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main([str(bundle), *flags])
    except SystemExit as ending:
        found = int(str(ending.code))
    assert found == code
    errors = capsys.readouterr().err
    assert errors.startswith("vtp-serve: error: ") and errors.count("\n") == 1 and line in errors


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--port", "0"]) in (1, 2)
    assert capsys.readouterr().err.startswith("vtp-serve: error: ")


def test_two_bundles_of_one_name(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bundle), str(bundle), "--port", "0"]) == 2
    assert f"two bundles have the name '{bundle.name}'; give one --name" in capsys.readouterr().err


def test_a_port_in_use(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([str(bundle), "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use; choose another --port" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["starlette", "uvicorn"])
def test_without_the_extra(
    bundle: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert main([str(bundle)]) == 1
    assert (
        f"needs {name}, which is not installed; run: pip install 'vtp-edge[serve]'" in capsys.readouterr().err
    )


def test_two_bundles_by_name(bundle: Path, exported: Callable[[str], Any], picture: Image.Image) -> None:
    other = exported("adaptprune").folder
    with started(str(bundle), str(other), "--name", "one", "--name", "two") as server:
        for name, kept in (("one", 6), ("two", 7), ("", 6)):
            answer = server.ask(body_of(picture, model=name, max_tokens=2))
            assert json.loads(answer.read())["vtp"]["visual_tokens"]["after"] == kept
        assert server.ask(body_of(picture, model="three")).status == 404


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("", False),
    ],
)
def test_which_hosts_are_this_machines_own(host: str, wanted: bool) -> None:
    assert is_loopback(host) is wanted


def test_every_flag_is_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs/serve.md").read_text(encoding="utf-8")
    flags = [flag for action in build_parser()._actions for flag in action.option_strings]
    own = [flag for flag in flags if flag.startswith("--") and flag not in ("--help", "--version")]
    assert not [flag for flag in own if f"`{flag}" not in page]


def test_the_line_to_try_is_one_command() -> None:
    _, address, flag, header, data, body = shlex.split(curl_line("http://[::1]:8000", key=True))
    assert (address, flag, data) == ("http://[::1]:8000/v1/chat/completions", "-H", "-d")
    assert header == "Authorization: Bearer $VTP_API_KEY"
    assert json.loads(body)["messages"][0]["role"] == "user"


@pytest.mark.parametrize(("host", "name"), [("0.0.0.0", socket.gethostname()), ("127.0.0.1", None)])
def test_the_machines_name_is_said_where_others_may_ask(host: str, name: str | None) -> None:
    with listen(host, 0) as listener:
        assert lan_name(listener) == name
