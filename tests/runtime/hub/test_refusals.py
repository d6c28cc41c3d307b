"""What the hub does not give, and bundles of strangers: one line each, and no folder of a bundle."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vtp.engines import VtpError
from vtp.runtime.hub.bundles import local_bundle

from ...stand_ins.hub_server import TOKEN, Hub

Files = dict[str, bytes]


def refused(given: str, message: str, home: Path) -> str:
    """One line that says `message`; nothing that a command would open is there."""
    with pytest.raises(VtpError, match=message) as caught:
        local_bundle(given)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700 and TOKEN not in text
    assert not list(home.glob("hub/models--*/vtp/*"))
    return text


# -- the hub's answers ---------------------------------------------------------------------------------------


def test_a_name_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    refused(
        "org/nothing", "nothing on the hub that you may read: org/nothing; check the name", tmp_path / "home"
    )


def test_a_private_one_wants_a_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token goes to the hub, not to where the hub sends for large files."""
    hub.repos["org/name"].private = True
    refused("org/name", "if it is private, log in with hf auth login, or set HF_TOKEN", tmp_path / "home")
    monkeypatch.setenv("HF_TOKEN", "hf_of_yesterday")
    text = refused(
        "org/name", "does not accept the token it was given for org/name: log in", tmp_path / "home"
    )
    assert "yesterday" not in text
    monkeypatch.setenv("HF_TOKEN", "hf_ä")
    refused("org/name", "the token for org/name has a character that no token has: log", tmp_path / "home")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.asked.clear()
    assert local_bundle("org/name").is_dir()
    tokens = {path.startswith("/cdn/"): token for _, path, token in hub.asked}
    assert tokens == {True: None, False: TOKEN}


def test_a_gated_one(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/name"].gated = True
    refused(
        "org/name", f"org/name is gated: ask for access at {hub.url}/org/name, then log in", tmp_path / "home"
    )


def test_a_revision_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    refused(
        "org/name@v9", "org/name has no revision 'v9'; .*/org/name/tree/main lists them", tmp_path / "home"
    )
    refused(f"org/name@{'ab' * 20}", "has no revision 'abab", tmp_path / "home")


def test_a_hub_that_is_down(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.down = True
    refused("org/name", r"the hub was not reached: org/name \(HfHubHTTPError: .*503", tmp_path / "home")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    text = refused(
        "org/name", r"not reached: org/name \(ConnectError: .*; check the network", tmp_path / "home"
    )
    assert "vtp-export --model org/name -o name-bundle" in text


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            ["config.json", "model.safetensors"],
            "is a model checkpoint .* vtp-export --model org/other -o other-b",
        ),
        (["vtp.json", "config.json"], "org/other on the hub is laid out for transformers.js, not a bundle"),
        (["README.md"], r"org/other@[0-9a-f]{12} on the hub is not a bundle: it has no manifest\.json"),
    ],
)
def test_repositories_of_other_kinds(hub: Hub, tmp_path: Path, held: list[str], message: str) -> None:
    hub.repo("org/other", dict.fromkeys(held, b"{}"))
    refused("org/other", message, tmp_path / "home")
    assert not hub.paths("HEAD")  # nothing was fetched to find out


# -- a stranger's bundle -------------------------------------------------------------------------------------


class Bad(NamedTuple):
    """A bundle that is changed, the line about it, and how many of its files may be fetched to find out."""

    change: Callable[[Files], Any]
    message: str
    fetched: int


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Files], None]:
    def apply(files: Files) -> None:
        data = json.loads(files["manifest.json"])
        change(data)
        files["manifest.json"] = json.dumps(data).encode()

    return apply


def names(path: str) -> Callable[[Files], None]:
    """The manifest names one more file, which is there."""

    def apply(files: Files) -> None:
        files[path] = b"more"
        info = {"sha256": hashlib.sha256(b"more").hexdigest(), "bytes": 4}
        manifest(lambda data: data["files"].update({path: info}))(files)

    return apply


def flip(path: str) -> Callable[[Files], None]:
    """One byte differs, so that only the sha256 tells."""

    def apply(files: Files) -> None:
        files[path] = bytes([files[path][0] ^ 1]) + files[path][1:]

    return apply


NEITHER = "which is neither a graph .*do not use this bundle"
BAD = {
    "an engine": Bad(names("decoder.plan"), f"'decoder.plan', {NEITHER}", 1),
    "a script": Bad(names("setup.py"), f"'setup.py', {NEITHER}", 1),
    "a path that leaves": Bad(names("../../x.onnx"), NEITHER, 1),
    "a folder": Bad(names("a/x.onnx"), NEITHER, 1),
    "a hidden file": Bad(names(".x.onnx"), NEITHER, 1),
    "a control character": Bad(names("x\n.onnx"), r"'x\\n\.onnx', which", 1),
    "capitals": Bad(names("DECODER.onnx"), "two files that differ in capitals", 1),
    "a file that is not there": Bad(
        lambda files: files.pop("decoder.onnx"), r"lacks decoder\.onnx, which", 1
    ),
    "another size": Bad(
        lambda files: files.update({"decoder.onnx": b"x"}), "is not what its manifest says", 1
    ),
    "another sha256": Bad(flip("decoder.onnx.data"), r"decoder\.onnx\.data .* or another sha256", 1),
    "another sha256 of a small file": Bad(
        flip("tokenizer.json"), r"is not used: tokenizer\.json does not have the manifest's sha256", 99
    ),
    "no manifest of ours": Bad(
        lambda files: files.update({"manifest.json": b'{"name": "app"}'}), "has no schema version", 1
    ),
    "an unknown key": Bad(manifest(lambda data: data.update(hook="x")), "has the unknown key 'hook'", 1),
    "a size below zero": Bad(
        manifest(lambda data: data["files"]["decoder.onnx"].update(bytes=-1)), "a size below 0", 1
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bundles_of_strangers(hub: Hub, tmp_path: Path, files: Files, name: str) -> None:
    bad, changed = BAD[name], dict(files)
    bad.change(changed)
    hub.repo("org/bad", changed)
    refused("org/bad", bad.message, tmp_path / "home")
    assert len(hub.paths("HEAD")) <= bad.fetched


def test_bytes_that_changed_on_their_way(hub: Hub, tmp_path: Path, files: Files) -> None:
    """The hub says one sha256 and sends another file of that size."""
    data = files["decoder.onnx.data"]
    hub.instead[hashlib.sha256(data).hexdigest()] = bytes(len(data))
    text = refused("org/name", r"decoder\.onnx\.data does not have the manifest's sha256", tmp_path / "home")
    assert "remove it with: hf cache rm model/org/name" in text


def test_a_graph_that_reads_elsewhere(hub: Hub, tmp_path: Path, files: Files) -> None:
    """What is refused of any bundle is refused here, before a command sees the folder."""
    graph = files["decoder.onnx"].replace(b"decoder.onnx.data", b"/etc/shadow.files")
    info = {"sha256": hashlib.sha256(graph).hexdigest(), "bytes": len(graph)}
    changed = {**files, "decoder.onnx": graph}
    manifest(lambda data: data["files"].update({"decoder.onnx": info}))(changed)
    hub.repo("org/bad", changed)
    refused("org/bad", "reads weights from '/etc/shadow.files'", tmp_path / "home")


# -- room ----------------------------------------------------------------------------------------------------


def test_more_than_the_limit(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTP_HUB_MAX_GB", "0.00001")
    refused("org/name", r"has .* to fetch, and VTP_HUB_MAX_GB is 1e-05; set it higher", tmp_path / "home")
    monkeypatch.setenv("VTP_HUB_MAX_GB", "much")
    refused("org/name", "VTP_HUB_MAX_GB='much' is not a number of gigabytes", tmp_path / "home")
    assert len(hub.paths("HEAD")) == 1  # the manifest


def test_a_disk_that_is_too_small(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=64 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    refused("org/name", "67.1 MB free; free some space, or set HF_HOME to another disk", tmp_path / "home")


def test_a_disk_that_fills_up(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    refused("org/name", "the disk is full while org/name.* is fetched; free some space", tmp_path / "home")
