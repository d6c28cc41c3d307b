"""Bundles are written whole or not at all: kills, full disks, names that are taken."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vtp.engines import UsageError, VtpError
from vtp.engines.disk import whole
from vtp.runtime.bundle.folder import MANIFEST, check_output, open_bundle, whole_bundle

from .test_bundle import names

# What check_output takes for the manifest of a bundle.
_NAMES = ["weights", "half", "a", "b"]
A_BUNDLE = json.dumps({"schema": 1, "stages": [], "graphs": {}, "files": dict.fromkeys(_NAMES)})


def write(folder: Path, mark: str = "new", overwrite: bool = False) -> None:
    with whole_bundle(folder, overwrite) as aside:
        (aside / "weights").write_text(mark)
        (aside / MANIFEST).write_text(A_BUNDLE)


def test_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with whole_bundle(target) as aside:
        (aside / MANIFEST).write_text(A_BUNDLE)
        assert not target.exists()
        assert aside.parent.parent == target.parent  # the same disk, so that the swap is one rename
    assert names(target) == {MANIFEST}
    assert names(tmp_path) == {"out"}
    assert target.stat().st_mode & 0o777 == 0o755


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_bundle(tmp_path / "deep" / "er" / "out") as aside:
        (aside / "half").write_text("x")
        raise ZeroDivisionError
    assert names(tmp_path) == set()  # not even the folders on the way


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_bundle(tmp_path / "out") as aside:
        (aside / "half").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == set()


def test_disk_full_is_one_line_and_the_old_bundle_stays(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    message = "No space left on device; nothing was left behind"
    with (
        pytest.raises(VtpError, match=message) as caught,
        whole_bundle(tmp_path / "out", overwrite=True) as aside,
    ):
        (aside / "half").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out" / "weights").read_text() == "old"
    assert names(tmp_path) == {"out"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(VtpError, match="No space left"),
        whole_bundle(tmp_path / "out"),
        Path("/dev/full").open("wb") as file,
    ):
        file.write(bytes(1 << 16))
    assert names(tmp_path) == set()


def test_no_room_for_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole.tempfile, "mkdtemp", full)
    with pytest.raises(VtpError, match=r"cannot write to .*No space left"):
        write(tmp_path / "deep" / "out")
    assert names(tmp_path) == set()


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "half").write_text("x")
    write(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path / "out") == {"weights", MANIFEST}
    assert (tmp_path / "out" / "weights").read_text() == "new"
    assert names(tmp_path) == {"out"}


def test_an_existing_bundle_needs_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="exists; choose another folder or add --overwrite"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_text() == "old"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert names(tmp_path / "out") == {"weights", MANIFEST}


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="is not a bundle, so --overwrite leaves it alone"):
        write(tmp_path, overwrite=True)
    assert names(tmp_path) == {"thesis.txt"}


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is a file"):
            write(tmp_path / "out", overwrite=overwrite)
    with pytest.raises(VtpError, match=r"cannot write to|cannot be used"):
        write(tmp_path / "out" / "inside")
    assert (tmp_path / "out").read_text() == "x"


@pytest.mark.parametrize("output", [".", "..", ""])
def test_the_folder_one_stands_in_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    with pytest.raises(UsageError, match="holds the folder you are in"):
        check_output(Path(output), overwrite=True)


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be used: File name too long"):
        check_output(tmp_path / ("x" * 300), overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(VtpError, match=r"cannot write to .*Permission denied"):
        write(tmp_path / "out")


def test_a_place_where_nothing_can_be_made() -> None:
    with pytest.raises(VtpError, match=r"^output /proc/out cannot be used: "):
        write(Path("/proc/out"))


def test_a_link_to_a_bundle_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    write(tmp_path / "store" / "real", "old")
    (tmp_path / "link").symlink_to("store/real")
    write(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "store" / "real" / "weights").read_text() == "new"
    assert names(tmp_path / "store") == {"real"}


def test_a_swap_that_fails_puts_the_old_bundle_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(whole, "exchange", lambda one, other: False)  # a disk that cannot
    with pytest.raises(VtpError, match="Input/output error"):
        write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "weights").read_text() == "old"
    assert names(tmp_path) == {"out"}


KILLED = """
import sys, time
from pathlib import Path
from vtp.runtime.bundle.folder import whole_bundle
with whole_bundle(Path(sys.argv[1]), overwrite=True) as aside:
    (aside / "half").write_text("x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


def start_and_kill(target: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_killed_run_leaves_the_old_bundle_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    write(tmp_path / "other", "other")
    start_and_kill(tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_text() == "old"
    assert len(names(tmp_path)) == 3  # the leftovers, hidden
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "weights").read_text() == "new"
    assert names(tmp_path) == {"out", "other"}


def test_a_running_export_to_the_same_output_is_left_alone(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "writing\n"
        write(tmp_path / "out")
        assert len(names(tmp_path)) == 2
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def die_between_two_renames(target: Path) -> None:
    """On a disk that cannot exchange folders: the old one is away, the new one is not there yet."""
    script = (
        "import os, signal, sys; from pathlib import Path; from vtp.engines.disk import whole\n"
        "from vtp.runtime.bundle.folder import *\n"
        "rename = Path.rename\n"
        "def die(self, target):\n"
        "    if self.name == 'new' and not target.exists(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rename(self, target)\n"
        "Path.rename, whole.exchange = die, lambda one, other: False\n"
        "with whole_bundle(Path(sys.argv[1]), overwrite=True) as aside:\n"
        "    (aside / MANIFEST).write_text(sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target), A_BUNDLE], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()


def test_what_opens_a_bundle_gets_the_old_one_after_a_kill_between_two_renames(bundle: Path) -> None:
    before = open_bundle(bundle).manifest
    die_between_two_renames(bundle)
    assert open_bundle(bundle, check_hashes=True).manifest == before


def test_a_run_killed_in_the_middle_of_the_swap_gives_the_old_bundle_back(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    die_between_two_renames(tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "weights").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_leftovers_of_a_similar_name_stay(tmp_path: Path) -> None:
    """`out` must not clean up after `out*`, nor read wildcards in its own name."""
    for stale in (".out2.partial-x", ".axb.partial-x"):
        (tmp_path / stale).mkdir()
    write(tmp_path / "out")
    write(tmp_path / "a?b")
    assert names(tmp_path) == {"out", "a?b", ".out2.partial-x", ".axb.partial-x"}


@pytest.mark.parametrize("text", ['{"name": "a browser extension", "manifest_version": 3}', "{}", "{", "[]"])
def test_overwrite_leaves_other_programs_folders_alone(tmp_path: Path, text: str) -> None:
    """Browser extensions and web apps have a manifest.json, too."""
    (tmp_path / "app" / "src").mkdir(parents=True)
    (tmp_path / "app" / MANIFEST).write_text(text)
    with pytest.raises(UsageError, match="is not a bundle, so --overwrite leaves it alone"):
        write(tmp_path / "app", overwrite=True)
    assert names(tmp_path / "app") == {"src", MANIFEST} and names(tmp_path) == {"app"}


def test_overwrite_leaves_a_bundle_with_somebodys_own_files_alone(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "engines").mkdir()  # where older versions of vtp-build put theirs
    write(tmp_path / "out", "newer", overwrite=True)
    (tmp_path / "out" / "notes").mkdir()
    with pytest.raises(UsageError, match="holds notes, which is not of the bundle"):
        write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "weights").read_text() == "newer"


def test_concurrent_writers_each_end_whole(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from vtp.runtime.bundle.folder import *\n"
        "for turn in range(20):\n"
        "    with whole_bundle(Path(sys.argv[1]), overwrite=True) as aside:\n"
        "        for name in 'ab': (aside / name).write_text(sys.argv[2])\n"
        "        (aside / MANIFEST).write_text(sys.argv[3])\n"
    )
    write(tmp_path / "out", "old")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "out"), mark, A_BUNDLE], stderr=subprocess.DEVNULL
        )
        for mark in "xy"
    ]
    for process in processes:
        process.wait(timeout=60)
    assert (tmp_path / "out" / MANIFEST).is_file()
    found = {(tmp_path / "out" / name).read_text() for name in "ab" if (tmp_path / "out" / name).exists()}
    assert len(found) <= 1  # never a mixture of two runs
