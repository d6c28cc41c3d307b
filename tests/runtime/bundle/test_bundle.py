"""Bundles on disk: opened only when whole and unchanged, written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from vtp.calib.keep.journal import Journal
from vtp.engines import UsageError, VtpError
from vtp.engines.disk import whole
from vtp.runtime.bundle.folder import MANIFEST, check_output, is_inside, open_bundle, whole_bundle
from vtp.runtime.commands.run import main as run_main
from vtp.runtime.triton.repository import write_repository


@pytest.fixture
def bundle(exported: Callable[[str], Any], tmp_path: Path) -> Path:
    """A copy of a bundle, to be spoilt."""
    return Path(shutil.copytree(exported("none").folder, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))


def refuse(bundle: Path, match: str, **options: Any) -> None:
    with pytest.raises(VtpError, match=match) as caught:
        open_bundle(bundle, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- opening -------------------------------------------------------------------------------------------------


def test_opens_with_and_without_hashes(bundle: Path) -> None:
    assert open_bundle(bundle).manifest == open_bundle(str(bundle), check_hashes=True).manifest


def test_manifest_lists_every_file(bundle: Path) -> None:
    assert set(open_bundle(bundle).manifest.files) == names(bundle) - {MANIFEST}


def test_no_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "no such folder; make one with: vtp-export")


def test_a_file_or_an_empty_folder_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", "no bundle at")
    refuse(tmp_path, "it has no manifest.json")


def test_a_manifest_that_is_not_text(bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(b"\xff\xfe\x00")
    refuse(bundle, "cannot read")


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "tokenizer.json"])
def test_a_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    refuse(bundle, f"lacks the file {name}")


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "tokenizer.json"])
@pytest.mark.parametrize("keep", [0, -1])
def test_a_truncated_file(bundle: Path, name: str, keep: int) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:keep])
    refuse(bundle, f"{name} has {len(content[:keep])} bytes where the manifest says {len(content)}")


def test_a_changed_file_is_seen_when_hashes_are_asked_for(bundle: Path) -> None:
    content = bytearray((bundle / "decoder.onnx.data").read_bytes())
    content[100] ^= 1
    (bundle / "decoder.onnx.data").write_bytes(content)
    open_bundle(bundle)
    refuse(bundle, "decoder.onnx.data does not have the manifest's sha256", check_hashes=True)


def test_a_folder_in_place_of_a_file(bundle: Path) -> None:
    (bundle / "decoder.onnx").unlink()
    (bundle / "decoder.onnx").mkdir()
    refuse(bundle, "lacks the file decoder.onnx")


OUTSIDE = [
    "../secret",
    "a/../../secret",
    "/etc/passwd",
    "..",
    ".",
    "",
    "..\\secret",
    "a\\..\\..\\secret",
    "C:\\secret",
    "C:secret",
    "c:/secret",
    "\\\\host\\share\\secret",
    "//host/share",
    "\\secret",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_that_leave_the_folder(bundle: Path, name: str) -> None:
    assert not is_inside(name)
    (bundle.parent / "secret").write_text("secret")
    edit(bundle, lambda data: data["files"].update({name: {"sha256": "", "bytes": 6}}))
    refuse(bundle, "leaves the bundle")


@pytest.mark.parametrize("name", ["decoder.onnx", "sub/file", "a..b", "...", "name with blank", "ünïcode"])
def test_paths_that_stay(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_stage_cannot_name_a_path_outside(bundle: Path, name: str) -> None:
    def change(data: dict[str, Any]) -> None:
        data["graphs"][name] = data["graphs"]["vision_encoder.onnx"]
        data["stages"][0]["file"] = name

    edit(bundle, change)
    refuse(bundle, "not one of manifest.files|leaves the bundle")


def test_links_that_leave_the_folder(bundle: Path) -> None:
    shutil.move(bundle / "decoder.onnx", bundle.parent / "decoder.onnx")
    (bundle / "decoder.onnx").symlink_to("../decoder.onnx")
    refuse(bundle, "decoder.onnx is a link that leaves the bundle")


def test_linked_folders_that_leave(bundle: Path) -> None:
    (bundle.parent / "beside").mkdir()
    (bundle.parent / "beside" / "file").write_text("x")
    (bundle / "sub").symlink_to("../beside")
    edit(bundle, lambda data: data["files"].update({"sub/file": {"sha256": "", "bytes": 1}}))
    refuse(bundle, "link that leaves the bundle")


def test_links_within_and_a_linked_bundle_are_fine(bundle: Path) -> None:
    shutil.move(bundle / "decoder.onnx", bundle / "real.onnx")
    (bundle / "decoder.onnx").symlink_to("real.onnx")
    (bundle.parent / "link").symlink_to("bundle")
    open_bundle(bundle.parent / "link")


# -- what graphs read and run --------------------------------------------------------------------------------


def spoil(bundle: Path, file: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph, and the manifest's identity of it."""
    model = onnx.load(bundle / file, load_external_data=False)
    change(model)
    content = model.SerializeToString()
    (bundle / file).unlink()
    (bundle / file).write_bytes(content)
    identity = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit(bundle, lambda data: data["files"].update({file: identity}))


def point_at(location: str) -> Callable[[onnx.ModelProto], None]:
    """A change after which the first weight in external data lies elsewhere."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(one for one in model.graph.initializer if one.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = location

    return change


@pytest.mark.parametrize("location", ["../secret", "other.data", "manifest.json"])
def test_a_graph_reads_the_bundle_s_files_only(bundle: Path, location: str) -> None:
    (bundle.parent / "secret").write_bytes(bytes(1 << 20))
    (bundle / "other.data").write_bytes(bytes(1 << 20))
    for file in ("decoder.onnx", "vision_encoder.onnx"):
        again = Path(shutil.copytree(bundle, bundle.with_name(f"spoilt-{file}")))
        spoil(again, file, point_at(location))
        refuse(again, f"{file} reads weights from '{location}', which is not one of the bundle's files")


def test_triton_writes_over_nothing(bundle: Path, tmp_path: Path) -> None:
    """A weights file called as the repository calls the graph: a hard link to it would be written over."""

    def rename(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "model.onnx" if entry.key == "location" else entry.value

    (bundle / "vision_encoder.onnx.data").rename(bundle / "model.onnx")

    def move(data: dict[str, Any]) -> None:
        data["files"]["model.onnx"] = data["files"].pop("vision_encoder.onnx.data")

    edit(bundle, move)
    spoil(bundle, "vision_encoder.onnx", rename)
    before = {path: path.read_bytes() for path in bundle.iterdir()}
    opened = open_bundle(bundle, check_hashes=True)
    with pytest.raises(VtpError, match=r"would both be model\.onnx"):
        write_repository(opened, tmp_path / "repository")
    assert {path: path.read_bytes() for path in bundle.iterdir()} == before
    assert not (tmp_path / "repository").exists()


def test_nothing_is_written_into_a_bundle(
    bundle: Path, tmp_path: Path, picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(bundle)
    (tmp_path / MANIFEST).write_text('{"name": "of another program"}')
    for inside in (bundle, bundle / "deep", tmp_path / "link"):
        for act in (
            lambda inside=inside: write_repository(open_bundle(bundle), inside / "tri"),
            lambda inside=inside: Journal(inside / "answers.jsonl"),
            lambda inside=inside: check_output(inside / "other", overwrite=True),
        ):
            with pytest.raises(UsageError, match=r"lies in the bundle .* choose a path elsewhere"):
                act()
    kept = bundle / "kept.png"
    asked = ["--image", str(picture_file), "--prompt", "what ?", "--show-kept", str(kept)]
    assert run_main([str(bundle), *asked]) == 2
    assert "kept.png lies in the bundle" in capsys.readouterr().err
    check_output(tmp_path / "other", overwrite=False)
    open_bundle(bundle, check_hashes=True)


def test_a_graph_with_control_flow_is_refused(bundle: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "If"

    spoil(bundle, "splice.onnx", change)
    refuse(bundle, r"splice\.onnx has control flow \(If\)")


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "tokenizer.json", MANIFEST])
def test_pipes_in_the_place_of_files_are_not_waited_for(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    refuse(bundle, f"lacks the file {name}|no {name}")


def test_a_manifest_that_is_a_link_outside(bundle: Path) -> None:
    (bundle / MANIFEST).rename(bundle.parent / "elsewhere.json")
    (bundle / MANIFEST).symlink_to("../elsewhere.json")
    refuse(bundle, "is a link that leaves")


@pytest.mark.parametrize("name", ["engines/decoder-0123456789abcdef.plan", "notes.txt", ".hidden"])
def test_files_that_the_manifest_does_not_name(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"x")
    open_bundle(bundle)
    refuse(bundle, f"holds {name.split('/')[0]}, which its manifest does not name", check_hashes=True)


# -- writing -------------------------------------------------------------------------------------------------


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
    with pytest.raises(VtpError, match="cannot write to /proc"):
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
