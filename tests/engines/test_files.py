"""The one door for strangers' files: pipes, devices, sockets, links out of a folder, files without an end."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from vtp.engines import VtpError
from vtp.engines.disk.files import open_regular, read_bounded, sha256


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = socket.socket(socket.AF_UNIX)
    here.bind(str(path))
    here.close()


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_pipe, "a named pipe"),
        (_socket, "a socket"),
        (_device, "a device"),
        (_folder, "a folder"),
        (_loop, os.strerror(40)),
        (lambda path: None, os.strerror(2)),
    ],
)
@pytest.mark.parametrize("read", [open_regular, sha256, lambda path: read_bounded(path, 10)])
def test_only_regular_files_are_opened(tmp_path: Path, make, says: str, read) -> None:
    path = tmp_path / "tokenizer.json"
    make(path)
    with pytest.raises(VtpError, match=says) as refused:
        read(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_a_pipe_that_takes_the_files_place_while_it_is_opened(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    before = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda self, **_: before)
    with pytest.raises(VtpError, match="a named pipe"):
        open_regular(path)


def test_links_stay_in_the_folder_that_is_named(tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    snapshot, blobs = model / "snapshots" / "1", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    (snapshot / "bad.json").symlink_to("../../../secret")
    assert read_bounded(snapshot / "config.json", 6, within=model) == b"inside"
    assert read_bounded(snapshot / "bad.json", 99) == b"outside"  # no folder named: links are followed
    with pytest.raises(VtpError, match="leaves"):
        read_bounded(snapshot / "bad.json", 99, within=model)


def test_no_more_than_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(VtpError, match="larger than 4 bytes"):
        read_bounded(path, 4)
    assert sha256(path) == hashlib.sha256(b"12345").hexdigest()


def test_a_name_that_no_system_takes_is_one_line(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 300):
        with pytest.raises(VtpError, match="cannot read"):
            open_regular(tmp_path / name)
