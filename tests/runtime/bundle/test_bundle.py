"""Bundles on disk: opened only when whole and unchanged, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from vtp.calib.keep.journal import Journal
from vtp.engines import UsageError, VtpError
from vtp.runtime.bundle.folder import MANIFEST, check_output, is_inside, open_bundle
from vtp.runtime.commands.run import main as run_main
from vtp.runtime.triton.repository import write_repository


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
