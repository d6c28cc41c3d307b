"""What is said at the start: of folders that are no bundles, and of slots for which there is no memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtp.runtime.bundle.memory import cache_bytes
from vtp.runtime.machine.room import Room
from vtp.serve import cli
from vtp.serve.hints import manifest_of, slots_note


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command ends."""
    capsys.readouterr()  # what the export of a fixture says
    assert cli.main([*arguments, "--port", "0"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("vtp-serve: error: ") and err.count("\n") == 1
    return err.removeprefix("vtp-serve: error: ").strip()


def test_a_checkpoint_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says how to make one of it, with what is to be typed next."""
    folder = tmp_path / "my llava"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlavaForConditionalGeneration"]}')
    said = refusal(capsys, str(folder))
    assert said.startswith(f"{folder} is a checkpoint of Hugging Face (it has config.json), not a bundle")
    assert f"vtp-export --model '{folder}' -o 'my llava-bundle'" in said


def test_a_misspelt_bundle(
    exported: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kitchen").symlink_to(exported("vispruner").folder)
    (tmp_path / "kitten").mkdir()  # no bundle
    assert refusal(capsys, str(tmp_path / "kitchn")) == (
        f"there is no bundle {tmp_path / 'kitchn'}; did you mean {tmp_path / 'kitchen'}?"
    )
    said = refusal(capsys, str(tmp_path / "garage"))
    assert said.endswith(f"and no such folder; make one with: vtp-export -o {tmp_path / 'garage'}")
    shadow = refusal(capsys, str(tmp_path / "kitchen"), "--shadow", str(tmp_path / "kitche"))
    assert "did you mean" in shadow


def test_other_things_that_are_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert refusal(capsys, "model.onnx").startswith("model.onnx is a file; a bundle is a folder")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert "vtp-export --model org/name -o name-bundle" in refusal(capsys, "org/name")
    (tmp_path / "org").mkdir()
    assert "a bundle of the hub is hf://org/name" in refusal(capsys, "org/name")
    (tmp_path / "empty").mkdir()
    assert refusal(capsys, "empty").startswith(
        "empty is not a bundle: it has no manifest.json; make one with"
    )


def test_slots_that_do_not_fit_into_memory_are_told(exported: Callable[[str], Any]) -> None:
    manifest = manifest_of(exported("adaptprune").folder)
    one = sum(cache_bytes(graph) for graph in manifest.graphs.values())
    assert one > 0
    for engine in ("auto", "ort-cpu"):
        assert slots_note(manifest, 4, engine, Room(4 * one, "free memory")) is None
        said = slots_note(manifest, 4, engine, Room(4 * one - 1, "free memory"))
        assert said is not None and said.startswith("--slots 4 may take ") and "give --slots 3, or" in said
    assert slots_note(manifest, 4, "auto", None) is None
    assert slots_note(manifest, 4, "ort-cuda", Room(1, "free memory")) is None


def test_it_is_said_once_and_the_bundle_is_served(
    exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The memory is a limit that may be raised, and caches fill as they are used."""
    bundle = exported("vispruner").folder
    monkeypatch.setattr(cli, "memory_room", lambda: Room(1, "free memory"))

    def loaded(folder: Any, **options: Any) -> Any:
        raise cli.VtpError("loaded")

    monkeypatch.setattr(cli.Scheduler, "load", loaded)
    capsys.readouterr()
    assert cli.main([str(bundle), "--port", "0"]) == 1
    note, error = capsys.readouterr().err.splitlines()
    assert note.startswith(f"vtp-serve: note: {bundle.name}: --slots 4 may take ") and error.endswith(
        "loaded"
    )
