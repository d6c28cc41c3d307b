"""vtp-build: what it refuses, and a bundle built whole with the real TensorRT-RTX."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vtp.engines.tensorrt.library import INSTALL
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands import build

from ...conftest import MAX_LENGTH
from ...once import Once

ENGINE = "tensorrt-rtx"
MISSING = util.find_spec("tensorrt_rtx") is None


def run(*argv: object) -> int:
    return build.main([str(one) for one in argv])


@pytest.mark.parametrize(
    ("argv", "message", "code"),
    [
        (("--engine", "trt"), "unknown engine 'trt'; choose one of tensorrt, tensorrt-rtx", 2),
        (("--engine", ENGINE, "--workspace-mb", "-1"), "workspace-mb '-1' is not a whole number", 2),
        (("--engine", ENGINE), "made for target 'ort', whose decoder TensorRT does not take; export", 1),
    ],
)
def test_what_cannot_be_built_is_one_line(
    exported: Callable[[str], Any],
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    message: str,
    code: int,
) -> None:
    folder = exported("none").folder
    capsys.readouterr()  # what the export printed
    assert run(folder, *argv) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_profiles_come_from_the_manifest(exported: Callable[[str], Any]) -> None:
    graph = open_bundle(exported("adaptprune").folder).manifest.graphs["decoder.onnx"]
    assert graph.kv is not None
    least, usual, most = build.profile_of(graph)["hidden_states"]
    assert (least[:2], most[:2]) == ([1, 1], [1, graph.kv.capacity]) and least[1] < usual[1] < most[1]


@pytest.mark.parametrize("name", ["adaptprune", "none", "vispruner"])
def test_every_profile_is_ordered_and_fits_prompts(exported: Callable[[str], Any], name: str) -> None:
    manifest = open_bundle(exported(name).folder).manifest
    for file, graph in manifest.graphs.items():
        for shapes in build.profile_of(graph).values():
            assert all(low <= usual <= high for low, usual, high in zip(*shapes, strict=True)), file
        assert all(least <= usual <= most for least, usual, most in graph.axes.values()), file


def test_before_a_cut_all_visual_tokens_are_expected(exported: Callable[[str], Any]) -> None:
    graphs = open_bundle(exported("adaptprune").folder).manifest.graphs
    sequences = {file: graph.axes.get("sequence") for file, graph in graphs.items()}
    assert sequences["decoder_head.onnx"] == [1, 16 + 64, 128]
    assert sequences["pruner_4.onnx"] == [16, 16 + 64, 128]
    assert sequences["decoder.onnx"] == [1, 7 + 64, 128]


def test_a_short_max_length_bounds_what_is_usual(exported: Callable[[str], Any]) -> None:
    from vtp.export.manifest import _graph_info

    folder = exported("adaptprune").folder
    plan, job = SimpleNamespace(caches={}, states={}), SimpleNamespace(max_length=40, keep=[7], count=16)
    for path in folder.glob("*.onnx"):
        spec = SimpleNamespace(name=path.stem, module=None, inputs=[])
        axes = _graph_info(spec, plan, folder, job).axes  # type: ignore[arg-type]
        assert all(least <= usual <= most for least, usual, most in axes.values()), path


@pytest.mark.trtrtx
@pytest.mark.skipif(MISSING, reason=f"tensorrt_rtx is not installed: {INSTALL[ENGINE]}")
def test_a_bundle_is_built_once(
    once: Once, model_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """On a bundle of tests/export/test_target.py."""
    wishes = {"method": "adaptprune", "target": "tensorrt", "max_length": MAX_LENGTH, "verify": "full"}
    bundle = open_bundle(once.bundle(model_folder("gqa"), keep_tokens="5", **wishes))
    capsys.readouterr()
    assert run(bundle.folder, "--engine", ENGINE, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["engines"]
    assert [row["graph"] for row in rows] == list(bundle.manifest.graphs)
    assert all(row["built"] and Path(row["engine"]).stat().st_size == row["bytes"] for row in rows)
    assert open_bundle(bundle.folder, check_hashes=True)  # engines beside it do not spoil a bundle
    assert run(bundle.folder, "--engine", ENGINE) == 0
    assert capsys.readouterr().out.count("kept") == len(rows)
