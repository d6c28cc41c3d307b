"""Every site and every cue: what a bundle's pruner is given equals what the plain reference computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.checkpoint.weights import fill
from vtp.export.exporter import Request, export
from vtp.export.plan.schedule import make_schedules, site_of
from vtp.export.pruners.base import Pruner
from vtp.export.pruners.registry import find_method
from vtp.export.pruners.site import Site
from vtp.export.tower_cues import SCORES
from vtp.export.verify import parity
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner

from ...models.tiny import save_tiny
from ...once import Once
from ...stand_ins import curious

FILE = Path(curious.__file__)
KEEP = (3, 7)
# Layers where a method reads: cues of several blocks of the tower, or three sites in the decoder.
LAYERS = {
    "CuriousVision": {"layers": 2, "vision_layers": 7},
    "CuriousProjector": {"layers": 2, "vision_layers": 7},
    "CuriousDecoder": {"layers": 5, "vision_layers": 2},
    "Blurring": {"layers": 2, "vision_layers": 2},
    "BlurringLate": {"layers": 2, "vision_layers": 2},
}


class Recording(parity.Chosen):
    """Chooses what a bundle chose and notes the cues it was given."""

    def forward(self, **cues: Tensor) -> Any:
        self.seen = {name: cue.numpy() for name, cue in cues.items()}
        return super().forward(**cues)


@pytest.fixture(scope="module")
def model_of(saved: Callable[..., Any]) -> Callable[[str], Path]:
    """The model of a class above, not deeper than it needs."""
    return lambda name: saved(save_tiny, **LAYERS[name], seed=11)[0]


@pytest.fixture(scope="module")
def bundles(once: Once, model_of: Callable[[str], Path]) -> Callable[[str], Path]:
    """Bundles of the classes above, each exported and verified once."""

    def get(name: str) -> Path:
        wishes = {"keep_tokens": ",".join(map(str, KEEP)), "max_length": 128, "verify": "full"}
        return once.bundle(model_of(name), method=f"{FILE}:{name}", **wishes)

    return get


@pytest.mark.parametrize("name", LAYERS)
def test_generation_is_verified_at_every_keep_count(bundles, name):
    manifest = json.loads((bundles(name) / "manifest.json").read_text())
    assert manifest["parity"]["mode"] == "full"
    assert {keep: answer["equal"] for keep, answer in manifest["parity"]["generation"].items()} == {
        "3": 16,
        "7": 16,
    }


@pytest.mark.parametrize("name", [pytest.param("Blurring", marks=pytest.mark.slow), "BlurringLate"])
def test_merged_rows_of_float16_bundles_are_verified(tmp_path, model_of, name):
    """The reference computes in float32 with rows that the bundle gives in float16."""
    request = Request(
        tmp_path / name, str(model_of(name)), f"{FILE}:{name}", "5", dtype="float16", max_length=128
    )
    manifest = export(request).manifest
    assert manifest.parity["generation"]["5"]["tokens"] == 16


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("name", LAYERS)
def test_cues_equal_the_reference(bundles, model_of, name, keep):
    """The reference computes each cue its own way (eager attention, hooks); the module then chooses alike."""
    bundle, model = open_bundle(bundles(name)), checkpoint.load(model_of(name), "float32")
    fill(model.family.model)
    method = getattr(curious, name)
    (schedule,) = make_schedules(method, model.family, [keep], {})
    case = parity._case(bundle, model)
    runner = StageRunner(bundle, "ort-cpu", 1)
    values = runner.prefill(keep, case.pixels, case.ids, case.image_start, Timings())
    stages = [
        stage
        for when in ("image", "prefill")
        for stage in bundle.manifest.stages_for(when, keep)
        if stage.name.startswith("pruner")
    ]
    assert len(stages) == len(schedule)
    replay = parity.chosen(bundle, schedule, values)
    recorders = [
        Recording(pruner, *(stand_in.answer if pruner.merges else (stand_in.answer,)))
        for pruner, stand_in in zip(schedule, replay, strict=True)
    ]
    with torch.no_grad():
        answer = reference_generate(
            model.family.model,
            recorders,
            case.expanded,
            torch.from_numpy(case.pixels),
            1,
            positions=bundle.manifest.method.positions,
        )
    final = values["keep_indices"].numpy()[0].tolist()
    assert answer.keep_indices.tolist() == final and len(final) == keep
    for pruner, recorder, stand_in in zip(schedule, recorders, replay, strict=True):
        given = {name: torch.from_numpy(cue) for name, cue in recorder.seen.items()}
        assert set(given) == set(method.needs)
        with torch.no_grad():
            wanted = pruner(**given)
        if pruner.merges:
            np.testing.assert_allclose(stand_in.answer[1], wanted[1], atol=1e-4)
            wanted, stand_in.answer = wanted[0], stand_in.answer[0]
        assert stand_in.answer.tolist() == wanted.tolist()
    compared = compare_cues(stages, recorders, values, case.image_start)
    assert compared >= len(stages)
    runner.close()


def compare_cues(stages: Any, recorders: Any, values: Any, start: int) -> int:
    """Hold the tensors that flowed against the recorded cues; returns how many were compared."""
    compared = 0
    for stage, recorder in zip(stages, recorders, strict=True):
        count = recorder.count
        for name, wanted in recorder.seen.items():
            flowed = values[stage.inputs[name]].numpy()
            if flowed.shape != wanted.shape:
                axis = flowed.ndim - 1 if name in ("text_attention", "text_gravity") else 1
                flowed = np.take(flowed, range(start, start + count), axis)
            slack = 2e-5 * max(1.0, float(np.abs(wanted).max()))
            np.testing.assert_allclose(flowed, wanted, atol=slack, rtol=1e-4, err_msg=f"{stage.name} {name}")
            compared += 1
    return compared


def test_several_sites_shorten_the_caches_in_turn(bundles):
    manifest = open_bundle(bundles("CuriousDecoder")).manifest
    assert manifest.method.site == "decoder:1,2,4"
    caches = {file: graph.kv for file, graph in manifest.graphs.items() if graph.kv}
    held = {file: (kv.layers, kv.capacity) for file, kv in caches.items()}
    assert held == {
        "decoder_head.onnx": ([0], 128),
        "decoder_1.onnx": ([1], 128 - 16 + 12),
        "decoder_2.onnx": ([2, 3], 128 - 16 + 8),
        "decoder.onnx": ([4], 128 - 16 + 7),
    }


def test_several_sites_answer_in_the_pipeline(bundles, picture):
    with Pipeline.load(bundles("CuriousDecoder"), threads=1) as pipe:
        results = [pipe.generate(picture, "what is it ?", keep_tokens=keep) for keep in (3, 7, 3)]
    assert results[0].token_ids == results[2].token_ids
    assert [len(result.kept) for result in results] == [3, 7, 3]
    assert {"pruner_1", "pruner_2", "pruner_3", "decoder_1"} <= set(results[0].timings.stages)
    assert all(index in range(16) for result in results for index in result.kept)


def test_a_method_that_reads_the_prompt_keeps_other_tokens_for_other_prompts(bundles, picture):
    prompts = ["what is it ?", "the red star on the left of two blue circles", "0123456789"]
    with Pipeline.load(bundles("CuriousProjector"), threads=1, image_cache=1) as pipe:
        kept = [tuple(pipe.generate(picture, prompt, max_new_tokens=1).kept) for prompt in prompts]
        again = tuple(pipe.generate(picture, prompts[0], max_new_tokens=1).kept)
    assert len(set(kept)) > 1
    assert again == kept[0]


@pytest.fixture(scope="module")
def family(model_of):
    family = checkpoint.load(model_of("CuriousDecoder"), "float32").family
    fill(family.model)
    return family


def lay_out(sites: tuple[tuple[int, int], ...]) -> type[Pruner]:
    """A method of the given sites."""

    class Somewhere(curious.CuriousDecoder):
        name = "somewhere"

        @classmethod
        def sites(cls, layers, count, keep, settings):
            return sites

    return Somewhere


@pytest.mark.parametrize(
    "sites",
    [(), ((0, 4),), ((5, 4),), ((2, 4), (2, 4)), ((3, 8), (1, 4)), ((1, 4), (2, 8)), ((1, 8), (2, 5))],
)
def test_sites_that_cannot_be_are_refused(family, sites):
    with pytest.raises(VtpError, match="layers must ascend") as caught:
        make_schedules(lay_out(sites), family, [4], {})
    assert "\n" not in str(caught.value)


def test_sites_that_move_with_the_keep_count_are_refused(family):
    class Moving(curious.CuriousDecoder):
        name = "moving"

        @classmethod
        def sites(cls, layers, count, keep, settings):
            return ((1 if keep > 4 else 2, keep),)

    with pytest.raises(UsageError, match="one by one"):
        make_schedules(Moving, family, [3, 6], {})
    assert str(site_of(make_schedules(Moving, family, [6], {})[0])) == "decoder:1"


def test_a_cue_that_a_family_lacks_is_refused_with_what_can_be_had_instead(family, monkeypatch):
    monkeypatch.setattr(
        type(family), "lacks", dict.fromkeys(SCORES, "its tower merges patches"), raising=False
    )
    with pytest.raises(
        UsageError, match="its tower merges patches; nearest methods that it serves: "
    ) as caught:
        make_schedules(curious.CuriousVision, family, [3], {})
    nearest = str(caught.value).partition("serves: ")[2].split(", ")
    assert nearest and not any(set(find_method(name).needs) & set(SCORES) for name in nearest)
    assert Site.parse(find_method(nearest[0]).site).kind == "vision"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda keep, rows: keep, "must return"),
        (lambda keep, rows: (keep, rows[:, :1]), "shape"),
        (lambda keep, rows: (keep, keep), "dtype"),
        (lambda keep, rows: (keep.flip(1), rows), "ascending"),
        (lambda keep, rows: (keep.int(), rows), "int64"),
    ],
)
def test_a_merging_method_must_give_indices_and_rows(family, answer, problem):
    class Wrong(curious.Blurring):
        name = "wrong"

        def forward(self, image_features: Tensor, attention_scores: Tensor) -> Any:  # type: ignore[override]
            return answer(*super().forward(image_features, attention_scores))

    with pytest.raises(VtpError, match=problem):
        make_schedules(Wrong, family, [3], {})
