"""Fetches what a set lacks: its question files, and only those pictures that are asked about.

The pictures' archives have 6 to 20 GB, and the questions name a few thousand files of them: the archive is
read in place, by HTTP ranges. Every file appears whole or not at all, so that a fetch that was ended goes on
with what is missing.
"""

from __future__ import annotations

import io
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO

from vtp.bench.real.sets import PublicSet, Remote
from vtp.calib.data import Sample
from vtp.engines import UsageError, VtpError
from vtp.engines.disk.files import is_file
from vtp.engines.disk.whole import whole_file
from vtp.engines.errors import shown

_PATIENCE = 30.0  # seconds that a server has to answer
_TRIES = 4
_PAUSE = 1.0  # seconds before the second try; it doubles
_AHEAD = 1 << 17  # bytes that are read at once: most pictures
_LARGEST = 1 << 30  # bytes of one file
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_BROKEN = (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError)

Progress = Callable[[str], None]


def fetch_questions(chosen: PublicSet, folder: Path, progress: Progress) -> None:
    """Fetch the question files that `folder` lacks. VtpError where the network does not give them."""
    for remote in (*chosen.files, *chosen.more):
        if not is_file(folder / remote.name):
            progress(f"fetch {remote.name}")
            _make(folder)
            _fetch(remote, folder / remote.name)


def fetch_pictures(chosen: PublicSet, folder: Path, samples: Iterable[Sample], progress: Progress) -> None:
    """Fetch the pictures that are asked about and not there. VtpError as above."""
    names = dict.fromkeys(one.image.name for one in samples if not is_file(one.image))
    odd = next((one.image for one in samples if one.image.parent != folder / chosen.pictures.name), None)
    if odd is not None:
        raise UsageError(f"{shown(folder)} names the picture {shown(odd)}, which is not a file's plain name")
    if not names:
        return
    progress(f"fetch {len(names)} pictures of {chosen.pictures.url}")
    with _archive(chosen.pictures.url) as (archive, members):
        _make(folder / chosen.pictures.name)
        for done, name in enumerate(names, start=1):
            _extract(
                archive, _member(members, name, chosen.pictures.url), folder / chosen.pictures.name / name
            )
            if done % 100 == 0:
                progress(f"{done} of {len(names)} pictures")


def _fetch(remote: Remote, target: Path) -> None:
    if not remote.url.endswith(".zip"):
        with whole_file(target) as part, part.open("wb") as out:
            _copy(remote.url, out)
        return
    with _archive(remote.url) as (archive, members):
        _extract(archive, _member(members, remote.name, remote.url), target)


def _copy(url: str, out: IO[bytes]) -> None:
    try:
        with _opened(url) as answer:
            shutil.copyfileobj(answer, out)
    except _BROKEN as error:
        raise _unreached(url, error) from error


@contextmanager
def _archive(url: str) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """A zip archive on a server, and its files by the last part of their names."""
    try:
        with zipfile.ZipFile(io.BufferedReader(RemoteFile(url), _AHEAD)) as archive:
            yield archive, {one.filename.rpartition("/")[2]: one for one in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise VtpError(f"{url} is not a zip archive that can be read: {shown(error)}") from error


def _member(members: dict[str, zipfile.ZipInfo], name: str, url: str) -> zipfile.ZipInfo:
    if name not in members:
        raise VtpError(f"{url} holds no {shown(name)}")
    if members[name].file_size > _LARGEST:
        raise VtpError(f"{shown(name)} in {url} has {members[name].file_size} bytes; at most {_LARGEST}")
    return members[name]


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    with whole_file(target) as part, part.open("wb") as out, archive.open(member) as content:
        shutil.copyfileobj(content, out)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VtpError(f"cannot make the folder {shown(folder)}: {error.strerror or error}") from error


class RemoteFile(io.RawIOBase):
    """A file on a server, read in pieces by HTTP ranges. VtpError where the server does not give them."""

    def __init__(self, url: str) -> None:
        """Ask for its first byte, which tells its length."""
        self._url, self._place = url, 0
        self._length = _length(url, self._range(0, 1)[1])

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, as in any file."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill a buffer, as far as the file goes."""
        count = min(len(buffer), self._length - self._place)
        if count <= 0:
            return 0
        data, _ = self._range(self._place, count)
        if len(data) != count:
            raise VtpError(f"{self._url} gave {len(data)} bytes instead of {count}; try again")
        buffer[:count] = data
        self._place += count
        return count

    def _range(self, start: int, count: int) -> tuple[bytes, str]:
        """`count` bytes from `start`, and the header that says so."""
        for pause in [*(_PAUSE * 2**again for again in range(_TRIES - 1)), None]:
            try:
                with _opened(self._url, start, count) as answer:
                    return answer.read(count), answer.headers.get("Content-Range", "")
            except _BROKEN as error:  # while it is read
                if pause is None:
                    raise _unreached(self._url, error) from error
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")


def _length(url: str, header: str) -> int:
    found = _RANGE.fullmatch(header)
    if found is None:
        raise VtpError(f"{url}: the server gives no parts of files; download it yourself, and see --data-dir")
    return int(found[3])


def _opened(url: str, start: int = 0, count: int | None = None) -> HTTPResponse:
    span = {} if count is None else {"Range": f"bytes={start}-{start + count - 1}"}
    request = urllib.request.Request(url, headers={"User-Agent": "vtp-edge", **span})
    try:
        answer: HTTPResponse = urllib.request.urlopen(request, timeout=_PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code >= 500:  # it may pass
            raise
        raise VtpError(
            f"{url} was not given: HTTP {error.code}; download it yourself, and see --data-dir"
        ) from error
    return answer


def _unreached(url: str, error: Exception) -> VtpError:
    reason = shown(getattr(error, "reason", error), 120)
    return VtpError(
        f"cannot reach {url}: {reason}; check the network, or download it elsewhere and see --data-dir"
    )
