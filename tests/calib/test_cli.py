"""vtp-calib on real bundles: the choice, the report, resuming after a kill, budgets, refusals."""

from __future__ import annotations

import csv
import json
import shutil
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vtp.calib import cli
from vtp.calib.keep import examiner
from vtp.calib.workers import cluster
from vtp.engines import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle, set_calibration
from vtp.runtime.bundle.memory import bundle_memory
from vtp.runtime.machine.conditions import conditions

from .asked import unpruned_answers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, exported: Any) -> Path:
    """Six questions whose accepted answers are what the unpruned model says."""
    return unpruned_answers(tmp_path_factory.mktemp("data"), exported("none").folder, 6)


@pytest.fixture
def bundle(tmp_path: Path, exported: Any) -> Path:
    """A copy of a bundle that holds 3 and 6 of 16 tokens."""
    return Path(shutil.copytree(exported("vispruner").folder, tmp_path / "bundle"))


def calib(*arguments: object) -> int:
    return cli.main([*map(str, arguments), "--threads", "1", "--max-new-tokens", "4"])


def test_keep_chooses_writes_and_reports(bundle, data, exported, capsys) -> None:
    goal = ["--reference", exported("none").folder, "--budget-ms", 1e6]
    assert calib("keep", bundle, "--data", data, *goal) == 0
    said = capsys.readouterr().out
    manifest = open_bundle(bundle, check_hashes=True).manifest
    rows = list(csv.DictReader((bundle.parent / "bundle-calib/keep.csv").open()))
    assert [row["keep"] for row in rows] == ["3", "6"]
    (chosen,) = [row for row in rows if row["chosen"] == "1"]
    best = max(float(row["score"]) for row in rows)
    assert float(chosen["score"]) == best and manifest.visual.default_keep == int(chosen["keep"])
    assert manifest.calibration["questions"] == 6 and manifest.calibration["budget_ms"] == 1e6
    assert set(manifest.calibration["tried"]) == {"3", "6"}
    assert f"keep {chosen['keep']} of 16 visual tokens: now the bundle's default" in said
    assert "a finer grid: vtp-export --model DIR --method vispruner" in said
    assert all(float(row["share_low"]) <= float(row["share"]) <= float(row["share_high"]) for row in rows)


def test_a_floor_that_nothing_holds_leaves_the_bundle_alone(bundle, data, exported, capsys) -> None:
    before = (bundle / "manifest.json").read_bytes()
    assert calib("keep", bundle, "--data", data, "--reference", exported("none").folder, "--floor", "1") == 1
    assert "no keep-count of this bundle holds 1: the largest, 6, keeps" in capsys.readouterr().err
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_bundle_with_all_tokens_is_its_own_reference(exported, data, tmp_path, capsys) -> None:
    whole = Path(shutil.copytree(exported("none").folder, tmp_path / "whole"))
    assert calib("keep", whole, "--data", data, "--floor", "1", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["keep"] == 16 and record["tried"]["16"]["share"] == [1, 1, 1]
    assert record["unpruned"][0] == 1 and record["metric"] == "exact"


def test_a_killed_run_goes_on_and_chooses_alike(exported, data, tmp_path, monkeypatch, capsys) -> None:
    none, out = exported("none").folder, tmp_path / "out"
    bundles = [shutil.copytree(exported("vispruner").folder, tmp_path / name) for name in ("one", "two")]
    goal = ["--data", data, "--reference", none, "--budget-ms", 1e6, "--json"]
    assert calib("keep", bundles[0], *goal) == 0
    whole = json.loads(capsys.readouterr().out)
    asked: list[int] = []
    write = examiner._write

    def dying(pipe: Any, paper: Any) -> Any:
        if len(asked) == 8:
            raise KeyboardInterrupt
        asked.append(paper.keep)
        return write(pipe, paper)

    monkeypatch.setattr(examiner, "_write", dying)
    assert calib("keep", bundles[1], *goal, "--out", out) == 130
    assert not open_bundle(bundles[1]).manifest.calibration
    monkeypatch.setattr(examiner, "_write", write)
    capsys.readouterr()
    assert calib("keep", bundles[1], *goal, "--out", out) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert resumed["keep"] == whole["keep"]
    scores = [{keep: tried["score"] for keep, tried in run["tried"].items()} for run in (whole, resumed)]
    assert scores[0] == scores[1]
    lines = (out / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 6 * 4 and len(set(lines)) == len(lines)


def test_dry_run_changes_nothing(bundle, data, exported, capsys) -> None:
    before = (bundle / "manifest.json").read_bytes()
    goal = ["--reference", exported("none").folder, "--budget-ms", 1e6, "--dry-run"]
    assert calib("keep", bundle, "--data", data, *goal) == 0
    assert (bundle / "manifest.json").read_bytes() == before
    assert "left as it is" in capsys.readouterr().out


def test_a_memory_budget_chooses_by_what_the_doctor_tells(bundle, data, exported, capsys) -> None:
    opened = open_bundle(bundle)
    few, many = (bundle_memory(opened, "ort-cpu", keep).total / 1e6 for keep in (3, 6))
    assert few < many <= bundle_memory(opened, "ort-cpu").total / 1e6
    goal = ["--data", data, "--reference", exported("none").folder, "--engine", "ort-cpu"]
    assert calib("keep", bundle, *goal, "--budget-mb", (few + many) / 2) == 0
    record = open_bundle(bundle).manifest.calibration
    assert open_bundle(bundle).manifest.visual.default_keep == 3 and set(record["tried"]) == {"3"}
    assert record["needs_mb"] == round(few, 1)
    capsys.readouterr()
    assert calib("keep", bundle, *goal, "--budget-mb", few / 2) == 1
    assert "no keep-count of this bundle fits into" in capsys.readouterr().err


def test_a_decoder_site_shortens_only_what_comes_after_it(exported) -> None:
    bundle = open_bundle(exported("adaptprune").folder)
    few, many = (
        {stage.file: stage.activations for stage in bundle_memory(bundle, "ort-cpu", keep).stages}
        for keep in (4, 7)
    )
    assert few["decoder.onnx"] < many["decoder.onnx"]
    assert few["decoder_head.onnx"] == many["decoder_head.onnx"]


def test_budget_ms_takes_the_largest_keep_count_that_was_fast_enough(bundle, picture) -> None:
    with Pipeline.load(bundle, threads=1) as pipe, pytest.raises(UsageError, match="not calibrated"):
        pipe.generate(picture, "what ?", budget_ms=50)
    tried = {"3": {"ttft_ms": 20.0}, "6": {"ttft_ms": 40.0}}
    here = conditions("ort-cpu", 1)
    measured = {"engine": "ort-cpu", "conditions": here.to_json(), "tried": tried}
    set_calibration(bundle, 3, measured)
    with Pipeline.load(bundle, "ort-cpu", threads=1) as pipe:
        kept = [len(pipe.generate(picture, "w", max_new_tokens=1, budget_ms=ms).kept) for ms in (20, 39, 40)]
        assert kept == [3, 3, 6]
        assert len(pipe.generate(picture, "w", max_new_tokens=1).kept) == 3
        with pytest.raises(UsageError, match=r"the fastest takes 20\.0 ms"):
            pipe.generate(picture, "w", budget_ms=5)
        with pytest.raises(UsageError, match="not both"):
            pipe.generate(picture, "w", budget_ms=50, keep_tokens=3)
    with Pipeline.load(bundle, "ort-cpu", threads=2) as pipe, pytest.raises(UsageError, match="threads 1"):
        pipe.generate(picture, "w", budget_ms=50)
    set_calibration(bundle, 3, {"engine": "ort-cuda", "tried": tried})
    with Pipeline.load(bundle, "ort-cpu", threads=1) as pipe, pytest.raises(UsageError, match="ort-cuda"):
        pipe.generate(picture, "w", budget_ms=50)


def test_engines_by_stage_are_calibrated_and_counted_on(bundle, data, exported, picture, capsys) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    mixed = "ort-cpu,vision_encoder=openvino-cpu"
    goal = ["--data", data, "--reference", exported("none").folder, "--budget-ms", 1e6, "--threads", 1]
    assert calib("keep", bundle, *goal, "--engine", mixed, "--json") == 0
    assert json.loads(capsys.readouterr().out)["engine"] == "ort-cpu,vision_encoder.onnx=openvino-cpu"
    with Pipeline.load(bundle, mixed, threads=1) as pipe:
        assert len(pipe.generate(picture, "w", max_new_tokens=1, budget_ms=1e6).kept) == 6
    with Pipeline.load(bundle, "ort-cpu", threads=1) as pipe, pytest.raises(UsageError, match="openvino-cpu"):
        pipe.generate(picture, "w", budget_ms=1e6)
    assert calib("keep", bundle, *goal, "--engine", "ort-cpu,splise=openvino-cpu") == 2
    told = capsys.readouterr().err
    assert "no stage 'splise' in this bundle, which has vision_encoder, pruner, " in told
    assert told.endswith("; did you mean 'splice'?\n")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"machine": "Orin, 6 cores"}, "machine 'Orin, 6 cores'"),
        ({"versions": {**conditions("ort-cpu", 1).versions, "onnxruntime": "1.17.0"}}, "onnxruntime 1.17.0"),
        ({"versions": "new"}, "versions were not recorded"),
        (None, "conditions were not recorded"),
    ],
)
def test_budget_ms_refuses_times_of_other_conditions(bundle, picture, change, says) -> None:
    measured = {} if change is None else {"conditions": conditions("ort-cpu", 1).to_json() | change}
    set_calibration(bundle, 3, {"engine": "ort-cpu", "tried": {"3": {"ttft_ms": 20.0}}, **measured})
    with Pipeline.load(bundle, "ort-cpu", threads=1) as pipe:
        with pytest.raises(UsageError, match=says):
            pipe.generate(picture, "w", budget_ms=50)
        assert len(pipe.generate(picture, "w", max_new_tokens=1).kept) == 3


def test_a_keep_count_that_the_bundle_lacks_is_never_written(bundle) -> None:
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(VtpError, match="default_keep"):
        set_calibration(bundle, 5, {})
    assert (bundle / "manifest.json").read_bytes() == before
    assert not list(bundle.glob(".*"))


def test_score_compares_bundles_on_the_same_questions(exported, data, tmp_path, capsys) -> None:
    none, pruned = exported("none").folder, exported("vispruner").folder
    arguments = [none, f"{pruned}:3", f"{pruned}:6", "--data", data, "--journal", tmp_path / "s"]
    assert calib("score", *arguments, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["bundles"]
    assert [row["bundle"] for row in rows] == ["none:16", "vispruner:3", "vispruner:6"]
    assert rows[0]["score"][0] == 1 and rows[0]["difference"] == [0, 0, 0]
    assert all(row["difference"][0] == pytest.approx(row["score"][0] - 1) for row in rows)
    assert [row["ttft_of_an_earlier_run"] for row in rows] == [False] * 3
    lines = (tmp_path / "s/answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "s/answers.jsonl").write_text("".join(lines[:12]))  # without those of vispruner:6
    assert calib("score", *arguments) == 0
    table = capsys.readouterr().out
    assert "6 questions, metric exact, paired bootstrap" in table and "* taken by an earlier run" in table
    marked = {line.split()[0]: line.rstrip().endswith("*") for line in table.splitlines()[2:5]}
    assert marked == {"none:16": True, "vispruner:3": True, "vispruner:6": False}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--floor", "0.9"], "give --reference"),
        (["--floor", "0.9", "--limit", "0"], "--limit 0"),
        (["--floor", "0.9", "--metric", "bleu"], "unknown metric 'bleu'"),
        (["--reference", "PRUNED"], "prunes; give a bundle"),
        (["--workers", "2"], "--workers belongs to --ray"),
        (["--ray", "local", "--workers", "0"], "--workers 0"),
    ],
)
def test_bad_input_is_one_line(bundle, data, exported, capsys, arguments, problem) -> None:
    wishes = [str(exported("fastv").folder) if word == "PRUNED" else word for word in arguments]
    assert calib("keep", bundle, "--data", data, *wishes) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert problem in said and said.startswith("vtp-calib keep: error: ")


@pytest.mark.parametrize("flag", ["--floor", "--budget-ms", "--budget-mb"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1_0", "\u0661", "0x1", ""])
def test_a_goal_that_is_no_number_is_one_line(bundle, data, capsys, flag, value) -> None:
    with pytest.raises(SystemExit) as left:
        calib("keep", bundle, "--data", data, f"{flag}={value}")
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"vtp-calib keep: error: argument {flag}: '{value}' is not a number")


@pytest.mark.parametrize("flag", ["--floor", "--budget-ms", "--budget-mb"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_a_goal_that_is_none_is_refused_before_anything_runs(bundle, data, capsys, flag, value) -> None:
    assert calib("keep", bundle, "--data", data, f"{flag}={value}") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"vtp-calib keep: error: {flag} {value} is not a") and said.count("\n") == 1
    assert not (bundle.parent / "bundle-calib").exists()


def test_ray_that_is_missing_is_one_line(bundle, data, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert calib("keep", bundle, "--data", data, "--ray", "local") == 2
    assert capsys.readouterr().err == (
        "vtp-calib keep: error: --ray needs Ray: pip install 'vtp-edge[ray]'\n"
    )


@pytest.mark.parametrize(
    ("address", "code", "problem"),
    [
        ("somewhere", 2, "is not a valid address; run this on a machine"),
        ("ray://127.0.0.1:10001", 2, "is not a valid address; run this on a machine"),
        ("127.0.0.1:CLOSED", 1, "no Ray cluster answers at --ray 127.0.0.1:"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(
    bundle, data, monkeypatch, capsys, address, code, problem
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens on it
        port = str(free.getsockname()[1])
        monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))  # asked only once somebody listens
        assert calib("keep", bundle, "--data", data, "--ray", address.replace("CLOSED", port)) == code
    said = capsys.readouterr().err
    assert problem in said and said.count("\n") == 1


def test_a_worker_says_what_it_does_not_see(bundle) -> None:
    seals = cluster._seals([bundle / "manifest.json", bundle / "decoder.onnx"])
    worker = cluster.Worker()
    assert worker.look(cluster._version(), seals) == ""
    assert "install the same on both" in worker.look("0.0.0", seals)
    (bundle / "decoder.onnx").unlink()
    assert "does not see" in worker.look(cluster._version(), seals)
    (bundle / "manifest.json").write_text("{}")
    assert "has another file at" in worker.look(cluster._version(), seals)


def test_score_refuses_what_it_cannot_compare(exported, data, tmp_path, capsys) -> None:
    bundle, out = exported("vispruner").folder, ["--out", tmp_path / "s"]
    assert calib("score", f"{bundle}:5", "--data", data, *out) == 2
    assert "this bundle holds 3, 6" in capsys.readouterr().err
    bare = data.parent / "bare.jsonl"
    bare.write_text(json.dumps({"image": "0.png", "prompt": "x"}) + "\n")
    assert calib("score", bundle, "--data", bare, *out) == 2
    assert "needs answers" in capsys.readouterr().err
