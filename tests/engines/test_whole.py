"""Files and folders that appear whole: the steps, the locks, the leftovers, the disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtp.engines import VtpError
from vtp.engines.disk import whole
from vtp.engines.disk.exchange import exchange
from vtp.engines.disk.locks import claim, locked_folder, try_lock
from vtp.engines.disk.whole import undisturbed, whole_file, whole_folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write(folder: Path, mark: str) -> None:
    with whole_folder(folder) as aside:
        (aside / "mark").write_text(mark)


@pytest.fixture(params=["one step", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways of replacing a folder; the second is the only one of some disks."""
    if request.param == "two renames":
        monkeypatch.setattr(whole, "exchange", lambda one, other: False)
    yield request.param


# -- the kernel's step ---------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_two_full_folders_change_places(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this disk cannot exchange folders")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == ({"b"}, {"a"})
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "c")


def test_the_target_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A looker who never blinks: before and after every call into the system there is a whole folder."""
    write(tmp_path / "out", "old")
    if not exchange(tmp_path, tmp_path):
        pytest.skip("this disk cannot exchange folders")
    seen = set()

    def look(frame: object, event: str, called: object) -> None:
        if event in ("c_call", "c_return"):
            sys.setprofile(None)
            seen.add((tmp_path / "out" / "mark").read_text())
            sys.setprofile(look)

    sys.setprofile(look)
    try:
        write(tmp_path / "out", "new")
    finally:
        sys.setprofile(None)
    assert seen == {"old", "new"}


# -- replacing -----------------------------------------------------------------------------------------------


def test_a_folder_is_replaced_and_nothing_else_is_left(tmp_path: Path, way: str) -> None:
    for mark in ("old", "new", "newer"):
        write(tmp_path / "out", mark)
        assert (tmp_path / "out" / "mark").read_text() == mark
        assert names(tmp_path) == {"out"}


def test_everything_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    synced: list[int] = []
    fsync, swap, rmtree = os.fsync, whole.exchange, whole.shutil.rmtree
    wanted: set[int] = set()

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checked_swap(new: Path, target: Path) -> bool:
        wanted.update(path.stat().st_ino for path in (new, *new.rglob("*")))
        assert wanted <= set(synced)
        synced.clear()
        return swap(new, target)

    def checked_rmtree(folder: Path, **options: bool) -> None:
        assert tmp_path.stat().st_ino in synced  # the new name is on the disk before the old bundle goes
        rmtree(folder, **options)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(whole, "exchange", checked_swap)
    monkeypatch.setattr(whole.shutil, "rmtree", checked_rmtree)
    with whole_folder(tmp_path / "out") as aside:
        (aside / "deep" / "er").mkdir(parents=True)
        for place in ("a", "deep/b", "deep/er/c"):
            (aside / place).write_text("x")
    assert len(wanted) == 6


def test_a_file_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda one: (synced.append(os.fstat(one).st_ino), fsync(one)))
    with whole_file(tmp_path / "file") as part:
        part.write_text("x")
    assert synced == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


def test_a_folder_that_appears_meanwhile_is_asked_about_again(tmp_path: Path, way: str) -> None:
    def check() -> None:
        if (tmp_path / "out").exists():
            raise VtpError("it exists")

    with pytest.raises(VtpError, match="it exists"), whole_folder(tmp_path / "out", check) as aside:
        (aside / "mark").write_text("mine")
        write(tmp_path / "out", "theirs")
    assert (tmp_path / "out" / "mark").read_text() == "theirs"
    assert names(tmp_path) == {"out"}


def test_two_writers_that_end_at_once_both_end(tmp_path: Path, way: str) -> None:
    """Between the renames of one comes the whole of the other."""
    write(tmp_path / "out", "old")
    with whole_folder(tmp_path / "out") as first:
        (first / "mark").write_text("first")
        with whole_folder(tmp_path / "out") as second:
            (second / "mark").write_text("second")
    assert (tmp_path / "out" / "mark").read_text() == "first"
    assert names(tmp_path) == {"out"}


def test_a_writer_is_faster_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    monkeypatch.setattr(whole, "exchange", lambda one, other: False)
    rename, moved = Path.rename, []

    def between(self: Path, target: Path) -> Path:
        done = rename(self, target)
        if target.name.startswith("old-") and not moved:
            moved.append(target)
            write(tmp_path / "out", "faster")
        return done

    monkeypatch.setattr(Path, "rename", between)
    write(tmp_path / "out", "new")
    assert moved
    assert (tmp_path / "out" / "mark").read_text() == "new"
    assert names(tmp_path) == {"out"}


# -- leftovers -----------------------------------------------------------------------------------------------

WAITING = """
import sys, time
from pathlib import Path
from vtp.engines.disk.whole import whole_file, whole_folder
with {how}(Path(sys.argv[1])) as aside:
    print(aside, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["whole_folder", "whole_file"])
def test_leftovers_go_with_their_process_and_not_before(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", WAITING.format(how=how), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        aside = Path(process.stdout.readline().strip())
        try:
            with getattr(whole, how)(tmp_path / "out") as mine:
                if how == "whole_folder":
                    (mine / "mark").touch()
            assert aside.exists()
        finally:
            process.kill()
    assert aside.exists()  # nobody could clean up
    with getattr(whole, how)(tmp_path / "out") as mine:
        if how == "whole_folder":
            (mine / "mark").touch()
    assert names(tmp_path) == {"out"}


def test_a_process_number_keeps_nothing(tmp_path: Path) -> None:
    """In a container the number of the killed writer is that of the next one: only a lock tells."""
    (tmp_path / ".out.partial-x").mkdir()
    (tmp_path / ".out.partial-x" / ".pid").write_text(str(os.getpid()))
    (tmp_path / f".out.{os.getpid()}.part").write_text("x")
    write(tmp_path / "out", "new")
    assert names(tmp_path) == {"out", f".out.{os.getpid()}.part"}
    with pytest.raises(VtpError), whole_file(tmp_path / "out") as part:
        part.write_text("a file cannot take the place of a folder")
    assert names(tmp_path) == {"out"}


def test_a_lock_is_let_go_with_its_descriptor(tmp_path: Path) -> None:
    first = claim(tmp_path / "lock")
    assert first is not None
    assert claim(tmp_path / "lock") is None
    os.close(first)
    second = claim(tmp_path / "lock")
    assert second is not None
    (tmp_path / "lock").unlink()
    assert claim(tmp_path / "lock") is not None  # of the new file, not of the removed one
    os.close(second)


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-x").mkdir()
    (tmp_path / ".out.partial-x" / "lock").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "out", "new")
    assert not (tmp_path / "elsewhere").exists()


# -- readers -------------------------------------------------------------------------------------------------


def test_nobody_replaces_what_is_being_read(tmp_path: Path, way: str) -> None:
    write(tmp_path / "out", "old")
    writer = threading.Thread(target=write, args=(tmp_path / "out", "new"))

    @undisturbed
    def read(folder: Path) -> list[str]:
        first = (folder / "mark").read_text()
        if not writer.ident:
            writer.start()
            writer.join(0.2)  # it waits for us
        return [first, (folder / "mark").read_text()]

    assert read(tmp_path / "out") == ["old", "old"]
    writer.join(20)
    assert read(tmp_path / "out") == ["new", "new"]


def test_what_was_replaced_without_a_lock_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(whole, "_WRITER_WAITS", 0.0)
    write(tmp_path / "out", "old")
    closed: list[list[str]] = []

    class Result(list[str]):
        def close(self) -> None:
            closed.append(self)

    @undisturbed
    def read(folder: Path) -> Result:
        first = (folder / "mark").read_text()
        if first == "old":
            write(folder, "new")
        return Result([first, (folder / "mark").read_text()])

    assert read(str(tmp_path / "out")) == ["new", "new"]
    assert closed == [["old", "new"]]


def test_a_reader_fails_only_for_what_is_still_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_WRITER_WAITS", 0.0)
    write(tmp_path / "out", "old")

    @undisturbed
    def read(folder: Path) -> str:
        if (folder / "mark").read_text() == "old":
            write(folder, "new")
            raise VtpError("a file is missing")  # as its folder went away under the reader
        return (folder / "mark").read_text()

    assert read(tmp_path / "out") == "new"


def test_endless_replacing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_WRITER_WAITS", 0.0)
    write(tmp_path / "out", "old")
    with pytest.raises(VtpError, match="is replaced again and again"):
        undisturbed(lambda folder: write(folder, "new"))(tmp_path / "out")


def test_many_share_a_folder_that_one_would_have_alone(tmp_path: Path) -> None:
    with locked_folder(tmp_path, True, 0), locked_folder(tmp_path, True, 0):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        assert try_lock(descriptor) is False
        os.close(descriptor)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    assert try_lock(descriptor) is True
    os.close(descriptor)


# -- the disk ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("how", ["whole_folder", "whole_file"])
def test_a_full_disk_is_one_line(tmp_path: Path, how: str) -> None:
    (tmp_path / "keep").touch()
    with (
        pytest.raises(VtpError, match=r"No space left on device.*free some space") as caught,
        getattr(whole, how)(tmp_path / "out"),
        Path("/dev/full").open("wb") as full,
    ):
        full.write(b"x")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"keep"}


def test_a_library_that_tells_of_a_full_disk_in_its_own_way(tmp_path: Path) -> None:
    text = f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"  # safetensors' own class
    with pytest.raises(VtpError, match="No space left"), whole_folder(tmp_path / "out"):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="else"), whole_folder(tmp_path / "out"):
        raise RuntimeError("something else")
    assert names(tmp_path) == set()


def test_a_file_goes_into_the_folder_that_was_there(tmp_path: Path) -> None:
    """A manifest that is changed while its bundle is replaced does not end in the new bundle."""
    write(tmp_path / "out", "old")
    held = os.open(tmp_path / "out", os.O_RDONLY)
    with pytest.raises(VtpError), whole_file(tmp_path / "out" / "mark", beside=tmp_path) as part:
        part.write_text("of the old one")
        write(tmp_path / "out", "new")
    os.close(held)
    assert (tmp_path / "out" / "mark").read_text() == "new"
    assert names(tmp_path) == {"out"}
