"""vtp-bench --engines: every graph on every engine, and an engine that answers otherwise is out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.bench import cli, engines
from vtp.calib.quantize.prompts import prompt_file, with_prompt_graphs
from vtp.engines import Choice
from vtp.engines.openvino.session import OvBinding
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import describe_files, open_bundle
from vtp.runtime.engine_choice import StageEngines

pytest.importorskip("openvino", reason="openvino is not installed")

BOTH = ["ort-cpu", "openvino-cpu"]


def test_every_graph_is_measured_on_every_engine(exported: Callable[[str], Any]) -> None:
    bundle = open_bundle(exported("adaptprune").folder)
    assert engines.candidates(bundle) == BOTH
    found = engines.measure_engines(bundle, BOTH, 1, repeats=1, tokens=4)
    assert {one.file for one in found} == set(bundle.manifest.graphs)
    for one in found:
        assert set(one.ms) == set(BOTH) and not one.out and all(spent > 0 for spent in one.ms.values())
        assert one.engine in BOTH
    rows = engines.table_of(found, BOTH)
    assert len(rows) == len(found) and all(len(row) == 4 for row in rows)


def test_steps_count_once_for_each_further_token(
    exported: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the graph that takes them, whether it reads the prompt as well or another one does that."""
    plain = exported("fastv").folder
    apart = Path(shutil.copytree(plain, tmp_path / "apart"))
    manifest = open_bundle(apart).manifest
    twins = {file: prompt_file(file) for file in ("decoder_head.onnx", "decoder.onnx")}
    for file, twin in twins.items():
        shutil.copyfile(apart / file, apart / twin)
    manifest = dataclasses.replace(with_prompt_graphs(manifest, twins), files=describe_files(apart))
    (apart / "manifest.json").write_text(manifest.to_json())
    monkeypatch.setattr(engines, "_times", lambda *_: {"ort-cpu": 1.0})
    for folder in (plain, apart):
        found = engines.measure_engines(open_bundle(folder), ["ort-cpu"], 1, repeats=1, tokens=9)
        ms = {one.file: one.ms["ort-cpu"] for one in found}
        prompts = 0 if folder == apart else 1
        assert all(ms[file] == prompts + 8 for file in twins) and ms["embed_tokens.onnx"] == 1 + 8
        assert all(ms[twin] == 1 for twin in twins.values() if folder == apart)
        assert ms["vision_encoder.onnx"] == ms["splice.onnx"] == 1


def test_what_is_refused_or_differs_is_out(
    exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OvBinding.run

    def wrong(self: OvBinding) -> None:
        run(self)
        if "image_embeds" in self.outputs:
            self.outputs["image_embeds"].update(self.outputs["image_embeds"].numpy() * np.float32(1.1))

    monkeypatch.setattr(OvBinding, "run", wrong)
    bundle = open_bundle(exported("vispruner").folder)
    found = {one.file: one for one in engines.measure_engines(bundle, BOTH, 1, 1, 2)}
    assert "computes in float64" in found["pruner_6.onnx"].out["openvino-cpu"]
    assert "image_embeds is not ort-cpu's: row" in found["projector.onnx"].out["openvino-cpu"]
    assert found["pruner_6.onnx"].engine == found["projector.onnx"].engine == "ort-cpu"
    assert not found["vision_encoder.onnx"].out


@pytest.mark.parametrize(
    ("ms", "out", "wanted"),
    [
        ({"ort-cpu": 10.0, "openvino-cpu": 8.0}, {}, "openvino-cpu"),
        ({"ort-cpu": 10.0, "openvino-cpu": 9.8}, {}, "ort-cpu"),  # within a twentieth
        ({"ort-cpu": 10.0, "openvino-cpu": 8.0}, {"openvino-cpu": "differs"}, "ort-cpu"),
        ({"ort-cpu": 10.0}, {"openvino-cpu": "refused"}, "ort-cpu"),
    ],
)
def test_the_fastest_of_those_that_are_right_runs_it(
    ms: dict[str, float], out: dict[str, str], wanted: str
) -> None:
    assert engines.Measured("g.onnx", ms, out).engine == wanted


def test_batches_are_held_against_each_other_as_well(
    exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(exported("none").folder)
    chosen = {"decoder.onnx": "openvino-cpu"}
    assert engines.disagreement(bundle, chosen, 1) == ""
    answer = Pipeline.generate_batch

    def wrong(self: Pipeline, *asked: Any, **options: Any) -> Any:
        found = answer(self, *asked, **options)
        if self.engines["decoder"] == "openvino-cpu":
            found[1].token_ids[0] += 1
        return found

    monkeypatch.setattr(Pipeline, "generate_batch", wrong)
    assert "two prompts together are answered otherwise" in engines.disagreement(bundle, chosen, 1)


def test_the_command_keeps_its_choice_for_auto(
    exported: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(engines, "GAIN", 1e9)  # whoever is fastest, by whatever
    folder = exported("none").folder
    assert cli.main([str(folder), "--engines", "--threads", "1", "--repeats", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    chosen = {file: one["engine"] for file, one in data["graphs"].items()}
    with Pipeline.load(folder, threads=1) as pipe:
        assert pipe.engines == StageEngines(Choice("ort-cpu"), chosen).by_stage(pipe.manifest)
    assert cli.main([str(folder), "--engines", "--threads", "1", "--repeats", "1"]) == 0
    assert "--engine auto takes it, from" in capsys.readouterr().out
