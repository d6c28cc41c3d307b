"""What clumsy and hostile users write beside BUNDLE and SOURCE: refused early, and nothing is left."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.bench.cli import main as bench
from vtp.engines import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.serve.streams.alerts import Alert
from vtp.serve.streams.capture import Capture
from vtp.serve.streams.cli import main
from vtp.serve.streams.frames import Frame
from vtp.serve.streams.sinks.hooks import Webhook
from vtp.serve.streams.sinks.recording import McapAnswers
from vtp.serve.streams.sources import video
from vtp.serve.streams.sources.names import source_name
from vtp.serve.streams.sources.opening import open_source
from vtp.serve.streams.typed import TypedPrompts
from vtp.serve.streams.watcher import Watcher

PROMPT = "what is it ?"


@pytest.fixture(scope="module")
def tiny(exported: Callable[[str], Any]) -> Path:
    return exported("vispruner").folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures."""
    path = tmp_path / "pictures"
    path.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"frame-0000000{number}.jpg")
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error, after exit code 2."""
    assert main([*map(str, arguments), "--threads", "1"]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1
    return error


# -- secrets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("http://user:p w@cam/a b", "http://cam/a b"),
        ("rtsp://user:a /b@cam/live", "rtsp://…@cam/live"),
        ("srt://cam:9000?passphrase=my secret", "srt://cam:9000"),
        ("rtsp://cam:554/user=admin_password=a b_channel=1.sdp", "rtsp://cam:554/…"),
        ("rtsp://user:a\nb@cam/live", "rtsp://cam/live"),
    ],
)
def test_a_password_with_a_space_is_in_no_message(text: str, name: str) -> None:
    assert source_name(text) == name


def test_the_benchmark_shows_no_password(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench([str(tiny), "--video", "http://user:hunter2@cam/x?token=abc"]) == 2
    out, error = capsys.readouterr()
    assert "hunter2" not in out + error and "abc" not in out + error
    assert "--video 'http://cam/x' is not a file" in error


# -- before a model is loaded --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "nothing is asked"),
        (["--prompt", PROMPT, "--every", "1e18"], "every 1e+18 is not a number of seconds; give 0 to 86400"),
        (["--prompt", PROMPT, "--timeout", "0"], "timeout 0.0 is not a number of seconds"),
        (["--prompt", PROMPT, "--page", "99999"], "page 99999 is not a valid port"),
        (["--prompt", PROMPT, "--mcap", "/nowhere/a.mcap"], "the folder '/nowhere' does not exist"),
        (["--prompt", PROMPT, "--mcap", "/dev/full"], "'/dev/full' is there already"),
        (
            ["--alert", "is it ?", "--hysteresis", "5"],
            "hysteresis 5.0 is not allowed; give a number from 0 to 0.5",
        ),
        (["--alert", "is it ?", "--hysteresis", "0.5"], "must be below the threshold 0.5"),
    ],
)
def test_options_are_refused_before_the_bundle_is_opened(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    assert line in refused(capsys, "no-such-bundle", folder, *options)


@pytest.mark.parametrize(("source", "line"), [("", "'' is not a source"), ("mcap:#/cam", "names no file")])
def test_a_source_without_a_name_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    line: str,
) -> None:
    """As of an empty variable of the shell; the pictures of this folder were meant by nobody."""
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png")
    monkeypatch.chdir(tmp_path)
    assert line in refused(capsys, "no-such-bundle", source, "--prompt", PROMPT)


def test_a_page_that_cannot_open_leaves_no_file_behind(
    tiny: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        files = ["--mcap", tmp_path / "said.mcap", "--show-kept", tmp_path / "kept"]
        line = refused(capsys, tiny, folder, "--prompt", PROMPT, "--page", port, *files)
    assert f"cannot listen on 127.0.0.1 port {port}" in line
    assert [one.name for one in tmp_path.iterdir()] == [folder.name]


def test_nothing_is_written_into_a_bundle_or_over_the_source(
    tiny: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [(one.name, one.read_bytes()) for one in sorted(folder.iterdir())]
    asked = (tiny, folder, "--prompt", PROMPT)
    assert "lies in the bundle" in refused(capsys, *asked, "--mcap", tiny / "said.mcap")
    assert "lies in the bundle" in refused(capsys, *asked, "--show-kept", tiny)
    (tmp_path / "link").symlink_to(folder)
    for kept in (folder, tmp_path / "link", folder / ".." / folder.name):
        assert "is the folder that is watched" in refused(capsys, *asked, "--show-kept", kept)
    assert [(one.name, one.read_bytes()) for one in sorted(folder.iterdir())] == before


# -- alerts --------------------------------------------------------------------------------------------------


def test_an_alert_that_could_never_end_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"hysteresis 0\.1 must be below the threshold 0.1, or the alert could"
    ):
        Alert("is it ?", threshold=0.1, hysteresis=0.1)


@pytest.mark.parametrize(("threshold", "edge"), [("0.05", 0.025), ("0.2", 0.1), ("0.7", 0.6)])
def test_by_default_an_alert_ends_at_half_of_a_low_threshold(threshold: str, edge: float) -> None:
    from vtp.serve.streams.cli import alerts_of, build_parser

    given = ["bundle", "source", "--alert", "is it ?", "--threshold", threshold]
    (alert,) = alerts_of(build_parser().parse_args(given))
    assert alert.threshold - alert.hysteresis == pytest.approx(edge)


@pytest.mark.parametrize(
    "url",
    ["http://user:pw@host:99999/a", "http://host:0/", "http://host/a b", "http://host/é", "http://h/\x7f"],
)
def test_a_webhook_that_cannot_be_called_is_refused_at_once(url: str) -> None:
    with pytest.raises(UsageError, match="--webhook 'http://h") as caught:
        Webhook(url)
    assert "pw" not in str(caught.value)


# -- questions that are typed --------------------------------------------------------------------------------


class Asked:
    """Stands for a watcher: takes every prompt."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    prompt = property(fset=lambda self, text: self.prompts.append(text))


def typed(*pieces: bytes) -> tuple[list[str], list[str]]:
    """The prompts that came of what was written into a pipe, and what was told."""
    read, write = os.pipe()
    asked, told = Asked(), list[str]()
    prompts = TypedPrompts(asked, told.append, read)  # type: ignore[arg-type]
    for piece in pieces:
        os.write(write, piece)
    os.close(write)
    prompts._thread.join(10)
    prompts.close()
    os.close(read)
    return asked.prompts, told


def test_the_last_question_needs_no_line_end() -> None:
    assert typed(b"one ?\ntw", b"o ?")[0] == ["one ?", "two ?"]
    assert typed(b"one ?\n \r\n")[0] == ["one ?"]


def test_a_line_that_is_too_long_is_left_out_whole() -> None:
    """Its end alone would be another question."""
    long = b"x" * 40_000
    prompts, told = typed(long, long, b" and now ?\nwhat ?\n")
    assert prompts == ["what ?"]
    assert told[0] == "the question stays as it is: a line of more than 65536 bytes is left out"


# -- waits ---------------------------------------------------------------------------------------------------


def test_a_wait_for_the_model_is_not_a_silence_of_the_source() -> None:
    """A source that waits until its frame was taken has as long as ever for the next one."""
    fourth = threading.Event()

    class Slow:
        name = "slow"

        def __iter__(self) -> Iterator[Frame]:
            for number in range(4):
                if number == 3:
                    fourth.wait(10)
                yield Frame(b"", number, 0, time.monotonic())

        def close(self) -> None:
            fourth.set()

    capture = Capture(Slow(), every_frame=True, timeout=0.5)
    capture.start()
    try:
        assert capture.take() is not None
        time.sleep(0.7)  # the model; the second frame lies there, and the third waits
        assert capture.take() is not None and capture.take() is not None
        threading.Timer(0.1, fourth.set).start()
        assert capture.take() is not None
    finally:
        capture.stop()


def test_a_server_that_says_nothing_is_told_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av", reason="PyAV (extra [streams]) is not installed")
    monkeypatch.setattr(video, "_OPEN", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/live"
        with pytest.raises(VtpError, match=r"cannot open http://127[^;]*: no picture came in 0.5 s; give a"):
            open_source(url)


# -- recorded answers ----------------------------------------------------------------------------------------


def answers(pipe: Pipeline, *stamps: int) -> Iterator[Any]:
    """An answer for each stamp."""

    class Given:
        name, every_frame = "given", True

        def __iter__(self) -> Iterator[Frame]:
            for number, stamp in enumerate(stamps):
                yield Frame(np.zeros((8, 8, 3), np.uint8), number, stamp, time.monotonic())

        def close(self) -> None:
            """Nothing is open."""

    return iter(Watcher(pipe, Given(), PROMPT, max_new_tokens=1))


def test_stamps_of_any_size_are_recorded(pipe: Pipeline, tmp_path: Path) -> None:
    """A file whose time is far in the future, a robot's negative one."""
    reader = pytest.importorskip("mcap.reader")
    path = tmp_path / "said.mcap"
    with McapAnswers(path) as sink:
        for answer in answers(pipe, -5, 7, 2**80):
            sink(answer)
    with path.open("rb") as file:
        messages = reader.make_reader(file, validate_crcs=True).iter_messages(["/vtp/answer"])
        assert [message.log_time for _, _, message in messages] == [0, 7, 2**64 - 1]


def test_without_an_answer_there_is_no_recording(tmp_path: Path) -> None:
    pytest.importorskip("mcap.writer")
    with McapAnswers(tmp_path / "said.mcap"):
        pass
    assert not list(tmp_path.iterdir())


def test_of_a_recording_that_was_not_ended_little_is_lost(pipe: Pipeline, tmp_path: Path) -> None:
    """As if the process had been killed: what is in the file is read as `mcap recover` reads it."""
    stream = pytest.importorskip("mcap.stream_reader")
    from mcap.exceptions import EndOfFile
    from mcap.records import Message

    path, sink = tmp_path / "said.mcap", McapAnswers(tmp_path / "said.mcap")
    answer = next(answers(pipe, 0))
    size, count = len(json.dumps(answer.to_json())), 400
    for _ in range(count):
        sink(answer)
    found = 0
    with path.open("rb") as file, pytest.raises(EndOfFile):
        for record in stream.StreamReader(file).records:
            found += isinstance(record, Message)
    assert 0 <= count - found / 2 <= 2**16 / size + 1
    sink.close()


def test_a_full_disk_is_one_line_and_what_was_recorded_stays(pipe: Pipeline, tmp_path: Path) -> None:
    """The largest size of a file stands for the disk's."""
    pytest.importorskip("mcap.writer")
    path, before = tmp_path / "said.mcap", resource.getrlimit(resource.RLIMIT_FSIZE)
    answer = next(answers(pipe, 0))
    try:
        with pytest.raises(VtpError) as caught, McapAnswers(path) as sink:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            for _ in range(20_000):
                sink(answer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == (
        f"cannot write '{path}': {os.strerror(errno.EFBIG)}; `mcap recover` makes a whole recording of what "
        "it has"
    )
    assert path.read_bytes().startswith(b"\x89MCAP0\r\n")
