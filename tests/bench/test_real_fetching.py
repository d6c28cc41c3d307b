"""Fetching from a local server that speaks HTTP ranges: only what is asked about, and whole or not at all."""

from __future__ import annotations

import io
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vtp.bench.real import fetching
from vtp.bench.real.sets import SETS, PublicSet, Remote
from vtp.engines import UsageError, VtpError

from . import real_files


@dataclass
class Server:
    """Files by path; how many bytes were given; what is to go wrong."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    given: int = 0
    fails: int = 0  # requests that are answered 503
    ranges: bool = True
    short: bool = False


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    held = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            held.asked.append(self.path)
            data = held.files.get(self.path)
            if held.fails:
                held.fails -= 1
                return self.send_error(503)
            if data is None:
                return self.send_error(404)
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if span and held.ranges:
                first, last = int(span[1]), min(int(span[2]), len(data) - 1)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                data = data[first : last + 1]
                data = data[:-1] if held.short and len(data) > 1 else data
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            held.given += len(data)
            return None

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    held.url = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setattr(fetching, "_PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield held
    http.shutdown()
    thread.join()
    http.server_close()


def packed(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return made.getvalue()


@pytest.fixture
def gqa(server: Server, tmp_path: Path) -> PublicSet:
    """GQA's two archives on the server, with 3 MB of pictures that nobody asks about."""
    real_files.gqa(tmp_path / "source", ["yes", "no", "table"])
    questions = (tmp_path / "source/testdev_balanced_questions.json").read_bytes()
    noise = bytes(range(256)) * 12_000
    pictures = {f"images/{one.name}": one.read_bytes() for one in (tmp_path / "source/images").iterdir()}
    server.files["/questions.zip"] = packed({"README": b"x", "testdev_balanced_questions.json": questions})
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("images/other.jpg", noise)
        for name, data in pictures.items():
            archive.writestr(name, data)
    server.files["/images.zip"] = made.getvalue()
    files = (Remote("testdev_balanced_questions.json", f"{server.url}/questions.zip"),)
    return replace(SETS["gqa"], files=files, pictures=Remote("images", f"{server.url}/images.zip"))


def fetch(chosen: PublicSet, folder: Path, limit: int | None = None) -> None:
    fetching.fetch_questions(chosen, folder, lambda _: None)
    fetching.fetch_pictures(chosen, folder, chosen.read(folder, limit), lambda _: None)


def test_only_what_is_asked_about_is_fetched(server: Server, gqa: PublicSet, tmp_path: Path) -> None:
    folder = tmp_path / "data/gqa"
    fetch(gqa, folder, limit=2)
    assert sorted(one.name for one in (folder / "images").iterdir()) == ["n0.jpg", "n1.jpg"]
    for name in ("testdev_balanced_questions.json", "images/n0.jpg", "images/n1.jpg"):
        assert (folder / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    assert server.given < 1_000_000  # of more than 3 MB
    server.asked.clear()
    fetch(gqa, folder, limit=2)
    assert not server.asked  # nothing lacks
    fetch(gqa, folder)
    gqa.check(folder, gqa.read(folder, None))
    assert "/questions.zip" not in server.asked


def test_a_plain_file_is_fetched_as_it_is(server: Server, tmp_path: Path) -> None:
    real_files.pope(tmp_path / "source", ["yes", "no"])
    for kind in real_files.KINDS:
        name = f"coco_pope_{kind}.json"
        server.files[f"/{name}"] = (tmp_path / "source" / name).read_bytes()
    files = tuple(replace(one, url=f"{server.url}/{one.name}") for one in SETS["pope"].files)
    fetching.fetch_questions(replace(SETS["pope"], files=files), tmp_path / "pope", lambda _: None)
    assert len(SETS["pope"].read(tmp_path / "pope", None)) == 6


def test_a_server_that_fails_twice_is_asked_again(server: Server, gqa: PublicSet, tmp_path: Path) -> None:
    server.fails = 2
    fetch(gqa, tmp_path / "gqa", limit=1)
    assert (tmp_path / "gqa/images/n0.jpg").is_file()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"fails": 99}, "cannot reach http://127.0.0.1"),
        ({"ranges": False}, "the server gives no parts of files; download it yourself, and see --data-dir"),
        ({"short": True}, "bytes instead of"),
        ({"files": {}}, "was not given: HTTP 404; download it yourself, and see --data-dir"),
        ({"files": {"/questions.zip": b"no archive" * 99}}, "is not a zip archive that can be read"),
        ({"files": {"/questions.zip": packed({"x": b""})}}, "holds no testdev_balanced_questions.json"),
    ],
)
def test_what_is_not_given_is_one_line_and_leaves_nothing(
    server: Server, gqa: PublicSet, tmp_path: Path, change: dict, problem: str
) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(VtpError, match=re.escape(problem)) as caught:
        fetch(gqa, tmp_path / "gqa")
    assert "\n" not in str(caught.value)
    assert not [one for one in (tmp_path / "gqa").rglob("*") if one.is_file()]


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_PAUSE", 0.001)
    closed = replace(SETS["pope"], files=(Remote("a.json", "http://127.0.0.1:9/a.json"),))
    with pytest.raises(VtpError, match=r"cannot reach http://127\.0\.0\.1:9/a\.json: .*; check the network"):
        fetching.fetch_questions(closed, tmp_path, lambda _: None)


def test_a_picture_that_damaged_on_its_way_is_left_out(server, gqa, tmp_path: Path) -> None:
    data = bytearray(server.files["/images.zip"])
    place = data.index(b"images/n0.jpg") + 60
    data[place] ^= 0xFF
    server.files["/images.zip"] = bytes(data)
    with pytest.raises(VtpError, match="is not a zip archive that can be read: Bad CRC-32"):
        fetch(gqa, tmp_path / "gqa", limit=1)
    assert not list((tmp_path / "gqa/images").iterdir())


def test_a_name_that_leaves_the_folder_is_refused(server: Server, gqa: PublicSet, tmp_path: Path) -> None:
    entry = {"imageId": "../../outside", "question": "?", "answer": "yes", "types": {}}
    real_files.write(tmp_path / "gqa/testdev_balanced_questions.json", {"1": entry})
    with pytest.raises(UsageError, match="which is not a file's plain name"):
        fetch(gqa, tmp_path / "gqa")
    assert not server.asked and not list(tmp_path.rglob("outside*"))
