"""Engines are this machine's: the key, the folder, and stamps that others made."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtp.engines import VtpError
from vtp.engines.tensorrt import store as trt_store
from vtp.engines.tensorrt.build import (
    STAMP,
    Stamp,
    check_engine,
    find_engine,
    read_stamp,
    set_gate,
    write_stamp,
)
from vtp.engines.tensorrt.store import cache_folder, check_folder, is_signed, make_folder, sign

from ..stand_ins.fake_trt import install, install_gpu

ENGINE = "tensorrt"
CONTENT = b"a plan"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a cache."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def put(folder: Path) -> Path:
    """An engine and its stamp, as a build leaves them."""
    import hashlib

    make_folder(folder)
    (folder / "g-0.plan").write_bytes(CONTENT)
    stamp = Stamp(ENGINE, "10.3.0", "8.7", "f" * 64, "s", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    write_stamp(folder / "g-0.plan", stamp)
    return folder / "g-0.plan"


def test_where_the_cache_is(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == home / ".cache/vtp/engines"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by XDG's base directory specification
    assert cache_folder() == home / ".cache/vtp/engines"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x/vtp/engines"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes are POSIX's")
def test_key_and_folders_are_the_user_s_alone() -> None:
    before = os.umask(0)
    try:
        plan = put(cache_folder() / "bundle")
    finally:
        os.umask(before)
    for folder in (cache_folder().parent, cache_folder(), plan.parent):
        assert mode(folder) == 0o700
    key = cache_folder() / "key"
    assert mode(key) == 0o600 and key.stat().st_size == 32
    assert {path.name for path in cache_folder().iterdir()} == {"key", "bundle"}
    content = key.read_bytes()
    put(cache_folder() / "another")
    assert key.read_bytes() == content


def test_a_signature_is_one_content_s_and_one_key_s() -> None:
    mac = sign(b"stamp")
    assert is_signed(b"stamp", mac)
    for other in ("", "0" * 64, mac[:-1], None, 7, "é\udc80"):
        assert not is_signed(b"stamp", other)
    assert not is_signed(b"stam", mac)
    (cache_folder() / "key").unlink()
    assert not is_signed(b"stamp", mac) and not (cache_folder() / "key").exists()
    assert sign(b"stamp") != mac


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes are POSIX's")
@pytest.mark.parametrize("what", ["key", ".", ".."])
def test_what_others_may_read_or_write_is_not_trusted(what: str) -> None:
    plan = put(cache_folder() / "bundle")
    path = cache_folder() / what
    path.chmod(mode(path) | 0o020)
    with pytest.raises(VtpError, match=r"is open to other users; .* chmod [67]00 ") as caught:
        read_stamp(plan)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can give files away")
def test_what_belongs_to_another_user_is_not_trusted() -> None:
    plan = put(cache_folder() / "bundle")
    os.chown(cache_folder() / "bundle", 12345, -1)
    with pytest.raises(VtpError, match="belongs to another user"):
        check_folder(plan.parent)
    os.chown(cache_folder() / "bundle", os.geteuid(), -1)
    os.chown(cache_folder() / "key", 12345, -1)
    with pytest.raises(VtpError, match="belongs to another user"):
        read_stamp(plan)


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_key_that_is_not_whole(content: bytes) -> None:
    plan = put(cache_folder() / "bundle")
    (cache_folder() / "key").write_bytes(content)
    with pytest.raises(VtpError, match=r"not whole|larger than 32 bytes"):
        read_stamp(plan)


def test_two_processes_that_make_the_key_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def late(part: Path, path: Path) -> None:
        path.write_bytes(b"k" * 32)  # the other was first
        path.chmod(0o600)
        real(part, path)

    monkeypatch.setattr(trt_store.os, "link", late)
    assert is_signed(b"stamp", sign(b"stamp"))
    assert (cache_folder() / "key").read_bytes() == b"k" * 32
    assert [path.name for path in cache_folder().iterdir()] == ["key"]


# -- stamps --------------------------------------------------------------------------------------------------


def strip(stamp: dict[str, Any]) -> None:
    del stamp["mac"]  # as vtp wrote them before


def pass_gate(stamp: dict[str, Any]) -> None:
    stamp["gate"] = {"passed": True, "device": "Orin"}


def resize(stamp: dict[str, Any]) -> None:
    stamp["bytes"] = 7


@pytest.mark.parametrize("change", [strip, pass_gate, resize])
@pytest.mark.parametrize("private", [True, False])
def test_stamps_that_were_not_made_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None], private: bool
) -> None:
    install_gpu(monkeypatch)
    install(monkeypatch)
    plan = put(cache_folder() / "bundle" if private else tmp_path / "engines")
    set_gate(plan, {"passed": False})
    assert check_engine(plan, ENGINE, "vtp-x").gate == {"passed": False}
    stamp = json.loads(plan.with_suffix(STAMP).read_text())
    change(stamp)
    plan.with_suffix(STAMP).write_text(json.dumps(stamp))
    with pytest.raises(VtpError, match="was not built by this user on this machine; rebuild it with: vtp-x"):
        check_engine(plan, ENGINE, "vtp-x")


def test_a_stranger_s_engines_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built and compared on another machine, under another key."""
    install_gpu(monkeypatch)
    install(monkeypatch)
    plan = put(tmp_path / "engines")
    shutil.move(cache_folder(), tmp_path / "another machine's")
    sign(b"this machine has a key, too")
    with pytest.raises(VtpError, match="not built by this user"):
        read_stamp(plan)


def test_outside_the_cache_the_content_is_held_against_the_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stamp of ours beside somebody else's engine of the same size."""
    install_gpu(monkeypatch)
    install(monkeypatch)
    plan = put(tmp_path / "engines")
    plan.write_bytes(CONTENT.upper())
    with pytest.raises(VtpError, match="it was changed; rebuild it with: vtp-x"):
        check_engine(plan, ENGINE, "vtp-x")


@pytest.mark.parametrize("content", ["[]", "{", "7", '{"engine": 1}', "[" * 100_000, "x" * (2 << 20)])
def test_stamps_of_nonsense_are_one_line(content: str) -> None:
    plan = put(cache_folder() / "bundle")
    plan.with_suffix(STAMP).write_text(content)
    with pytest.raises(VtpError, match="missing or was not finished") as caught:
        read_stamp(plan)
    assert len(str(caught.value)) < 200


def test_the_signature_covers_every_field() -> None:
    stamp = Stamp("e", "1", "8.7", "g", "s", 3, "h", {"a": 1})
    for field in dataclasses.fields(stamp):
        changed = dataclasses.replace(stamp, **{field.name: "other"})
        assert (changed.signed_part != stamp.signed_part) == (field.name != "mac")


def test_names_with_wildcards_find_their_own_engines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtp.engines.tensorrt.build.graph_hash", lambda *_: "f" * 64)
    install_gpu(monkeypatch)
    install(monkeypatch)
    put(tmp_path / "engines")
    assert find_engine("g.onnx", ENGINE, tmp_path / "engines", "vtp-x")[0].name == "g-0.plan"
    with pytest.raises(VtpError, match="no tensorrt engine"):
        find_engine("*.onnx", ENGINE, tmp_path / "engines", "vtp-x")
