"""A few moments of `make kill` (see __main__.py), and that it sees what it looks for."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtp.engines import VtpError
from vtp.engines.disk import whole

from . import borders, moments
from .moments import Tally
from .works import New, Overwrite

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bundles(exported: Callable[[str], Any]) -> tuple[Path, Path]:
    return exported("none").folder, exported("vispruner").folder


def test_nothing_is_lost_in_a_few_moments(bundles: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "tests.kill", "--kills", "12", "--exports", "0", "--no-mount"]
    done = subprocess.run(
        [*command, "--bundles", *map(str, bundles)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 0 bad; " in done.stdout
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) ([a-z ]+)[,;]", done.stdout)}
    assert counts.pop("loads") > 0
    assert counts.pop("pairs of writers") == 2
    assert sum(counts.pop(kind) for kind in ("placed kills", "random kills", "full disks")) == 12


def test_every_border_of_a_file_is_survived(tmp_path: Path) -> None:
    """All of them, not a few: a file's writing is short."""
    target = tmp_path / "file"

    def write() -> None:
        with whole.whole_file(target) as part:
            part.write_text("new")

    write()
    for number in range(borders.count(write)):
        target.write_text("old")
        assert moments.in_child(lambda number=number: borders.kill_at(write, number)) == -9
        assert target.read_text() in ("old", "new")
        write()
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_call_that_finds_no_room_fails_as_on_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        borders.fill_at(lambda: (tmp_path / "folder").mkdir(), 0)
    assert caught.value.errno == errno.ENOSPC

    def write() -> None:
        with whole.whole_file(tmp_path / "file") as part:
            part.write_text("x")

    for number in range(borders.count(write, room=True)):
        with pytest.raises(VtpError, match="No space left"):
            borders.fill_at(write, number)
    assert borders.count(write, room=True) > 4


class Careless(Overwrite):
    """What this was before: the old folder goes, then the new one comes, in place."""

    def write(self) -> None:
        source = self.bundles[self._turn % 2]
        self.target.mkdir(exist_ok=True)
        for file in source.iterdir():
            (self.target / file.name).write_bytes(file.read_bytes())


class Littering(New):
    """Writes aside and never cleans up."""

    def write(self) -> None:
        (self.place / f".aside-{len(self.left())}").mkdir()


def test_a_careless_writer_is_found(tmp_path: Path, bundles: tuple[Path, Path]) -> None:
    work, tally = Careless(tmp_path / "careless", bundles), Tally()
    most = moments.borders_of(work)
    for number in range(0, most, max(1, most // 8)):
        moments.placed_kill(work, "careless", number, tally)
    assert any("mixture" in line or "bytes" in line or "lacks" in line for line in tally.bad)
    work, tally = Littering(tmp_path / "littering", bundles), Tally()
    moments.placed_kill(work, "littering", 10**6, tally)
    assert any("there still is" in line for line in tally.bad)
