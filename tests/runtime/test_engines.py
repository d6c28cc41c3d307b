"""Bundles on OpenVINO, whole and by stages: the same tokens as on ONNX Runtime, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import Choice, UsageError, VtpError, choose_engine
from vtp.engines.ort.session import OrtValue
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands import doctor, run
from vtp.runtime.engine_choice import choose_engines
from vtp.runtime.result import Result

OPENVINO = "openvino-cpu"
PROMPTS = ["what shape is the red ?", "where ?", "how many blue circles are left of the star ?"]
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60 + 9 * seed, 90, 3), dtype=np.uint8))
    for seed in range(3)
]
BUNDLES = [
    "none",
    "vispruner",
    "original",
    "adaptprune",
    "fastv",
    "mha",
    "qwen2",
    "mistral",
    "tied",
    "siglip",
]
pytest.importorskip("openvino", reason="openvino is not installed")


def said(result: Result) -> tuple[Any, ...]:
    return result.token_ids, result.kept, result.finish_reason, result.visual_tokens


def answers(folder: Path, engine: str) -> list[tuple[Any, ...]]:
    """Each prompt alone at every keep-count, then all of them as a batch."""
    with Pipeline.load(folder, engine, threads=1) as pipe:
        found = [
            pipe.generate(picture, prompt, keep_tokens=keep, max_new_tokens=24)
            for keep in pipe.manifest.visual.keep
            for picture, prompt in zip(PICTURES, PROMPTS, strict=True)
        ]
        return [said(one) for one in [*found, *pipe.generate_batch(PICTURES, PROMPTS, max_new_tokens=24)]]


# -- the same answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLES)
def test_openvino_answers_token_for_token(exported: Callable[[str], Any], name: str) -> None:
    folder = exported(name).folder
    assert answers(folder, OPENVINO) == answers(folder, "ort-cpu")


@pytest.mark.parametrize(
    "stages",
    [
        "ort-cpu,vision_encoder=openvino-cpu",
        "ort-cpu,decoder=openvino-cpu,splice=openvino-cpu",
        "openvino-cpu,vision_encoder=ort-cpu,decoder=ort-cpu,pruner=ort-cpu",
        "embed_tokens=openvino-cpu,projector=openvino-cpu",
    ],
)
@pytest.mark.parametrize("name", ["vispruner", "adaptprune"])
def test_stages_on_several_engines_answer_as_on_one(
    exported: Callable[[str], Any], name: str, stages: str
) -> None:
    folder = exported(name).folder
    assert answers(folder, stages) == answers(folder, "ort-cpu")
    with Pipeline.load(folder, stages, 1) as pipe:
        named = dict(part.split("=") for part in stages.split(",") if "=" in part)
        assert named.items() <= pipe.engines.items()
        assert set(pipe.engines.values()) == {"ort-cpu", OPENVINO}


def test_a_value_goes_from_engine_to_engine_without_a_copy(
    exported: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`numpy()` is what copies; what is adopted shares memory both ways."""
    stages = "ort-cpu,vision_encoder=openvino-cpu,decoder=openvino-cpu"
    with Pipeline.load(exported("none").folder, stages, 1) as pipe, pipe.claimed() as runner:
        by_file = runner._opened._engines
        ours, theirs = by_file["projector.onnx"], by_file["vision_encoder.onnx"]
        for one, other in ((ours, theirs), (theirs, ours)):
            value = one.put(np.arange(12, dtype=np.float32).reshape(3, 4))
            assert np.shares_memory(other.adopt(value).view(), value.view())
            assert one.adopt(value) is value
        pixels = theirs.put(np.zeros((1, 3, 56, 56), np.float32))
        features = theirs.run({"pixel_values": pixels})["image_features"]
        embeds = ours.run({"image_features": ours.adopt(features)})["image_embeds"]
        monkeypatch.setattr(OrtValue, "numpy", lambda _: pytest.fail("copied"))
        assert np.shares_memory(theirs.adopt(embeds).view(), embeds.view())


def test_float64_goes_to_the_engine_that_has_it(exported: Callable[[str], Any]) -> None:
    """VisPruner's cosines: rounded to float32 they would choose other tokens."""
    bundle = open_bundle(exported("vispruner").folder)
    found = choose_engines(bundle, OPENVINO)
    assert found.elsewhere == {"pruner_3.onnx": "ort-cpu", "pruner_6.onnx": "ort-cpu"}
    assert found.by_stage(bundle.manifest)["pruner"] == "ort-cpu"
    with Pipeline.load(bundle.folder, OPENVINO, 1) as pipe:
        assert pipe.engine == OPENVINO and pipe.engines["decoder"] == OPENVINO
        assert "pruner_3.onnx runs on ort-cpu: it computes in float64, which openvino-cpu" in pipe.notes[0]
    assert not choose_engines(open_bundle(exported("adaptprune").folder), OPENVINO).elsewhere
    with pytest.raises(VtpError, match=r"pruner_.* computes in float64.*; use ort-cpu for it"):
        Pipeline.load(bundle.folder, "ort-cpu,pruner=openvino-cpu", 1)


def test_float64_without_onnxruntime_is_one_line(exported: Callable[[str], Any]) -> None:
    def choose(name: str, *more: Any, **named: Any) -> Choice:
        if name == "ort-cpu":
            raise VtpError("engine 'ort-cpu' cannot run here: onnxruntime is not installed")
        return Choice(name)

    with pytest.raises(
        VtpError, match=r"pruner_3.*float64, which openvino-cpu rounds.*not installed"
    ) as caught:
        choose_engines(open_bundle(exported("vispruner").folder), OPENVINO, choose)
    assert "\n" not in str(caught.value)


# -- refused -------------------------------------------------------------------------------------------------

WRONG = {
    "ort-cpu,decoder": "is not an engine and then one STAGE=ENGINE for each stage.*such as --engine",
    "ort-cpu,": "is not an engine and then",
    "ort-cpu,=openvino-cpu": "is not an engine and then",
    "ort-cpu,decoder=": "is not an engine and then",
    "ort-cpu,decoder=ort-cpu,decoder=openvino-cpu": "is not an engine and then",
    "ort-cpu,decodre=openvino-cpu": "no stage 'decodre' in this bundle, which has .*; did you mean 'decoder'",
    "ort-cpu,decoder=openvino-cp": "unknown engine 'openvino-cp'; did you mean 'openvino-cpu'",
    "ort-cpu,decoder=auto,x": "is not an engine and then",
    "openvino-cup": "unknown engine 'openvino-cup'; did you mean 'openvino-cpu'",
}


@pytest.mark.parametrize("wanted", WRONG)
def test_engines_that_are_not_written_so_are_one_line(exported: Callable[[str], Any], wanted: str) -> None:
    with pytest.raises(UsageError, match=WRONG[wanted]) as caught:
        Pipeline.load(exported("none").folder, wanted, 1)
    assert "\n" not in str(caught.value)


def test_engines_that_keep_values_elsewhere_are_not_mixed(exported: Callable[[str], Any]) -> None:
    bundle = open_bundle(exported("none").folder)
    for wanted in ("ort-cuda,decoder=ort-cpu", "ort-cpu,decoder=ort-cuda"):
        with pytest.raises(UsageError, match="ort-cuda keeps values where no other engine reads them"):
            choose_engines(bundle, wanted, lambda name, *more, **named: Choice(name))


def test_other_targets_name_the_export_line() -> None:
    with pytest.raises(VtpError, match=r"does not run target 'tensorrt'; export .* --target ort"):
        choose_engine(OPENVINO, "float16", target="tensorrt")


# -- commands ------------------------------------------------------------------------------------------------


def test_vtp_run_says_which_engine_ran_what(
    exported: Callable[[str], Any], picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(exported("vispruner").folder), "--image", str(picture_file), "--prompt", "what ?", "--json"]
    wanted = [*asked, "--threads", "1", "--engine", "ort-cpu,vision_encoder=openvino-cpu"]
    assert run.main(wanted) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["engine"], data["engines"]["vision_encoder"]) == ("ort-cpu", OPENVINO)
    assert data["engines"]["decoder"] == "ort-cpu"
    assert run.main([*asked, "--engine", "ort-cpu,encoder=openvino-cpu"]) == 2
    assert "no stage 'encoder' in this bundle" in capsys.readouterr().err


def test_vtp_doctor_opens_a_bundle_with_every_engine(
    exported: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main([str(exported("vispruner").folder), "--json"]) == 0
    rows = {one["engine"]: one for one in json.loads(capsys.readouterr().out)["engines"]}
    assert rows[OPENVINO]["accepted"] and "pruner_3.onnx" in rows[OPENVINO]["reason"]
    assert doctor.main(["--json"]) == 0
    rows = {one["engine"]: one for one in json.loads(capsys.readouterr().out)["engines"]}
    assert rows[OPENVINO]["reason"].startswith("openvino 20")
