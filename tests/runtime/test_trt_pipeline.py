"""A bundle on TensorRT engines, refused, compared, answering; the library and the GPU are stand-ins."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.engines import VtpError
from vtp.engines.cuda.driver import probe_cuda
from vtp.engines.tensorrt.build import find_engine, read_stamp, set_gate
from vtp.engines.tensorrt.library import BuildOptions
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.commands import build
from vtp.runtime.commands import run as cli
from vtp.runtime.machine.facts import Machine, Memory
from vtp.runtime.opening import Opening, engines_folder
from vtp.runtime.parity_gate import Case, Verdict, cases, judge

from ..stand_ins.fake_trt import FakeMemory, install, install_gpu, store

ENGINE = "tensorrt"
PROMPT = "what color is the star ?"


@pytest.fixture(scope="module")
def bundle(exported: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its own copy: engines are built into it."""
    folder = tmp_path_factory.mktemp("trt") / "bundle"
    shutil.copytree(exported("jetpack6").folder, folder)
    return open_bundle(folder)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> FakeMemory:
    """A machine with TensorRT and a GPU."""
    install_gpu(monkeypatch)
    return install(monkeypatch)


def build_all(bundle: Bundle, folder: Path, **said: Any) -> dict[str, Path]:
    """Stand-in engines of every graph, as if vtp-build had built them."""
    return {
        file: store(folder, bundle.path(file), build.profiles_of(graph), **said)
        for file, graph in bundle.manifest.graphs.items()
    }


def run(*argv: object) -> int:
    return build.main([str(one) for one in argv])


def load(bundle: Bundle, folder: Path) -> Pipeline:
    return Pipeline.load(bundle.folder, ENGINE, opening=Opening(engines=folder))


def test_engines_run_after_they_were_compared_and_answer_as_onnx_runtime(
    bundle: Bundle,
    memory: FakeMemory,
    picture_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "engines"
    plans = build_all(bundle, folder)
    with pytest.raises(
        VtpError, match=r"was never compared with ONNX Runtime; compare it with: vtp-build .* -o"
    ):
        load(bundle, folder)
    assert run(bundle.folder, "--engine", ENGINE, "-o", folder, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checked"] and {row["graph"] for row in report["engines"]} == set(plans)
    for row in report["engines"]:
        gate = row["gate"]
        assert not row["built"] and gate["passed"] and gate["device"] == "Orin"
        assert gate["cosine"] > 0.9999 and gate["cases"] >= 1
        assert read_stamp(row["engine"]).gate == gate
    argv = ["--image", str(picture_file), "--prompt", PROMPT, "--max-new-tokens", "6", "--json"]
    answers = []
    for engine in ([ENGINE, "--engines", str(folder)], ["ort-cpu"]):
        assert cli.main([str(bundle.folder), *argv, "--engine", *engine]) == 0
        said = capsys.readouterr()
        answers.append(json.loads(said.out))
        assert ("never run on a GPU" in said.err) == (engine[0] == ENGINE)
    assert answers[0]["engine"] == ENGINE and answers[0]["token_ids"] == answers[1]["token_ids"]
    assert len(answers[0]["token_ids"]) == 6
    assert not memory.blocks  # nothing of the GPU is held by a closed pipeline


def test_engines_lie_in_the_user_s_cache_and_never_in_the_bundle(
    bundle: Bundle, memory: FakeMemory, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = bundle.folder / "engines"
    plans = build_all(bundle, inside)  # as bundles came with them before
    for plan in plans.values():
        set_gate(plan, {"passed": True, "device": "Orin"})
    try:
        with pytest.raises(VtpError, match=r"no tensorrt engine of .* in .*/vtp/engines/.*; build it with"):
            Pipeline.load(bundle.folder, ENGINE)
        with pytest.raises(VtpError, match="lies in the bundle, where no engine is opened"):
            load(bundle, inside)
        assert run(bundle.folder, "--engine", ENGINE, "-o", inside) == 1
        assert "lies in the bundle" in capsys.readouterr().err
    finally:
        shutil.rmtree(inside)
    folder = engines_folder(bundle)
    assert folder.parent == cache / "vtp" / "engines"
    assert engines_folder(open_bundle(bundle.folder)) == folder
    build_all(bundle, folder)
    assert run(bundle.folder, "--engine", ENGINE, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["engines"]
    assert {Path(row["engine"]).parent for row in rows} == {folder}
    with Pipeline.load(bundle.folder, ENGINE, check_hashes=True):
        pass
    shutil.rmtree(folder)


def test_a_second_comparison_is_asked_for(
    bundle: Bundle, memory: FakeMemory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "engines"
    plans = build_all(bundle, folder)
    for plan in plans.values():
        set_gate(plan, {"passed": True, "device": "Orin", "cosine": 0.5, "relative": 0.0, "compared": 1})
    assert run(bundle.folder, "--engine", ENGINE, "-o", folder) == 0
    assert "0.500000" in capsys.readouterr().out
    assert run(bundle.folder, "--engine", ENGINE, "-o", folder, "--again") == 0
    assert "0.500000" not in capsys.readouterr().out


def test_an_engine_that_answers_something_else_is_refused(
    bundle: Bundle, memory: FakeMemory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "engines"
    build_all(bundle, folder)
    store(
        folder,
        bundle.path("projector.onnx"),
        build.profiles_of(bundle.manifest.graphs["projector.onnx"]),
        scale=1.2,
    )
    assert run(bundle.folder, "--engine", ENGINE, "-o", folder) == 1
    said = capsys.readouterr()
    differs = r"projector\.onnx does not answer as ONNX Runtime does: image_embeds: row \d+ differs by 0\.2 "
    assert re.search(differs, said.err)
    assert said.err.splitlines()[-1].startswith("vtp-build: error:")
    with pytest.raises(VtpError, match=r"engine projector-.* does not answer as ONNX Runtime does"):
        load(bundle, folder)


def test_engines_of_another_gpu_version_or_graph_are_refused(
    bundle: Bundle, memory: FakeMemory, tmp_path: Path
) -> None:
    folder = tmp_path / "engines"
    with pytest.raises(VtpError, match=r"no tensorrt engine of .*\.onnx in .*; build it with: vtp-build"):
        load(bundle, folder)
    plans = build_all(bundle, folder)
    for plan in plans.values():
        set_gate(plan, {"passed": True, "device": "another"})
    with pytest.raises(
        VtpError, match="compared with ONNX Runtime on another, this is Orin; compare it here"
    ):
        load(bundle, folder)
    shutil.rmtree(folder)
    build_all(bundle, folder, version="9.9")
    with pytest.raises(
        VtpError, match=r"built for version 9\.9, this is 10\.3\.0; rebuild it with: vtp-build"
    ):
        load(bundle, folder)
    for plan in folder.glob("*.plan"):
        plan.write_bytes(plan.read_bytes()[:20])
    with pytest.raises(VtpError, match=r"has 20 bytes of .*: it was cut off; rebuild it with"):
        load(bundle, folder)


def test_a_comparison_that_does_not_fit_is_refused_and_engines_are_kept(
    bundle: Bundle, memory: FakeMemory, tmp_path: Path
) -> None:
    plans = build_all(bundle, tmp_path)
    made = [
        build.BuiltGraph(file, build.StoredEngine(plan, read_stamp(plan), False), 0.0)
        for file, plan in plans.items()
    ]
    small = Machine(memory=Memory(1 << 20, 1 << 20, swap=1 << 10), cuda=probe_cuda())
    with pytest.raises(
        VtpError, match=r"comparing the engine of \S+ with ONNX Runtime takes about .* add swap"
    ):
        build.compare_bundle(bundle, ENGINE, made, small)
    assert all(plan.is_file() and not read_stamp(plan).gate for plan in plans.values())


def test_without_a_gpu_nothing_is_compared_and_the_report_says_so(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch)
    build_all(bundle, tmp_path)
    for file, graph in bundle.manifest.graphs.items():
        store(tmp_path, bundle.path(file), build.profiles_of(graph), engine="tensorrt-rtx")
    rows = [
        build._row(build.BuiltGraph("a.onnx", build.StoredEngine(plan, read_stamp(plan), False), 0.0))
        for plan in sorted(tmp_path.glob("*.plan"))
    ]
    assert "built, and not compared: no GPU here to run them" in build._report(rows, tmp_path)
    with pytest.raises(VtpError, match="'tensorrt' cannot run here: no NVIDIA driver"):
        load(bundle, tmp_path)


def test_a_bundle_for_onnx_runtime_is_refused_by_name(
    exported: Callable[[str], Any], memory: FakeMemory
) -> None:
    with pytest.raises(
        VtpError, match=r"does not run target 'ort'; export the bundle again with --target tens"
    ):
        Pipeline.load(exported("none").folder, ENGINE)


# -- a plugin ------------------------------------------------------------------------------------------------

NEWER = "10.13.0"
PLUGGED = BuildOptions(plugin="greedy")


@pytest.fixture
def plugged(
    bundle: Bundle, memory: FakeMemory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Path]:
    """Puts "engines" of every graph into a folder, those of pruners with the plugin as well."""
    monkeypatch.setattr("tensorrt.__version__", NEWER)
    monkeypatch.setattr("vtp.engines.plugins.nvcc.find_nvcc", lambda: "nvcc")
    monkeypatch.setattr("vtp.engines.plugins.greedy.find_nvcc", lambda: "nvcc")
    folder = tmp_path / "engines"

    def make(**said: Any) -> Path:
        build_all(bundle, folder, version=NEWER)
        for file, graph in bundle.manifest.graphs.items():
            if file.startswith("pruner"):
                profiles = build.profiles_of(graph)
                store(folder, bundle.path(file), profiles, version=NEWER, options=PLUGGED, **said)
        return folder

    return make


def ask(bundle: Bundle, folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(bundle.folder, "--engine", ENGINE, "-o", folder, "--json", *more) == 0
    return {row["graph"]: row for row in json.loads(capsys.readouterr().out)["engines"]}


def test_a_plugin_that_keeps_the_same_tokens_is_used_and_one_can_go_back(
    bundle: Bundle, plugged: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plugged()
    for more, wanted in ((["--plugin", "greedy"], "greedy"), ([], ""), (["--plugin", "greedy"], "greedy")):
        rows = ask(bundle, folder, capsys, *more)
        with load(bundle, folder):  # every engine may run
            pass
        for file, row in rows.items():
            assert row["plugin"] == (wanted if file.startswith("pruner") else "") and not row["note"]
            assert row["gate"]["passed"] and row["gate"]["kept_in_common"] == 1.0
            found, _ = find_engine(bundle.path(file), ENGINE, folder, "")
            assert str(found) == row["engine"]  # what was asked for last


def test_a_plugin_that_keeps_another_token_is_left_out(
    bundle: Bundle, plugged: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plugged(other_token=True)
    for _ in range(2):  # the second time from what was compared before
        rows = ask(bundle, folder, capsys, "--plugin", "greedy")
        for file, row in rows.items():
            assert row["gate"]["passed"] and not row["plugin"]
            assert row["note"].startswith("keeps other tokens: ") == file.startswith("pruner")
            assert str(find_engine(bundle.path(file), ENGINE, folder, "")[0]) == row["engine"]
    assert run(bundle.folder, "--engine", ENGINE, "-o", folder, "--plugin", "greedy") == 0
    assert "was built without the plugin: keeps other tokens: " in capsys.readouterr().out


def test_a_plugin_that_cannot_be_built_is_left_out(
    bundle: Bundle, plugged: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plugged()
    plain = set(build_all(bundle, folder, version=NEWER).values())
    for plan in set(folder.glob("*.plan")) - plain:
        plan.unlink()  # so it would have to be built, by a child process that finds no library
    rows = ask(bundle, folder, capsys, "--plugin", "greedy")
    assert {row["note"] for file, row in rows.items() if file.startswith("pruner")} == {
        "tensorrt is not installed: install TensorRT 10.3 or newer (JetPack brings it; elsewhere: "
        "pip install tensorrt)"
    }
    assert all(row["gate"]["passed"] and not row["plugin"] for row in rows.values())


@pytest.mark.parametrize(
    ("engine", "plugin", "message"),
    [
        (ENGINE, "greed", "unknown plugin 'greed'; choose greedy"),
        ("tensorrt-rtx", "greedy", "--plugin is for --engine tensorrt: tensorrt-rtx "),
    ],
)
def test_plugins_that_cannot_be_used_are_refused(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
    plugin: str,
    message: str,
) -> None:
    install(monkeypatch, engine.replace("-", "_"))
    assert run(bundle.folder, "--engine", engine, "--plugin", plugin) == 2
    assert message in capsys.readouterr().err


def test_a_bundle_without_greedy_selection_takes_no_plugin(
    exported: Callable[[str], Any], memory: FakeMemory
) -> None:
    other = open_bundle(exported("none").folder)
    other = replace(other, manifest=replace(other.manifest, target="tensorrt"))
    with pytest.raises(VtpError, match=r"\(method none\) has the greedy selection .* leave out --plugin"):
        build.build_bundle(other, ENGINE, Path("unused"), PLUGGED)


# -- the comparison ------------------------------------------------------------------------------------------


def test_cases_are_what_the_pipeline_runs(bundle: Bundle) -> None:
    made = list(cases(bundle))
    files = [case.file for case in made]
    assert set(files) == set(bundle.manifest.graphs)
    assert files.count("decoder.onnx") == files.count("decoder_head.onnx") == 2  # the prompt, and a step
    prompt, step = (case for case in made if case.file == "decoder.onnx")
    assert step.length == prompt.length + 1 and step.feeds["hidden_states"].shape[1] == 1
    assert step.feeds["seqlens_k"].tolist() == [step.length - 1]
    past = "past_key_values.2.key"
    np.testing.assert_array_equal(step.feeds[past], prompt.outputs["present.2.key"])
    assert not prompt.feeds[past].any() and step.feeds[past].any()


def case_of(**outputs: Any) -> Case:
    found = {name: np.asarray(value) for name, value in outputs.items()}
    return Case("g.onnx", "prefill", {}, found, length=1)


@pytest.mark.parametrize(
    ("wanted", "found", "problem"),
    [
        ({"a": [1.0, 2.0]}, {"a": [1.0, 2.001]}, ""),
        ({"a": [1.0, 2.0]}, {"a": [2.0, 4.0]}, r"a: row 0 differs by 1 of its length \(allowed 0.04\)"),
        ({"a": [1.0, 2.0]}, {"a": [2.0, 1.0]}, "a: row 0 differs"),
        ({"a": [1.0, 2.0]}, {"a": [np.nan, 2.0]}, "a: row 0 has values that are not finite"),
        ({"a": [0.0]}, {"a": [0.0]}, ""),
        ({"a": [[1.0]]}, {"a": [1.0]}, r"a: shape \[1\] instead of \[1, 1\]"),
        ({"a": np.zeros((0, 2))}, {"a": np.zeros((0, 2))}, "a: nothing to compare"),
        ({"a": [[1000.0] + [1.0] * 63]}, {"a": [[1000.0] + [0.0] * 63]}, "a: row 0 differs"),
        ({"position_ids": [1, 2]}, {"position_ids": [1, 3]}, "position_ids: row 0 has other numbers"),
        (
            {"keep_indices": [[0, 1]], "b": [1.0]},
            {"keep_indices": [[0, 2]], "b": [9.0]},
            "keeps 50% of the same",
        ),
        ({"present.0.key": [[[[1.0], [5.0]]]]}, {"present.0.key": [[[[1.0], [7.0]]]]}, ""),
        (
            {"present.0.key": [[[[1.0], [5.0]]]]},
            {"present.0.key": [[[[3.0], [5.0]]]]},
            "present.0.key: row 0 differs",
        ),
    ],
)
def test_answers_are_compared(wanted: dict, found: dict, problem: str) -> None:
    verdict = Verdict()
    judge(case_of(**wanted), {name: np.asarray(value) for name, value in found.items()}, verdict)
    gate = verdict.to_gate("Orin")
    assert gate["passed"] == (not problem)
    assert re.search(problem or "^$", gate["note"])


def test_with_a_plugin_every_kept_token_counts() -> None:
    wanted, found = np.arange(100).reshape(1, -1), np.arange(1, 101).reshape(1, -1)
    for exact, passes in ((False, True), (True, False)):
        verdict = Verdict(exact=exact)
        judge(case_of(keep_indices=wanted), {"keep_indices": found}, verdict)
        gate = verdict.to_gate("Orin")
        assert gate["passed"] == passes
        assert ("keeps other tokens: 99.0% are ONNX Runtime's" in gate["note"]) == exact


def test_an_engine_that_was_never_tried_has_not_passed() -> None:
    assert not Verdict().to_gate("Orin")["passed"]
