"""What vtp-bench --engines keeps: taken by "auto" where it was measured, and by nobody else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtp.engines.tensorrt.store import cache_folder
from vtp.runtime import Pipeline, measured_engines
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.engine_choice import choose_engines
from vtp.runtime.measured_engines import recall, remember

pytest.importorskip("openvino", reason="openvino is not installed")

CHOSEN = {"vision_encoder.onnx": "openvino-cpu", "decoder.onnx": "ort-cpu"}


@pytest.fixture
def bundle(exported: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return open_bundle(exported("none").folder)


def test_auto_takes_what_was_measured_and_says_so(bundle: Bundle) -> None:
    assert not choose_engines(bundle, threads=1).elsewhere
    path = remember(bundle, 1, CHOSEN, {"decoder.onnx": {"ms": {"ort-cpu": 1.0}}})
    assert path.parent == cache_folder() / "measured" and path.parent.stat().st_mode & 0o077 == 0
    with Pipeline.load(bundle.folder, threads=1) as pipe:
        assert pipe.engines["vision_encoder"] == "openvino-cpu" and pipe.engine == "ort-cpu"
        assert pipe.engines["decoder"] == "ort-cpu"
        assert pipe.notes == [
            "as vtp-bench --engines measured here, vision_encoder.onnx on openvino-cpu; the others on ort-cpu"
        ]
    with Pipeline.load(bundle.folder, "ort-cpu", threads=1) as pipe:  # asked for by name
        assert set(pipe.engines.values()) == {"ort-cpu"} and not pipe.notes


def test_it_holds_for_these_threads_files_and_versions_only(
    bundle: Bundle, exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(bundle, 1, CHOSEN, {})
    assert recall(bundle, 1).engines == CHOSEN
    assert not recall(bundle, 2).engines and not recall(bundle, None).engines
    assert not recall(open_bundle(exported("mha").folder), 1).engines
    there = measured_engines.conditions

    def newer(*asked: Any) -> Any:
        found = there(*asked)
        return dataclasses.replace(found, versions={**found.versions, "openvino": "2027.1.0"})

    monkeypatch.setattr(measured_engines, "conditions", newer)
    found = choose_engines(bundle, threads=1)
    assert not found.elsewhere
    assert found.notes == (
        f"what vtp-bench --engines measured is not used, run it again: openvino "
        f"{there('openvino-cpu', 1).versions['openvino']}, here 2027.1.0",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: "{", "not used"),
        (lambda data: [], "names no engines of this bundle's graphs"),
        (
            lambda data: {**data, "engines": {"other.onnx": "ort-cpu"}},
            "names no engines of this bundle's gra",
        ),
        (lambda data: {**data, "engines": {"decoder.onnx": "ort-cup"}}, "unknown engine 'ort-cup'"),
        (lambda data: {**data, "engines": {"decoder.onnx": "tensorrt"}}, "cannot be mixed"),
        (lambda data: {**data, "engines": {"decoder.onnx": ["ort-cpu"]}}, "unknown engine"),
        (lambda data: {**data, "conditions": 7}, "were not recorded"),
    ],
)
def test_a_file_that_says_something_else_is_passed_over(
    bundle: Bundle, change: Callable[[Any], Any], message: str
) -> None:
    path = remember(bundle, 1, CHOSEN, {})
    data = change(json.loads(path.read_text()))
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    found = choose_engines(bundle, threads=1)
    assert not found.elsewhere and len(found.notes) == 1
    assert message in found.notes[0] and "\n" not in found.notes[0]


def test_a_folder_that_others_can_write_is_not_read(bundle: Bundle) -> None:
    path = remember(bundle, 1, CHOSEN, {})
    path.parent.chmod(0o777)
    found = choose_engines(bundle, threads=1)
    assert not found.elsewhere and "is open to other users" in found.notes[0]
